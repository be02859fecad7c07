"""Records of a Parquet or Arrow file, row by row, with the columns that a conversation can have."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import EyasError
from common.texts import first_line
from dump.record_shapes import FIELDS, usable

_BATCH = 256  # rows
_ARROW_FILE = b"ARROW1"


def read_parquet(url: str, file: BinaryIO) -> Iterator[tuple[list[Any], float]]:
    """Rows, and the share of the table that they are. EyasError if it is damaged or has other columns."""
    with _damage(url, "Parquet"):
        table = pq.ParquetFile(file)
        columns = _columns(url, table.schema_arrow)
        rows = max(table.metadata.num_rows, 1)
        for batch in table.iter_batches(batch_size=_BATCH, columns=columns):
            yield _rows(batch), batch.num_rows / rows


def read_arrow(url: str, file: BinaryIO) -> Iterator[tuple[list[Any], float]]:
    """Like `read_parquet`, of Arrow's file and stream formats; a stream does not say how long it is."""
    with _damage(url, "Arrow"):
        is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
        file.seek(0)
        if is_file:
            table = pa.ipc.open_file(file)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            batches = table = pa.ipc.open_stream(file)
        columns = _columns(url, table.schema)
        for batch in batches:
            share = 1 / max(table.num_record_batches, 1) if is_file else 0.0
            for start in range(0, batch.num_rows, _BATCH):
                part = batch.select(columns).slice(start, _BATCH)
                yield _rows(part), share * part.num_rows / batch.num_rows


def _rows(batch: pa.RecordBatch) -> list[Any]:
    return [_without_nulls(row) for row in batch.to_pylist()]


def _without_nulls(value: Any) -> Any:
    """A table gives every object every field of the column; null is what the others have."""
    if isinstance(value, dict):
        return {name: _without_nulls(field) for name, field in value.items() if field is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _columns(url: str, schema: pa.Schema) -> list[str]:
    if not usable(schema.names):
        raise EyasError(
            f"{url} has the columns {', '.join(schema.names) or '(none)'}; expected conversations or "
            "messages, lists of turns with a role and a text, or a question and an answer (prompt, response)"
        )
    return [name for name in schema.names if name.lower() in FIELDS]


@contextmanager
def _damage(url: str, kind: str) -> Iterator[None]:
    """Arrow's errors as one line."""
    try:
        yield
    except pa.ArrowException as error:
        raise EyasError(f"{url} is no whole {kind} file: {first_line(error)}") from None
