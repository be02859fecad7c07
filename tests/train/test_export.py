"""An exported head is what a server expects: names, numbers, configuration, and nothing half-written."""

import copy

import numpy as np
import pytest

from common.errors import EyasError
from tests.train.served import inverse_frequencies, served_logits
from tests.train.small_head import IDS, LLAMA3, TARGET, config_of, exported, made, tensors_of, without
from train.check_export import check
from train.export import export
from train.heads.eagle3.head import Eagle3
from train.servers import best

T = 11


@pytest.fixture
def folder(tmp_path):
    return exported(tmp_path / "head")


def inputs(seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(T, 3, 24)), rng.normal(size=(T, 24)), np.arange(T)


def test_the_folder_holds_the_heads_numbers_under_the_servers_names(folder):
    params, _ = made()
    found = tensors_of(folder)
    assert found.keys() == params.keys() | {"d2t", "t2d"}
    assert found["fc.weight"].shape == (24, 72)  # [out, in]
    assert found["midlayer.self_attn.k_proj.weight"].shape == (16, 48)
    for name, value in params.items():
        np.testing.assert_allclose(found[name], value, rtol=2**-8)
    np.testing.assert_array_equal(found["d2t"] + np.arange(17), IDS)
    np.testing.assert_array_equal(np.flatnonzero(found["t2d"]), IDS)
    assert (found["d2t"].dtype, found["t2d"].dtype, found["t2d"].shape) == (np.int64, np.bool_, (61,))


def test_check_accepts_what_export_writes(folder):
    facts = check(folder, TARGET)
    assert any("15 tensors" in fact and "bfloat16" in fact for fact in facts)
    assert "draft vocabulary: 17 of 61 tokens, d2t and t2d agree" in facts
    assert "  vLLM 0.32                 loads" in facts
    told = "no: it cannot take heads of 8: it divides hidden_size 24 by 6 heads"
    assert any(told in fact for fact in facts)


def test_the_card_tells_how_to_serve_and_how_it_was_made(folder):
    with open(f"{folder}/README.md") as file:
        card = file.read()
    assert "EAGLE3 draft head for Small-9" in card
    assert '{"method": "eagle3", "model": "HEAD", "num_speculative_tokens": 3}' in card
    assert "| AL | 1.5 |" in card


@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_transformers_reads_the_rope_of_the_target(tmp_path, scaling):
    from transformers import LlamaConfig

    target = TARGET | {"rope_scaling": scaling, "rope_theta": 500000.0}
    params, head = made(target)
    written = config_of(export(str(tmp_path / "head"), params, head, IDS, target))
    ours, its = LlamaConfig.from_dict(written), LlamaConfig.from_dict(copy.deepcopy(target))
    assert ours.rope_parameters == its.rope_parameters
    assert ours.rope_parameters["rope_theta"] == 500000.0
    assert (ours.head_dim, ours.vocab_size, ours.tie_word_embeddings) == (8, 61, False)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, [2, 3], None)


@pytest.mark.parametrize("hidden", [24, 33, 160, 320])
def test_transformers_takes_the_head_of_a_target_of_any_sizes(hidden):
    """Heads that do not divide the hidden size (GLM-4.7), of odd sizes, of latent attention."""
    from transformers import LlamaConfig

    for heads, kv_heads, head_dim in [(6, 2, 8), (6, 3, None), (5, 1, 7), (96, 8, 2), (12, 12, 64)]:
        for latent in (None, 16):
            sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
            target = TARGET | sizes | {"head_dim": head_dim, "kv_lora_rank": latent}
            head = Eagle3.for_target(target, 5, (2, 4, 6))
            read = LlamaConfig.from_dict(head.serving_config(target, "bfloat16"))
            assert (read.num_attention_heads, read.head_dim) == (head.num_heads, head.head_dim)
            assert best(head.limits(target))["vllm"].taken


def test_target_hidden_size_stays_out(folder):
    # EAGLE's own code does not load the target's embeddings where it finds this key.
    assert "target_hidden_size" not in config_of(folder)


def test_other_aux_layers_are_named_in_both_ways_of_counting(tmp_path, folder):
    assert not any("aux" in key or key == "eagle_config" for key in config_of(folder))
    params, head = made(aux_layers=(1, 4, 8))
    other = export(str(tmp_path / "other"), params, head, IDS, TARGET)
    config = config_of(other)
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 4, 8]  # vLLM: the stream that enters layer k
    assert config["eagle_config"] == {
        "eagle_aux_hidden_state_layer_ids": [0, 3, 7]
    }  # SGLang: the layer before
    facts = check(other, TARGET)
    assert "aux layers: [1, 4, 8]" in facts
    assert sum("cannot take aux layers [1, 4, 8]" in fact for fact in facts) == 3


def test_a_draft_vocabulary_as_large_as_the_targets_has_no_maps(tmp_path):
    params, head = made(ids=np.arange(61))
    folder = export(str(tmp_path / "head"), params, head, np.arange(61), TARGET)
    assert tensors_of(folder).keys() == params.keys()
    check(folder, TARGET)


def test_float32_keeps_every_bit_and_bfloat16_nearly_the_same_logits(tmp_path, folder):
    params, head = made()
    exact = export(str(tmp_path / "exact"), params, head, IDS, TARGET, dtype="float32")
    for name, value in params.items():
        np.testing.assert_array_equal(tensors_of(exact)[name], value)
    assert any("float32" in fact for fact in check(exact))
    a, b = served_logits(exact, *inputs()), served_logits(folder, *inputs())
    assert a.shape == (T, 17)
    assert 0 < np.abs(a - b).max() < 0.03 * np.abs(a).max()


def test_the_served_step_is_causal_and_feels_position_and_scaling(tmp_path, folder):
    aux, embed, positions = inputs()
    before = served_logits(folder, aux, embed, positions)
    aux_2, embed_2, _ = inputs(2)
    changed = served_logits(
        folder, np.concatenate([aux[:7], aux_2[7:]]), np.concatenate([embed[:7], embed_2[7:]]), positions
    )
    np.testing.assert_array_equal(before[:7], changed[:7])
    assert np.abs(before[7:] - changed[7:]).max() > 1e-3
    shifted = served_logits(folder, aux, embed, positions + 100)  # RoPE sees distances only
    np.testing.assert_allclose(before, shifted, atol=1e-9)
    assert np.abs(before - served_logits(folder, aux, embed, positions * 9)).max() > 1e-6
    plain = inverse_frequencies({"head_dim": 8, "rope_theta": 10000.0, "rope_scaling": None})
    scaled = inverse_frequencies({"head_dim": 8, "rope_theta": 10000.0, "rope_scaling": LLAMA3})
    # Turns in the old context of 64: 10.2 (kept), 1.02 (blended), 0.1 and 0.01 (stretched by 8).
    np.testing.assert_allclose(scaled[[0, 2, 3]], plain[[0, 2, 3]] / [1, 8, 8])
    assert plain[1] / 8 < scaled[1] < plain[1]


def test_an_earlier_export_is_replaced(folder):
    params, head = made()
    params["norm.weight"] = params["norm.weight"] * 2
    export(folder, params, head, IDS, TARGET)
    assert (tensors_of(folder)["norm.weight"] == 2).all()
    check(folder, TARGET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"params": without(a["params"], "fc.weight")}, "lacks fc.weight"),
        (lambda a: a | {"params": a["params"] | {"extra": np.zeros(3)}}, "unexpected extra"),
        (
            lambda a: a | {"params": a["params"] | {"norm.weight": np.ones(23)}},
            r"shape \[23\], expected \[24\]",
        ),
        (
            lambda a: a | {"params": a["params"] | {"norm.weight": np.full(24, np.nan)}},
            "24 values that are not",
        ),
        (
            lambda a: a | {"params": a["params"] | {"norm.weight": np.full(24, 1e5)}, "dtype": "float16"},
            "wider",
        ),
        (lambda a: a | {"draft_ids": IDS[::-1]}, "expected 17 ascending ids below 61"),
        (lambda a: a | {"draft_ids": IDS + 60}, "expected 17 ascending ids below 61"),
        (lambda a: a | {"draft_ids": IDS[:-1]}, r"shape \[16\]"),
        (lambda a: a | {"dtype": "int8"}, "choose one of bfloat16"),
        (lambda a: a | {"target_config": TARGET | {"vocab_size": 62}}, "vocab_size 61, its target 62"),
        (lambda a: a | {"target_config": TARGET | {"rope_scaling": LLAMA3}}, "rope None, its target"),
        (lambda a: a | {"head": made(aux_layers=(2, 4, 9))[1]}, "aux layers .* of 9 layers"),
    ],
)
def test_a_wrong_head_is_refused_before_anything_is_written(tmp_path, change, message):
    params, head = made()
    arguments = {"params": params, "head": head, "draft_ids": IDS, "target_config": TARGET}
    with pytest.raises(EyasError, match=message) as caught:
        export(str(tmp_path / "head"), **change(arguments))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_head_rotates_all_and_says_so_where_its_target_rotates_a_part():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    target = TARGET | {"rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.25, **scaling}}
    head = Eagle3.for_target(target, 17, (2, 4, 6))
    assert (head.rope, head.rope_theta) == (scaling, 5e6)
    assert head.serving_config(target, "bfloat16")["rope_scaling"] == scaling
