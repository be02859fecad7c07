"""Codecs against NumPy in float64, ties and float8 included."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from common.channels import decode_channels, encode_channels
from common.codec import (
    Codec,
    _summed,
    _summed_by_block,
    arrays_of,
    decode,
    decode_states,
    encode_logits,
    encode_states,
    quantise,
    shapes,
    square_sums,
)
from common.config import CODECS, FLOAT8, PRECISIONS
from common.draft_vocab import most_frequent
from common.errors import EyasError
from common.mesh import make_mesh, sharding
from dump import reduce_logits
from dump.plan import DumpConfig

B, T, H, V, K = 4, 6, 16, 40, 5
IDS = np.array([0, 3, 17, 39], np.int32)


def inputs():
    rng = np.random.default_rng(0)
    last = rng.integers(-3, 4, (B, T, H)).astype(np.float32)  # small integers: many exact ties
    head = rng.integers(-1, 2, (V, H)).astype(np.float32)
    head[20:] = head[:20]  # every logit appears twice
    return last, head


def run(codec, chunk, mesh=None):
    last, head = inputs()
    if mesh is not None:
        last = jax.device_put(last, sharding(mesh, ("batch", None, None)))
        head = jax.device_put(head, sharding(mesh, ("vocab", None)))

    def whole(last):
        found = jnp.einsum("bch,vh->bcv", last, head)
        return found if mesh is None else jax.sharding.reshard(found, sharding(mesh, ("row", None, None)))

    encode = jax.jit(lambda x: reduce_logits.reduce_logits(codec, whole, x, jnp.asarray(IDS), chunk))
    return {n: np.asarray(x) for n, x in encode(jnp.asarray(last)).items()}


def expected():
    last, head = inputs()
    return np.einsum("bth,vh->btv", last.astype(np.float64), head.astype(np.float64))


@pytest.mark.parametrize("chunk", [1, 2, 4, 6])
@pytest.mark.parametrize(("name", "size"), [("topk", K), ("draft", len(IDS)), ("full", V), ("none", 0)])
def test_logits_codecs(name, size, chunk):
    found = run(Codec(name, size, "float32"), chunk)
    logits = expected()
    np.testing.assert_array_equal(found.pop("argmax"), logits.argmax(-1))
    logsumexp = np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(found.pop("logsumexp"), logsumexp, rtol=1e-6)
    logp = logits - logsumexp[..., None]
    if name == "topk":
        order = np.argsort(-logits, axis=-1, kind="stable")[..., :K]
        np.testing.assert_array_equal(found["topk_ids"], order)
        np.testing.assert_allclose(found["topk_logprobs"], np.take_along_axis(logp, order, -1), rtol=5e-4)
        assert found["topk_logprobs"].dtype == np.float16
    elif name == "draft":
        np.testing.assert_allclose(found["draft_logprobs"], logp[..., IDS], rtol=1e-6, atol=1e-6)
    elif name == "full":
        np.testing.assert_allclose(found["full_logprobs"], logp, rtol=1e-6, atol=1e-6)
    else:
        assert not found


@pytest.mark.parametrize(("name", "size"), [("topk", 16), ("draft", 16), ("full", 500)])
def test_confident_targets_keep_their_probabilities(name, size):
    """With logits of about 40: of the likely tokens within 0.1%, and of what they lack of the mass too."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(300, 500))
    logits[:, 0] += rng.uniform(12, 16, size=300)  # p of 0.97 to 0.9999
    logits += rng.uniform(30, 40, size=(300, 1))
    logits = logits.astype(np.float32)
    ids = np.arange(size, dtype=np.int32)
    found = jax.jit(lambda x: encode_logits(Codec(name, size, "bfloat16"), x, ids))(logits)
    stored = np.asarray(found[f"{name}_logprobs"])
    assert stored.dtype == np.float16
    p = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    p = np.take_along_axis(p, np.asarray(found["topk_ids"]), -1) if name == "topk" else p[:, :size]
    back = np.exp(stored.astype(np.float64))
    likely = p > 0.02
    np.testing.assert_allclose(back[likely], p[likely], rtol=1e-3)
    assert (np.abs(back - p) <= 5e-4 * (1 - p) + 2e-7).all()
    np.testing.assert_allclose(1 - back[:, 0], 1 - p[:, 0], rtol=1e-3)
    if name == "topk":
        np.testing.assert_allclose(1 - back.sum(-1), 1 - p.sum(-1), rtol=1e-3)


def test_log_probabilities_are_finite_and_at_most_0():
    """Also of tokens that a target rules out; each codec stores numbers that verify lets pass."""
    logits = np.full((2, V), -1e30, np.float32)
    logits[0, 3], logits[1] = 50, 0.0
    logits[0, 4] = -np.inf
    for codec in (Codec("topk", K, "int8"), Codec("full", V, "float32")):
        found = encode_logits(codec, jnp.asarray(logits), None)[codec.logprobs[0]]
        assert np.isfinite(found).all()
        assert (np.asarray(found) <= 0).all()
        assert (np.exp(np.asarray(found[0], np.float64)).sum()) == 1


def test_the_vocabulary_is_never_sorted():
    last, head = map(jnp.asarray, inputs())

    def encode(last, head):
        return reduce_logits.reduce_logits(
            Codec("topk", K, "float32"),
            lambda part: jnp.einsum("bch,vh->bcv", part, head),
            last,
            None,
            2,
        )

    compiled = jax.jit(encode).lower(last, head).compile().as_text()
    assert "TopK" in compiled
    assert " sort(" not in compiled


def test_the_default_selects_nothing_but_the_largest():
    assert CODECS[0] == DumpConfig("model", "store").logits == "none"
    text = jax.jit(lambda x: encode_logits(Codec("none", 0, "float32"), x, None)).lower(jnp.ones((2, 3, V)))
    assert not re.search(r"top_?k|\bsort\b", text.as_text(), re.IGNORECASE)


@pytest.mark.parametrize("size", [1, 37, 40, 384, 1000])
def test_the_first_of_the_largest_is_kept_for_any_vocabulary(size):
    rng = np.random.default_rng(size)
    logits = rng.integers(-2, 3, (2, 30, size)).astype(np.float32)
    logits[0, :5] = -np.inf
    logits[0, 5:20, rng.integers(size, size=15)] = np.inf
    logits[1, :9, rng.integers(size, size=9)] = np.nan
    found = jax.jit(lambda x: encode_logits(Codec("none", 0, "float32"), x, None))(logits)
    known = ~np.isnan(logits).any(-1)
    np.testing.assert_array_equal(np.asarray(found["argmax"])[known], logits.argmax(-1)[known])
    assert np.isnan(np.asarray(found["logsumexp"])[~known]).all()  # which ends the dump


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_states_come_back_as_they_were(precision, kind):
    rng = np.random.default_rng(0)
    states = {
        "aux_hidden": rng.standard_normal((B, T, 3, H)).astype(np.float32),
        "last_hidden": 1000 * rng.standard_normal((B, T, H)).astype(np.float32),
    }
    codec = Codec("none", 0, precision)
    channels = {n: rng.choice([0.25, 1, 2], s).astype(np.float32) for n, s in codec.channels(3, H).items()}
    stored = encode_states(codec, *map(jnp.asarray, states.values()), channels)
    assert set(stored) == set(arrays_of(precision, *states))
    given = {name: kind(x) for name, x in stored.items()} | {"argmax": kind(np.zeros(3))}
    found = decode_states(given, {name: kind(x) for name, x in channels.items()})
    assert set(found) == {*states, "argmax"}
    bits = {"float32": 24, "bfloat16": 8, "float8_e4m3fn": 4}
    for name, x in states.items():
        off = np.abs(np.asarray(found[name], np.float32) - x)
        if precision == "int8":  # half of a step, which is a channel's part of the token's largest
            step = (np.abs(x / channels[name]).max(-1, keepdims=True) / 127) * channels[name]
            assert (off <= 0.5001 * step).all()
        else:
            assert (off <= 2.0 ** -bits[precision] * np.abs(x) + 1e-5 * np.abs(x).max()).all()


def test_scales_of_channels_make_channels_alike():
    """Of sums over documents alone: the root mean square of tokens that are as large as all others, to the
    nearest power of two; a silent channel's is finite, and so are those of a silent state."""
    rng = np.random.default_rng(0)
    size = 10.0 ** rng.integers(-2, 4, H)
    aux = (rng.standard_normal((B, T, 3, H)) * size).astype(np.float32)
    aux[..., 0, :] = 0
    aux[..., 1, 5] = 0
    inside = np.ones((B, T), bool)
    inside[:, -1] = False
    aux[:, -1] = np.nan
    aux[:, 0] *= 1e25  # it counts for one token
    codec = Codec("none", 0, "int8")
    squares = square_sums(codec, jnp.asarray(aux), jnp.asarray(aux[..., 2, :]), jnp.asarray(inside))
    assert {n: x.shape for n, x in squares.items()} == {"aux_hidden": (B, 3, H), "last_hidden": (B, H)}
    total = {n: np.asarray(x).sum(0) for n, x in squares.items()}
    text = encode_channels(total)
    found = decode_channels(text, codec.channels(3, H))
    np.testing.assert_array_equal(found["aux_hidden"][0], 1)
    tokens = aux[inside][:, 2].astype(np.float64)
    rms = np.sqrt((np.square(tokens) / np.square(tokens).mean(-1, keepdims=True)).mean(0))
    ratio = found["last_hidden"] / (rms / rms.max())
    assert ((ratio <= 2**0.5001) & (ratio >= 2**-0.5001)).all()
    np.testing.assert_array_equal(found["aux_hidden"][2], found["last_hidden"])
    assert (found["aux_hidden"] > 0).all()
    with pytest.raises(ValueError, match=r"must have \d+ exponents"):
        decode_channels(text, codec.channels(3, H + 1))
    assert not Codec("none", 0, FLOAT8).channels(3, H)


def test_a_codec_may_leave_the_last_state_out():
    codec = Codec("topk", K, "int8", last_rows=0)
    assert set(codec.channels(3, H)) == {"aux_hidden"}
    aux, last = jnp.ones((B, T, 3, H)), jnp.ones((B, T, H))
    assert set(encode_states(codec, aux, last, {"aux_hidden": np.ones((3, H), np.float32)})) == {
        "aux_hidden",
        "aux_scale",
    }
    assert not [name for name in shapes(codec, B, T, 3, H) if name.startswith("last")]
    some = shapes(Codec("topk", K, "int8", last_rows=2), B, T, 3, H)
    assert {name: shape[0] for name, (shape, _) in some.items()} == dict.fromkeys(some, B) | {
        "last_hidden": 2,
        "last_scale": 2,
    }


def test_a_mesh_gives_the_same():
    codec = Codec("topk", K, "float32")
    alone, split = run(codec, 2), run(codec, 2, make_mesh(2, 2))
    for name, value in alone.items():
        np.testing.assert_array_equal(split[name], value, name)


def test_declared_shapes_are_those_made():
    last, head = map(jnp.asarray, inputs())
    aux = jnp.ones((B, T, 3, H))

    def everything(codec):
        def whole(last):
            return jnp.einsum("bch,vh->bcv", last, head)

        return encode_states(codec, aux, last) | reduce_logits.reduce_logits(codec, whole, last, IDS, 3)

    for precision in PRECISIONS:
        for name, size in (("topk", K), ("draft", len(IDS)), ("full", V), ("none", 0)):
            codec = Codec(name, size, precision)
            made = jax.eval_shape(lambda codec=codec: everything(codec))
            declared = shapes(codec, B, T, 3, H)
            assert {n: (x.shape, x.dtype) for n, x in made.items()} == declared


@pytest.mark.parametrize("precision", [FLOAT8, "int8"])
def test_tokens_that_are_not_finite_stay_so_and_the_least_of_all_are_nothing(precision):
    """Also of values of which a device keeps the size, but not that of the scale."""
    x = np.ones((4, H), np.float32)
    x[0, 3], x[1, 3], x[2], x[3] = np.nan, -np.inf, 2e-38, 1e-40
    back = np.asarray(decode(*quantise(jnp.asarray(x), precision)))
    assert np.isnan(back[:2]).any(-1).all()
    np.testing.assert_array_equal(back[2:], 0)


def test_a_channel_that_was_silent_in_the_sample_does_not_drown_the_others():
    rng = np.random.default_rng(0)
    seen = rng.standard_normal((200, H)).astype(np.float32)
    seen[:, 4] = 0
    text = encode_channels({"last_hidden": np.square(seen).sum(0)})
    channel = decode_channels(text, {"last_hidden": (H,)})["last_hidden"]
    later = rng.standard_normal((50, H)).astype(np.float32)
    back = np.asarray(decode(*quantise(jnp.asarray(later), "int8", channel), channel))
    assert np.abs(back - later).max() < 0.05


def test_float8_has_a_scale_a_token():
    rng = np.random.default_rng(0)
    # Tokens whose sizes differ by 1e8, as massive activations do; a token of zeros.
    x = (rng.standard_normal((B, T, H)) * 10.0 ** rng.integers(-4, 5, (B, T, 1))).astype(np.float32)
    x[1, 2] = 0
    stored, scale = quantise(jnp.asarray(x), FLOAT8)
    assert stored.dtype == ml_dtypes.float8_e4m3fn
    assert scale.shape == (B, T)
    back = np.asarray(stored, np.float64) * np.asarray(scale, np.float64)[..., None]
    assert np.isfinite(back).all()
    assert (np.abs(back - x) <= np.abs(x) / 16 + np.abs(x).max(-1, keepdims=True) / 448 / 1024).all()
    np.testing.assert_array_equal(back[1, 2], 0)


def test_chunks_are_equal_parts_of_the_row_that_fit():
    assert reduce_logits.chunk_length(4, 512, "tpu") == 256
    assert reduce_logits.chunk_length(3, 512, "tpu") == 256  # 341 would fit; 2 parts either way
    assert reduce_logits.chunk_length(1, 6, "tpu") == 6
    assert reduce_logits.chunk_length(4096, 6, "tpu") == 1
    assert reduce_logits.chunk_length(4, 512, "cpu") == 32


def test_most_frequent_prefers_lower_ids():
    counts = np.array([0, 5, 2, 5, 2, 2, 9])
    assert most_frequent(counts, 4).tolist() == [1, 2, 3, 6]
    assert most_frequent(counts, 7).tolist() == list(range(7))
    for n in (0, 8):
        with pytest.raises(EyasError, match="draft vocabulary"):
            most_frequent(counts, n)


@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize("mesh", [(1, 1), (4, 1), (2, 2)])
def test_rows_of_any_number_lie_where_they_lay(rows, mesh):
    """One row a chip, and several."""
    made = make_mesh(*mesh)
    logits = np.random.default_rng(0).normal(size=(rows // 4 * made.size, 3, 256)).astype(np.float32)
    held = jax.device_put(logits, sharding(made, ("row", None, None)))
    found = jax.jit(lambda x: encode_logits(Codec("none", 0, "float32"), x, None))(held)
    np.testing.assert_array_equal(found["argmax"], logits.argmax(-1))


@pytest.mark.parametrize("way", [_summed, _summed_by_block])
@pytest.mark.parametrize("dp", [0, 1, 2])
def test_every_way_finds_the_first_of_equals(way, dp):
    logits = expected().astype(np.float32)
    mesh = make_mesh(dp) if dp else None
    placed = logits if mesh is None else jax.device_put(logits, sharding(mesh, ("row", None, None)))
    argmax, logsumexp = jax.jit(way)(placed)
    np.testing.assert_array_equal(argmax, logits.argmax(-1))
    np.testing.assert_allclose(logsumexp, np.log(np.exp(logits).sum(-1)), rtol=1e-6)
