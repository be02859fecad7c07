"""A batch is a function of (store, seed, step); what it says to compute is what the masks say."""

import numpy as np
import pytest

from common.errors import EyasError
from common.mesh import make_mesh
from common.store import Store
from tests.train import small_store
from train.stream import Stream, Workload, order, teaching_arrays

STEPS = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store.open(small_store.write_store(str(tmp_path_factory.mktemp("stream") / "store")))


def test_every_epoch_visits_every_row_once_in_an_order_of_its_own():
    rows = np.array([3, 5, 8, 9, 20])
    wanted = order(rows, seed=1, steps=5, batch_rows=3).reshape(3, 5)
    assert (np.sort(wanted, axis=1) == rows).all()
    assert len({tuple(epoch) for epoch in wanted}) == 3
    assert (order(rows, 2, 5, 3) != wanted.reshape(5, 3)).any()


def test_a_shorter_run_reads_the_same_batches():
    rows = np.arange(7)
    np.testing.assert_array_equal(order(rows, 0, 3, 2), order(rows, 0, 30, 2)[:3])


def stream_of(store, rows, chips=1):
    mesh = make_mesh(chips)
    workload = Workload(store, store.split_rows("train"), STEPS)
    wanted = np.asarray(rows).reshape(1, -1)
    return Stream(
        store, workload, workload.capacity(np.maximum(wanted, 0), mesh.size), mesh, "recompute", np.arange(4)
    )


def test_a_batch_holds_the_rows_asked_for(store):
    rows = np.array([9, 0, 4, 1])
    (batch,) = stream_of(store, rows).batches([rows])
    for name in ("tokens", "segment_ids", "positions", "aux_hidden", "last_hidden", "argmax", "logsumexp"):
        np.testing.assert_array_equal(getattr(batch, name), store.read([name], rows)[name])
    assert batch.draft_logits is None


@pytest.mark.parametrize("chips", [1, 2])
def test_the_workload_is_that_of_a_loop_over_positions(store, chips):
    rows = np.array([0, 1, 3, 4])
    (batch,) = stream_of(store, rows, chips).batches([rows])
    found = store.read(("segment_ids", "loss_mask"), rows)
    segments, mask = found["segment_ids"].reshape(chips, -1), found["loss_mask"].reshape(chips, -1)
    n, T = segments.shape[1], small_store.T
    for chip in range(chips):
        s, m = segments[chip], mask[chip]

        def same(i, j, s=s):
            return j < n and i // T == j // T and s[i] == s[j] > 0

        targets = [j for j in range(n) if same(j, j + 1) and m[j + 1]]
        live = [i for i in range(n) if any(same(i, i + k + 1) and i + k + 1 in targets for k in range(STEPS))]
        for name, expected in (("targets", targets), ("live", live)):
            got = np.asarray(getattr(batch, name)).reshape(chips, -1)[chip]
            np.testing.assert_array_equal(got[: len(expected)], expected)
            assert (got[len(expected) :] == n).all()
        assert np.asarray(batch.count)[chip] == len(targets)


def test_an_empty_row_counts_nothing(store):
    rows = np.array([0, -1])
    (batch,) = stream_of(store, rows).batches([rows])
    assert (np.asarray(batch.segment_ids)[1] == 0).all()
    assert (np.asarray(batch.targets)[: int(batch.count[0])] < small_store.T).all()


def test_batches_come_in_order_however_many_are_in_flight(store):
    wanted = order(store.split_rows("train"), 0, 9, 1)
    stream = stream_of(store, np.arange(1))
    got = [np.asarray(batch.tokens) for batch in stream.batches(wanted)]
    np.testing.assert_array_equal(
        np.stack(got), store.read(["tokens"], wanted.reshape(-1))["tokens"][:, None]
    )
    assert stream.waited > 0


def test_a_damaged_store_stops_the_stream(tmp_path):
    url = small_store.write_store(str(tmp_path / "store"), blocks=1)
    store = Store.open(url)
    with pytest.raises(EyasError, match="partial"):
        list(stream_of(store, np.array([0, 9])).batches([np.array([0, 9])]))


def test_stored_logits_are_asked_for_by_codec(tmp_path, store):
    with pytest.raises(EyasError, match="no logits to teach with"):
        teaching_arrays(store, "stored")
    small = Store.open(small_store.write_store(str(tmp_path / "f8"), "draft", "float8_e4m3fn"))
    assert set(teaching_arrays(small, "stored")) == {
        "aux_hidden",
        "aux_scale",
        "argmax",
        "logsumexp",
        "draft_logits",
    }
    assert {"last_hidden", "last_scale"} < set(teaching_arrays(small, "recompute"))
