"""The trainer's rollout, losses, gradients and scores against the float64 reference; nothing leaks."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from common import attention
from common.mesh import make_mesh
from tests.train.on_device import STEPS, batch_of, f32, frozen_of, parameters_of
from tests.train.problem import Problem, head_config, problem
from tests.train.reference import directional_derivative
from train import loss
from train.heads.eagle3 import rollout
from train.loss import cross_entropy
from train.objective import shard_counts, shard_loss, shard_scores

CONFIG = head_config()
DECAY = 0.8
COMPATS = (None, "specforge")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several chunks of targets and several, uneven blocks of queries at tiny sizes."""
    monkeypatch.setattr(loss, "CHUNK", 16)
    monkeypatch.setattr(attention, "BLOCK", 16)


@pytest.fixture(scope="module")
def packed() -> Problem:
    return problem()


def weights_of(p: Problem, compat) -> np.ndarray:
    """decay^k over what the reference divides by."""
    divisor = p.tokens.size if compat else p.losses(STEPS, compat=compat).counted
    return DECAY ** np.arange(STEPS) / divisor


@jax.jit
def loss_and_gradients(params, frozen, batch, weight_K):
    def fn(params):
        return shard_loss(CONFIG, cross_entropy, params, frozen, batch, weight_K, jnp.float32)

    return jax.value_and_grad(fn, has_aux=True)(params)


def trained(p: Problem, compat=None, **changed):
    batch = batch_of(p, compat)._replace(**changed)
    return loss_and_gradients(parameters_of(p), frozen_of(p), batch, f32(weights_of(p, compat)))


def directions(p: Problem, seed: int, name: str | None = None) -> dict:
    """A random direction, of unit length within every parameter, of one or of all parameters."""
    rng = np.random.default_rng(seed)
    drawn = {n: rng.normal(size=a.shape) for n, a in p.params.items() if name in (None, n)}
    return {n: a / np.linalg.norm(a) for n, a in drawn.items()}


def slope(gradients: dict, direction: dict) -> float:
    return sum(float((np.asarray(gradients[n], np.float64) * d).sum()) for n, d in direction.items())


@pytest.mark.parametrize("compat", COMPATS)
def test_losses_are_the_references(packed, compat):
    expected = packed.losses(STEPS, compat=compat)
    (total, sums), _ = trained(packed, compat)
    counts = jax.jit(shard_counts, static_argnums=2)(frozen_of(packed), batch_of(packed, compat), STEPS)
    np.testing.assert_array_equal(sums.counted, expected.counted)
    np.testing.assert_array_equal(counts, expected.counted)
    divisor = packed.tokens.size if compat else expected.counted
    np.testing.assert_allclose(np.asarray(sums.loss) / divisor, expected.steps, rtol=1e-5)
    np.testing.assert_allclose(total, expected.total, rtol=1e-5)


@pytest.mark.parametrize("compat", COMPATS)
def test_a_row_that_is_one_document_does_not_run_into_the_next(packed, compat):
    """Both rows' segment is 1, so only the rows' ends tell them apart."""
    B, T = packed.tokens.shape
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    whole = replace(packed, segments=np.ones_like(packed.segments), positions=positions)
    whole = replace(whole, mask=np.ones_like(packed.mask))
    expected = whole.losses(STEPS, compat=compat)
    (total, sums), gradients = trained(whole, compat)
    np.testing.assert_array_equal(sums.counted, expected.counted)
    np.testing.assert_allclose(total, expected.total, rtol=1e-5)
    direction = directions(whole, 0)
    found = directional_derivative(
        lambda params: whole.losses(STEPS, params, compat).total, whole.params, direction
    )
    np.testing.assert_allclose(slope(gradients, direction), found, rtol=1e-4)


@pytest.mark.parametrize("compat", COMPATS)
def test_gradients_are_the_references(packed, compat):
    """Every parameter along a direction of its own, then all of them along several together."""
    _, gradients = trained(packed, compat)
    norms = {n: float(jnp.linalg.norm(g)) for n, g in gradients.items()}

    def fn(params):
        return packed.losses(STEPS, params, compat).total

    alone = {name: directions(packed, 0, name) for name in packed.params}
    together = {f"all, {seed}": directions(packed, seed) for seed in range(1, 4)}
    for name, direction in (alone | together).items():
        expected = directional_derivative(fn, packed.params, direction)
        size = norms.get(name) or sum(norms.values())
        assert size > 1e-3, f"{name} has no gradient to compare"
        assert abs(slope(gradients, direction) - expected) < 1e-4 * size, name


ALL = {"layers": 2, "fc_norm": True, "norm_output": True, "norm_before_residual": True}


@pytest.mark.parametrize(
    "variant",
    [ALL, *(pytest.param({name: value}, marks=pytest.mark.slow) for name, value in ALL.items())],
)
def test_other_kinds_of_eagle3_have_the_references_loss_and_gradients(variant):
    p = problem(T=24, **variant)
    assert abs(p.losses(STEPS).total - problem(T=24).losses(STEPS).total) > 1e-3

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def fn(params, frozen, batch, weights):
        return shard_loss(p.config, cross_entropy, params, frozen, batch, weights, jnp.float32)

    (total, _), gradients = fn(parameters_of(p), frozen_of(p), batch_of(p), f32(weights_of(p, None)))
    np.testing.assert_allclose(total, p.losses(STEPS).total, rtol=1e-5)
    for seed in range(2):
        direction = directions(p, seed)
        expected = directional_derivative(lambda x: p.losses(STEPS, x).total, p.params, direction)
        size = sum(float(jnp.linalg.norm(g)) for g in gradients.values())
        assert abs(slope(gradients, direction) - expected) < 1e-4 * size
    assert min(float(jnp.linalg.norm(g)) for g in gradients.values()) > 1e-4


def test_where_most_are_live_all_are_computed_and_as_many_count(packed):
    """All positions in their places, none moved: the same loss and the same gradients."""
    (total, sums), gradients = trained(packed)
    everywhere = jnp.arange(packed.tokens.size, dtype=jnp.int32)
    (other, others), dense = trained(packed, live=everywhere)
    np.testing.assert_allclose(other, total, rtol=1e-6)
    np.testing.assert_array_equal(others.counted, sums.counted)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(dense[name], gradient, rtol=1e-4, atol=1e-6, err_msg=name)


def test_stored_logits_teach_as_recomputed_ones(packed):
    (total, _), gradients = trained(packed)
    logp = packed.target_logits - np.log(np.exp(packed.target_logits).sum(-1, keepdims=True))
    stored = f32(logp[..., packed.draft_ids])
    batch = batch_of(packed)._replace(last_hidden=None, draft_logprobs=stored)
    frozen = frozen_of(packed)._replace(lm_head=None)
    weights = f32(weights_of(packed, None))
    (other, _), others = loss_and_gradients(parameters_of(packed), frozen, batch, weights)
    np.testing.assert_allclose(other, total, rtol=1e-6)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(others[name], gradient, rtol=1e-4, atol=1e-6, err_msg=name)


@jax.jit
def on_two_devices(params, frozen, batch, weights):
    """Every device's own (loss, sums), gradients, stacked."""

    def shard(*args):
        return jax.tree.map(lambda x: x[None], loss_and_gradients(*args))

    specs = (P(), P(), P("dp"), P())
    mapped = jax.shard_map(shard, mesh=make_mesh(dp=2), in_specs=specs, out_specs=P("dp"), check_vma=False)
    return mapped(params, frozen, batch, weights)


@pytest.mark.parametrize("compat", COMPATS)
def test_two_devices_sum_to_the_references_loss_and_gradients(packed, compat):
    """Each device holds one row, with another number of counted positions."""
    batch = batch_of(packed, compat, shards=2)
    assert batch.count[0] != batch.count[1]
    mesh = make_mesh(dp=2)
    whole = (parameters_of(packed), frozen_of(packed), f32(weights_of(packed, compat)))
    params, frozen, weights = jax.device_put(whole, NamedSharding(mesh, P()))
    parts = on_two_devices(params, frozen, jax.device_put(batch, NamedSharding(mesh, P("dp"))), weights)
    (total, sums), gradients = jax.tree.map(lambda x: np.asarray(x).sum(0), parts)
    expected = packed.losses(STEPS, compat=compat)
    np.testing.assert_array_equal(sums.counted, expected.counted)
    np.testing.assert_allclose(total, expected.total, rtol=1e-5)
    _, on_one = trained(packed, compat)
    for name, gradient in on_one.items():
        np.testing.assert_allclose(gradients[name], gradient, rtol=1e-4, atol=1e-6, err_msg=name)


@jax.jit
def scores_of(params, frozen, batch):
    return shard_scores(CONFIG, params, frozen, batch, STEPS, jnp.float32)[:2]


def of_document(p: Problem, row: int, segment: int) -> np.ndarray:
    return (p.segments == segment) & (np.arange(len(p.segments)) == row)[:, None]


# In the middle of the padded row, and first of the next row.
DOCUMENTS = ((0, 4), (1, 2))


@pytest.mark.parametrize(("row", "segment"), DOCUMENTS)
def test_other_documents_and_padding_change_no_score(packed, row, segment):
    here = of_document(packed, row, segment)
    rng = np.random.default_rng(2)
    elsewhere = np.where(here, packed.tokens, (packed.tokens + 1) % packed.config.vocab_size)
    aux = np.where(here[..., None, None], packed.aux, 3 * rng.normal(size=packed.aux.shape))
    other = replace(packed, tokens=elsewhere.astype(np.int32), aux=aux)
    found = []
    for p in (packed, other):
        batch = batch_of(packed)._replace(tokens=jnp.asarray(p.tokens), aux_hidden=f32(p.aux))
        scores, valid = scores_of(parameters_of(p), frozen_of(p), batch)
        inside = here.reshape(-1).take(batch.targets, mode="clip") & (batch.targets < here.size)
        assert inside.any()
        found.append([np.where(valid, x, 0) for x in scores])
    for name, before, after in zip(scores._fields, *found, strict=True):
        np.testing.assert_array_equal(before[inside], after[inside], err_msg=name)
        assert name == "correct" or (before[~inside] != after[~inside]).any(), name


@jax.jit
def gradients_of_inputs(params, frozen, batch):
    def fn(aux, embed):
        moved, thawed = batch._replace(aux_hidden=aux), frozen._replace(embed=embed)
        return shard_loss(CONFIG, cross_entropy, params, thawed, moved, jnp.ones(STEPS), jnp.float32)[0]

    return jax.grad(fn, argnums=(0, 1))(batch.aux_hidden, frozen.embed)


@pytest.mark.parametrize(("row", "segment"), DOCUMENTS)
def test_a_documents_loss_has_no_gradient_in_any_other(packed, row, segment):
    """Every position has a token of its own here, so that the embedding's rows tell positions apart."""
    here = of_document(packed, row, segment)
    batch, frozen = batch_of(packed, taught=here), frozen_of(packed)
    n = packed.tokens.size
    batch = batch._replace(tokens=jnp.arange(n, dtype=jnp.int32).reshape(packed.tokens.shape))
    frozen = frozen._replace(embed=f32(packed.embed[packed.tokens.reshape(-1)]))
    of_aux, of_embed = (
        np.asarray(g).reshape(n, -1) for g in gradients_of_inputs(parameters_of(packed), frozen, batch)
    )
    inside = here.reshape(-1)
    assert np.abs(of_aux[inside]).max() > 1e-3
    assert np.abs(of_embed[inside]).max() > 1e-3
    assert (of_aux[~inside] == 0).all()
    assert (of_embed[~inside] == 0).all()


def test_positions_become_angles_once_for_all_steps(packed):
    """XLA for CPU computes an angle that a step makes again for every head: a tenth of the step's time."""
    given = parameters_of(packed), frozen_of(packed), batch_of(packed), f32(weights_of(packed, None))
    assert (
        str(jax.make_jaxpr(loss_and_gradients)(*given)).count(" = cos ") == 2
    )  # all positions', and the steps'


@pytest.mark.slow
def test_what_is_kept_for_the_backward_pass_changes_no_gradient(packed, monkeypatch):
    """Of long rows the results of matmuls are not: less memory, the same gradients."""
    given = frozen_of(packed), batch_of(packed), f32(weights_of(packed, None))

    def step(params):
        return shard_loss(CONFIG, cross_entropy, params, *given, jnp.bfloat16)[0]

    found, memory = [], []
    for room in (2**30, 0):
        monkeypatch.setattr(rollout, "_MATMULS", room)
        compiled = jax.jit(jax.grad(lambda params: step(params))).lower(parameters_of(packed)).compile()
        found.append(compiled(parameters_of(packed)))
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
    assert memory[1] < memory[0]
    for name, kept in found[0].items():
        np.testing.assert_allclose(found[1][name], kept, atol=0.02 * np.abs(kept).max(), err_msg=name)
