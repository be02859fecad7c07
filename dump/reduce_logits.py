"""What a codec keeps of the logits, made and reduced a few positions at a time: [B, T, V] is never held.

Dimensions: B rows of a batch, T positions, c positions of a chunk, H hidden size, V vocabulary, N draft
vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from common.codec import Codec

CHUNK_BYTES = 64 << 20  # of f32 logits a device holds at a time

Logits = Callable[[jax.Array], jax.Array]  # [..., H] -> f32 [..., V]


def chunk_length(rows: int, length: int, vocab_size: int) -> int:
    """Positions whose logits are held at once: equal parts of `length` that fit CHUNK_BYTES."""
    fits = max(1, CHUNK_BYTES // (rows * vocab_size * 4))
    return -(-length // -(-length // fits))


def encode_logits(
    codec: Codec, logits: Logits, last_BTH: jax.Array, draft_ids_N: jax.Array | None, chunk: int
) -> dict[str, jax.Array]:
    """Argmax, logsumexp and what the codec adds, [B, T, ...]; `chunk` positions at a time.

    `logits` also decides where its result lies on the mesh (whole distributions, split by row). The argmax is
    the first of equals, as `jax.lax.top_k` and `numpy.argmax` have it.
    """
    B, T, H = last_BTH.shape
    whole_BTH = jnp.pad(last_BTH, ((0, 0), (0, -T % chunk), (0, 0)))
    last_nBcH = jnp.moveaxis(whole_BTH.reshape(B, -1, chunk, H), 1, 0)
    found = jax.lax.map(lambda last_BcH: _reduce(codec, logits(last_BcH), draft_ids_N), last_nBcH)
    return {n: jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T] for n, x in found.items()}


def _reduce(codec: Codec, logits_BcV: jax.Array, draft_ids_N: jax.Array | None) -> dict[str, jax.Array]:
    # The barrier: where slices of top_k's result are used, XLA for CPU sorts the whole vocabulary instead of
    # selecting (jaxlib 0.10.2: 12 times the time).
    found = jax.lax.top_k(logits_BcV, codec.size if codec.name == "topk" else 1)
    top, ids = jax.lax.optimization_barrier(found)
    largest = top[..., 0]
    found = {
        "argmax": ids[..., 0],
        "logsumexp": largest + jnp.log(jnp.exp(logits_BcV - largest[..., None]).sum(-1)),
    }
    if codec.name == "topk":
        found |= {"topk_logits": top.astype(jnp.float16), "topk_ids": ids}
    elif codec.name == "draft":
        found["draft_logits"] = jnp.take(logits_BcV, draft_ids_N, axis=-1).astype(codec.logits_dtype)
    elif codec.name == "full":
        found["full_logits"] = logits_BcV.astype(codec.logits_dtype)
    return found
