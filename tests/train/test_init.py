"""A fitted head already predicts what follows linearly from its inputs; units undo the features' sizes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.mesh import make_mesh
from common.store import Store
from tests.train import small_store
from train import optimizer
from train.evaluate import Evaluator
from train.head import head_config
from train.init import feature_units, start
from train.plan import frozen

IDS = np.arange(small_store.V, dtype=np.int32)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store.open(small_store.write_store(str(tmp_path_factory.mktemp("start") / "store"), rows=60))


@pytest.fixture(scope="module")
def head(store):
    return head_config(store.target_config(), len(IDS), small_store.AUX_LAYERS)


def made(store, head, init, seed=0):
    return start(head, store, store.split_rows("train"), IDS, init, seed)


def test_a_fitted_head_is_better_than_an_untrained_one(store, head):
    """The made-up target's next state is a function of the current token, so a linear map comes near."""
    mesh = make_mesh()
    evaluator = Evaluator(store, store.split_rows("test"), head, IDS, mesh, 1, 4, jnp.float32)
    taught = frozen(store, IDS, "recompute", mesh, jnp.float32)
    acc = {i: evaluator(made(store, head, i), taught)["acc"][0] for i in ("fitted", "target", "normal")}
    assert acc["fitted"] > 0.2 > 2 * max(acc["target"], acc["normal"])


def test_a_fitted_head_is_as_sure_as_it_is_right(store, head):
    """Its loss rises when its logits shrink by half or double; values have full rank, as in the fit."""
    head = replace(head, num_kv_heads=small_store.H // head.head_dim)
    mesh = make_mesh()
    evaluator = Evaluator(store, store.split_rows("test"), head, IDS, mesh, 1, 4, jnp.float32)
    taught = frozen(store, IDS, "recompute", mesh, jnp.float32)
    fitted = made(store, head, "fitted")

    def loss(scale):
        return evaluator(fitted | {"norm.weight": fitted["norm.weight"] * np.float32(scale)}, taught)["loss"][
            0
        ]

    assert loss(1) < min(loss(0.5), loss(2))


def test_the_same_seed_gives_the_same_head(store, head):
    for init in ("fitted", "normal"):
        first, again, other = (made(store, head, init, seed) for seed in (3, 3, 4))
        for name, weight in first.items():
            np.testing.assert_array_equal(weight, again[name], err_msg=name)
        q = "midlayer.self_attn.q_proj.weight"
        assert (first[q] != other[q]).any()


def test_lm_head_starts_as_the_targets_rows_or_as_noise(store, head):
    rows = store.target_tensor("lm_head")[IDS]
    for init in ("fitted", "target"):
        np.testing.assert_array_equal(made(store, head, init)["lm_head.weight"], rows)
    assert made(store, head, "normal")["lm_head.weight"].std() == pytest.approx(0.02, rel=0.1)


def test_units_are_the_root_mean_squares_of_documents(store, head):
    rows = store.split_rows("train")
    found = store.read(("segment_ids", "aux_hidden"), rows)
    aux = found["aux_hidden"][found["segment_ids"] > 0].reshape(-1, 3 * small_store.H)
    np.testing.assert_allclose(feature_units(head, store, rows, 0), np.sqrt((aux**2).mean(0)), rtol=1e-5)


def test_training_in_units_is_training_on_divided_features():
    """Adam on W(x / u) moves W as the trainer moves w = W / u."""
    rng = np.random.default_rng(0)
    units = np.array([1.0, 1000.0, 0.1], np.float32)
    inside = {"w": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)}
    outside = {"w": inside["w"] / units[None]}
    rate = optax.constant_schedule(0.1)
    makers = {
        "in": optimizer.make(rate, 0.5, (0.9, 0.99), 0.1),
        "out": optimizer.make(rate, 0.5, (0.9, 0.99), 0.1, {"w": units}),
    }
    states = {"in": makers["in"].init(inside), "out": makers["out"].init(outside)}
    for step in range(4):
        gradient = jnp.asarray(np.random.default_rng(step).normal(size=(2, 3)), jnp.float32)
        with jax.numpy_dtype_promotion("standard"):
            moved, states["in"] = makers["in"].update({"w": gradient}, states["in"], inside)
            inside = optax.apply_updates(inside, moved)
            # d loss / d w = d loss / d W * u
            moved, states["out"] = makers["out"].update({"w": gradient * units[None]}, states["out"], outside)
            outside = optax.apply_updates(outside, moved)
    np.testing.assert_allclose(outside["w"] * units[None], inside["w"], rtol=1e-5)
