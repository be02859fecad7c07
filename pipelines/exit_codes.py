"""The exit codes of `eyas`, and the one line that it ends with when something goes wrong.

0: done. 1: the machine failed, and somebody must mend it (a full disk). 2: a mistake in what was given. 42:
what may pass by itself (no network, a lost host, SIGTERM of a machine that is taken away): start the same
command again. 130: stopped by Ctrl-C. Only a bug of Eyas shows a stack trace.
"""

import errno
import socket
from typing import Any

import click

from common import pod
from common.errors import EyasError
from common.library_errors import explained, is_librarys
from common.stopping import STOPPED, Stop, stopped
from common.texts import is_unicode, printable

_MACHINE = {
    errno.ENOSPC: "the disk is full; make room and run the same command again",
    errno.EDQUOT: "the disk quota is used up; make room and run the same command again",
    errno.EFBIG: "the file is larger than may be written here (ulimit -f); allow more",
    errno.EIO: "the disk failed; mend that and run the same command again",
    errno.EACCES: "permission denied; choose a place that you may read and write",
    errno.EROFS: "the file system is read-only; choose another place",
}
_NETWORK = (ConnectionError, TimeoutError, socket.gaierror)


class Group(click.Group):
    """Commands whose errors, as far as a user can put them right, become one line and an exit code."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Words that are no Unicode text are refused: no array and no JSON file can be named by them."""
        for word in args:
            if not is_unicode(word):
                raise _failure(f"{word!a} is not UTF-8; rename what it names", EyasError.exit_code)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with Stop(everywhere=True, hurried=True), pod.announced():
                return super().invoke(ctx)
        except EyasError as error:
            raise _failure(str(error), error.exit_code) from None
        except KeyboardInterrupt as error:
            told = stopped(error, STOPPED)
            raise _failure(str(told), told.exit_code) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _MACHINE:
                where = f"{error.filename}: " if error.filename else ""
                raise _failure(where + _MACHINE[error.errno], 1) from None
            if not (is_librarys(error) or isinstance(error, _NETWORK)):
                raise
            told = explained(error, "a server")
            raise _failure(str(told), told.exit_code) from None


def _failure(text: str, code: int) -> click.ClickException:
    failure = click.ClickException(printable(" ".join(text.splitlines())))
    failure.exit_code = code
    return failure
