"""The decoder gives what transformers gives, packed and alone, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import EyasError
from common.mesh import make_mesh, sharding
from dump import target
from dump.target import moe
from tests.goldens import golden
from tests.goldens.values import DOCUMENTS

TOLERANCE = 1e-4


def packed_and_alone(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Four rows: both documents, the first alone, the second alone, and both the other way round."""
    first, second = np.split(tokens, [DOCUMENTS[0]])
    rows = [(first, second), (first,), (second,), (second, first)]
    length = len(tokens) + 7
    out = np.zeros((3, len(rows), length), np.int32)
    for r, documents in enumerate(rows):
        start = 0
        for number, document in enumerate(documents, 1):
            part = slice(start, start + len(document))
            out[0, r, part], out[1, r, part], out[2, r, part] = document, number, np.arange(len(document))
            start = part.stop
    return out[0], out[1], out[2]


def assert_close(found: np.ndarray, expected: np.ndarray, what: str, tolerance: float) -> None:
    size = np.sqrt(np.mean(expected**2))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * size, err_msg=what)


def check(found: dict[str, np.ndarray], made: golden.Golden, tolerance: float = TOLERANCE) -> None:
    """All four rows of `found` against the documents' expected values."""
    n = DOCUMENTS[0]
    total = len(made.tokens)
    for key, expected in made.expected.items():
        value = np.asarray(found[key])
        places = {
            "packed": (value[0, :total], expected),
            "of the first alone": (value[1, :n], expected[:n]),
            "of the second alone": (value[2, : total - n], expected[n:]),
            "of the second in front": (value[3, : total - n], expected[n:]),
            "of the first behind": (value[3, total - n : total], expected[:n]),
        }
        for place, (ours, theirs) in places.items():
            assert_close(ours, theirs, f"{key} {place}", tolerance)


def run(
    made: golden.Golden, folder: str, dp: int, tp: int, experts: str | None = None, dequantise: bool = False
) -> dict[str, jax.Array]:
    cfg = target.read_config(folder, experts, dequantise)
    mesh = make_mesh(dp, tp)
    weights = target.load(folder, cfg, mesh, jnp.float32)
    rows = [jax.device_put(x, sharding(mesh, ("batch", None))) for x in packed_and_alone(made.tokens)]

    @jax.jit
    def whole(weights, *rows):
        aux, last = target.forward(cfg, weights, *rows, made.aux_layers)
        return {"aux": aux, "last": last, "logits": target.logits(cfg, weights, last)}

    return whole(weights, *rows)


@pytest.mark.parametrize("name", golden.names())
def test_parity_with_transformers(name, tmp_path):
    made = golden.read(name)
    check(run(made, golden.write_folder(made, tmp_path), 1, 1), made)


@pytest.mark.parametrize(
    ("name", "experts", "dp", "tp"),
    [
        ("llama", None, 2, 2),
        ("mistral_window", None, 4, 1),
        ("qwen3_moe", "ffn", 2, 2),
        ("qwen3_moe", "expert", 2, 2),
        ("qwen3_moe", None, 4, 1),
        ("gpt_oss", None, 2, 2),
        ("gpt_oss", None, 4, 1),
        ("deepseek_v3", "ffn", 2, 2),
        ("deepseek_v3", None, 4, 1),
        ("minimax_m2", "expert", 2, 2),
        ("qwen3_next", "ffn", 2, 2),
        ("qwen3_next", None, 4, 1),
    ],
)
def test_a_mesh_gives_the_same(name, experts, dp, tp, tmp_path):
    made = golden.read(name)
    check(run(made, golden.write_folder(made, tmp_path), dp, tp, experts), made)


@pytest.mark.parametrize(("name", "experts"), [("qwen3_moe", "expert"), ("deepseek_v3", "ffn")])
def test_experts_give_the_same_a_few_tokens_and_rows_at_a_time(name, experts, tmp_path, monkeypatch):
    monkeypatch.setattr(moe, "SORTED_VALUES", 1 << 12)
    monkeypatch.setattr(moe, "LEAST_ROWS", 8)
    made = golden.read(name)
    check(run(made, golden.write_folder(made, tmp_path), 2, 2, experts), made)


def test_key_heads_that_the_mesh_cannot_divide_are_repeated(tmp_path):
    made = golden.read("gemma3")
    check(run(made, golden.write_folder(made, tmp_path), 1, 3), made)


def test_sparse_attention_refuses_rows_that_it_would_thin_out(tmp_path):
    cfg = target.read_config(golden.write_folder(golden.read("glm_moe_dsa"), tmp_path))
    target.check_length(cfg, 96)
    with pytest.raises(EyasError, match="index_topk=96"):
        target.check_length(cfg, 97)


@pytest.mark.parametrize("name", golden.names())
def test_a_golden_was_made_from_its_config(name):
    assert golden.read(name).config == golden.config(name)
