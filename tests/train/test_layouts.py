"""Which servers take which kind of head in which layout, and that every layout holds the same head."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from common import safetensors, storage
from common.errors import EyasError
from common.params import initialise
from common.store import Store
from pipelines.copy_head import copy_head
from tests.train import small_store
from tests.train.small_head import IDS, TARGET, config_of, made, tensors_of
from train.check_export import check
from train.evaluate import load_head
from train.export import export
from train.heads.eagle3.head import Eagle3
from train.heads.head import read_serving_config
from train.servers import LAYOUTS, SERVERS, best, require
from train.warm_start import open_published

ALL = "vllm sglang sglang-jax tpu-inference speculators eagle"
# Who takes which kind of head, in the layout that suits it best; "*": by vLLM's own models alone.
VARIANTS = {
    "plain": ({}, ALL),
    "fc_norm": ({"fc_norm": True}, "vllm sglang tpu-inference* speculators"),
    "norm_output": ({"norm_output": True}, "vllm sglang tpu-inference* speculators"),
    "norm_before_residual": ({"norm_before_residual": True}, "vllm tpu-inference speculators"),
    "layers": ({"layers": 2}, "vllm sglang tpu-inference* speculators"),
    "all": (
        {"layers": 3, "fc_norm": True, "norm_output": True, "norm_before_residual": True},
        "vllm tpu-inference* speculators",
    ),
    "more heads of keys": ({"num_kv_heads": 6}, ALL),
    "frozen": ({"lm_head": "frozen"}, ALL),
    "tied": ({"lm_head": "tied"}, ALL),
    "four aux layers": ({"aux_layers": (1, 3, 5, 7)}, "vllm sglang tpu-inference* speculators"),
    "one aux layer": ({"aux_layers": (8,)}, "vllm sglang tpu-inference* speculators"),
}
PLAIN = TARGET | {"head_dim": 4}  # nothing else about it is special
EMBEDDING = np.random.default_rng(3).normal(size=(61, 24)).astype(np.float32)


def variant(options):
    head = Eagle3.for_target(PLAIN, len(IDS), **({"aux_layers": (2, 4, 6)} | options))
    return initialise(head.parameters(), jax.random.key(0)), head


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_taken_by_the_servers_that_read_it_and_refused_for_the_rest(name):
    options, takers = VARIANTS[name]
    found = best(variant(options)[1].limits(PLAIN))
    told = {key + "*" * bool(verdict.environment) for key, verdict in found.items() if verdict.taken}
    assert told == set(takers.split())
    for key in SERVERS:
        if found[key].taken:
            require(found, (key,), "HEAD")
        else:
            with pytest.raises(EyasError, match=f"HEAD: {SERVERS[key].title} cannot take .*; train a head"):
                require(found, (key,), "HEAD")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_in_every_layout_is_read_as_what_it_was(tmp_path, name, layout):
    params, head = variant(VARIANTS[name][0])
    folder = str(tmp_path / "head")
    export(folder, params, head, IDS, PLAIN, layout=layout, verifier="org/target", embedding=EMBEDDING)
    lines = check(folder, PLAIN)
    assert f"layout {layout}:" in lines
    for key, server in SERVERS.items():
        if layout in server.layouts:
            continue
        with pytest.raises(EyasError, match=f"cannot take the layout {layout}; export it with --layout "):
            check(folder, PLAIN, (key,))
    config, found = config_of(folder), tensors_of(folder)
    layer = config.get("transformer_layer_config", config)
    # The keys by which servers size and wire the head.
    assert layer["num_hidden_layers"] == head.layers
    for key in ("fc_norm", "norm_output", "norm_before_residual"):
        assert config[key] is getattr(head, key)
    assert layer.get("num_aux_hidden_states", 3) == len(head.aux_layers)
    assert found["fc.weight"].shape == (24, 24 * len(head.aux_layers))
    assert sum(key.startswith("fc_norm.") for key in found) == len(head.aux_layers) * head.fc_norm
    for number in range(1, head.layers):
        assert found[f"layers.{number}.self_attn.q_proj.weight"].shape == (24, 24)
        if layout != "speculators":  # vLLM reads the one name, SGLang the other
            norms = [found[f"layers.{number}.{n}.weight"] for n in ("input_layernorm", "hidden_norm")]
            np.testing.assert_array_equal(*norms)
    read = read_serving_config("config.json", config, TARGET["num_hidden_layers"])
    assert replace(read, lm_head=head.lm_head) == head


def test_the_layout_of_speculators_names_its_target_and_holds_its_embedding(tmp_path):
    params, head = variant({})
    folder = str(tmp_path / "head")
    target = PLAIN | {"architectures": ["LlamaForCausalLM"]}
    export(folder, params, head, IDS, target, layout="speculators", verifier="org/x", embedding=EMBEDDING)
    config, found = config_of(folder), tensors_of(folder)
    verifier = {"name_or_path": "org/x", "architectures": ["LlamaForCausalLM"]}
    assert config["speculators_config"]["verifier"] == verifier
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 6]
    np.testing.assert_array_equal(found["embed_tokens.weight"], EMBEDDING)
    assert "layers.0.hidden_norm.weight" in found
    assert not any(key.startswith("midlayer.") for key in found)
    with pytest.raises(EyasError, match=r"layout speculators takes of the target lacks embed_tokens\.weight"):
        export(str(tmp_path / "other"), params, head, IDS, target, layout="speculators", verifier="org/x")


def test_tpu_inference_finds_maps_of_a_whole_vocabulary_and_its_own_architecture(tmp_path):
    params, head = made(ids=np.arange(61))
    folder = export(str(tmp_path / "head"), params, head, np.arange(61), TARGET, layout="tpu-inference")
    assert config_of(folder)["architectures"] == ["LlamaForCausalLM"]
    found = tensors_of(folder)
    np.testing.assert_array_equal(found["d2t"], np.zeros(61, np.int64))
    check(folder, TARGET)


@pytest.mark.parametrize(
    ("change", "server", "what"),
    [
        ({"architectures": ["Gemma3ForCausalLM"]}, "vllm", "a head for Gemma3ForCausalLM, whose hidden"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "sglang-jax", "a head for Qwen3MoeForCausalLM"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "eagle", "yarn RoPE scaling"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "sglang-jax", "linear RoPE scaling"),
    ],
)
def test_what_a_server_cannot_take_of_a_target_is_named(change, server, what):
    head = Eagle3.for_target(PLAIN | change, 17, (2, 4, 6))
    assert what in best(head.limits(PLAIN | change))[server].why


def test_tpu_inference_runs_the_models_of_vllm_where_its_own_would_misread():
    qwen = PLAIN | {"architectures": ["Qwen3ForCausalLM"]}
    yarn = PLAIN | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    wide = TARGET | {"head_dim": 160}  # its cache would be of heads of 4, padded to 128
    for target in (qwen, yarn, wide):
        found = best(Eagle3.for_target(target, 17, (2, 4, 6)).limits(target))["tpu-inference"]
        assert found.taken
        assert found.environment == {"MODEL_IMPL_TYPE": "vllm", "DRAFT_MODEL_IMPL_TYPE": "vllm"}
    gemma = PLAIN | {"architectures": ["Gemma3ForCausalLM"]}
    assert not best(Eagle3.for_target(gemma, 17, (2, 4, 6)).limits(gemma))["tpu-inference"].taken


def test_sglang_would_count_other_layers_of_deepseek_unless_they_begin_at_two():
    deepseek = PLAIN | {"architectures": ["DeepseekV3ForCausalLM"]}
    for aux, taken in (((1, 4, 6), False), ((2, 4, 7), True), ((2, 4, 6), True)):
        assert best(Eagle3.for_target(deepseek, 17, aux).limits(deepseek))["sglang"].taken is taken


def test_a_head_goes_from_layout_to_layout_and_back_unchanged(tmp_path):
    """Its weights to the bit, and what is told of how it was made."""
    store = small_store.write_store(str(tmp_path / "store"))
    opened = Store.open(store)
    target = opened.target_config()
    head = Eagle3.for_target(target, 20, small_store.AUX_LAYERS, ffn=24, layers=2)
    params = initialise(head.parameters(), jax.random.key(0))
    ids = np.arange(20) * 2
    first = export(str(tmp_path / "a"), params, head, ids, target, metadata={"learning rate": 0.25})
    places = [str(tmp_path / name) for name in "bcd"]
    source = first
    for place, layout in zip(places, ("speculators", "tpu-inference", "portable"), strict=True):
        copy_head(source, opened, place, layout=layout, target="org/target")
        source = place
        with open(f"{place}/README.md") as file:
            assert "| learning rate | 0.25 |" in file.read()
        assert open_published(place, "eagle3", opened).head == head  # a training begins with any of them
        _, weights, found = load_head(place, opened.target_config())  # and eval reads it
        np.testing.assert_array_equal(found, ids)
        for name, value in params.items():
            np.testing.assert_allclose(weights[name], value, rtol=2**-8)
    with pytest.raises(EyasError, match="give --target, its folder or Hub id"):
        copy_head(first, opened, str(tmp_path / "none"), layout="speculators")
    (tmp_path / "run/best").mkdir(parents=True)
    (tmp_path / "run/experiment.json").touch()
    with pytest.raises(EyasError, match="lies in best/ of a run, which training writes; name another place"):
        copy_head(first, opened, str(tmp_path / "run/best"))
    with pytest.raises(EyasError, match=r"store/head is in the store .*, which is read only"):
        copy_head(first, opened, str(tmp_path / "store/head"))
    last = tensors_of(places[-1])
    for name, value in tensors_of(first).items():
        np.testing.assert_array_equal(value, last[name], err_msg=name)
    assert config_of(first) == config_of(places[-1])
    np.testing.assert_array_equal(
        tensors_of(places[0])["embed_tokens.weight"], opened.target_tensor("embed_tokens")
    )


def test_what_a_damaged_head_says_of_its_making_is_refused(tmp_path):
    opened = Store.open(small_store.write_store(str(tmp_path / "store")))
    head = Eagle3.for_target(opened.target_config(), 20, small_store.AUX_LAYERS)
    params = initialise(head.parameters(), jax.random.key(0))
    how = params, head, np.arange(20) * 2, opened.target_config(), "float32"
    folder = export(str(tmp_path / "a"), *how)
    config, tensors = config_of(folder), tensors_of(folder)

    def refuse(message):
        with pytest.raises(EyasError, match=message):
            copy_head(folder, opened, str(tmp_path / "none"), layout="speculators", target="org/target")

    for origin in (["x"], {"target": 7}, 7):
        storage.write_json(f"{folder}/config.json", config | {"trained_for": origin})
        refuse("config.json: trained_for.*export the head anew")
    storage.write_json(f"{folder}/config.json", config)
    for text in ("{", "[1]", "7", "[" * 10_000):
        safetensors.write(f"{folder}/model.safetensors", tensors, {"made": text})
        refuse("model.safetensors, made of its header")


def test_an_exported_layer_that_servers_would_read_differently_is_refused(tmp_path):
    head = Eagle3.for_target(PLAIN, len(IDS), (2, 4, 6), layers=2)
    params = initialise(head.parameters(), jax.random.key(0))
    folder = export(str(tmp_path / "head"), params, head, IDS, PLAIN, dtype="float32")
    found = tensors_of(folder)
    found["layers.1.hidden_norm.weight"] = 2 * found["layers.1.hidden_norm.weight"]
    safetensors.write(f"{folder}/model.safetensors", found)
    with pytest.raises(
        EyasError, match=r"layers.1.hidden_norm.weight is not layers.1.input_layernorm.weight"
    ):
        check(folder)
