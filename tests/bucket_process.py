"""Processes whose gs:// is a server on this machine; libraries read where that is when they are loaded."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pipelines.bench import bucket

ROOT = Path(__file__).parents[1]


def started(url: str, *arguments: str) -> subprocess.Popen:
    """`python -m ARGUMENTS` with the server at `url`."""
    environment = os.environ | bucket.environment(url) | {"no_proxy": "127.0.0.1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, **pipes)


def ended(process: subprocess.Popen, seconds: float = 280) -> tuple[int, list[str]]:
    """(exit code, the lines it said that are not TensorStore's own)."""
    try:
        _, said = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, [line for line in said.splitlines() if not line.startswith(("I", "W", "E1"))]


def ran(url: str, *arguments: str) -> tuple[int, list[str]]:
    """`ended` of what was started."""
    return ended(started(url, *arguments))


def taken_away(process: subprocess.Popen, begun: Callable[[], object], seconds: float) -> str:
    """The last line of a process that gets SIGTERM once `begun` says so, in so many seconds: it ends within
    twelve, to be started again."""
    end = time.monotonic() + seconds
    while not begun() and time.monotonic() < end:
        time.sleep(0.1)
    assert begun()
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    code, said = ended(process, 60)
    assert time.monotonic() - start < 12
    assert code == 42, "\n".join(said)
    return said[-1]
