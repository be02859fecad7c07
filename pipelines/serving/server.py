"""A server that runs for as long as a block of code, on a port of this machine, with its log kept."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Self

from common.errors import MachineError
from common.progress import note
from pipelines.serving import keeper

_LOOK = 0.5  # seconds
_TOLD = 30.0  # seconds between two notes
_TRIES = 3  # ports
_TAKEN = "ddress already in use"


class Server:
    """`make` gives the command of a server on a port. Within `with` it has answered at `health`.

    MachineError, with the last lines of `log`, if it ends by itself or is not up in `timeout` seconds.
    """

    def __init__(
        self, make: Callable[[int], list[str]], environment: Mapping[str, str], log: str, timeout: float
    ) -> None:
        self._make, self._environment = make, environment
        self.log, self._timeout = log, timeout
        self.url = ""

    def __enter__(self) -> Self:
        for last in (False,) * (_TRIES - 1) + (True,):
            self._start()
            try:
                self._wait()
                return self
            except MachineError:
                self.__exit__()
                if last or _TAKEN not in tail(self.log, 200):  # somebody was faster
                    raise
            except BaseException:
                self.__exit__()
                raise
        raise AssertionError

    def __exit__(self, *_: object) -> None:
        self._keeper.stdin.close()
        self._keeper.wait()

    def _start(self) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-P", keeper.__file__, *self._make(port)]
        # What is on Eyas's path must not be found by the server, and its log must not tell keys.
        kept = {n: v for n, v in os.environ.items() if n != "PYTHONPATH" and not n.startswith("EYAS_API_KEY")}
        with open(self.log, "wb") as log:
            self._keeper = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=kept | dict(self._environment),
                cwd=os.path.dirname(self.log),
            )

    def _wait(self) -> None:
        began = told = time.monotonic()
        while not _answers(f"{self.url}/health"):
            self.require_running()
            now = time.monotonic()
            if now - began > self._timeout:
                raise MachineError(
                    f"the server did not answer in {self._timeout:g} seconds (--timeout); {self._last()}"
                )
            if now - told > _TOLD:
                told = now
                note(f"the server starts since {now - began:.0f} seconds: {tail(self.log, 1)}")
            time.sleep(_LOOK)

    def require_running(self) -> None:
        """MachineError if it has ended."""
        code = self._keeper.poll()
        if code is not None:
            raise MachineError(f"the server ended with {code}; {self._last()}")

    def _last(self) -> str:
        return f"its log {self.log} ends: {tail(self.log, 3)}"


def free_port() -> int:
    """A port of this machine that nobody listened on just now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def tail(log: str, lines: int) -> str:
    """The last lines of a file that say something, as one line."""
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - 65536))
        text = file.read().decode(errors="replace")
    said = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return " | ".join(line[-200:] for line in said[-lines:]) or "(it is empty)"


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
