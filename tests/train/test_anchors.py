"""A sample for the steps behind step 0 changes nothing of what the loss and its gradients are on average."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.mesh import make_mesh, sharding
from common.store import Store
from tests.train import small_store
from tests.train.on_device import STEPS, batch_of, f32, frozen_of, parameters_of
from tests.train.problem import Problem, problem
from tests.train.reference import directional_derivative
from train.anchors import begins, behind_first, most_live, most_sampled, sampled, stretch_starts
from train.batch import Batch
from train.order import listed
from train.step import gradient
from train.stream import Stream, View
from train.targets import compact, counted_targets, live_places, live_queries, round_up
from train.workload import Workload

SHARE, TAUGHT = 0.4, 10  # of every row: a sample is 4 targets, and there are 10 samples
DECAY = 0.8
ALL = {"layers": 2, "fc_norm": True, "norm_output": True, "norm_before_residual": True}


def problem_of(**variant) -> Problem:
    """Ten targets in every row."""
    p = problem(**variant)
    counted = counted_targets(p.segments, p.mask)
    taught = counted & (np.cumsum(counted, 1) <= TAUGHT)
    return replace(p, mask=np.roll(taught, 1, 1).astype(p.mask.dtype))


def with_sample(p: Problem, batch: Batch, begin: float, shards: int, dense: bool) -> Batch:
    """The batch whose steps behind step 0 compute a sample."""
    sample = sampled(counted_targets(p.segments, p.mask), SHARE, np.full(len(p.mask), begin))
    assert (sample.sum(1) == SHARE * TAUGHT).all()
    live = live_queries(p.segments, sample, STEPS, first=1)
    room = p.tokens.size // shards if dense else round_up(p.tokens.size)
    found = {
        "live": live_places(live, shards, room),
        "targets": compact(sample, shards, round_up(sample.size)),
        "count": sample.reshape(shards, -1).sum(1).astype(np.int32),
    }
    return batch._replace(samples={1: jax.tree.map(jnp.asarray, found)})


@pytest.mark.parametrize(
    ("chips", "parts", "stored", "variant"),
    [
        (2, 1, False, {}),
        pytest.param(1, 2, False, {}, marks=pytest.mark.slow),
        pytest.param(1, 1, True, ALL, marks=pytest.mark.slow),
    ],
)
def test_the_mean_over_all_samples_is_the_references_loss_and_gradient(chips, parts, stored, variant):
    """In parts, also where all positions are computed in their places."""
    p, mesh, shards = problem_of(**variant), make_mesh(chips), chips * parts
    frozen, batch = frozen_of(p), batch_of(p, shards=shards)
    if stored:
        frozen = frozen._replace(lm_head=None)
        logp = p.target_logits - np.log(np.exp(p.target_logits).sum(-1, keepdims=True))
        batch = batch._replace(last_hidden=None, draft_logprobs=f32(logp[..., p.draft_ids]))
    whole = jax.device_put((parameters_of(p), frozen), sharding(mesh, ()))
    fn = jax.jit(gradient(p.config, mesh, STEPS, DECAY, jnp.float32, shares=behind_first(SHARE, STEPS)))
    found = []
    for number in range(TAUGHT):
        one = with_sample(p, batch, (number + 0.01) / TAUGHT, shards, dense=parts > 1)
        found.append(jax.device_get(fn(*whole, jax.device_put(one, sharding(mesh, ("row",))))))
    assert np.std([total for (total, _, _), _ in found]) > 1e-3
    (total, loss_K, _), gradients = jax.tree.map(lambda *x: np.mean(x, 0, np.float64), *found)
    expected = p.losses(STEPS)
    np.testing.assert_allclose(loss_K, expected.steps, rtol=1e-5)
    np.testing.assert_allclose(total, expected.total, rtol=1e-5)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        direction = {name: rng.normal(size=x.shape) / x.size**0.5 for name, x in gradients.items()}
        slope = sum((gradients[name] * x).sum() for name, x in direction.items())
        wanted = directional_derivative(lambda x: p.losses(STEPS, x).total, p.params, direction)
        assert abs(slope - wanted) < 1e-4 * sum(np.linalg.norm(x) for x in gradients.values())


@pytest.mark.parametrize("share", [0.07, 0.25, 0.5, 0.9])
def test_every_target_is_as_likely_and_a_sample_fits_its_room(share):
    rng = np.random.default_rng(0)
    counted, segments = rng.random((6, 90)) < [[0.05], [0.3], [0.6], [0.9], [1], [0]], np.ones((6, 90))
    counted[:, -1], counts = False, np.zeros((6, 90))
    draws, room = 2000, most_sampled(counted.sum(1), share)
    most = most_live(room, stretch_starts(counted).sum(1), steps=6)
    for number in range(draws):
        sample = sampled(counted, share, np.full(6, (number + 0.5) / draws))
        assert (sample.sum(1) <= room).all()
        assert (sample.sum(1) >= np.floor(share * counted.sum(1))).all()
        assert (live_queries(segments, sample, 7, first=1).sum(1) <= most).all()
        counts += sample
    np.testing.assert_allclose(counts / draws, share * counted, atol=0.02)


def test_begins_are_spread_evenly_and_others_in_every_row_step_and_seed():
    rows = np.arange(-1, 199)
    found = np.concatenate([begins(rows, seed, step) for seed in (0, 1) for step in (0, 5)])
    assert len(np.unique(found)) == len(found)
    np.testing.assert_allclose(np.histogram(found, 4, (0, 1))[0] / len(found), 0.25, atol=0.05)
    np.testing.assert_array_equal(begins(rows[::-1], 1, 5)[::-1], found[-len(rows) :])


def test_a_rows_sample_is_the_same_on_any_number_of_chips(tmp_path):
    store = Store.open(small_store.write_store(str(tmp_path / "store")))
    workload, wanted = Workload(store, store.split_rows("train"), STEPS), listed(np.array([[0, 1, 3, 4]] * 3))
    found, shares = [], behind_first(SHARE, STEPS)
    for chips, parts in ((1, 1), (2, 1), (1, 4), (4, 1)):
        capacity = workload.capacity(wanted.rows, chips * parts, shares)
        view = View(wanted, workload, capacity, "recompute", np.arange(4), None, parts, shares, seed=3)
        batches = [batch for dealt in Stream(store, make_mesh(chips), [view]).batches() for _, batch in dealt]
        n = 4 * small_store.T // (chips * parts)
        at = [np.asarray(batch.samples[1]["targets"]).reshape(chips * parts, -1) for batch in batches]
        for batch, places in zip(batches, at, strict=True):
            np.testing.assert_array_equal(batch.samples[1]["count"], (places < n).sum(1))
        found.append([(x + n * np.arange(chips * parts)[:, None])[x < n] for x in at])
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, found[0])
    first, second, third = found[0]
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)
