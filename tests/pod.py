"""A pod in miniature: several processes on this machine, each with some virtual devices."""

import os
import socket
import subprocess
import sys
import textwrap
from dataclasses import dataclass

# Ends as `eyas` does: an error is one line and an exit code, and the other processes hear of it.
FRAME = """
import jax, sys
jax.config.update("jax_num_cpu_devices", {devices})
jax.config.update("jax_numpy_dtype_promotion", "strict")
from common import pod
from common.errors import EyasError
me = {process}
try:
    pod.initialise({address!r}, {processes}, me)
    with pod.announced():
{code}
except EyasError as error:
    print("Error:", error, file=sys.stderr)
    pod.leave(error.exit_code)
pod.leave(0)
"""


@dataclass(frozen=True)
class Ended:
    """One process that has ended."""

    code: int
    out: str
    err: str


def start(
    code: str, processes: int, devices: int | tuple[int, ...] = 1, **environment: str
) -> list[subprocess.Popen]:
    """Starts Python `code` in every process; `pod` is common.pod, joined, `me` the process's number, and
    `EyasError` at hand.

    `devices` of each process, or of one after the other.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    found, counts = [], (devices,) * processes if isinstance(devices, int) else devices
    for process in range(processes):
        values = {"devices": counts[process], "process": process, "processes": processes, "address": address}
        text = FRAME.format(code=textwrap.indent(code, " " * 8), **values)
        command = [sys.executable, "-c", text]
        environ = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        found.append(subprocess.Popen(command, env=environ, **pipes))
    return found


def wait(started: list[subprocess.Popen], seconds: float = 120) -> list[Ended]:
    """All of them, ended; none outlives the call."""
    try:
        texts = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Ended(p.returncode, out, err) for p, (out, err) in zip(started, texts, strict=True)]
