"""What the disk or the bucket refuses, said in one line."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from common import arrays
from common.errors import MachineError

_STATUS = re.compile(r"[A-Z_]+: ")  # how TensorStore's errors begin
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def readable_errors(what: str) -> Iterator[None]:
    """Turns what the file system or TensorStore refuses into one line: a full disk, or what else it was."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and not _STATUS.match(str(error)):
            raise  # not TensorStore's
        code = error.errno if isinstance(error, OSError) else None
        full = code in _FULL or any(f"os_error_code='{n}'" in str(error) for n in _FULL)
        cause = (
            "the disk is full; make room" if full else f"writing failed ({arrays.reason(error)}); mend that"
        )
        raise MachineError(
            f"{what}: {cause} and run the same command again; what is complete is kept"
        ) from error
