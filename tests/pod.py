"""A pod in miniature: several processes on this machine, each with some virtual devices."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Ended:
    """One process that has ended."""

    code: int
    out: str
    err: str


def start(
    code: str, processes: int, devices: int | tuple[int, ...] = 1, **environment: str
) -> list[subprocess.Popen]:
    """Starts Python `code` in every process; `pod` is common.pod, joined, and `me` the process's number.

    `devices` of each process, or of one after the other.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    found, counts = [], (devices,) * processes if isinstance(devices, int) else devices
    for process in range(processes):
        text = (
            f"import jax; jax.config.update('jax_num_cpu_devices', {counts[process]})\n"
            f"from common import pod; me = {process}\n"
            f"pod.initialise({address!r}, {processes}, me)\n"
        ) + code
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
