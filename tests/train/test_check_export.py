"""The check names, in one line, whatever a server would stumble over in a head's folder."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.errors import EyasError
from tests.train.small_head import IDS, LLAMA3, TARGET, config_of, exported, made, tensors_of, without
from train.check_export import check
from train.export import export


@pytest.fixture
def folder(tmp_path):
    return exported(tmp_path / "head")


def _edit_config(**changes):
    def change(folder):
        config = config_of(folder) | changes
        config = {key: value for key, value in config.items() if value != "remove"}
        with open(f"{folder}/config.json", "w") as file:
            json.dump(config, file)

    return change


def _edit_tensors(change):
    def edit(folder):
        found = tensors_of(folder)
        found = {n: a.astype(np.float32) if a.dtype == np.float32 else np.array(a) for n, a in found.items()}
        save_file(change(found), f"{folder}/model.safetensors")
        _edit_config(torch_dtype="float32")(folder)

    return edit


def _cut(folder):
    with open(f"{folder}/model.safetensors", "r+b") as file:
        file.truncate(3000)


def _put(name):
    return lambda folder: open(f"{folder}/{name}", "wb").close()


def _nan(tensors):
    tensors["midlayer.mlp.up_proj.weight"][3, 4] = np.nan
    return tensors


def _unmark(tensors):
    tensors["t2d"][IDS[0]] = False
    return tensors


def _move_mark(tensors):
    tensors["t2d"][[IDS[0], np.setdiff1d(np.arange(61), IDS)[0]]] = False, True
    return tensors


AUX = "eagle_aux_hidden_state_layer_ids"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "config.json is missing"),
        (lambda folder: open(f"{folder}/config.json", "w").close(), "config.json is not JSON"),
        (
            lambda folder: shutil.move(f"{folder}/model.safetensors", f"{folder}/x"),
            "model.safetensors is missing",
        ),
        (_cut, "model.safetensors cannot be read"),
        (_put("pytorch_model.bin"), "pytorch_model.bin, a pickle"),
        (_put("modeling.py"), "modeling.py, code"),
        (_put("experiment.json"), r"is a run, which holds heads; name .*/best, or last"),
        (_put("adapter.safetensors"), "adapter.safetensors beside model.safetensors"),
        (
            _edit_config(norm_before_residual="remove"),
            "norm_before_residual is missing, expected true or false",
        ),
        (_edit_config(tie_word_embeddings=True), "tie_word_embeddings is True, expected False"),
        (_edit_config(num_hidden_layers=True), "num_hidden_layers is True, expected a positive integer"),
        (
            _edit_config(architectures=["LlamaForCausalLMEagle"]),
            "architectures is .*of no head that was exported here",
        ),
        (_edit_config(hidden_size="24"), "hidden_size is '24', expected a positive integer"),
        (_edit_config(rope_theta="remove"), "rope_theta is missing"),
        (
            _edit_config(rope_scaling={"factor": 2.0}),
            "rope_scaling is .*expected null or an object with rope_type",
        ),
        (_edit_config(torch_dtype="float64"), "torch_dtype is 'float64'"),
        (_edit_config(pad_token_id=61), "pad_token_id is 61, expected null or a token id"),
        (_edit_config(num_key_value_heads=4), "num_heads=6 is no multiple of num_kv_heads=4"),
        (_edit_config(target_hidden_size=48), "target_hidden_size is 48"),
        (_edit_config(torch_dtype=["float32"]), "torch_dtype is"),
        (_edit_config(eos_token_id=[2, 61]), "eos_token_id is .2, 61."),
        (_edit_config(auto_map={"AutoModel": "x"}), "remote code"),
        (_edit_config(intermediate_size=41), r"has shape \[40, 24\], expected \[41, 24\]"),
        (_edit_config(torch_dtype="float32"), "is BF16, expected F32"),
        (_edit_config(**{AUX: [1, 4, 6]}), "eagle_config.* is None, expected .0, 3, 5."),
        (_edit_config(eagle_config={AUX: [0, 3, 5]}), f"{AUX} is None, expected a list"),
        (_edit_config(**{AUX: [1, 4, 9], "eagle_config": {AUX: [0, 3, 8]}}), "from a target of 9 layers"),
        (_edit_tensors(lambda t: without(t, "norm.weight")), "lacks norm.weight"),
        (
            _edit_tensors(lambda t: t | {"embed_tokens.weight": np.zeros((61, 24))}),
            "unexpected embed_tokens.weight",
        ),
        (_edit_tensors(lambda t: t | {"d2t": t["d2t"].astype(np.int32)}), "d2t is I32, expected I64"),
        (_edit_tensors(_nan), "up_proj.weight has values that are not finite"),
        (_edit_tensors(lambda t: t | {"d2t": IDS}), "d2t holds offsets"),
        (_edit_tensors(_unmark), "t2d marks 16 ids, not the 17 of d2t"),
        (_edit_tensors(_move_mark), "t2d marks 17 ids, not the 17 of d2t"),
    ],
)
def test_check_names_what_a_server_would_stumble_over(folder, damage, message):
    damage(folder)
    with pytest.raises(EyasError, match=message) as caught:
        check(folder, TARGET)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 32), ("vocab_size", 64), ("rope_theta", 5e5), ("rope_scaling", LLAMA3)],
)
def test_check_refuses_another_target(folder, field, value):
    with pytest.raises(EyasError, match="give the target it was trained for"):
        check(folder, TARGET | {field: value})
    check(folder)


def test_maps_beside_a_full_vocabulary_are_refused(tmp_path):
    params, head = made(ids=np.arange(61))
    folder = export(str(tmp_path / "head"), params, head, np.arange(61), TARGET)
    _edit_tensors(lambda t: t | {"d2t": np.zeros(61, np.int64)})(folder)
    with pytest.raises(EyasError, match="unexpected d2t"):  # vLLM stops at it
        check(folder, TARGET)
