"""Heads of other trainers are read in both layouts, map and all; what is not the target's head is refused."""

import json
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from common import safetensors, storage
from common.errors import EyasError, RestartError
from common.params import initialise
from common.store import Store
from pipelines.copy_head import copy_head
from tests.train import small_store
from train import check_export
from train.config import TrainConfig
from train.evaluate import load_head
from train.export import export, target_identity
from train.heads.eagle3.head import Eagle3
from train.planning import make_plan
from train.warm_start import open_published

IDS = np.sort(np.random.default_rng(1).permutation(small_store.V)[:20]).astype(np.int32)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store.open(small_store.write_store(str(tmp_path_factory.mktemp("warm") / "store")))


@pytest.fixture(scope="module")
def head(store):
    return Eagle3.for_target(store.target_config(), len(IDS), small_store.AUX_LAYERS, ffn=24)


@pytest.fixture(scope="module")
def params(head):
    return {name: np.asarray(x) for name, x in initialise(head.parameters(), jax.random.key(3)).items()}


def portable(folder, store, head, params):
    """As SGLang, vLLM and EAGLE load it."""
    origin = target_identity(store)
    return export(str(folder), params, head, IDS, store.target_config(), "float32", trained_for=origin)


def speculators(folder, store, head, params, drop=(), embed=None, **changed):
    """As speculators saves it: other names, the target's embedding, and a config.json of another shape."""
    layer = {name: head_config(head, store)[name] for name in LAYER}
    rope = {"rope_theta": head.rope_theta} | (head.rope or {"rope_type": "default"})
    config = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": len(IDS),
        "norm_before_residual": False,
        "norm_before_fc": False,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": list(head.aux_layers),
        "transformer_layer_config": layer | {"model_type": "llama", "rope_parameters": rope},
    } | changed
    tensors = {name.replace("midlayer.", "layers.0."): x for name, x in params.items()}
    tensors["d2t"], t2d = IDS.astype(np.int64) - np.arange(len(IDS)), np.zeros(small_store.V, bool)
    t2d[IDS] = True
    table = store.target_tensor("embed_tokens").astype(ml_dtypes.bfloat16) if embed is None else embed
    tensors |= {"t2d": t2d, "embed_tokens.weight": table}
    for name in drop:
        del tensors[name]
    storage.write_json(f"{folder}/config.json", config)
    safetensors.write(f"{folder}/model.safetensors", tensors)
    return str(folder)


LAYER = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "num_hidden_layers", "rms_norm_eps",
)  # fmt: skip


def head_config(head, store):
    return head.serving_config(store.target_config(), "float32")


@pytest.mark.parametrize("layout", [portable, speculators])
def test_a_published_head_is_read_with_its_vocabulary(layout, tmp_path, store, head, params):
    found = open_published(layout(tmp_path / "head", store, head, params), "eagle3", store)
    assert found.head == head
    np.testing.assert_array_equal(found.draft_ids, IDS)
    weights = found.weights()
    for name, weight in params.items():
        np.testing.assert_array_equal(weights[name], weight, err_msg=name)


def test_every_kind_of_head_is_read_as_what_it_is(tmp_path, store):
    variant = {"layers": 2, "fc_norm": True, "norm_output": True, "norm_before_residual": True}
    head = Eagle3.for_target(store.target_config(), len(IDS), small_store.AUX_LAYERS, **variant)
    params = {n: np.asarray(x) for n, x in initialise(head.parameters(), jax.random.key(3)).items()}
    both = (
        portable(tmp_path / "portable", store, head, params),
        speculators(
            tmp_path / "speculators",
            store,
            head,
            params,
            **{n: x for n, x in variant.items() if n != "layers"},
        ),
    )
    for folder in both:
        found = open_published(folder, "eagle3", store)
        assert found.head == head
        for name, weight in found.weights().items():
            np.testing.assert_array_equal(weight, params[name], err_msg=name)


def test_a_run_begins_with_the_published_head(tmp_path, store, head, params):
    folder = portable(tmp_path / "head", store, head, params)
    config = TrainConfig(store.url, str(tmp_path / "out"), steps=1, batch_rows=2, ttt_steps=2, init=folder)
    plan = make_plan(config)
    assert plan.head == head
    np.testing.assert_array_equal(plan.draft_ids, IDS)
    assert plan.identity["init"]["tensors"].keys() == params.keys()
    for name, weight in plan.initial(plan.sample()).items():
        np.testing.assert_array_equal(weight, params[name], err_msg=name)
    for changed, match in (
        ({"draft_vocab": 21}, "draft_vocab=21, but .* has logits of 20 tokens"),
        ({"ffn": 25}, "ffn=25, but .* has 24"),
        ({"init": str(tmp_path / "nothing")}, "holds no config.json; name fitted, target, normal"),
    ):
        with pytest.raises(EyasError, match=match):
            make_plan(replace(config, **changed))


@pytest.mark.parametrize(
    ("made", "match"),
    [
        ({"norm_before_fc": True}, "norm_before_fc is True, which cannot be trained on here"),
        ({"norm_before_residual": None}, "norm_before_residual is None, expected true or false"),
        ({"speculators_model_type": "eagle"}, "of no head of kind=eagle3"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 4, 9]}, "aux layers .* of 8 layers"),
        ({"draft_vocab_size": 19}, "lm_head.weight has shape"),
        ({"fc_norm": True}, "lacks fc_norm.0.weight"),
        ({"eagle_aux_hidden_state_layer_ids": [4, 2, 5]}, r"takes aux layers \[4, 2, 5\] .* ascending order"),
        (
            {"transformer_layer_config": [1]},
            r"transformer_layer_config is \[1\], but input should be",
        ),
        ({"drop": ("norm.weight",)}, "lacks norm.weight"),
        ({"drop": ("d2t",)}, "lacks d2t, the map of its 20 of 64 tokens"),
    ],
)
def test_a_head_that_cannot_be_trained_on_is_refused_by_name(made, match, tmp_path, store, head, params):
    folder = speculators(tmp_path / "head", store, head, params, **made)
    with pytest.raises(EyasError, match=match) as caught:
        open_published(folder, "eagle3", store)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(folder) == 1  # told once


@pytest.mark.parametrize("layout", [portable, speculators])
def test_a_config_of_wrong_types_is_refused_in_one_line(layout, tmp_path, store, head, params):
    place = f"{layout(tmp_path / 'head', store, head, params)}/config.json"
    config = storage.read_json(place) | {"eagle_config": {}, "rope_parameters": {"rope_theta": 10000.0}}
    tables, told = [()] + [(name,) for name, value in config.items() if isinstance(value, dict)], []
    for path in tables:
        for key in [*(config[path[0]] if path else config), "eagle_aux_hidden_state_layer_ids"]:
            for wrong in (-1, 1.5, "x", True, [], [[]], {"a": [1]}, [None], ["x"]):
                changed = json.loads(json.dumps(config))
                (changed[path[0]] if path else changed)[key] = wrong
                storage.write_json(place, changed)
                try:  # not every field decides on something
                    open_published(str(tmp_path / "head"), "eagle3", store)
                except EyasError as error:
                    told.append(str(error))
    assert len(told) > 100
    assert not [text for text in told if "\n" in text]


def test_a_head_of_another_target_is_refused_by_name(tmp_path, store, head, params):
    strange = store.target_tensor("embed_tokens")[::-1].copy()
    with pytest.raises(EyasError, match=r"row 0 of its embed_tokens.weight is not that of made-up"):
        open_published(
            speculators(tmp_path / "embedding", store, head, params, embed=strange), "eagle3", store
        )
    folder = portable(tmp_path / "named", store, head, params)
    config = storage.read_json(f"{folder}/config.json")
    assert config["trained_for"]["target"] == "made-up"
    config["trained_for"] = {"target": "another", "embed_tokens": "0" * 64}
    storage.write_json(f"{folder}/config.json", config)
    with pytest.raises(EyasError, match=r"was trained for another, but .* holds features of made-up"):
        open_published(folder, "eagle3", store)
    config = json.loads(json.dumps(config).replace('"rope_theta": 10000.0', '"rope_theta": 500000.0'))
    storage.write_json(f"{folder}/config.json", config | {"trained_for": None})
    with pytest.raises(EyasError, match=r"has rope_theta 500000.0, its target"):
        open_published(folder, "eagle3", store)


def test_a_pickled_head_is_not_opened(tmp_path, store, head, params):
    folder = portable(tmp_path / "head", store, head, params)
    (tmp_path / "head" / "model.safetensors").rename(tmp_path / "head" / "pytorch_model.bin")
    with pytest.raises(EyasError, match=r"pickled weights .* never opened; convert to safetensors"):
        open_published(folder, "eagle3", store)


def test_a_head_that_is_replaced_after_it_was_looked_at_is_not_begun_with(tmp_path, store, head, params):
    """Its sums are in the run's identity; in a bucket nothing else tells."""
    opened = open_published(portable(tmp_path / "head", store, head, params), "eagle3", store)
    other = params | {"fc.weight": params["fc.weight"] + 1}
    tensors = open_published(portable(tmp_path / "other", store, head, other), "eagle3", store)._tensors
    with pytest.raises(RestartError, match=r"head was replaced while it was read; run the same command"):
        replace(opened, _tensors=tensors).weights()


@pytest.mark.parametrize("base", ["", "memory://"])
def test_a_head_that_is_replaced_while_it_is_read_gives_no_mixture(
    tmp_path, store, head, params, base, monkeypatch
):
    """A training run does it at every evaluation, in a bucket too, where each tensor is a request."""
    folder, check = f"{base}{tmp_path}/head", check_export.check

    def put(more):
        changed = {name: x + np.float32(more) for name, x in params.items()}
        export(folder, changed, head, IDS, store.target_config())

    def checked(*args):
        check(*args)
        put(1)

    put(0)
    assert load_head(folder, store.target_config())[0] == head
    for place in ("train.evaluate.check_export.check", "pipelines.copy_head.check"):
        monkeypatch.setattr(place, checked)
    out = tmp_path / "copy"
    for read in (
        lambda: load_head(folder, store.target_config()),
        lambda: copy_head(folder, store, str(out)),
    ):
        with pytest.raises(
            RestartError, match=r"head/.* was replaced while the folder was read; run the same"
        ):
            read()
    assert not out.exists()
