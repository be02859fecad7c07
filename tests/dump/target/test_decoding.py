"""Sequences that grow by a cache give what they give in one pass, in every family."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import cached_attention
from common.errors import EyasError
from common.mesh import make_mesh
from dump import target
from dump.target import decoding
from dump.target.deltarule import CHUNK, delta_rule, delta_rule_from
from tests.dump.target.test_parity import TOLERANCE, assert_close
from tests.goldens import golden
from tests.goldens.values import DOCUMENTS

SLOTS, LENGTH = 3, 46  # of the cache
FILLED = 24  # positions of the batch that begins
BEGUN = np.array([17, 5], np.int32)  # tokens of the two documents that it has
WHERE = np.array([2, 0], np.int32)  # their slots


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cached_attention, "BLOCK", 8)


def on_one_device(folder, cfg, dtype=jnp.float32):
    weights = target.load(folder, cfg, make_mesh(), dtype)
    return {name: x.addressable_data(0) for name, x in weights.items()}


class Grown:
    """Two documents in slots of a cache, whose states are compared with those of whole documents."""

    def __init__(self, made: golden.Golden, folder: str, tokens: int):
        cfg = self.cfg = target.read_config(folder)
        self.documents = np.split(made.tokens, DOCUMENTS[:1])
        self.expected = {n: np.split(x, DOCUMENTS[:1]) for n, x in made.expected.items()}
        self.weights = on_one_device(folder, cfg)
        self.cache = decoding.empty_cache(cfg, SLOTS, LENGTH, jnp.float32, tokens)
        self.has = BEGUN.copy()
        jit = partial(jax.jit, donate_argnums=1)
        self._prefill = jit(lambda *given: self._logits(decoding.prefill(cfg, *given, made.aux_layers)))
        self._step = jit(lambda *given: self._logits(decoding.step(cfg, *given, made.aux_layers)))

    def _logits(self, found):
        aux, last, cache = found
        return {"aux": aux, "last": last, "logits": target.logits(self.cfg, self.weights, last)}, cache

    def begin(self):
        tokens = np.full((2, FILLED), 7, np.int32)
        for row, (document, n) in enumerate(zip(self.documents, BEGUN, strict=True)):
            tokens[row, :n] = document[:n]
        found, self.cache = self._prefill(self.weights, self.cache, tokens, BEGUN, WHERE)
        for row, n in enumerate(BEGUN):
            self._compare(found, row, row, 0, n, "begun")

    def grow(self, size: int, right: tuple[int, int]):
        """A step of so many tokens, of which the first `right` are each document's and are kept."""
        tokens, starts = np.full((SLOTS, size), 3, np.int32), np.zeros(SLOTS, np.int32)
        for row, slot in enumerate(WHERE):
            start, n = self.has[row], right[row]
            starts[slot], tokens[slot, :n] = start, self.documents[row][start : start + n]
        found, self.cache = self._step(self.weights, self.cache, tokens, starts)
        for row, slot in enumerate(WHERE):
            self._compare(found, row, slot, self.has[row], right[row], f"step of {size}")
        self.has += right

    def _compare(self, found, document: int, row: int, start: int, count: int, what: str):
        for name, value in found.items() if count else ():
            expected = self.expected[name][document][start : start + count]
            assert_close(np.asarray(value)[row, :count], expected, f"{name}, {what}", TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.names())
def test_a_cache_gives_what_a_whole_pass_gives(name, tmp_path):
    made = golden.read(name)
    grown = Grown(made, golden.write_folder(made, tmp_path), tokens=3)
    grown.begin()
    for right in ((3, 3), (1, 2), (2, 0), (3, 1), (0, 3)):  # the others are drafts that were wrong
        grown.grow(3, right)
    assert (grown.has == (26, 14)).all()


@pytest.mark.parametrize("name", ["gpt_oss", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_a_slot_forgets_what_it_held(name, tmp_path):
    made = golden.read(name)
    grown = Grown(made, golden.write_folder(made, tmp_path), tokens=1)
    for _ in range(2):
        grown.has = BEGUN.copy()
        grown.begin()
        for _ in range(3):
            grown.grow(1, (1, 1))


def test_a_cache_is_refused_for_what_a_pass_would_not_compute_exactly(tmp_path):
    cfg = target.read_config(golden.write_folder(golden.read("glm_moe_dsa"), tmp_path))
    decoding.cache_shapes(cfg, 1, 96, jnp.float32)
    with pytest.raises(EyasError, match="index_topk=96"):
        decoding.cache_shapes(cfg, 1, 97, jnp.float32)


def test_weights_on_a_mesh_do_not_decode(tmp_path):
    made = golden.read("llama")
    folder = golden.write_folder(made, tmp_path)
    cfg = target.read_config(folder)
    cache = decoding.empty_cache(cfg, 1, 8, jnp.float32)
    weights = target.load(folder, cfg, make_mesh(), jnp.float32)
    with pytest.raises(EyasError, match="on one device"):
        decoding.step(cfg, weights, cache, jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32))


@pytest.mark.parametrize("length", [5, CHUNK + 9])
def test_the_delta_rule_from_a_state_on(length):
    rng = np.random.default_rng(0)
    B, N, D, E, T = 2, 3, 8, 4, CHUNK + 20 + length
    q, k = (rng.normal(size=(B, T, N, D)).astype(np.float32) / D**0.5 for _ in range(2))
    v = rng.normal(size=(B, T, N, E)).astype(np.float32)
    decay, beta = (-rng.uniform(0, 1, (B, T, N)).astype(np.float32), rng.uniform(0, 1, (B, T, N)))
    given = [jnp.asarray(x, jnp.float32) for x in (q, k, v, decay, beta)]
    whole = delta_rule(*given, jnp.ones((B, T), jnp.int32))
    state = jnp.zeros((B, N, D, E), jnp.float32)
    first, state = delta_rule_from(state, *(x[:, :-length] for x in given))
    second, _ = delta_rule_from(state, *(x[:, -length:] for x in given))
    assert_close(np.concatenate([first, second], 1), np.asarray(whole), "results", 1e-5)
