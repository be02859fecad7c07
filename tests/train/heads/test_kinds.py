"""P-EAGLE, DFlash and MTP, small: each is its package, and does all that a head does."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import safetensors, storage
from common.errors import EyasError
from common.params import initialise
from tests.train import small_run, small_store
from tests.train.heads import kinds, mtp, reference
from tests.train.reference import directional_derivative
from tests.train.small_run import lines_of
from train import check_export, placing
from train.config import EvaluateConfig
from train.evaluate import estimate
from train.order import listed
from train.planning import make_plan
from train.run import run
from train.source import Source
from train.step import gradient
from train.stream import Stream, View
from train.sweep import run as sweep
from train.targets import counted_targets

STEPS, DECAY, ROWS, IDS = 3, 0.8, np.array([[0, 1, 3, 4]]), np.arange(0, 60)
REFERENCE = {"mtp": reference.mtp, "p-eagle": reference.peagle, "dflash": reference.dflash}


@pytest.fixture(autouse=True)
def other_kinds(monkeypatch):
    kinds.register(monkeypatch)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return small_store.write_store(str(tmp_path_factory.mktemp("kinds") / "store"))


def head_of(kind, source):
    return kinds.ALL[kind][1].for_target(source.store.target_config(), len(IDS), small_store.AUX_LAYERS)


def weights_of(head):
    params = initialise(head.parameters(), jax.random.key(1))
    return {n: 12 * np.asarray(x) if x.ndim > 1 else np.asarray(x) for n, x in params.items()}


def trained(url, kind, dp=1, sp=1, parts=1, anchors=1.0):
    """((loss, by step, right), gradients, batch) of the first rows."""
    source = Source(url, dp, sp=sp)
    head = head_of(kind, source)
    params = weights_of(head)
    where = placing.along(params, head.parameters(), source.mesh)
    params = jax.tree.map(placing.place, params, where)
    workload, shares = source.workload(STEPS), head.shares(anchors, STEPS)
    room = workload.capacity(ROWS, dp * parts, shares)
    view = View(listed(ROWS), workload, room, "recompute", IDS, head.inputs, parts, shares, seed=3)
    frozen = source.frozen(IDS, "recompute", jnp.float32)
    step = jax.jit(gradient(head, source.mesh, STEPS, DECAY, jnp.float32, shares=shares))
    (((_, batch),),) = Stream(source.store, source.mesh, [view]).batches()
    return *jax.device_get(step(params, frozen, batch)), batch


def taught_at(batch, shape):
    """bool [K, B, T]: the targets of every step."""
    found = np.zeros((STEPS, *shape), bool)
    parts = {0: {"targets": batch.targets}} | (batch.samples or {})
    for first, part in parts.items():
        targets = np.asarray(part["targets"])
        found[first:] = False
        found[first:].reshape(STEPS - first, -1)[:, targets[targets < found[0].size]] = True
    return found


@pytest.mark.slow
@pytest.mark.parametrize("anchors", [1.0, 0.5])
@pytest.mark.parametrize("kind", kinds.ALL)
def test_losses_and_gradients_are_those_of_a_reference_in_float64(url, kind, anchors):
    (total, loss_K, _), gradients, batch = trained(url, kind, anchors=anchors)
    source = Source(url)
    head, store = head_of(kind, source), source.store
    names = ("tokens", "segment_ids", "loss_mask", "aux_hidden", "last_hidden", "argmax")
    rows = {n: x.astype(np.float64) if "hidden" in n else x for n, x in store.read(names, ROWS[0]).items()}
    target = [store.target_tensor(name).astype(np.float64) for name in ("embed_tokens", "lm_head")]
    counted, segments = counted_targets(rows["segment_ids"], rows["loss_mask"]), rows["segment_ids"]
    known = np.isin(rows["argmax"], IDS)
    counts, shares = [], head.shares(anchors, STEPS)
    for k in range(STEPS):
        there = counted.copy()
        there[:, : k + 1] = False
        there[:, k + 1 :] &= segments[:, k + 1 :] == segments[:, : -k - 1]
        counts.append((there & known).sum() * shares[k])
    taught = taught_at(batch, counted.shape)
    assert [taught[k].sum() < counted.sum() for k in range(STEPS)] == [share < 1 for share in shares]
    masks = () if kind == "mtp" else (target[0][1],)
    about = rows, taught, counts, DECAY, target, IDS, masks
    params = {name: x.astype(np.float64) for name, x in weights_of(head).items()}
    wanted, by_step = reference.losses(REFERENCE[kind], head, params, *about)
    np.testing.assert_allclose(loss_K, by_step, rtol=2e-5)
    np.testing.assert_allclose(total, wanted, rtol=2e-5)
    rng = np.random.default_rng(0)
    direction = {name: rng.normal(size=x.shape) / x.size**0.5 for name, x in gradients.items()}
    slope = sum((gradients[name] * x).sum() for name, x in direction.items())

    def loss(moved):
        return reference.losses(REFERENCE[kind], head, moved, *about)[0]

    size = sum(np.linalg.norm(x) for x in gradients.values())
    assert abs(slope - directional_derivative(loss, params, direction)) < 1e-4 * size


@pytest.mark.slow
@pytest.mark.parametrize("anchors", [1.0, 0.5])
@pytest.mark.parametrize("kind", kinds.ALL)
def test_it_is_the_same_on_other_chips_and_in_parts(url, kind, anchors):
    *expected, _ = trained(url, kind, anchors=anchors)
    for layout in ({"dp": 2, "sp": 2}, {"dp": 2, "parts": 2}):
        *found, _ = trained(url, kind, anchors=anchors, **layout)
        for some, whole in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(some, whole, rtol=5e-4, atol=5e-6)


def config(url, out, kind, **changes):
    settings = {"steps": 12, "batch_rows": 4, "ttt_steps": STEPS, "draft_vocab": 48, "learning_rate": 1e-2}
    settings |= {"optimizer": "adamw", "eval_every": 6, "log_every": 1, "kind": kind}
    return kinds.Config(url, str(out), **settings | changes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds.ALL)
def test_it_trains_goes_on_is_exported_and_is_trained_on(url, tmp_path, kind):
    first = config(url, tmp_path / "run", kind, anchors=0.5, accumulate=2, steps=40, save_every=7)
    run(first)
    losses = [line["loss"] for line in lines_of(tmp_path / "run") if "loss" in line]
    assert np.mean(losses[-5:]) < 0.95 * losses[0]
    best = f"{tmp_path}/run/best"
    assert check_export.check(best, small_store.TARGET)
    figures = estimate(Source(url), EvaluateConfig(best, url, STEPS))
    lengths = [x["evaluation"]["length_greedy"] for x in lines_of(tmp_path / "run") if "evaluation" in x]
    assert figures["length_greedy"] == pytest.approx(max(lengths), rel=2e-2)  # in bfloat16
    on = replace(first, out=str(tmp_path / "on"), init=best, steps=1, learning_rate=1e-9, draft_vocab=None)
    run(on)
    for name, weight in small_run.weights_of(tmp_path / "on").items():
        expected = small_run.weights_of(tmp_path / "run", "best")[name]
        np.testing.assert_allclose(weight, expected, rtol=1e-2, atol=1e-6)
    whole = small_run.weights_of(tmp_path / "run")
    newest = sorted((tmp_path / "run" / "state").iterdir(), key=lambda place: int(place.name))[1:]
    assert newest
    for place in newest:
        shutil.rmtree(place)
    run(first)
    jax.tree.map(np.testing.assert_array_equal, small_run.weights_of(tmp_path / "run"), whole)


@pytest.mark.slow
def test_heads_of_all_kinds_from_one_stream_are_those_of_runs_alone(url, tmp_path):
    """Each reads other states of a row, and computes other samples of it."""
    every = ("eagle3", *kinds.ALL)
    heads = {kind: config(url, tmp_path / "all" / kind, kind, anchors=0.5, noise=0.0) for kind in every}
    sweep(heads, str(tmp_path / "all"))
    for kind in every:
        run(replace(heads[kind], out=str(tmp_path / kind)))
        small_run.assert_same_run(tmp_path / kind, tmp_path / "all" / kind)


def test_more_tokens_than_a_block_has_masks_are_refused(url, tmp_path):
    with pytest.raises(EyasError, match="drafts 4 tokens at most, and not 5"):
        make_plan(config(url, tmp_path / "run", "dflash", ttt_steps=5))


@pytest.mark.slow
def test_weights_of_a_targets_own_checkpoint_begin_a_head(url, tmp_path):
    """Its output is the target's, of the whole vocabulary."""
    head = head_of("mtp", Source(url))
    whole = replace(head, draft_vocab_size=head.vocab_size)
    rng, its = np.random.default_rng(0), {}
    for name, declared in whole.parameters().items():
        known = mtp._OF_TARGET.get(name)
        its[f"model.layers.8.{known}.weight" if known else "lm_head.weight"] = rng.normal(size=declared.shape)
    its = {name: x.astype(np.float32) for name, x in its.items()}
    store = Source(url).store
    its |= {
        "model.embed_tokens.weight": store.target_tensor("embed_tokens"),
        "model.norm.weight": np.ones(16),
    }
    folder = tmp_path / "target"
    folder.mkdir()
    safetensors.write(f"{folder}/model.safetensors", its)
    storage.write_json(f"{folder}/config.json", small_store.TARGET | {"num_nextn_predict_layers": 1})
    asked = {"init": str(folder), "draft_vocab": None}
    made = make_plan(config(url, tmp_path / "run", "mtp", **asked))
    found = made.published.weights()
    np.testing.assert_array_equal(found["join"], its["model.layers.8.eh_proj.weight"])
    assert made.head.draft_vocab_size == small_store.V
    run(config(url, tmp_path / "run", "mtp", **asked, steps=1))
    with pytest.raises(EyasError, match="give --kind eagle3 or mtp"):
        make_plan(config(url, tmp_path / "run", "p-eagle", **asked))
