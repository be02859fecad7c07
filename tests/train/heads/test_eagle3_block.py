"""The block is a function of its inputs alone: with attention written down plainly it drafts as trained."""

import jax
import jax.numpy as jnp
import numpy as np

from common.layers import linear, rms_norm
from tests.train.on_device import f32, parameters_of
from tests.train.problem import problem
from train.heads.eagle3.block import block, fused, keys_values, turns, weights


def attend(q_TNd, keys, values, seen_TS):
    """Softmax attention over keys [T, S, N, d], S of them for each query."""
    s = jnp.einsum("tnd,tsnd->tns", q_TNd, keys) * q_TNd.shape[-1] ** -0.5
    p = jax.nn.softmax(jnp.where(seen_TS[:, None], s, -jnp.inf), -1)
    return jnp.einsum("tns,tsnd->tnd", p, values)


def test_two_steps_of_the_block_are_the_references():
    p = problem().document(1, 5)
    c, T = p.config, p.tokens.shape[1]
    before, w = weights(c, parameters_of(p), jnp.float32)
    positions = jnp.asarray(p.positions[:1])
    embedded = rms_norm(f32(p.embed[p.tokens[0]]), before["token_norm"], c.rms_eps)
    token_TX = linear(embedded, before["qkv"])
    state = fused(c, before, f32(p.aux[0]))
    causal = np.tri(T, dtype=bool)
    own: list = []
    expected = p.logits(2)

    def read(q_1TNd):
        first, *later = own
        keys, values = (
            jnp.concatenate(
                [jnp.broadcast_to(first[n][None], (T, *first[n].shape)), *(x[n][:, None] for x in later)], 1
            )
            for n in (0, 1)
        )
        seen = np.pad(causal, ((0, 0), (0, len(later))), constant_values=True)
        return attend(q_1TNd[0], keys, values, seen).reshape(T, -1)

    for step in range(2):
        token = jnp.roll(token_TX, -1 - step, 0)
        width = c.num_heads * c.head_dim
        turned = turns(c, positions + step)
        made = keys_values(c, w, token[:, width:], state, turned)
        heads = (x.reshape(T, c.num_kv_heads, -1) for x in made)
        own.append([jnp.repeat(x, c.num_heads // c.num_kv_heads, 1) for x in heads])
        state = block(c, w, token[:, :width], state, turned, read)
        logits = linear(rms_norm(state, before["norm"], c.rms_eps), f32(p.params["lm_head.weight"]))
        inside = T - 1 - step  # whose token is in the document; they see no index behind them
        np.testing.assert_allclose(logits[:inside], expected[step, 0, :inside], rtol=1e-4, atol=1e-4)
