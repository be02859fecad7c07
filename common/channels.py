"""The scales of a store's channels as its manifest has them: lines of base64 of int8, exponents of two.

So every reader multiplies to the same bits, and whoever changes one changes the manifest, whose hash all
commit markers have.
"""

import base64
import math
from collections.abc import Mapping

import numpy as np

_LEAST = -20  # exponents below that of the largest channel: what is smaller is nothing beside it
_LINE = 96  # characters: people read manifests


def encode_channels(squares: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """The scales by the names of states, of the sums of each channel's squares over one sample
    (`codec.square_sums`), all finite: a channel's root mean square over that of the state's largest channel
    [..., H]; 1 of a channel that is 0 there, for if it is ever more, in small units it would drown all others
    of its token."""
    found = {}
    for name, square in squares.items():
        square = np.asarray(square, np.float64)
        largest = square.max(-1, keepdims=True)
        share = np.divide(square, largest, out=np.ones_like(square), where=square > 0)
        exponent = np.rint(np.log2(np.maximum(share, 4.0**_LEAST)) / 2)
        text = base64.b64encode(exponent.astype(np.int8).tobytes()).decode()
        found[name] = [text[start : start + _LINE] for start in range(0, len(text), _LINE)]
    return found


def decode_channels(
    stored: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Their inverse: float32 of these shapes. ValueError for what `encode_channels` never makes: a text that
    is not base64, of another size, or with exponents that would make states infinite."""
    found = {}
    for name, lines in stored.items():
        exponent = np.frombuffer(base64.b64decode("".join(lines), validate=True), np.int8)
        size = math.prod(shapes[name])
        if len(exponent) != size or exponent.min() < _LEAST or exponent.max() > 0:
            raise ValueError(f"{name} must have {size} exponents from {_LEAST} to 0")
        found[name] = np.ldexp(np.float32(1), exponent.reshape(shapes[name]).astype(np.int32))
    return found
