"""Runs a command until it ends or its standard input is closed, then ends all that it has started.

    python -m pipelines.serving.keeper COMMAND ARGUMENT ...

Whoever starts it holds the other end of its standard input: however that process ends, killed for good or by
a second Ctrl-C, the command ends with it.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

_SECONDS = 20.0  # to end by itself


def main(command: list[str]) -> int:
    """The command's exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # of a terminal's group: standard input says when to end
        signal.signal(number, signal.SIG_IGN)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_as_usual
    )
    threading.Thread(target=_wait_for_the_end_of_input, args=(process,), daemon=True).start()
    try:
        return process.wait()
    finally:
        _end(process.pid, signal.SIGKILL)  # what it has started and left behind


def _as_usual() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _wait_for_the_end_of_input(process: subprocess.Popen) -> None:
    while os.read(0, 4096):
        pass
    _end(process.pid, signal.SIGTERM)
    until = time.monotonic() + _SECONDS
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    _end(process.pid, signal.SIGKILL)


def _end(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
