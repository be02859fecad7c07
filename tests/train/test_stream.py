"""A batch is a function of (store, seed, step); what it says to compute is what the masks say."""

import dataclasses
import threading
import time

import numpy as np
import pytest

from common.errors import EyasError
from common.mesh import make_mesh
from common.store import Store
from tests.train import small_store
from train import targets
from train.batch import Inputs
from train.order import level, listed, order, share_of
from train.stored import teaching_arrays
from train.stream import Stream, View
from train.targets import CHUNK, MOST, live_capacity, live_places, round_up
from train.workload import Workload

STEPS = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store.open(small_store.write_store(str(tmp_path_factory.mktemp("stream") / "store")))


def test_every_epoch_visits_every_row_once_in_an_order_of_its_own():
    rows = np.array([3, 5, 8, 9, 20])
    wanted = order(rows, seed=1, steps=5, batch_rows=3).rows.reshape(3, 5)
    assert (np.sort(wanted, axis=1) == rows).all()
    assert len({tuple(epoch) for epoch in wanted}) == 3
    assert (order(rows, 2, 5, 3).rows != wanted.reshape(5, 3)).any()


def test_a_shorter_run_reads_the_same_batches():
    rows = np.arange(7)
    np.testing.assert_array_equal(order(rows, 0, 3, 2).rows, order(rows, 0, 30, 2).rows[:3])


def uneven(count):
    """Work of rows that differ as chats do: few prompts without an answer, many long answers."""
    return np.random.default_rng(0).beta(2, 0.6, count) * 2048 // 1


def fullest(rows, work, shards):
    return work[rows.reshape(len(rows) * shards, -1)].sum(1).max() / rows.shape[1] * shards


@pytest.mark.parametrize(("shards", "batch_rows"), [(1, 6), (4, 12), (4, 8), (2, 10)])
def test_every_shard_of_every_batch_gets_about_as_much_work(shards, batch_rows):
    """Also where batches run over the end of an epoch: 331 rows are no whole number of them."""
    rows, work = np.arange(331) * 2, np.zeros(662, np.int64)
    work[rows] = uneven(331)
    mean, steps = work[rows].mean(), 900 // batch_rows
    by_chance = order(rows, 3, steps, batch_rows)
    dealt = order(rows, 3, steps, batch_rows, work=work[rows])
    leveled = level(dealt, work, shards)
    assert fullest(by_chance.rows, work, shards) > 1.2 * mean
    assert fullest(leveled.rows, work, shards) < 1.16 * mean
    epochs = dealt.rows.ravel()[: 331 * 2].reshape(2, -1)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(rows, (2, 1)))
    assert (epochs[0] != epochs[1]).any()


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_a_step_has_the_same_rows_whatever_the_number_of_shards(share):
    rows, work = np.arange(50), uneven(50).astype(np.int64)
    wanted = order(rows, 5, 30, 12, share, work)
    assert (order(rows, 6, 30, 12, share, work).rows != wanted.rows).any()
    for shards in (1, 2, 3, 4, 12):
        leveled = level(wanted, work, shards)
        for found, expected in zip(leveled, wanted, strict=True):
            np.testing.assert_array_equal(np.sort(found, axis=1), np.sort(expected, axis=1))
        pairs = np.stack(leveled).reshape(2, -1).T.tolist(), np.stack(wanted).reshape(2, -1).T.tolist()
        assert sorted(pairs[0]) == sorted(pairs[1]), "a row keeps its place in the epoch"


def stream_of(store, rows, chips=1, aux_layers=None):
    mesh = make_mesh(chips)
    workload = Workload(store, store.split_rows("train"), STEPS)
    wanted = np.atleast_2d(rows)
    capacity = workload.capacity(wanted, mesh.size)
    inputs = Inputs(aux_layers) if aux_layers else None
    view = View(listed(wanted), workload, capacity, "recompute", np.arange(4), inputs)
    return Stream(store, mesh, [view])


def batches(stream):
    return [batch for dealt in stream.batches() for _, batch in dealt]


def test_what_heads_have_in_common_is_on_the_devices_once(store):
    """Of heads that differ in draft vocabulary and TTT length only what differs lies there for each."""
    wanted, views = listed(store.split_rows("train")[None, :2]), []
    for steps in (2, 2, 3):
        workload = Workload(store, store.split_rows("train"), steps)
        room = dataclasses.replace(workload.capacity(wanted.rows, 1), targets=256)
        layers = Inputs(tuple(store.features["aux_layers"][1:]))
        views.append(View(wanted, workload, room, "recompute", np.arange(4 + len(views)), layers))
    stream = Stream(store, make_mesh(), views)
    ((_, parts),) = stream.reading()
    assert parts[0].slots is parts[1].slots is parts[2].slots  # looked for once
    ((_, first), (_, second), (_, third)) = next(stream.batches())
    assert first.aux_hidden.shape[2] == layers.count
    for name in ("aux_hidden", "tokens", "targets", "count"):
        assert getattr(first, name) is getattr(second, name) is getattr(third, name), name
    assert first.live is second.live


def test_room_is_what_the_fullest_batch_needs_in_whatever_order_rows_come(store):
    """Rows of very different work, and empty ones, of which none stands for another."""
    workload = Workload(store, store.split_rows("train"), STEPS)
    workload.targets = np.array([1000, 5, 3000, 7, 900, 20])
    workload._live = workload._taught = workload.targets[:, None]
    for rows in ([[5, 2], [4, 0]], [[2, -1], [5, -1]], [[5, 3], [1, 2]], [[0, 4], [-1, 2]]):
        needed = max(sum(int(workload.targets[row]) for row in batch if row >= 0) for batch in rows)
        assert needed <= workload.capacity(np.array(rows), 1).targets < needed + 128
    assert workload.capacity(np.full((1, 2), -1), 1).targets == 128


@pytest.mark.parametrize(("room", "sizes"), [(round_up, 8), (lambda n: live_capacity(n, 2**30), 16)])
def test_seeds_have_few_sizes_of_programs_and_little_room_that_is_empty(room, sizes):
    """What the fullest shard holds differs from seed to seed by some percent."""
    for count in (150, 1000, 3000, 20_000, 300_000):
        found = {room(n) for n in range(count, 2 * count)}
        assert len(found) <= sizes + 1
        assert all(0 <= room(n) - n < max(CHUNK, n / sizes) for n in range(count, 2 * count, 7))


def test_the_loss_can_take_many_targets_at_once():
    for count in range(16 * CHUNK + 1, 40_000, 50):
        assert any(round_up(count) % (n * CHUNK) == 0 for n in range(MOST // 2, MOST + 1))


def test_a_batch_holds_the_rows_asked_for(store):
    rows = np.array([9, 0, 4, 1])
    (batch,) = batches(stream_of(store, rows))
    for name in ("tokens", "segment_ids", "positions", "aux_hidden", "last_hidden", "argmax", "logsumexp"):
        np.testing.assert_array_equal(getattr(batch, name), store.read([name], rows)[name])
    assert batch.draft_logprobs is None


@pytest.mark.parametrize("chips", [1, 2])
def test_the_workload_is_that_of_a_loop_over_positions(store, chips, monkeypatch):
    monkeypatch.setattr(targets, "DENSE", 9.0)  # else all positions are computed
    rows = np.array([0, 1, 3, 4])
    (batch,) = batches(stream_of(store, rows, chips))
    found = store.read(("segment_ids", "loss_mask"), rows)
    segments, mask = found["segment_ids"].reshape(chips, -1), found["loss_mask"].reshape(chips, -1)
    n, T = segments.shape[1], small_store.T
    for chip in range(chips):
        s, m = segments[chip], mask[chip]

        def same(i, j, s=s):
            return j < n and i // T == j // T and s[i] == s[j] > 0

        taught = [j for j in range(n) if same(j, j + 1) and m[j + 1]]
        live = [i for i in range(n) if any(same(i, i + k + 1) and i + k + 1 in taught for k in range(STEPS))]
        for name, expected in (("targets", taught), ("live", live)):
            got = np.asarray(getattr(batch, name)).reshape(chips, -1)[chip]
            np.testing.assert_array_equal(got[: len(expected)], expected)
            assert (got[len(expected) :] == n).all()
        assert np.asarray(batch.count)[chip] == len(taught)


def test_where_most_positions_are_live_all_are():
    assert live_capacity(1790, 2048) == 1792
    assert live_capacity(1900, 2048) == 2048
    mask = np.arange(2048).reshape(2, 1024) % 10 > 0
    np.testing.assert_array_equal(live_places(mask, 2, 1024), np.tile(np.arange(1024), 2))
    assert (live_places(mask, 2, 1000)[:900] % 10 > 0).all()


def test_an_empty_row_counts_nothing(store):
    rows = np.array([0, -1])
    (batch,) = batches(stream_of(store, rows))
    assert (np.asarray(batch.segment_ids)[1] == 0).all()
    assert (np.asarray(batch.targets)[: int(batch.count[0])] < small_store.T).all()


def test_batches_come_in_order_however_many_are_in_flight(store):
    wanted = order(store.split_rows("train"), 0, 9, 1).rows
    stream = stream_of(store, wanted)
    got = [np.asarray(batch.tokens) for batch in batches(stream)]
    np.testing.assert_array_equal(
        np.stack(got), store.read(["tokens"], wanted.reshape(-1))["tokens"][:, None]
    )
    assert stream.waited > 0


def test_a_damaged_store_stops_the_stream(tmp_path):
    url = small_store.write_store(str(tmp_path / "store"), blocks=1)
    store = Store.open(url)
    with pytest.raises(EyasError, match="partial"):
        batches(stream_of(store, np.array([0, 9])))


def test_stored_logits_are_asked_for_by_codec(tmp_path, store):
    with pytest.raises(EyasError, match="no logits to teach with"):
        teaching_arrays(store, "stored", Inputs((0,)))
    small = Store.open(small_store.write_store(str(tmp_path / "f8"), "draft", "float8_e4m3fn"))
    assert set(teaching_arrays(small, "stored", Inputs((0,)))) == {
        "aux_hidden",
        "aux_scale",
        "argmax",
        "draft_logprobs",
    }
    assert {"last_hidden", "last_scale"} < set(teaching_arrays(small, "recompute", Inputs((0,))))


@pytest.mark.parametrize("precision", ["float8_e4m3fn", "int8"])
@pytest.mark.parametrize("dp", [1, 2])
def test_batches_have_the_states_of_8_bits_as_they_were(tmp_path, precision, dp):
    """Next to the same rows in float32; empty rows are zeros. Some of the layers are taken too."""
    exact = Store.open(small_store.write_store(str(tmp_path / "exact")))
    small = Store.open(small_store.write_store(str(tmp_path / "small"), precision=precision))
    wanted = np.array([[0, 4], [9, -1]])
    found = [batches(stream_of(one, wanted, dp, (5, 2))) for one in (exact, small)]
    for one, other in zip(*found, strict=True):
        assert other.aux_hidden.dtype == other.last_hidden.dtype == "bfloat16"
        for name in ("aux_hidden", "last_hidden"):
            want, got = (np.asarray(getattr(x, name), np.float32) for x in (one, other))
            assert np.abs(got - want).max() < np.abs(want).max() / (14 if precision != "int8" else 100)
    assert not np.asarray(found[1][1].aux_hidden, np.float32)[1].any()


def test_a_share_of_the_rows_keeps_their_order_and_smaller_shares_lie_in_larger_ones():
    rows = np.arange(0, 60, 2)
    work = np.arange(60)[::-1] % 7
    whole = order(rows, 3, 30, 2, work=work[rows])
    for share, other in ((0.5, 0.8), (0.1, 0.5), (0.01, 0.1)):
        inside, outer = share_of(rows, 3, share), share_of(rows, 3, other)
        assert len(inside) == max(1, round(30 * share))
        assert set(inside) <= set(outer)
        part = order(rows, 3, 2 * len(inside), 2, share, work[rows])
        epochs = part.rows.reshape(-1, len(inside))
        assert (np.sort(epochs, axis=1) == inside).all()
        expected = whole.rows.ravel()[np.isin(whole.rows.ravel(), inside)]
        n = min(len(expected), part.rows.size)
        np.testing.assert_array_equal(part.rows.ravel()[:n], expected[:n])


@pytest.mark.parametrize("first", [(0, 0, 0, 0), (2, 5, 0, 1), (9, 0, 1, 3)])
@pytest.mark.parametrize("chips", [1, 2])
def test_one_reading_gives_each_run_the_batches_that_it_has_alone(store, first, chips):
    """Other lengths, shares, draft vocabularies and TTT steps; rows cross from one batch to the next."""
    mesh, rows = make_mesh(chips), store.split_rows("train")
    views = []
    for steps, share, ids, ttt_steps in ((9, 1.0, 4, 3), (6, 0.5, 9, 1), (2, 0.2, 4, 3), (4, 1.0, 4, 2)):
        workload = Workload(store, rows, ttt_steps)
        wanted = level(order(rows, 1, steps, 4, share, workload.targets[rows]), workload.targets, chips)
        capacity = workload.capacity(wanted.rows, chips)
        views.append(View(wanted, workload, capacity, "recompute", np.arange(ids)))
    together = Stream(store, mesh, views)
    reading = together.reading(first)
    left = [view.order.places[start:].ravel() for view, start in zip(views, first, strict=True)]
    read = sum((rows >= 0).sum() for rows, _ in reading)
    assert read == len(np.unique(np.concatenate(left))), "nothing is read twice"
    got = [[] for _ in views]
    for dealt in together.batches(reading):
        for number, batch in dealt:
            got[number].append(batch)
    for view, start, found in zip(views, first, got, strict=True):
        alone = batches(Stream(store, mesh, [view]))[start:]
        assert len(found) == len(alone)
        for one, other in zip(found, alone, strict=True):
            for name, x, y in zip(one._fields, one, other, strict=True):
                np.testing.assert_array_equal(x, y, err_msg=name)
                assert x is None or x.sharding == y.sharding


def test_what_is_read_ahead_stays_within_its_memory(store, monkeypatch):
    """Batches that are read or being read, and not on the devices yet."""
    wanted = order(store.split_rows("train"), 0, 30, 2)
    stream = stream_of(store, wanted.rows[:1])
    names = stream._names
    batch = 2 * sum(store.row_bytes(name) for name in names)
    memory = 4.5 * batch / 2**30
    view = stream._views[0]
    stream = Stream(store, make_mesh(), [dataclasses.replace(view, order=wanted)], memory)
    held, most, lock = 0, 0, threading.Lock()
    load = Stream._load

    def counted(self, *args):
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        return load(self, *args)

    monkeypatch.setattr(Stream, "_load", counted)
    for _ in stream.batches():
        time.sleep(0.01)
        with lock:
            held -= 1
    assert held == 0
    assert most == 4
    with pytest.raises(EyasError, match=r"two such batches more than the .* GiB for what is read ahead"):
        Stream(store, make_mesh(), [view], 1e-6)


def test_a_store_that_does_not_answer_can_be_left(store, monkeypatch):
    stream, over = stream_of(store, np.array([9, 0])), threading.Event()
    monkeypatch.setattr(stream, "_read", lambda *_: over.wait(60))

    def check():
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        next(stream.batches(check=check))
    assert time.monotonic() - start < 20
    over.set()
