"""The float64 reference itself: packing, causality, and formulas written a second way."""

from dataclasses import replace

import numpy as np
import pytest

from tests.train.problem import problem
from tests.train.reference import directional_derivative, losses, metrics, rms_norm
from tests.train.served import served_logits
from train.export import export

STEPS = 4


@pytest.fixture(scope="module")
def packed():
    return problem()


@pytest.fixture(scope="module")
def logits(packed):
    return packed.logits(STEPS)


def test_the_problem_has_what_packing_must_survive(packed):
    lengths = {np.sum(row == s) for row in packed.segments for s in set(row) - {0}}
    assert {1, 2} < lengths
    assert (packed.segments[0, -4:] == 0).all()
    turns = np.diff(packed.mask.astype(int))[np.diff(packed.segments) == 0]
    assert {-1, 1} <= set(turns), "no conversation of several turns"
    steps = packed.losses(STEPS)
    assert (steps.counted > 0).all()
    assert (packed.losses(STEPS, compat="specforge").counted > 0).all()
    found = packed.metrics(STEPS)
    assert (found["counted"] > steps.counted).all(), "no target outside the draft vocabulary"
    assert (found["full_acc"] > 0).all()
    assert (found["cond_acc"] < 1).all()


def test_a_document_alone_gives_what_it_gives_when_packed(packed, logits):
    for row in range(2):
        for segment in set(packed.segments[row]) - {0}:
            alone = packed.document(row, segment).logits(STEPS)
            np.testing.assert_allclose(
                alone[:, 0], logits[:, row, packed.segments[row] == segment], rtol=1e-12
            )


def test_a_step_sees_nothing_later_than_its_token_and_its_aux_state(packed, logits):
    row, cut = 1, 20
    tokens, aux = packed.tokens.copy(), packed.aux.copy()
    tokens[row, cut:] = (tokens[row, cut:] + 1) % packed.config.vocab_size
    aux[row, cut:] += 1
    changed = replace(packed, tokens=tokens, aux=aux).logits(STEPS)
    for k in range(STEPS):  # the token of position i at step k is x[i+1+k]
        same = (changed[k, row] == logits[k, row]).all(-1)
        assert same[: cut - 1 - k].all()
        assert not same[cut:][:4].any()
    at_the_edge = (changed[1, row, cut - 2] == logits[1, row, cut - 2]).all()
    assert not at_the_edge, "step 1 does not read x[i+2]"


def test_later_steps_add_their_own_index_and_no_other(packed):
    """With even attention over values of embeddings alone, (i, k) averages v(x[1]) .. v(x[i+1+k])."""
    c, one = packed.config, packed.document(1, 4)
    T = one.tokens.shape[1]
    p = dict(one.params)
    for name in ("midlayer.self_attn.q_proj.weight", "midlayer.mlp.down_proj.weight"):
        p[name] = 0 * p[name]
    p["midlayer.hidden_norm.weight"] = np.zeros(c.hidden_size)
    found = one.logits(STEPS, p)[:, 0]
    normed = rms_norm(one.embed[one.tokens[0]], p["midlayer.input_layernorm.weight"], c.rms_eps)
    values = normed @ p["midlayer.self_attn.v_proj.weight"][:, : c.hidden_size].T
    heads = np.repeat(values.reshape(T, c.num_kv_heads, -1), c.num_heads // c.num_kv_heads, 1).reshape(T, -1)
    moves = heads @ p["midlayer.self_attn.o_proj.weight"].T
    for i in range(T - 1):
        state = p["fc.weight"] @ one.aux[0, i].reshape(-1)
        for k in range(min(STEPS, T - 1 - i)):
            state = state + moves[1 : i + 2 + k].mean(0)
            logits = p["lm_head.weight"] @ rms_norm(state, p["norm.weight"], c.rms_eps)
            np.testing.assert_allclose(found[k, i], logits, rtol=1e-10)


@pytest.mark.parametrize(
    ("variant", "servers"),
    [
        ({}, {"vllm", "sglang"}),
        ({"fc_norm": True, "norm_output": True, "layers": 3}, {"vllm", "sglang"}),
        ({"norm_before_residual": True}, {"vllm"}),
        ({"norm_before_residual": True, "fc_norm": True, "layers": 2}, {"vllm"}),
    ],
)
def test_the_first_step_is_what_a_server_computes(tmp_path, variant, servers):
    """Against a reading of the exported folder that was compared with vLLM. Who would read the folder as
    something else is named by the check of the folder."""
    packed = problem(**variant)
    target = {
        "model_type": "llama",
        "hidden_size": 10,
        "intermediate_size": 14,
        "num_hidden_layers": 9,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 4,
        "vocab_size": 17,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000.0,
        "rope_scaling": packed.config.rope,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    one = packed.document(1, 5)
    bfloat16 = {
        n: (a.astype(np.float32).view(np.uint32) >> 16 << 16).view(np.float32)
        for n, a in packed.params.items()
    }
    one = replace(one, params={n: a.astype(np.float64) for n, a in bfloat16.items()})
    export(str(tmp_path / "head"), bfloat16, one.config, one.draft_ids, target, metadata={})
    embedded = one.embed[[*one.tokens[0, 1:], 0]]
    expected = one.logits(1)[0, 0]
    limits = one.config.limits(target)
    cannot = {name for limit in limits if "residual" in limit.what for name in limit.servers}
    for server in ("vllm", "sglang"):
        served = served_logits(tmp_path / "head", one.aux[0], embedded, one.positions[0], server)
        assert np.allclose(served, expected, rtol=1e-6, atol=1e-6) == (server in servers)
        assert server in servers or server in cannot


def test_the_loss_of_one_step_by_a_direct_formula(packed, logits):
    segments, mask = packed.segments, packed.mask
    together = (segments[:, :-2] == segments[:, 2:]) & (segments[:, :-2] > 0)
    teacher = packed.target_logits[:, 1:-1]
    counted = together & (mask[:, 2:] == 1) & np.isin(teacher.argmax(-1), packed.draft_ids)
    p = np.exp(teacher[..., packed.draft_ids])
    p /= p.sum(-1, keepdims=True)
    head = logits[0, :, :-2]
    cross_entropy = np.log(np.exp(head).sum(-1)) - (p * head).sum(-1)
    found = packed.losses(1)
    assert found.counted == counted.sum()
    np.testing.assert_allclose(found.steps, cross_entropy[counted].mean(), rtol=1e-12)
    np.testing.assert_allclose(found.total, found.steps[0], rtol=1e-12)


def test_masks_by_hand():
    """Eight tokens, documents of 5 and 2, one of padding; every target is in the draft vocabulary."""
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 0]])
    mask = np.array([[0, 0, 1, 1, 1, 1, 1, 1]])
    teacher, ids = np.zeros((1, 8, 3)), np.array([0, 2])
    uniform = np.zeros((3, 1, 8, 2))
    found = losses(uniform, segments, mask, teacher, ids)
    assert found.counted.tolist() == [3, 2, 1]  # predicted: x2 x3 x4; x3 x4; x4
    np.testing.assert_allclose(found.steps, np.log(2))
    np.testing.assert_allclose(found.total, np.log(2) * (1 + 0.8 + 0.64))
    other = losses(uniform, segments, mask, teacher, ids, compat="specforge")
    assert other.counted.tolist() == [3, 2, 2]  # input x2 x3 of document 1, x5 of 2; then x2, x3; x2, x3
    np.testing.assert_allclose(other.steps, np.log(2) * other.counted / 8)


def test_metrics_by_hand():
    """Six tokens of one answer: step 0 counts positions 0..3, step 1 positions 0..2."""
    segments, mask, ids = np.ones((1, 6), int), np.ones((1, 6), int), np.array([1, 3])
    teacher = np.log(np.full((1, 6, 4), 0.1))
    for position, token in enumerate([0, 1, 3, 1, 0, 3]):  # position 4's target is no draft token
        teacher[0, position, token] = np.log(0.7)
    head = np.log(np.full((2, 1, 6, 2), 0.5))
    wanted = {0: [1, 3, 3, 1], 1: [3, 1, 1]}  # step 0: right right wrong miss; step 1: right right miss
    for k, choices in wanted.items():
        for i, token in enumerate(choices):
            head[k, 0, i] = np.log([0.9, 0.1] if token == 1 else [0.1, 0.9])
    found = metrics(head, segments, mask, teacher, ids)
    np.testing.assert_allclose(found["acc"], [2 / 4, 2 / 3])
    np.testing.assert_allclose(found["full_acc"], [2 / 4, 2 / 3])
    np.testing.assert_allclose(found["cond_acc"], [2 / 4, 1])
    # Draft tokens hold 0.8 of a covered target, 0.2 of the other: right 0.7+0.1, wrong 0.1+0.1, miss 0.1+0.1.
    np.testing.assert_allclose(found["alpha"], [(0.8 + 0.8 + 0.2 + 0.2) / 4, (0.8 + 0.8 + 0.2) / 3])
    # Drafts of one token stand at index 0 (right), 2 (wrong) and 3 (miss), of two at 0 (both right) and 3.
    np.testing.assert_allclose(found["length_greedy_by_k"], [1 + 1 / 3, 1 + 2 / 2])
    np.testing.assert_allclose(found["accepted_greedy"], [1 / 2, 1 / 2])
    # Of one token, expected from index 3, 2, 1, 0 on: 1, 1.8, 2.16, 1.872 drafts...
    drafts = [1.0, 1 + 0.8 * 1.0]
    drafts += [1 + 0.2 * drafts[1] + 0.8 * drafts[0]]
    drafts += [1 + 0.2 * drafts[2] + 0.8 * drafts[1]]
    accepted = [0.2, 0.2 + 0.8 * 0.2]
    accepted += [0.8 + 0.2 * accepted[1] + 0.8 * accepted[0]]
    accepted += [0.8 + 0.2 * accepted[2] + 0.8 * accepted[1]]
    by_k = [1 + accepted[3] / drafts[3], 1 + 1.9424 / 2.232]  # of two tokens: worked out by hand
    np.testing.assert_allclose(found["length_sampled_by_k"], by_k)
    assert found["coverage"] == 3 / 4
    assert found["counted"].tolist() == [4, 3]


def test_directional_derivative_of_a_polynomial():
    point, direction = {"a": np.array([2.0, 1.0]), "b": np.array([3.0])}, {"a": np.array([1.0, -1.0])}
    slope = directional_derivative(lambda p: (p["a"] ** 3).sum() * p["b"][0], point, direction)
    np.testing.assert_allclose(slope, 3 * (3 * 4 - 3), rtol=1e-8)
