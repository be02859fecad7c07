"""A fitted head already predicts what follows linearly from its inputs; units undo the features' sizes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.errors import EyasError
from common.mesh import make_mesh
from common.store import Store
from tests.train import small_store
from train import optimizer, sample
from train.evaluate import Evaluator
from train.heads.eagle3.head import Eagle3
from train.heads.eagle3.start import halves
from train.init import start
from train.sample import measure
from train.source import Source
from train.targets import counted_targets
from train.workload import Workload

IDS = np.arange(small_store.V, dtype=np.int32)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store.open(small_store.write_store(str(tmp_path_factory.mktemp("start") / "store"), rows=60))


@pytest.fixture(scope="module")
def head(store):
    return Eagle3.for_target(store.target_config(), len(IDS), small_store.AUX_LAYERS)


def measured(store, head, fitted, chips=1):
    mesh, source = make_mesh(chips), Source(store.url, chips)
    embed = source.embed(jnp.float32) if fitted else None
    rows = store.split_rows("train")
    return measure(store, mesh, Workload(store, rows, 1), rows, embed, head.rms_eps, head.inputs)


def made(store, head, init, seed=0, chips=1):
    rows = Source(store.url, chips).rows_of(head.rows_of, IDS, jnp.float32)
    known = measured(store, head, init == "fitted", chips)
    return start(head, make_mesh(chips), known, rows, init, seed)


def test_a_fitted_head_is_better_than_an_untrained_one(store, head):
    """The made-up target's next state is a function of the current token, so a linear map comes near."""
    source = Source(store.url)
    evaluator = Evaluator(source, head, IDS, 1, 4, jnp.float32)
    taught = source.frozen(IDS, "recompute", jnp.float32)
    acc = {i: evaluator(made(store, head, i), taught)["acc"][0] for i in ("fitted", "target", "normal")}
    assert acc["fitted"] > 0.2 > 2 * max(acc["target"], acc["normal"])


def test_a_store_of_states_that_are_not_finite_is_refused(store, head, monkeypatch):
    read = Store.read

    def overflown(self, names, rows):
        found = read(self, names, rows)
        if "aux_hidden" in found:
            found["aux_hidden"][0, 2] = np.inf
        return found

    monkeypatch.setattr(Store, "read", overflown)
    with pytest.raises(EyasError, match=r"store: aux states of its rows are not finite.*dump them anew"):
        measured(store, head, fitted=False)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [{"fc_norm": True}, {"layers": 2, "norm_before_residual": True}])
def test_other_kinds_of_eagle3_begin_as_well(store, variant):
    head = Eagle3.for_target(store.target_config(), len(IDS), small_store.AUX_LAYERS, **variant)
    source = Source(store.url)
    evaluator, taught = (
        Evaluator(source, head, IDS, 1, 4, jnp.float32),
        source.frozen(IDS, "recompute", "float32"),
    )
    assert evaluator(made(store, head, "fitted"), taught)["acc"][0] > 0.2


def test_heads_of_keys_that_serve_unequal_numbers_of_heads_are_refused(store):
    with pytest.raises(EyasError, match=r"num_kv_heads=3, but the head has 4 heads .* give one of 1, 2, 4$"):
        Eagle3.for_target(store.target_config(), len(IDS), small_store.AUX_LAYERS, num_kv_heads=3)


@pytest.mark.parametrize(("kind", "tensor"), [("frozen", "lm_head"), ("tied", "embed_tokens")])
def test_an_output_that_is_not_trained_is_the_targets_in_any_case(store, kind, tensor):
    head = Eagle3.for_target(store.target_config(), len(IDS), small_store.AUX_LAYERS, lm_head=kind)
    rows = store.target_tensor(tensor)[IDS]
    np.testing.assert_array_equal(made(store, head, "normal")["lm_head.weight"], rows)
    assert head.still() == {"lm_head.weight"}


def test_a_fitted_head_is_as_sure_as_it_is_right(store):
    """Its loss rises when its logits shrink by half or double; values have full rank, as in the fit."""
    given = len(IDS), small_store.AUX_LAYERS
    head = Eagle3.for_target(store.target_config(), *given, num_kv_heads=4)
    assert head.num_kv_heads * head.head_dim == small_store.H
    source = Source(store.url)
    evaluator = Evaluator(source, head, IDS, 1, 4, jnp.float32)
    taught = source.frozen(IDS, "recompute", jnp.float32)
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
    found = store.read(("segment_ids", "aux_hidden"), store.split_rows("train"))
    aux = found["aux_hidden"][found["segment_ids"] > 0].reshape(-1, 3 * small_store.H)
    known = measured(store, head, fitted=False)
    np.testing.assert_allclose(known.units_A, np.sqrt((aux**2).mean(0)), rtol=1e-5)
    np.testing.assert_array_equal(head.units(known)["fc.weight"], 3 * known.units_A)


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


def test_rows_without_answers_give_a_head_too(tmp_path, head, capsys):
    store = Store.open(small_store.write_store(str(tmp_path / "store"), mask=0))
    fitted, target = (made(store, head, init) for init in ("fitted", "target"))
    for name, weight in target.items():
        np.testing.assert_array_equal(fitted[name], weight, err_msg=name)
    assert "starts without a fit" in capsys.readouterr().err


def test_the_sample_is_of_rows_that_count(store, head, monkeypatch):
    """All rows but one have no answer, and the sample is of one row."""
    rows = store.split_rows("train")
    mask = store.read(("loss_mask",), np.arange(store.rows))["loss_mask"].copy()
    mask[rows[1:]] = 0
    read = store.read

    def edited(names, wanted):
        changed = {"loss_mask": mask[np.asarray(wanted)]} if "loss_mask" in names else {}
        return dict(read(names, wanted)) | changed

    monkeypatch.setattr(store, "read", edited)
    monkeypatch.setattr(sample, "_POSITIONS", small_store.T)
    monkeypatch.setattr(sample, "fit_rows", lambda *_: 0)
    fit = measured(store, head, fitted=True).fit
    assert np.isfinite(fit.map_XH).all()
    assert np.abs(fit.map_XH).max() > 0


def test_a_sample_of_rows_that_do_not_fill_the_chips_is_done_at_its_end(store, head, capsys):
    """What is counted is what was announced."""
    rows, mesh = store.split_rows("train")[:37], make_mesh(4)
    measure(store, mesh, Workload(store, rows, 1), rows, None, head.rms_eps, head.inputs)
    assert "sample: 100%" in capsys.readouterr().err


def test_units_are_data_of_the_program_and_no_constants(store, head):
    known = measured(store, head, fitted=False)
    params = made(store, head, "normal")
    programs = []
    for factor in (1, 3):
        units = {name: factor * unit for name, unit in head.units(known).items()}
        adamw = optimizer.make(optax.constant_schedule(0.1), 0.5, (0.9, 0.99), 0.1, units)
        with jax.numpy_dtype_promotion("standard"):
            programs.append(jax.jit(adamw.update).lower(params, adamw.init(params), params).as_text())
    assert programs[0] == programs[1]


def test_a_head_made_on_four_chips_lies_divided_and_is_that_of_one_chip(store, head):
    alone, spread = (made(store, head, "fitted", chips=chips) for chips in (1, 4))
    for name, weight in spread.items():
        scale = float(jnp.abs(alone[name]).max()) + 1e-6
        np.testing.assert_allclose(weight, alone[name], atol=2e-3 * scale, err_msg=name)
        held = {shard.data.size for shard in weight.addressable_shards}
        assert held == {weight.size // 4 if weight.ndim > 1 else weight.size}, name


@pytest.mark.parametrize("rank", [5, 40])
def test_halves_are_the_best_approximation_of_their_rank_and_equally_large(rank):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(40, 40)))[0] for _ in range(2))
    size = 2.0 ** -np.arange(40.0)
    matrix = jnp.asarray((left * size) @ right, jnp.float32)
    back, into = halves(matrix, rank, jax.random.key(0))
    best = (left[:, :rank] * size[:rank]) @ right[:rank]
    np.testing.assert_allclose(back @ into, best, atol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(back[:, :5], axis=0), np.linalg.norm(into[:5], axis=1), rtol=1e-3
    )


def told(store, monkeypatch, share):
    """(inputs of a linear prediction, last states) of train rows' targets and of test rows'. Of the last
    states, which the store then has, `share` is a linear function of the inputs and the rest is noise."""
    found = store.read(("tokens", "segment_ids", "loss_mask", "aux_hidden"), np.arange(store.rows))
    rng, H = np.random.default_rng(1), small_store.H
    token = store.target_tensor("embed_tokens")[found["tokens"]]
    token = token / np.sqrt((token**2).mean(-1, keepdims=True))
    before = np.roll(found["aux_hidden"].reshape(*token.shape[:2], -1), 1, 1)
    inputs = np.concatenate([before, token], -1)
    signal = inputs @ rng.normal(size=(4 * H, H)) / np.sqrt(4 * H)
    last = np.sqrt(share) * signal + np.sqrt(1 - share) * rng.normal(size=signal.shape)
    last = (last * rng.uniform(0.1, 10, H)).astype(np.float32)  # dimensions of very unlike sizes
    read = Store.read

    def edited(self, names, rows):
        changed = {"last_hidden": last[np.asarray(rows)]} if "last_hidden" in names else {}
        return dict(read(self, names, rows)) | changed

    monkeypatch.setattr(Store, "read", edited)
    counts = counted_targets(found["segment_ids"], found["loss_mask"])
    counts[:, 1:] &= found["segment_ids"][:, 1:] == found["segment_ids"][:, :-1]
    counts[:, 0] = False
    parts = [(rows, counts[rows]) for rows in map(store.split_rows, ("train", "test"))]
    return [(inputs[rows][here], last[rows][here]) for rows, here in parts]


def explained(predicted, last, size):
    """(R² after the best rescaling, that rescaling) of predictions of states in units of their size."""
    both, own = ((predicted / size * x).sum() for x in (last / size, predicted / size))
    return both**2 / own / ((last / size) ** 2).sum(), both / own


@pytest.mark.parametrize("share", [0.9, 0.4])
def test_a_fit_tells_what_can_be_told_as_surely_as_it_is_right(store, head, monkeypatch, share):
    """Of rows that it has not seen, as much as the best ridge regression of all the others; no row is lost
    for having been kept out, and what it says is neither too large nor too small."""
    (inputs, last), (others, truth) = told(store, monkeypatch, share)
    fit, size = measured(store, head, fitted=True).fit, np.sqrt((last**2).mean(0))
    found = others @ np.asarray(fit.map_XH)
    found = found / np.sqrt((found**2).mean(1, keepdims=True)) * np.asarray(fit.scale_H)
    scaled = inputs / np.sqrt((inputs**2).sum(0))
    by_ridge = []
    for ridge in np.geomspace(1e-3, 1, 20):
        solved = np.linalg.solve(scaled.T @ scaled + ridge * np.eye(scaled.shape[1]), scaled.T @ last)
        best = others / np.sqrt((inputs**2).sum(0)) @ solved
        best = best / size / np.sqrt(((best / size) ** 2).mean(1, keepdims=True)) * size
        by_ridge.append(explained(best, truth, size)[0])
    part, times = explained(found, truth, size)
    assert share > part > 0.97 * max(by_ridge)
    assert times == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize("share", [0.9, 0.1])
def test_the_state_of_a_fitted_head_is_as_large_whatever_can_be_told(store, head, monkeypatch, share):
    """By it all that layers add in the first steps is measured: a small one is thrown back by them."""
    (inputs, _), _ = told(store, monkeypatch, share)
    head = replace(head, num_kv_heads=small_store.H // head.head_dim)  # for all of the token's part
    fit, made_of = measured(store, head, fitted=True).fit, made(store, head, "fitted")
    assert np.sqrt(((inputs @ np.asarray(fit.map_XH)) ** 2).mean()) == pytest.approx(1, rel=0.02)
    aux, token = np.split(inputs, [3 * small_store.H], 1)
    values = token @ np.asarray(made_of["midlayer.self_attn.v_proj.weight"])[:, : small_store.H].T
    values = np.repeat(
        values.reshape(len(token), -1, 1, head.head_dim), head.num_heads // head.num_kv_heads, 2
    )
    state = aux @ np.asarray(made_of["fc.weight"]).T
    state += values.reshape(len(token), -1) @ np.asarray(made_of["midlayer.self_attn.o_proj.weight"]).T
    assert np.sqrt((state**2).mean()) == pytest.approx(2, rel=0.02)
