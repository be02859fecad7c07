"""Rows in pieces on several chips give the losses, gradients and scores of whole rows on one chip."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import EyasError
from common.mesh import make_mesh
from common.params import initialise
from common.rows import Rows
from tests.train import small_run, small_store
from tests.train.small_run import lines_of, weights_of
from train import loss, pieces, placing, targets
from train.anchors import behind_first
from train.batch import Inputs
from train.evaluate import Evaluator
from train.heads.eagle3.head import Eagle3
from train.order import listed
from train.run import run
from train.sample import measure
from train.source import Source
from train.step import gradient
from train.stream import Stream, View

STEPS = 3
IDS = np.arange(0, small_store.V, 2, dtype=np.int32)
ROWS = np.array([[0, 1, 3, 4]])
ALL = {"layers": 2, "fc_norm": True, "norm_output": True, "norm_before_residual": True}


def small_chunks(monkeypatch):
    """At tiny sizes too indices are compacted, and a halo is not a whole piece."""
    for module in (targets, loss, pieces):
        monkeypatch.setattr(module, "CHUNK", 4)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    small_chunks(monkeypatch)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Rows of 24 positions: two documents of odd and even lengths, most of which go on in the next piece."""
    return small_store.write_store(str(tmp_path_factory.mktemp("pieces") / "store"))


@pytest.fixture(scope="module")
def edge(tmp_path_factory):
    """Rows of which only the first few positions of one piece count: drafts come from the one before too."""
    made = small_store._rows

    def around_an_edge(*args):
        columns = made(*args)
        columns["loss_mask"][:, [*range(7), *range(10, small_store.T)]] = 0
        return columns

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_store, "_rows", around_an_edge)
        return small_store.write_store(str(tmp_path_factory.mktemp("edge") / "store"))


def opened(url, dp=1, sp=1, **options):
    """(the store on a mesh, a head, its parameters there)."""
    source = Source(url, dp, sp=sp)
    head = Eagle3.for_target(source.store.target_config(), len(IDS), small_store.AUX_LAYERS, **options)
    params = initialise(head.parameters(), jax.random.key(1))
    params = {name: 6 * np.asarray(x) if x.ndim > 1 else np.asarray(x) for name, x in params.items()}
    where = placing.along(params, head.parameters(), source.mesh)
    return source, head, jax.tree.map(placing.place, params, where)


def trained(url, dp=1, sp=1, parts=1, anchors=1.0, compat=None, dense=False, **options):
    """(loss, by step, right), gradients of a batch."""
    source, head, params = opened(url, dp, sp, **options)
    workload = source.workload(STEPS, compat)
    shares = behind_first(anchors, STEPS)
    room, own = workload.capacity(ROWS, dp * parts, shares), small_store.T // sp
    positions = ROWS.size // dp // parts * (own + (pieces.halo(own, STEPS) if sp > 1 else 0))
    room = replace(room, live=positions) if dense else room
    assert dense or room.live < positions
    view = View(listed(ROWS), workload, room, "recompute", IDS, None, parts, shares, seed=3)
    frozen = source.frozen(IDS, "recompute", jnp.float32)
    step = jax.jit(gradient(head, source.mesh, STEPS, 0.8, jnp.float32, compat, shares=shares))
    (((_, batch),),) = Stream(source.store, source.mesh, [view]).batches()
    return jax.device_get(step(params, frozen, batch))


def assert_same(found, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6), found, expected)


@pytest.fixture(scope="module")
def whole(url):
    with pytest.MonkeyPatch.context() as patch:
        small_chunks(patch)
        found = trained(url)
    assert min(np.abs(x).max() for x in jax.tree.leaves(found)) > 1e-4
    return found


@pytest.mark.parametrize(
    ("dp", "sp", "dense"), [(1, 4, False), (2, 2, False), pytest.param(1, 2, True, marks=pytest.mark.slow)]
)
def test_pieces_have_the_losses_and_gradients_of_whole_rows(url, whole, dp, sp, dense):
    assert_same(trained(url, dp, sp, dense=dense), whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [{"parts": 2}, {"anchors": 0.4}, {"compat": "specforge"}, ALL, ALL | {"anchors": 0.4, "parts": 2}],
)
def test_whatever_is_computed_of_rows_is_computed_of_pieces(url, given):
    assert_same(trained(url, 1, 4, **given), trained(url, **given))


@pytest.mark.slow
def test_what_counts_in_one_piece_alone_has_its_drafts_in_the_one_before(edge):
    assert_same(trained(edge, 1, 4), trained(edge))


@pytest.mark.slow
def test_pieces_have_the_scores_of_whole_rows(url):
    """Answers are walked through over the edges of pieces; some held-out rows are empty ones."""
    found = []
    for dp, sp in ((1, 1), (1, 4), (2, 2)):
        source, head, params = opened(url, dp, sp)
        score = Evaluator(source, head, IDS, STEPS, batch_rows=2, dtype=jnp.float32)
        found.append(score(params, source.frozen(IDS, "recompute", jnp.float32)))
    assert 0 < found[0]["acc"][0] < 1
    assert found[0]["drafts"] > 0
    for other in found[1:]:
        assert_same(other, found[0])


@pytest.mark.slow
def test_the_sample_of_pieces_is_that_of_whole_rows(url):
    found = []
    for dp, sp in ((1, 1), (1, 4)):
        source, head, _ = opened(url, dp, sp)
        of = source.store, source.mesh, source.workload(STEPS), source.train_rows
        found.append(measure(*of, source.embed(jnp.float32), head.rms_eps, head.inputs))
    np.testing.assert_allclose(found[1].units_A, found[0].units_A, rtol=1e-5)
    for one, other in zip(found[1].fit, found[0].fit, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("sp", "measured"), [(1, [2, 2]), (4, [2, 3])])
def test_a_sample_is_shared_by_runs_to_which_it_is_the_same_bits(url, monkeypatch, sp, measured):
    """So a head of a sweep begins as it does alone. Of rows in pieces the room of the halo is part of it."""
    monkeypatch.setattr("train.source.measure", lambda store, mesh, workload, *_: workload.ttt_steps)
    source = Source(url, sp=sp)
    given = 0, 1.0, Inputs(small_store.AUX_LAYERS), 1e-5, True, jnp.float32
    assert [source.sample(source.workload(steps), *given) for steps in (2, 3)] == measured


@pytest.mark.slow
def test_a_run_in_pieces_is_that_of_whole_rows(url, tmp_path):
    """From the fitted start on, with noise, in parts, with Muon, evaluated and saved."""
    given = {
        "steps": 2,
        "eval_every": 2,
        "init": "fitted",
        "noise": 0.05,
        "optimizer": "muon",
        "log_every": 1,
    }
    for name, chips in (("whole", {}), ("pieces", {"sp": 4, "accumulate": 2})):
        run(small_run.short_run(url, f"{tmp_path}/{name}", learning_rate=1e-3, **given, **chips))
    whole, found = (lines_of(tmp_path / name) for name in ("whole", "pieces"))
    for line, expected in zip(found, whole, strict=True):
        for key in expected.keys() - {"seconds"}:
            assert_same(line[key], expected[key])
    for name, weight in weights_of(tmp_path / "whole").items():
        np.testing.assert_allclose(weights_of(tmp_path / "pieces")[name], weight, atol=0.01)


def test_a_piece_has_its_own_positions_and_what_lies_ahead():
    mask = np.random.default_rng(0).random((5, 24)) < 0.5
    for count in (2, 3, 4):
        t, h = 24 // count, pieces.halo(24 // count, STEPS)
        assert STEPS < h <= t
        for ahead in (0, STEPS):
            found = pieces.spread(mask, count, STEPS, ahead).reshape(5, count, t + h)
            for piece in range(count):
                seen = mask[:, piece * t : (piece + 1) * t + ahead]
                np.testing.assert_array_equal(found[:, piece, : seen.shape[1]], seen)
                assert not found[:, piece, seen.shape[1] :].any()
    np.testing.assert_array_equal(pieces.spread(mask, 1, STEPS), mask)


@pytest.mark.parametrize(("dp", "sp"), [(4, 1), (2, 2), (1, 4)])
def test_rows_are_cut_as_they_lie_on_the_mesh(dp, sp):
    rows = Rows(make_mesh(dp, sp), ("batch", "position"))
    values, numbers, by_chip = np.arange(4 * 8 * 3).reshape(4, 8, 3), np.arange(4), np.arange(8)
    assert rows.own(values).shape == values.shape
    placed = rows.place([values, numbers], [by_chip])
    for found, expected in zip(placed, (values, numbers, by_chip), strict=True):
        np.testing.assert_array_equal(found, expected)
    cut = {shard.device: np.asarray(shard.data) for shard in placed[0].addressable_shards}
    for device, part in zip(make_mesh(dp, sp).devices.ravel(), rows.cut(values), strict=True):
        np.testing.assert_array_equal(cut[device], part)


def test_rows_that_chips_cannot_share_are_refused():
    with pytest.raises(EyasError, match="rows of S have 30 positions, which sp=4 chips can't share evenly"):
        pieces.require(30, 4, 3, "S")
    pieces.require(30, 1, 40, "S")
