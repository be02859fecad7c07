"""Splits keep chats together and packing loses nothing."""

import resource
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from common.errors import EyasError, MachineError
from common.manifest import COLUMNS
from dump import rows
from dump.encode import Encodings
from dump.pack import advise_length, best_fit, draw, fill, pack, split
from dump.spill import Spill

T, V = 64, 50


def sides(bases, holdout, seed):
    draws = np.array([draw(base, seed) for base in bases], np.uint64)
    return split(draws, bases.__getitem__, holdout, seed)


def test_chunks_of_one_chat_are_on_one_side():
    bases = [f"chat{i // 5}" for i in range(4000)]
    held_out = sides(bases, 0.1, seed=0).reshape(-1, 5)
    assert (held_out.all(1) == held_out.any(1)).all()
    assert 0.07 < held_out.mean() < 0.13


def test_a_conversation_keeps_its_side_whatever_else_is_there():
    bases = [f"chat{i}" for i in range(1000)]
    some = sides(bases[::-2], 0.1, seed=3)
    np.testing.assert_array_equal(sides(bases, 0.1, seed=3)[::-2], some)
    assert (sides(bases, 0.1, seed=4)[::-2] != some).any()


@pytest.mark.parametrize("count", [2, 3, 10])
@pytest.mark.parametrize("holdout", [0.001, 0.999])
def test_neither_side_is_empty(count, holdout):
    for seed in range(20):
        held_out = sides([f"chat{i}" for i in range(count)], holdout, seed)
        assert held_out.any()
        assert not held_out.all()


def test_a_base_of_more_conversations_than_a_chat_has_chunks_is_no_chat():
    bases = [f"corpora{i % 3}" for i in range(600)] + [f"chat{i // 5}" for i in range(600)]
    held_out = sides(bases, 0.1, seed=0)
    assert 0.07 < held_out[:600].mean() < 0.13
    chats = held_out[600:].reshape(-1, 5)
    assert (chats.all(1) == chats.any(1)).all()


def test_ids_that_only_count_do_not_make_one_chat():
    held_out = sides(["conversation"] * 1000, 0.1, seed=0)
    assert 0.05 < held_out.mean() < 0.15


def test_nothing_is_held_out_without_holdout_and_one_conversation_cannot_be_split():
    assert not sides(["a"], 0.0, 0).any()
    with pytest.raises(EyasError, match="set holdout to 0"):
        sides(["a"], 0.1, 0)


def test_best_fit_is_the_textbook_algorithm():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, T + 1, 500)
    wanted, room = [], []
    for item in sorted(range(500), key=lambda i: -lengths[i]):  # said plainly, without buckets
        fits = [r for r in range(len(wanted)) if room[r] >= lengths[item]]
        if fits:
            tightest = min(room[r] for r in fits)
        else:
            tightest = T
            wanted.append([])
            room.append(T)
        row = [r for r in range(len(wanted)) if room[r] == tightest][-1]
        wanted[row].append(item)
        room[row] -= lengths[item]
    items, first = best_fit(lengths, T)
    found = [items[start:stop].tolist() for start, stop in pairwise(first)]
    assert len(found) == len(wanted)
    assert sorted(sum(lengths[i] for i in row) for row in found) == sorted(T - r for r in room)
    assert sorted(i for row in found for i in row) == list(range(500))


def test_no_conversations_fill_no_rows():
    items, first = best_fit(np.zeros(0, np.int32), T)
    assert (items.tolist(), first.tolist()) == ([], [0])


def conversations(count, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, T + 1, count)
    masks = [(rng.random(n) < 0.5).astype(np.uint8) for n in lengths]
    return [(rng.integers(0, V, n).astype(np.int32), mask) for n, mask in zip(lengths, masks, strict=True)]


@pytest.fixture
def spilled(tmp_path):
    """Puts conversations into a spill, some at a time."""
    made = []

    def put(found, piece=7):
        spill = Spill(str(tmp_path / "store"))
        made.append(spill)
        for start in range(0, len(found), piece):
            part = found[start : start + piece]
            lengths = np.array([len(tokens) for tokens, _ in part], np.int32)
            counted = np.array([mask.sum() for _, mask in part], np.int32)
            tokens, mask = (np.concatenate(arrays) for arrays in zip(*part, strict=True))
            ids = [f"c{i} «é»" for i in range(start, start + len(part))]
            spill.add(
                Encodings([], tokens, mask, lengths, counted, lengths),
                ids,
                [0] * len(part),
                [i // piece for i in range(start, start + len(part))],
            )
        spill.finish()
        return spill

    yield put
    for spill in made:
        with spill:
            pass


def packed_rows(spill, held_out, seed):
    packed = pack(spill.lengths, held_out, T, seed)
    columns = rows.columns(spill, packed, T)
    return packed, {name: column[0 : packed.rows] for name, column in columns.items()}


@pytest.mark.parametrize(("piece", "lines"), [(1 << 20, 1 << 18), (2 * T, 10)])
def test_rows_hold_every_conversation_once_and_whole(spilled, monkeypatch, piece, lines):
    monkeypatch.setattr(rows, "_PIECE", piece)
    monkeypatch.setattr(rows, "_LINES", lines)
    made = conversations(300)
    held_out = np.arange(300) % 7 == 0
    spill = spilled(made)
    packed, arrays = packed_rows(spill, held_out, seed=1)
    batches = list(rows.index(spill, packed))
    found = pa.Table.from_batches(batches).to_pylist()
    assert len(batches) == 1 or piece < 1 << 20
    assert sorted(line["id"] for line in found) == sorted(f"c{i} «é»" for i in range(300))
    covered = np.zeros_like(arrays["segment_ids"])
    for line in found:
        place = (line["row"], slice(line["start"], line["start"] + line["length"]))
        number = int(line["id"].split()[0][1:])
        tokens, mask = made[number]
        np.testing.assert_array_equal(arrays["tokens"][place], tokens)
        np.testing.assert_array_equal(arrays["loss_mask"][place], mask)
        np.testing.assert_array_equal(arrays["positions"][place], np.arange(line["length"]))
        assert len(set(arrays["segment_ids"][place].tolist())) == 1
        assert (line["counted"], line["source"]) == (mask.sum(), number // 7)
        assert line["split"] == ("test" if held_out[number] else "train")
        assert (line["row"] >= packed.train_rows) == held_out[number]
        covered[place] += 1
    np.testing.assert_array_equal(arrays["segment_ids"] > 0, covered == 1)
    for name in ("tokens", "positions", "loss_mask"):
        assert not arrays[name][covered == 0].any()
    for row in arrays["segment_ids"]:
        segments = row[row > 0]
        assert sorted(set(segments.tolist())) == list(range(1, segments.max() + 1))
        assert (np.diff(segments) >= 0).all()


def test_some_rows_are_those_of_all(spilled):
    spill = spilled(conversations(100))
    packed, arrays = packed_rows(spill, np.arange(100) % 4 == 0, seed=0)
    for name, column in rows.columns(spill, packed, T).items():
        assert arrays[name].dtype == COLUMNS[name]
        for start in range(0, packed.rows, 5):
            stop = min(start + 5, packed.rows)
            np.testing.assert_array_equal(column[start:stop], arrays[name][start:stop])


@pytest.mark.parametrize("piece", [1 << 20, 100])
def test_token_counts_are_those_of_the_train_side(spilled, monkeypatch, piece):
    monkeypatch.setattr(rows, "_PIECE", piece)
    made = conversations(100)
    held_out = np.arange(100) % 3 == 0
    expected = np.zeros(V, np.int64)
    for (tokens, mask), out in zip(made, held_out, strict=True):
        if not out:
            np.add.at(expected, tokens[mask == 1], 1)
    np.testing.assert_array_equal(rows.token_counts(spilled(made), ~held_out, V), expected)


def test_the_seed_orders_the_train_rows_only(spilled):
    spill, held_out = spilled(conversations(200)), np.arange(200) % 5 == 0
    (packed, one), (_, two) = (packed_rows(spill, held_out, seed) for seed in (1, 2))
    train = packed.train_rows
    assert (one["tokens"][:train] != two["tokens"][:train]).any()
    np.testing.assert_array_equal(one["tokens"][train:], two["tokens"][train:])
    assert sorted(map(bytes, one["tokens"])) == sorted(map(bytes, two["tokens"]))


def test_a_spill_leaves_no_file_and_goes_where_there_is_a_folder(tmp_path):
    with Spill(str(tmp_path / "not" / "yet" / "there")) as spill:
        assert spill.folder == str(tmp_path)
        spill.add(Encodings([0], *(np.ones(3, kind) for kind in (np.int32, np.uint8))), ["a"], [1], [0])
        assert not list(tmp_path.iterdir())


def test_a_spill_that_finds_the_disk_full_is_one_line(tmp_path):
    found = Encodings([0], *(np.ones(1 << 20, kind) for kind in (np.int32, np.uint8)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with (
            pytest.raises(MachineError, match=f"^{tmp_path}: the disk is full; make room"),
            Spill(str(tmp_path / "store")) as spill,
        ):
            spill.add(found, ["a"], [1], [0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lengths_like_those_of_chats_fill_the_rows():
    lengths = np.minimum(np.random.default_rng(0).lognormal(6.6, 1.0, 20_000).astype(int) + 1, 2048)
    assert fill(lengths, 2048) > 0.97


def test_a_length_is_advised_that_fills_and_cuts_nothing_more():
    lengths = np.random.default_rng(0).normal(270, 20, 3000).astype(int)
    assert fill(lengths, 512) < 0.8
    length, share = advise_length(lengths, 512)
    assert length >= 512
    assert abs(fill(lengths, length) - share) < 0.02
    assert share > 0.93
    assert advise_length(np.array([50, 60, 70]), 2048) == (192, 180 / 192)
