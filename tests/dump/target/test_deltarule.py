"""The chunked delta rule is the step-by-step recurrence, started anew at every document."""

import numpy as np

from dump.target.deltarule import CHUNK, delta_rule


def recurrence(q, k, v, decay, beta, segments):
    out = np.zeros(v.shape)
    B, T, N, D = k.shape
    for b in range(B):
        for n in range(N):
            state = np.zeros((D, v.shape[-1]))
            for t in range(T):
                if t and segments[b, t] != segments[b, t - 1]:
                    state[:] = 0
                state *= np.exp(decay[b, t, n])
                state += beta[b, t, n] * np.outer(k[b, t, n], v[b, t, n] - k[b, t, n] @ state)
                out[b, t, n] = q[b, t, n] @ state
    return out


def test_chunks_equal_the_recurrence_over_document_boundaries():
    random = np.random.RandomState(0)
    T = 2 * CHUNK + 21
    q, k, v = (random.standard_normal((2, T, 3, n)) for n in (8, 8, 5))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    decay, beta = -np.abs(random.standard_normal((2, T, 3))) * 0.1, random.uniform(0, 1, (2, T, 3))
    cuts = [[5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK], [CHUNK + 30]]
    segments = np.array([np.searchsorted(c, np.arange(T), "right") + 1 for c in cuts], np.int32)
    given = (x.astype(np.float32) for x in (q, k, v, decay, beta))
    found = delta_rule(*given, segments)
    np.testing.assert_allclose(found, recurrence(q, k, v, decay, beta, segments), atol=2e-5)
