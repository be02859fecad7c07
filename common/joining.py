"""How the processes of a pod meet: what was given by hand is checked, and the others are waited for. And what
is said where JAX aborts this one because the first is gone."""

import ctypes
import os
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any

from common import progress, stopping
from common.errors import EyasError, RestartError

SECONDS = 300  # for all processes to start
_LONGER = 8.0  # seconds that the first process, which the others ask, waits longer
_PATIENCE = 8.0  # seconds after which the user is told
_ANSWER = 2.0  # seconds for the first process to take a connection
_handlers: list[Any] = []  # the system calls them: they are kept
_leaving: list[int] = []  # the code with which this process is about to end


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Initialises jax.distributed, in a thread: it hears no signal while it waits, and would end the process
    with a trace when it has waited enough.

    RuntimeError if not all come, Stopped if asked to stop meanwhile, and what JAX raises.
    """
    import jax  # only here: every verb imports this file

    def joined() -> None:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=2 * SECONDS)

    start, last = time.monotonic(), SECONDS + (_LONGER if process == 0 else 0)
    told = False

    def check() -> None:
        nonlocal told
        stopping.check()
        seconds = time.monotonic() - start
        if seconds > last:
            raise RuntimeError(f"not all came within {SECONDS} seconds")
        if seconds > _PATIENCE and not told:
            told = True
            progress.note("waiting for the other processes of the pod: the same command runs on every host")

    stopping.interruptible(joined, check)


def check_given(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """EyasError unless JAX could begin with these; of some mistakes it would die without a word."""
    if None in (coordinator, processes, process):
        raise EyasError(
            f"--coordinator is {coordinator}, --processes {processes}, --process {process}: give all three "
            "or none (EYAS_COORDINATOR, EYAS_PROCESSES and EYAS_PROCESS count as given)"
        )
    if not 0 <= process < processes:
        raise EyasError(f"--process {process} of {processes}: give a number from 0 to {processes - 1}")
    host, _, port = coordinator.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise EyasError(
            f"--coordinator {coordinator!r} is no HOST:PORT; give that of process 0, 10.0.0.1:8476 say"
        )


def check_port(coordinator: str) -> None:
    """EyasError unless this process, the first one, can listen there."""
    try:
        socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
    except OSError as error:
        raise EyasError(
            f"--coordinator {coordinator}: this host cannot listen there ({os.strerror(error.errno)}); end "
            "what uses the port, or give another one on every host"
        ) from None


def leaves(code: int) -> None:
    """From now on the end of the first process is none that this one would have to tell of."""
    _leaving.append(code)


def explain_abort(coordinator: str) -> None:
    """From now on this process ends with one line and the code to start it again where JAX aborts it because
    the first one is gone: JAX has no other way to tell that. Any other abort stays what it is."""
    host, _, port = coordinator.rpartition(":")

    def aborted(_: int) -> None:
        if _leaving:  # the first one heard that, and was faster
            os._exit(_leaving[0])
        with suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()
            return
        print("Error: process 0 is lost; start the same command again", file=sys.stderr, flush=True)
        os._exit(RestartError.exit_code)

    _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted))  # Python's own come too late
    ctypes.CDLL(None).signal(signal.SIGABRT, _handlers[-1])
