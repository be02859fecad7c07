"""Processes whose gs:// is a server on this machine; libraries read where that is when they are loaded."""

import os
import subprocess
import sys
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
