"""What a codec keeps of the logits, made and reduced a few positions at a time: [B, T, V] is never held.

Dimensions: B rows of a batch, T positions, c positions of a chunk, n chunks, H hidden size, V vocabulary, N
draft vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from common.codec import Codec, encode_logits

# Of a device at a time: with fewer it would wait for the output head to be read again. With more a CPU's
# caches would not hold their logits.
CHUNK_TOKENS, CPU_CHUNK_TOKENS = 1024, 128

Logits = Callable[[jax.Array], jax.Array]  # [..., H] -> f32 [..., V]


def chunk_length(rows: int, length: int, platform: str) -> int:
    """Positions of each of a device's `rows` whose logits are held at once: equal parts of `length`."""
    fits = max(1, (CPU_CHUNK_TOKENS if platform == "cpu" else CHUNK_TOKENS) // rows)
    return -(-length // -(-length // fits))


def reduce_logits(
    codec: Codec, logits: Logits, last_BTH: jax.Array, draft_ids_N: jax.Array | None, chunk: int
) -> dict[str, jax.Array]:
    """`encode_logits` of every position, [B, T, ...]; `chunk` positions at a time.

    `logits` also decides where its result lies on the mesh (whole distributions, split by row).
    """
    B, T, H = last_BTH.shape
    whole_BTH = jnp.pad(last_BTH, ((0, 0), (0, -T % chunk), (0, 0)))
    last_nBcH = jnp.moveaxis(whole_BTH.reshape(B, -1, chunk, H), 1, 0)
    found = jax.lax.map(lambda last_BcH: encode_logits(codec, logits(last_BcH), draft_ids_N), last_nBcH)
    return {n: jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T] for n, x in found.items()}
