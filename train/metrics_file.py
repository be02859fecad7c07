"""metrics.jsonl, which a run appends to and a continued run reads again."""

import io
import json
import os
from contextlib import suppress
from typing import Any, BinaryIO

from common import pod, schema, storage, strict_json
from common.errors import EyasError
from common.library_errors import library_errors
from common.progress import note
from common.schema import Count, TypedDict
from train.names import EVALUATION, METRICS


class _Line(TypedDict):
    step: Count


class Lines:
    """metrics.jsonl, a JSON object a line. Lines beyond `step`, and evaluations beyond step `measured`, are
    dropped: the run that wrote them was killed, and they come again.

    An object of a bucket cannot be appended to: the lines are held in memory, and all are written when they
    are flushed: some hundred bytes a line, beside the 12 bytes a parameter of the state that they go with. Of
    several processes the first one writes. `before`: the lines that were there; `again`: the steps whose
    evaluations were dropped.
    """

    def __init__(self, out: str, step: int, measured: int):
        """EyasError if a line is no metrics'; half a line at the end, of a run that was killed, is none."""
        self._url = storage.join(out, METRICS)
        self._unwritten = False
        self._file: BinaryIO = io.BytesIO()
        self.before: list[dict[str, Any]] = []
        self.again: list[int] = []
        if not pod.is_first():
            return
        kept: list[bytes] = []
        if storage.exists(self._url):
            lines = storage.read_bytes(self._url).splitlines(keepends=True)
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    continue
                found = self._parse(line, number)
                if found["step"] <= (measured if EVALUATION in found else step):
                    kept.append(line)
                    self.before.append(found)
                elif EVALUATION in found:
                    self.again.append(found["step"])
        if step and not kept:
            note(f"{self._url} has lost its lines up to step {step}; the weights do not need them")
        storage.write_bytes(self._url, b"".join(kept))
        if storage.is_remote(self._url):
            self._file.write(b"".join(kept))
            return
        with library_errors(self._url):
            self._file = open(storage.local_path(self._url), "ab")  # noqa: SIM115

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        where, advice = f"{self._url}, line {number}", "mend or delete that line: the weights do not need it"
        return schema.check(_Line, strict_json.parse(line, where), where, advice)

    def add(self, line: dict[str, Any]) -> None:
        """Appends one line, on a disk at once."""
        self._unwritten = pod.is_first()
        with library_errors(self._url):
            self._file.write((json.dumps(line, allow_nan=False) + "\n").encode())
            self._file.flush()

    def flush(self) -> None:
        """Waits until every line is on disk or in the bucket; one that refused them is not asked again."""
        unwritten, self._unwritten = self._unwritten, False
        if isinstance(self._file, io.BytesIO):
            if unwritten:
                storage.write_bytes(self._url, self._file.getvalue())
            return
        with library_errors(self._url):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more lines. Those of a run that ends by an error are kept where that can be done."""
        with suppress(EyasError):
            self.flush()
        with suppress(OSError):  # what the disk refused, which was told, is tried once more
            self._file.close()
