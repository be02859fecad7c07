"""Which arrays of a store teach a head, and how they become states on the devices.

They travel as they are stored, and are decoded once for all runs that take them.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from common.channels import decode_channels
from common.codec import LOGPROBS, arrays_of, decode_states
from common.errors import EyasError
from common.store import Store
from train.batch import Inputs

_LOOKED_AT = 8  # rows at once


def whole_teacher(store: Store) -> str:
    """What tells most of the target for every row: its states, or where they are left out stored logits."""
    return "recompute" if store.rows_with("last_hidden") == store.rows else "stored"


def at_most(store: Store) -> str:
    """What is to be said of the acceptance at temperature 1 that the store tells; "" if it is exact."""
    if whole_teacher(store) == "recompute":
        return ""
    return (
        f"at most: {store.features['codec']['size']} logits are known, the others taken to be as the head's"
    )


def teaching_arrays(store: Store, teacher: str, inputs: Inputs) -> tuple[str, ...]:
    """The feature arrays that are read for a teacher and a head with these inputs. EyasError if the store has
    not what is to teach."""
    features = store.features
    states = ["aux_hidden"] if inputs.aux_layers else []
    if inputs.last or teacher == "recompute":
        states.append("last_hidden")
    names = ("argmax", *arrays_of(features["precision"], *states))
    if teacher == "recompute":
        return (*names, "logsumexp")
    codec = features["codec"]["name"]
    if codec not in ("topk", "draft", "full"):
        raise EyasError(
            f"{store.url} has no logits to teach with (codec {codec}); use --teacher recompute, or dump with "
            "--logits topk, draft or full"
        )
    return (*names, f"{codec}{LOGPROBS}", *(("topk_ids",) if codec == "topk" else ()))


def require_inputs(inputs: Inputs, store: Store, where: str) -> None:
    """EyasError unless the store has what the head at `where` reads, of every row."""
    stored = store.features["aux_layers"]
    if not set(inputs.aux_layers) <= set(stored):
        raise EyasError(
            f"{where} takes aux layers {list(inputs.aux_layers)}, {store.url} has those of {stored}; dump a "
            "store with --aux-layers like the head's"
        )
    if inputs.last and whole_teacher(store) != "recompute":
        raise EyasError(
            f"{where} reads last_hidden, which {store.url} has not of every row; dump a store with "
            "--last-hidden all"
        )


def channels_of(store: Store) -> dict[str, np.ndarray]:
    """The float32 scales of the store's channels by the names of states; {} where it has none."""
    features, hidden = store.features, store.features["target"]["hidden_size"]
    shapes = {"aux_hidden": (len(features["aux_layers"]), hidden), "last_hidden": (hidden,)}
    return decode_channels(features.get("channels", {}), shapes)


def not_finite(store: Store, rows: np.ndarray, inputs: Inputs) -> str | None:
    """The name of an array and the number of the first of these rows in which it is not finite, of those that
    a head with these inputs is measured by."""
    for at in range(0, len(rows), _LOOKED_AT):
        some = rows[at : at + _LOOKED_AT]
        for name, values in store.read(teaching_arrays(store, whole_teacher(store), inputs), some).items():
            sound = np.isfinite(values.reshape(len(some), -1).astype(np.float32)).all(1)
            if not sound.all():
                return f"{name} of row {some[sound.argmin()]}"
    return None


def decoded(rows: Mapping[str, jax.Array], channels: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """What was read, with states of 8 bits in bfloat16, which rounds by far less than they do."""
    states = {name: x for name, x in rows.items() if name.endswith(("_hidden", "_scale"))}
    if states.keys().isdisjoint(("aux_scale", "last_scale")):
        return dict(rows)
    return {name: x for name, x in rows.items() if name not in states} | _widened(states, dict(channels))


@jax.jit
def _widened(states: dict[str, jax.Array], channels: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: x.astype(jnp.bfloat16) for name, x in decode_states(states, channels).items()}
