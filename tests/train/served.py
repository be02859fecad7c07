"""One step of an EAGLE3 server, in float64 NumPy, from nothing but the files of an exported head.

It shares no code with the trainer: the layer is written after SafeAILab/EAGLE `eagle/model/cnets.py`, RoPE
after Llama 3.1's public description of its scaling. vLLM 0.32, serving SmolLM2-135M with a random head
in float32, gave the same logits within 2e-6 at every position of a prompt, with and without scaling.

Dimensions: T positions, A aux states, H hidden size, N draft vocabulary, Q query heads, K key/value heads,
G = Q // K, D head_dim.
"""

import json
import pathlib

import numpy as np

_DTYPES = {"F16": "<f2", "F32": "<f4", "I64": "<i8", "BOOL": "?"}


def read_tensors(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """{name: array} of a safetensors file, bfloat16 widened to float32."""
    data = pathlib.Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        raw = data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        if entry["dtype"] == "BF16":
            array = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            array = np.frombuffer(raw, _DTYPES[entry["dtype"]])
        found[name] = array.reshape(entry["shape"])
    return found


def inverse_frequencies(config: dict) -> np.ndarray:
    """Radians a position of each of the D // 2 pairs, float64."""
    inverse = config["rope_theta"] ** (-np.arange(0, config["head_dim"], 2) / config["head_dim"])
    scaling = config["rope_scaling"]
    if scaling is None:
        return inverse
    assert scaling["rope_type"] == "llama3", scaling
    # Short waves stay, long ones are stretched by `factor`, those between change over linearly.
    waves = scaling["original_max_position_embeddings"] * inverse / (2 * np.pi)  # turns in the old context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = np.clip((waves - low) / (high - low), 0, 1)
    return inverse * (keep + (1 - keep) / scaling["factor"])


def _rms(x, weight, eps):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * weight


def _rotate(x_THD, angles_TF):
    """Half-rotation: dimension d turns with d + D // 2."""
    first, second = np.split(x_THD, 2, -1)
    cos, sin = np.cos(angles_TF)[:, None], np.sin(angles_TF)[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _attend(q_TQD, k_TKD, v_TKD):
    """Causal softmax attention within one document; query heads q*G .. q*G+G-1 share key/value head q."""
    T, Q, D = q_TQD.shape
    group = Q // k_TKD.shape[1]
    k, v = np.repeat(k_TKD, group, 1), np.repeat(v_TKD, group, 1)
    scores = np.einsum("tqd,sqd->qts", q_TQD, k) / np.sqrt(D)
    scores[:, np.triu(np.ones((T, T), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("qts,sqd->tqd", weights, v).reshape(T, Q * D)


def served_logits(folder, aux_TAH, embed_TH, positions_T, server="vllm") -> np.ndarray:
    """Draft logits [T, N] of the first step over one document, as a server reads the folder.

    `aux_TAH` are the target's states, `embed_TH` the embeddings of the tokens one place later. vLLM reads
    `norm_before_residual`, and norms what enters a later layer by its input_layernorm; SGLang knows no
    `norm_before_residual`, and takes the later layer's hidden_norm (their `models/llama_eagle3.py`).
    """
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    w = {n: a.astype(np.float64) for n, a in read_tensors(pathlib.Path(folder) / "model.safetensors").items()}
    eps, D, T = config["rms_norm_eps"], config["head_dim"], len(positions_T)
    angles = np.asarray(positions_T, np.float64)[:, None] * inverse_frequencies(config)
    aux_TAH = np.asarray(aux_TAH, np.float64)
    if config.get("fc_norm"):
        aux_TAH = np.stack(
            [_rms(aux_TAH[:, a], w[f"fc_norm.{a}.weight"], eps) for a in range(aux_TAH.shape[1])], 1
        )
    state = aux_TAH.reshape(T, -1) @ w["fc.weight"].T
    for number in range(config["num_hidden_layers"]):
        prefix = f"layers.{number}." if number else "midlayer."
        block = {name.removeprefix(prefix): a for name, a in w.items() if name.startswith(prefix)}
        if number:
            norm = {"vllm": "input_layernorm", "sglang": "hidden_norm"}[server]
            x = _rms(state, block[f"{norm}.weight"], eps)
        else:
            normed = _rms(state, block["hidden_norm.weight"], eps)
            embedded = _rms(np.asarray(embed_TH, np.float64), block["input_layernorm.weight"], eps)
            x = np.concatenate([embedded, normed], -1)
            if server == "vllm" and config["norm_before_residual"]:
                state = normed
        q, k, v = ((x @ block[f"self_attn.{p}_proj.weight"].T).reshape(T, -1, D) for p in "qkv")
        assert (q.shape[1], k.shape[1]) == (config["num_attention_heads"], config["num_key_value_heads"])
        mixed = _attend(_rotate(q, angles), _rotate(k, angles), v)
        state = state + mixed @ block["self_attn.o_proj.weight"].T
        y = _rms(state, block["post_attention_layernorm.weight"], eps)
        gate = y @ block["mlp.gate_proj.weight"].T
        wide = gate / (1 + np.exp(-gate)) * (y @ block["mlp.up_proj.weight"].T)
        state = state + wide @ block["mlp.down_proj.weight"].T
    return _rms(state, w["norm.weight"], eps) @ w["lm_head.weight"].T
