"""What the disk or the bucket refuses, said in one line."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from common import arrays, files
from common.errors import EyasError, MachineError

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


def require_room(url: str, need: int, what: str, advice: str) -> None:
    """EyasError if the disk of `url` (a folder, there or not) has less room than `need` bytes for `what`."""
    if files.is_remote(url):
        return
    place = os.path.abspath(files.local_path(url))
    while not os.path.exists(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free
    if need > free:
        raise EyasError(
            f"{what} need {tqdm.format_sizeof(need, 'B')}, the disk of {url} has "
            f"{tqdm.format_sizeof(free, 'B')} left; {advice}"
        )
