"""A store of int8 states has one scale a channel, whoever writes its blocks and whenever."""

import base64
import os
import signal
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from common import safetensors, storage
from common.channels import decode_channels
from common.codec import decode_states
from common.errors import EyasError
from common.store import Store
from common.store_verify import verify
from dump import channels
from dump import dump as stage
from dump import plan as planning
from dump.dump import run
from tests.dump import tiny
from tests.dump.tiny import ROWS, contents


@pytest.fixture
def small(config):
    return replace(config, precision="int8", logits="none", topk=64)


def read(url: str):
    """(the states, what one step of the integers is at each of their values), of documents."""
    store = Store.open(url)
    features = store.features
    shapes = {"aux_hidden": (len(features["aux_layers"]), tiny.H), "last_hidden": (tiny.H,)}
    of_channel = decode_channels(features["channels"], shapes)
    found = store.read([*features["arrays"], "segment_ids"], np.arange(ROWS))
    real = found.pop("segment_ids") > 0
    scales = {name: found[name.replace("hidden", "scale")][real] for name in shapes}
    steps = {name: scales[name][..., None] * of_channel[name] for name in shapes}
    return {name: x[real] for name, x in decode_states(found, of_channel).items()}, steps


def changed(lines: list[str]) -> list[str]:
    """Other scales: the first is half of what it was."""
    exponents = np.frombuffer(base64.b64decode("".join(lines)), np.int8).copy()
    exponents[0] -= 1
    return [base64.b64encode(exponents.tobytes()).decode()]


def test_states_are_within_half_a_step_of_those_in_float32(small, tmp_path):
    exact = replace(small, store=f"{tmp_path}/exact", precision="float32")
    os.system(f"cp -r {small.store} {exact.store}")
    run(small)
    run(exact)
    assert verify(small.store)["damaged"] == []
    found, steps = read(small.store)
    store = Store.open(exact.store)
    want = store.read(["aux_hidden", "last_hidden", "argmax", "segment_ids"], np.arange(ROWS))
    real = want["segment_ids"] > 0
    for name in ("aux_hidden", "last_hidden"):
        assert (np.abs(found[name] - want[name][real]) <= 0.501 * steps[name]).all()
        assert Store.open(small.store).row_bytes(name) * 4 == store.row_bytes(name)
    np.testing.assert_array_equal(found["argmax"], want["argmax"][real])


def test_a_resumed_dump_divides_by_the_same_scales(small, monkeypatch):
    run(small)
    before = contents(small.store)
    for name in ("000000.json", "000002.json"):
        os.unlink(f"{small.store}/commits/{name}")
    os.unlink(f"{small.store}/features/last_hidden/c/0/0/0")
    monkeypatch.setattr(stage, "find_channels", lambda *_: pytest.fail("found anew"))
    run(small)
    assert contents(small.store) == before


def test_of_two_that_begin_at_once_the_first_ones_scales_hold(small, monkeypatch):
    """The second has found others, by a rounding, when it comes to the manifest."""
    find = stage.find_channels

    def slower(*given):
        found = find(*given)
        monkeypatch.setattr(stage, "find_channels", find)
        run(replace(small, share="1/2"))
        return {name: changed(lines) for name, lines in found.items()}

    monkeypatch.setattr(stage, "find_channels", slower)
    run(replace(small, share="2/2"))
    found = contents(small.store)
    again = replace(small, store=f"{small.store}-again")
    tiny.write_store(again.store, small.model, ROWS)
    run(again)
    assert {n: x for n, x in contents(again.store).items() if "commits" not in n} == {
        n: x for n, x in found.items() if "commits" not in n
    }


def test_a_changed_scale_is_found(small):
    run(small)
    place = f"{small.store}/manifest.json"
    manifest = storage.read_json(place)
    stored = manifest["features"]["channels"]
    stored["aux_hidden"] = changed(stored["aux_hidden"])
    storage.write_json(place, manifest)
    assert any("another manifest" in line for line in verify(small.store)["damaged"])
    with pytest.raises(EyasError, match="another manifest"):
        Store.open(small.store).read(["aux_hidden"], [0])


def test_states_whose_squares_are_not_finite_have_scales_too(small):
    weights = f"{small.model}/model.safetensors"
    tensors = safetensors.from_bytes(storage.read_bytes(weights))
    tensors["model.embed_tokens.weight"] = np.full_like(tensors["model.embed_tokens.weight"], 1e30)
    storage.write_bytes(weights, safetensors.to_bytes(tensors))
    run(small)
    assert verify(small.store)["damaged"] == []


def test_a_request_to_stop_is_heard_while_scales_are_found(small, monkeypatch):
    """Before the store has a manifest of features; the same command makes what one left alone makes."""
    small, before, read, batches = (
        replace(small, chip_tokens=tiny.T),
        contents(small.store),
        channels._inputs,
        [],
    )

    def asked(*given):
        batches.append(given)
        os.kill(os.getpid(), signal.SIGTERM)
        return read(*given)

    with monkeypatch.context() as patch:
        patch.setattr(channels, "_inputs", asked)
        with pytest.raises(EyasError, match=r"dump stopped; .*continue with the same command") as stopped:
            run(small)
    assert (len(batches), stopped.value.exit_code, contents(small.store)) == (1, 42, before)
    run(small)
    assert verify(small.store)["damaged"] == []


def test_states_that_are_not_finite_have_no_scales(small):
    weights = f"{small.model}/model.safetensors"
    tensors = safetensors.from_bytes(storage.read_bytes(weights))
    tensors["model.layers.1.mlp.down_proj.weight"] = np.full_like(
        tensors["model.layers.1.mlp.down_proj.weight"], np.inf
    )
    storage.write_bytes(weights, safetensors.to_bytes(tensors))
    before = contents(small.store)
    with pytest.raises(EyasError, match=r"states .* are not finite; check the weights"):
        run(small)
    assert contents(small.store) == before


def test_the_last_state_can_be_left_out_beside_the_largest_logits(config):
    run(replace(config, precision="int8", last_hidden="none"))
    features = Store.open(config.store).features
    assert set(features["arrays"]) == {
        *("aux_hidden", "aux_scale", "argmax", "logsumexp", "topk_logprobs", "topk_ids")
    }
    assert "last_hidden" not in features
    assert set(features["channels"]) == {"aux_hidden"}
    assert verify(config.store)["damaged"] == []
    with pytest.raises(EyasError, match=r"was dumped otherwise: .*last_hidden"):
        run(replace(config, precision="int8"))


def test_the_last_state_of_the_first_blocks_alone(config, monkeypatch):
    """What is there is what a whole store has; a dump that goes on writes the same, and damage is found."""
    monkeypatch.setattr(planning, "fit_rows", lambda *_: 1)
    run(replace(config, precision="int8", last_hidden="first"))
    store, size = Store.open(config.store), config.block_rows
    assert verify(config.store)["damaged"] == []
    assert store.rows_with("last_hidden") == store.rows_with("last_scale") == size < store.rows
    assert "last_hidden" in store.commit(0)["crc32c"]
    assert "last_hidden" not in store.commit(1)["crc32c"]
    store.read(["last_hidden"], [0, size - 1])
    with pytest.raises(
        EyasError, match=rf"has last_hidden of rows 0 to {size - 1}; row {size} was asked for"
    ):
        store.read(["last_hidden"], [0, size])
    before = contents(config.store)
    for name in ("000000.json", "000001.json"):
        os.unlink(f"{config.store}/commits/{name}")
    run(replace(config, precision="int8", last_hidden="first"))
    assert contents(config.store) == before
    with pytest.raises(EyasError, match=r"was dumped otherwise: .*last_hidden"):
        run(replace(config, precision="int8"))
    os.unlink(f"{config.store}/features/last_scale/c/0/0")
    assert any("last_scale" in line for line in verify(config.store)["damaged"])


def test_scales_are_those_of_the_first_rows_on_any_mesh(small, tmp_path):
    other = replace(small, store=f"{tmp_path}/other", dp=2, tp=2)
    os.system(f"cp -r {small.store} {other.store}")
    run(small)
    run(other)
    one, two = (Store.open(x.store).features["channels"] for x in (small, other))
    assert one == two
    assert jnp.dtype("int8") == Store.open(small.store).read(["aux_hidden"], [0])["aux_hidden"].dtype
