"""Splits keep chats together and packing loses nothing."""

import numpy as np
import pytest

from common.errors import EyasError
from dump.chat import Encoded
from dump.pack import advise_length, best_fit, fill, pack, split

T, V = 64, 50


def test_chunks_of_one_chat_are_on_one_side():
    bases = [f"chat{i // 5}" for i in range(4000)]
    held_out = split(bases, 0.1, seed=0).reshape(-1, 5)
    assert (held_out.all(1) == held_out.any(1)).all()
    assert 0.07 < held_out.mean() < 0.13


def test_a_conversation_keeps_its_side_whatever_else_is_there():
    bases = [f"chat{i}" for i in range(1000)]
    some = split(bases[::-2], 0.1, seed=3)
    np.testing.assert_array_equal(split(bases, 0.1, seed=3)[::-2], some)
    assert (split(bases, 0.1, seed=4)[::-2] != some).any()


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("holdout", [0.001, 0.999])
def test_neither_side_is_empty(count, holdout):
    for seed in range(20):
        held_out = split([f"chat{i}" for i in range(count)], holdout, seed)
        assert held_out.any()
        assert not held_out.all()


def test_a_base_of_more_conversations_than_a_chat_has_chunks_is_no_chat():
    bases = [f"corpora{i % 3}" for i in range(600)] + [f"chat{i // 5}" for i in range(600)]
    held_out = split(bases, 0.1, seed=0)
    assert 0.07 < held_out[:600].mean() < 0.13
    chats = held_out[600:].reshape(-1, 5)
    assert (chats.all(1) == chats.any(1)).all()


def test_ids_that_only_count_do_not_make_one_chat():
    held_out = split(["conversation"] * 1000, 0.1, seed=0)
    assert 0.05 < held_out.mean() < 0.15


def test_nothing_is_held_out_without_holdout_and_one_conversation_cannot_be_split():
    assert not split(["a"], 0.0, 0).any()
    with pytest.raises(EyasError, match="set holdout to 0"):
        split(["a"], 0.1, 0)


def test_best_fit_is_the_textbook_algorithm():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, T + 1, 500)
    rows, room = [], []
    for item in sorted(range(500), key=lambda i: -lengths[i]):  # said plainly, without buckets
        fits = [r for r in range(len(rows)) if room[r] >= lengths[item]]
        if fits:
            tightest = min(room[r] for r in fits)
        else:
            tightest = T
            rows.append([])
            room.append(T)
        row = [r for r in range(len(rows)) if room[r] == tightest][-1]
        rows[row].append(item)
        room[row] -= lengths[item]
    found = best_fit(lengths, T)
    assert len(found) == len(rows)
    assert sorted(map(sum, ([lengths[i] for i in r] for r in found))) == sorted(T - r for r in room)
    assert sorted(i for row in found for i in row) == list(range(500))


def conversations(count, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        n = int(rng.integers(2, T + 1))
        mask = (rng.random(n) < 0.5).astype(np.uint8)
        made.append(Encoded(rng.integers(0, V, n).astype(np.int32), mask))
    return made


def test_rows_hold_every_conversation_once_and_whole():
    made = conversations(300)
    ids = [f"c{i}" for i in range(300)]
    held_out = np.arange(300) % 7 == 0
    packed = pack(ids, made, held_out, T, V, seed=1)
    found = packed.index.to_pylist()
    assert sorted(line["id"] for line in found) == sorted(ids)
    covered = np.zeros_like(packed.arrays["segment_ids"])
    for line in found:
        place = (line["row"], slice(line["start"], line["start"] + line["length"]))
        number = int(line["id"][1:])
        np.testing.assert_array_equal(packed.arrays["tokens"][place], made[number].tokens)
        np.testing.assert_array_equal(packed.arrays["loss_mask"][place], made[number].mask)
        np.testing.assert_array_equal(packed.arrays["positions"][place], np.arange(line["length"]))
        assert len(set(packed.arrays["segment_ids"][place].tolist())) == 1
        assert line["counted"] == made[number].mask.sum()
        assert line["split"] == ("test" if held_out[number] else "train")
        assert (line["row"] >= packed.train_rows) == held_out[number]
        covered[place] = 1
    np.testing.assert_array_equal(packed.arrays["segment_ids"] > 0, covered == 1)
    for name in ("tokens", "positions", "loss_mask"):
        assert not packed.arrays[name][covered == 0].any()
    for row in packed.arrays["segment_ids"]:
        segments = row[row > 0]
        assert sorted(set(segments.tolist())) == list(range(1, segments.max() + 1))
        assert (np.diff(segments) >= 0).all()


def test_token_counts_are_those_of_the_train_side():
    made = conversations(100)
    held_out = np.arange(100) % 3 == 0
    packed = pack([str(i) for i in range(100)], made, held_out, T, V, seed=1)
    expected = np.zeros(V, np.int64)
    for here, out in zip(made, held_out, strict=True):
        if not out:
            np.add.at(expected, here.tokens[here.mask == 1], 1)
    np.testing.assert_array_equal(packed.token_counts, expected)


def test_the_seed_orders_the_train_rows_only():
    made, held_out = conversations(200), np.arange(200) % 5 == 0
    one, two = (pack([str(i) for i in range(200)], made, held_out, T, V, seed) for seed in (1, 2))
    train = one.train_rows
    assert (one.arrays["tokens"][:train] != two.arrays["tokens"][:train]).any()
    np.testing.assert_array_equal(one.arrays["tokens"][train:], two.arrays["tokens"][train:])
    rows = [sorted(map(bytes, packed.arrays["tokens"])) for packed in (one, two)]
    assert rows[0] == rows[1]


def test_lengths_like_those_of_chats_fill_the_rows():
    lengths = np.minimum(np.random.default_rng(0).lognormal(6.6, 1.0, 20_000).astype(int) + 1, 2048)
    rows = best_fit(lengths, 2048)
    assert lengths.sum() / (len(rows) * 2048) > 0.97


def test_a_length_is_advised_that_fills_and_cuts_nothing_more():
    lengths = np.random.default_rng(0).normal(270, 20, 3000).astype(int)
    assert fill(lengths, 512) < 0.8
    length, share = advise_length(lengths, 512)
    assert length >= 512
    assert abs(fill(lengths, length) - share) < 0.02
    assert share > 0.93
    assert advise_length(np.array([50, 60, 70]), 2048) == (192, 180 / 192)
