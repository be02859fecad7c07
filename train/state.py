"""What of a run is on disk: the resumable state (orbax) and the lines of metrics."""

import json
import logging
import os
from typing import Any

import jax
import orbax.checkpoint as ocp

from common import storage
from common.errors import EyasError
from common.storage import readable_errors
from train.step import State

_KEPT = 2  # a machine that dies while saving leaves the one before


class Saved:
    """The folder `state/` of a run: saved states, written in the background, whole or not at all."""

    def __init__(self, out: str):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs traces of what it then raises
        self._out = out
        place = os.path.abspath(storage.local_path(storage.join(out, "state")))
        options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT, create=True)
        self._manager = ocp.CheckpointManager(place, options=options)

    def step(self) -> int | None:
        """The newest saved step, None if there is none."""
        return self._manager.latest_step()

    def restore(self, like: State, where: jax.sharding.Sharding) -> tuple[State, dict[str, Any]]:
        """(the newest state, in the shapes and dtypes of `like`; what was noted beside it)."""
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted), noted=ocp.args.JsonRestore())
        try:
            found = self._manager.restore(self.step(), args=args)
        except (ValueError, OSError, KeyError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise EyasError(
                f"{self._out}/state/{self.step()} cannot be read ({reason}); delete it to continue from the "
                "state before it"
            ) from error
        return found["state"], found["noted"]

    def save(self, state: State, noted: dict[str, Any]) -> None:
        """Begins to save; waits only for an earlier save. EyasError if the disk is full."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), noted=ocp.args.JsonSave(noted))
        with readable_errors(f"{self._out}/state"):
            self._manager.save(int(state.step), args=args, force=True)

    def finish(self) -> None:
        """Waits until everything is on disk."""
        with readable_errors(f"{self._out}/state"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


class Lines:
    """metrics.jsonl, a JSON object a line. Lines beyond `step`, of a run that was killed, are dropped."""

    def __init__(self, out: str, step: int):
        self._path = storage.local_path(storage.join(out, "metrics.jsonl"))
        kept = []
        if os.path.exists(self._path):
            with open(self._path, encoding="utf-8") as file:
                # A killed run may leave half a line, its last.
                kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= step]
        storage.write_bytes(self._path, "".join(kept).encode())

    def add(self, line: dict[str, Any]) -> None:
        """Appends one line at once."""
        with readable_errors(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
