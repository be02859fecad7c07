"""What the runtime of the chips raises, in one line: memory that does not suffice, chips that were lost."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from common.errors import EyasError, RestartError

_LOST = ("UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED")  # of a host that is gone, say


@contextmanager
def device_errors(smaller: str) -> Iterator[None]:
    """EyasError where the chips' memory does not suffice, `smaller` says what needs less of it; RestartError
    where a chip or another host no longer answers."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        found = explained(error, smaller)
        if found is None:
            raise
        raise found from error


def explained(error: BaseException, smaller: str) -> EyasError | None:
    """The error that says so; None for any other."""
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    status, _, text = str(error).strip().partition(": ")
    line = (text.splitlines() or [""])[0][:300]
    if status == "RESOURCE_EXHAUSTED":
        return EyasError(f"the memory of the chips does not suffice ({line}); {smaller}")
    if status in _LOST or text.startswith("Gloo "):  # which carries what CPUs exchange; its status is UNKNOWN
        return RestartError(f"a chip or a host is lost ({line}); start the same command again")
    return None
