"""Schedules, Muon, the average of the weights, what stays still, and steps that are skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train import optimizer
from train.config import TrainConfig

SHAPES = {"block": (6, 4), "wide": (3, 12), "lm_head": (5, 4), "norm": (4,)}


def tree(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def moved(steps=3, bad=(), loss=0.0, units=None, **options):
    """(parameters, state, updates) after so many steps; the gradients of those in `bad` are not finite."""
    made = optimizer.make(optax.constant_schedule(0.1), 1.0, (0.9, 0.99), 0.01, units, **options)
    params = tree(0)
    state, updates = made.init(params), None

    @jax.jit
    def one(params, state, gradients, loss):
        updates, state = made.update(gradients, state, params, loss=loss)
        return optax.apply_updates(params, updates), state, updates

    with jax.numpy_dtype_promotion("standard"):
        for step in range(steps):
            gradients = tree(10 + step)
            if step in bad:
                gradients["norm"] = gradients["norm"].at[1].set(jnp.nan)
            params, state, updates = one(params, state, gradients, loss)
    return params, state, updates


def equal(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_schedules_rise_stay_and_fall_as_their_names_say():
    for kind, at_50, at_90, at_end in (
        ("linear", 0.5e-3, 0.1e-3, 0.0),
        ("cosine", 0.5e-3, 0.0245e-3, 0.0),
        ("constant", 1e-3, 1e-3, 1e-3),
        ("wsd", 1e-3, 0.5e-3, 0.0),
    ):
        rate = optimizer.schedule(1e-3, 0.0, 100, kind, 0.2)
        found = [float(rate(step)) for step in (50, 90, 100)]
        np.testing.assert_allclose(found, [at_50, at_90, at_end], rtol=0.02, atol=1e-5, err_msg=kind)
        assert 0 < float(optimizer.schedule(1e-3, 0.1, 100, kind)(0)) < 2e-4
        assert optimizer.schedule(1e-3, 0.0, 100, kind)(0) == np.float32(1e-3), "nothing warms up"
        assert float(optimizer.schedule(1e-3, 0.02, 1, kind)(0)) > 0


def test_muons_rate_falls_with_the_width_of_wide_heads_and_adamws_stays():
    assert [optimizer.peak("muon", size) for size in (64, 576, 5760)] == pytest.approx([4e-3, 4e-3, 4e-4])
    assert optimizer.peak("adamw", 64) == optimizer.peak("adamw", 5760)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 12])
def test_shares_that_both_round_up_give_each_step_one_rate(steps):
    """The last step of the warm-up is on its line, and nothing jumps."""
    for warmup, cooldown in ((0.5, 0.5), (0.3, 0.7), (0.9, 0.1), (0.0, 1.0)):
        rate = optimizer.schedule(1.0, warmup, steps, "wsd", cooldown)
        rising = max(1, round(warmup * steps)) if warmup else 0
        found = [rate(step) for step in range(steps)]
        line = [(step + 1) / (rising + 1) for step in range(min(rising, steps))]
        np.testing.assert_allclose(found[:rising], line, rtol=1e-6)
        assert (np.diff(found[rising:]) < 0).all()


@pytest.mark.parametrize("options", [{"ema": 0.9}, {"muon": frozenset({"block"}), "ema": 0.5}])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(options):
    """Steps 1 and 2 are skipped: what is left are the counts."""
    before, after = moved(1, **options), moved(3, bad=(1, 2), **options)
    equal(after[0], before[0])
    equal(optax.tree.get(after[1], "average"), optax.tree.get(before[1], "average"))
    for name in ("mu", "nu"):
        equal([x for _, x in optax.tree.get_all_with_path(after[1], name)],
              [x for _, x in optax.tree.get_all_with_path(before[1], name)])  # fmt: skip
    assert [int(x) for x in optimizer.skipped(after[1])] == [2, 2]
    assert not np.isfinite(optimizer.gradient_norm(after[1]))
    later = moved(4, bad=(1, 2), **options)
    assert [int(x) for x in optimizer.skipped(later[1])] == [2, 0]
    assert (later[0]["block"] != after[0]["block"]).all()


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradients_are():
    params, state, _ = moved(1, loss=jnp.inf)
    equal(params, tree(0))
    assert int(optimizer.skipped(state)[0]) == 1


def test_the_average_is_that_of_the_weights_after_every_step():
    after = [moved(steps, ema=0.3)[0] for steps in range(4)]
    average = after[0]
    for step, weights in enumerate(after[1:]):
        by = min(0.3, (1 + step) / (10 + step))
        average = jax.tree.map(lambda kept, x, by=by: by * kept + (1 - by) * x, average, weights)
    _, state, _ = moved(3, ema=0.3)
    for name, found in optimizer.weights(state, None).items():
        np.testing.assert_allclose(found, average[name], rtol=1e-5, atol=1e-6)
    equal(after[3], moved(3)[0])  # training itself is the same
    params = tree(4)
    assert optimizer.weights(moved(1)[1], params) is params


def test_what_stays_still_has_no_moments_and_counts_for_no_norm():
    params, state, _ = moved(still=frozenset({"lm_head"}))
    equal(params["lm_head"], tree(0)["lm_head"])
    assert (params["block"] != tree(0)["block"]).all()
    sizes = [x.size for x in jax.tree.leaves(state)]
    assert sum(sizes) < 2 * sum(np.prod(s) for n, s in SHAPES.items() if n != "lm_head") + 20
    norm = optax.tree.norm({n: x for n, x in tree(12).items() if n != "lm_head"})
    np.testing.assert_allclose(optimizer.gradient_norm(state), norm, rtol=1e-6)


def test_muon_moves_a_matrix_by_as_much_in_every_direction():
    names = frozenset({"block", "wide"})
    params, _, updates = moved(1, muon=names)
    adam = moved(1)
    for name in names:
        singular = np.linalg.svd(np.asarray(updates[name]), compute_uv=False)
        assert singular.max() < 2 * singular.min()  # Newton-Schulz ends between 0.7 and 1.2
        assert 0.6 < np.sqrt(np.square(updates[name]).mean()) / (0.1 * 0.2) < 1.3  # of the rate, as Adam's
    equal([params["lm_head"], params["norm"]], [adam[0]["lm_head"], adam[0]["norm"]])


def test_muon_sees_a_matrix_in_its_units():
    units = {"block": jnp.array([1.0, 10.0, 0.1, 1.0])}
    _, _, plain = moved(1, muon=frozenset({"block"}))
    _, _, scaled = moved(1, muon=frozenset({"block"}), units=units)
    singular = np.linalg.svd(np.asarray(scaled["block"]) * np.asarray(units["block"]), compute_uv=False)
    assert singular.max() < 2 * singular.min()
    assert np.abs(scaled["block"] - plain["block"]).max() > 1e-3


def test_options_of_the_optimiser_that_would_do_nothing_are_refused():
    for changed, match in (
        ({"cooldown": 0.3}, "cooldown=0.3 has no meaning with schedule=cosine"),
        ({"schedule": "wsd", "warmup": 0.9}, "are more than all steps"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"optimizer": "sgd"}, "use one of adamw, muon"),
        ({"patience": 0}, "patience=0"),
        ({"batch_rows": 6, "dp": 2, "accumulate": 2}, "accumulate=2 must divide the rows of a chip"),
    ):
        with pytest.raises(ValueError, match=match):
            TrainConfig(store="s", out="o", **changed)
