"""What goes wrong is one line and an exit code: 0 done, 1 the machine failed (a full disk, no network), 2 a
mistake in what was given, 130 stopped by Ctrl-C. Only a bug of ours has a stack trace.
"""

import errno
import socket
from typing import Any

import click

from common.errors import EyasError, MachineError

STOPPED = "stopped; the same command continues"
_MACHINE = {
    errno.ENOSPC: "the disk is full; make room and run the same command again",
    errno.EDQUOT: "the disk quota is used up; make room and run the same command again",
    errno.EACCES: "permission denied; choose a place that you may read and write",
    errno.EROFS: "the file system is read-only; choose another place",
}


class Group(click.Group):
    """Turns what a user can put right into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EyasError as error:
            code = 1 if isinstance(error, MachineError) else 2
            # A stage that is stopped says itself how far it came.
            code = 130 if isinstance(error.__context__, KeyboardInterrupt) else code
            raise _failure(str(error), code) from None
        except KeyboardInterrupt:
            raise _failure(STOPPED, 130) from None
        except OSError as error:
            if error.errno in _MACHINE:
                where = f"{error.filename}: " if error.filename else ""
                raise _failure(where + _MACHINE[error.errno], 1) from None
            if not _is_network(error):
                raise
            text = f"{error}; check the network and the address, then run the same command again"
            raise _failure(text, 1) from None


def _is_network(error: OSError) -> bool:
    """A host that cannot be reached, as the standard library or aiohttp (of gcsfs) says it."""
    known = (ConnectionError, TimeoutError, socket.gaierror)
    return isinstance(error, known) or type(error).__module__.startswith("aiohttp.")


def _failure(text: str, code: int) -> click.ClickException:
    failure = click.ClickException(" ".join(text.splitlines()))
    failure.exit_code = code
    return failure
