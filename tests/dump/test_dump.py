"""A dump writes what the target computes."""

import os
from dataclasses import replace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from common import storage
from common.errors import EyasError
from common.mesh import make_mesh
from common.store import Store
from common.store_verify import verify
from dump import plan as planning
from dump import target
from dump.dump import DumpConfig, run
from dump.prefill import Prefill
from dump.rounds import Discard, run_rounds
from tests.dump import tiny
from tests.dump.tiny import ROWS, contents


def expected(config: DumpConfig, rows: np.ndarray):
    """(aux, last, logits) of the rows in f32, straight from the target's functions."""
    cfg = target.read_config(config.model)
    weights = target.load(config.model, cfg, make_mesh(), jnp.float32)
    inputs = Store.open(config.store).read(("tokens", "segment_ids", "positions"), rows)
    aux, last = target.forward(cfg, weights, *map(jnp.asarray, inputs.values()), (2, 4, 5))
    return (
        np.asarray(aux),
        np.asarray(last),
        np.asarray(target.logits(cfg, weights, last)),
    )


def test_store_holds_what_the_target_computes(config):
    config = replace(config, precision="float32")
    found = run(config)
    assert (found["rows"], found["blocks"], found["blocks_before"]) == (ROWS, 3, 0)
    store = Store.open(config.store)
    store.require_complete()
    assert verify(config.store)["damaged"] == []
    rows = np.array([10, 3, 0, 7])  # of three blocks, the last one short
    aux, last, logits = expected(config, rows)
    got = store.read(list(store.features["arrays"]), rows)
    real = store.read(["segment_ids"], rows)["segment_ids"] > 0
    near = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(got["aux_hidden"][real], aux[real], **near)
    np.testing.assert_allclose(got["last_hidden"][real], last[real], **near)
    np.testing.assert_array_equal(got["argmax"][real], logits.argmax(-1)[real])
    np.testing.assert_array_equal(got["topk_ids"][..., 0], got["argmax"])
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(got["topk_logprobs"][real], -np.sort(-logp, -1)[real][:, :4], rtol=1e-3)
    # Positions restart, and every one but the padding is a token of the marker's count.
    assert store.commit(2)["tokens"] == 3 * (tiny.T - 2)
    # The logits are a function of the store alone.
    head = store.target_tensor("lm_head").astype(np.float64)
    again = np.log(np.exp(got["last_hidden"].astype(np.float64) @ head.T).sum(-1))
    np.testing.assert_allclose(got["logsumexp"], again, rtol=1e-5)
    assert store.target_config()["architectures"] == ["LlamaForCausalLM"]
    store.require_target(store.features["target"]["config_hash"])


def test_a_packed_document_gives_what_it_gives_alone(config, tmp_path):
    run(config)
    alone = replace(config, store=tiny.write_store(f"{tmp_path}/alone", config.model, ROWS, alone=True))
    run(alone)
    packed, apart = Store.open(config.store), Store.open(alone.store)
    names = list(packed.features["arrays"])
    got, wanted = packed.read(names, np.arange(ROWS)), apart.read(names, np.arange(2 * ROWS))
    cut, end = tiny.T // 2 - 3, tiny.T - 2
    for name in names:
        near = {"rtol": 2e-3, "atol": 2e-3} if name == "topk_logprobs" else {"rtol": 1e-5, "atol": 1e-5}
        np.testing.assert_allclose(got[name][:, :cut], wanted[name][:ROWS, :cut], **near)
        np.testing.assert_allclose(got[name][:, cut:end], wanted[name][ROWS:, : end - cut], **near)


def test_mesh_precision_and_other_codecs(config, tmp_path):
    """A (2, 2) mesh, float8 states and draft logits, against f32 of one device."""
    mixed = replace(config, dp=2, tp=2, precision="float8_e4m3fn", logits="draft", draft_vocab=10, topk=64)
    run(mixed)
    store = Store.open(mixed.store)
    aux, last, logits = expected(config, np.arange(ROWS))
    got = store.read(list(store.features["arrays"]), np.arange(ROWS))
    assert got["last_hidden"].dtype == ml_dtypes.float8_e4m3fn
    back = got["last_hidden"].astype(np.float32) * got["last_scale"][..., None]
    real = store.read(["segment_ids"], np.arange(ROWS))["segment_ids"] > 0
    assert np.abs(back - last)[real].max() < np.abs(last).max() / 14
    back = got["aux_hidden"].astype(np.float32) * got["aux_scale"][..., None]
    assert np.abs(back - aux)[real].max() < np.abs(aux).max() / 14
    ids = store.draft_ids()
    assert verify(mixed.store)["damaged"] == []
    for path in ("c/0", "zarr.json"):
        os.rename(f"{mixed.store}/features/draft_ids/{path}", f"{tmp_path}/aside")
        assert any("draft_ids" in line for line in verify(mixed.store)["damaged"])
        run(mixed)
        assert verify(mixed.store)["damaged"] == []
    assert ids.tolist() == sorted(np.argsort(-store.token_counts(), kind="stable")[:10])
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(got["draft_logprobs"][real], logp[real][:, ids], rtol=1e-3)
    np.testing.assert_array_equal(got["argmax"][real], logits.argmax(-1)[real])


def test_tied_target_and_full_logits(tmp_path):
    model = tiny.write_model(f"{tmp_path}/model", tied=True)
    config = DumpConfig(
        model, tiny.write_store(f"{tmp_path}/store", model, 3), logits="full", dtype="bfloat16"
    )
    run(config)
    store = Store.open(config.store)
    np.testing.assert_array_equal(store.target_tensor("lm_head"), store.target_tensor("embed_tokens"))
    got = store.read(["full_logprobs", "argmax"], [2])
    assert got["full_logprobs"].shape == (1, tiny.T, tiny.V)
    assert got["full_logprobs"].dtype == np.float16
    at = np.take_along_axis(got["full_logprobs"], got["argmax"][..., None], -1)[..., 0]
    np.testing.assert_array_equal(at, got["full_logprobs"].max(-1))
    np.testing.assert_allclose(np.exp(got["full_logprobs"].astype(np.float32)).sum(-1), 1, rtol=1e-3)


def test_forward_passes_can_be_timed_without_writing(config):
    plan = planning.make_plan(config)
    weights = target.load(config.model, plan.target, plan.mesh, jnp.float32)
    before = contents(config.store)
    run_rounds(plan, Prefill(plan, weights), Discard())
    assert contents(config.store) == before


def test_numbers_that_are_not_finite_are_refused(config):
    weights = f"{config.model}/model.safetensors"
    data = bytearray(storage.read_bytes(weights))
    data[-4:] = np.float32(np.nan).tobytes()
    storage.write_bytes(weights, bytes(data))
    with pytest.raises(EyasError, match=r"states \(last_hidden\) are not finite"):
        run(replace(config, precision="int8"))
    with pytest.raises(EyasError, match="row 0: the target's logits are not finite"):
        run(replace(config, precision="float32"))
