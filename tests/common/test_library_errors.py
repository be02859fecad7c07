"""What storage and network refuse is one line that names the bucket; who is waited for is named."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common import library_errors as errors
from common import zarr
from common.errors import EyasError, MachineError, RestartError
from common.library_errors import library_errors, reason
from tests.common.refusing import environment, refusing

ROOT = Path(__file__).parents[2]
CALLS = {
    "verify": ["verify", "--store", "gs://bucket/store"],
    "read": ["-c", "storage.read_json('gs://bucket/store/manifest.json')"],
    "list": ["-c", "storage.list_names('gs://bucket/store')"],
    "write": ["-c", "storage.write_json('gs://bucket/store/a.json', {})"],
    "array": ["-c", "zarr.open_array('gs://bucket/store/a', zarr.describe((2, 3), np.dtype('int32')))"],
    "create": [
        "-c",
        "zarr.open_array('gs://bucket/a', zarr.describe((2,), np.dtype('int32')), create=True)",
    ],
    "claim": ["-c", "kvstore.create_file('gs://bucket/store/manifest.json', b'{}')"],
}
_SCRIPT = """
import sys, click, numpy as np
from common import kvstore, storage, zarr
from common.library_errors import library_errors
from pipelines.exit_codes import Group
@click.group(cls=Group)
def main(): pass
@main.command()
def call(): eval(sys.argv.pop())
main(["call"])
"""


def run(call, port):
    """(exit code, what is said, seconds) of a call in a process of its own."""
    arguments = CALLS[call]
    code = ["-c", _SCRIPT, arguments[1]] if arguments[0] == "-c" else ["-m", "pipelines", *arguments]
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, *code],
        cwd=ROOT,
        env=os.environ | environment(port),
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("I")]  # TensorStore's own notes
    return done.returncode, lines, time.monotonic() - begun


def refused(call, status):
    """The one line of a call that the server refuses; a busy machine may be told of before, as waiting."""
    with refusing(status) as port:
        code, lines, _ = run(call, port)
    assert code == 2
    (line,) = [line for line in lines if not line.startswith("waiting for")]
    return line


REFUSALS = {401: "asks for valid credentials", 403: "this account may not"}
FEW = [("verify", 403), ("list", 401), ("write", 403), ("create", 401), ("array", 403), ("claim", 403)]
ALL = [(call, status) for call in CALLS for status in REFUSALS if (call, status) not in FEW]


@pytest.mark.parametrize(("call", "status"), [*FEW, *(pytest.param(*a, marks=pytest.mark.slow) for a in ALL)])
def test_who_has_no_permission_is_told_bucket_and_permission_in_one_line(call, status):
    words, line = REFUSALS[status], refused(call, status)
    assert line.startswith("Error: gs://bucket")
    for word in (words, "the bucket bucket", "storage.objects."):
        assert word in line


@pytest.mark.parametrize("call", ["write", "create", "claim"])
def test_a_bucket_that_is_not_there_is_named(call):
    line = refused(call, 404)
    assert "the bucket bucket does not exist; check its name or create it" in line


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("call", ["verify", "array"])
@pytest.mark.parametrize("status", [429, 503, None, "dead"])
def test_a_server_that_does_not_answer_is_named_soon_and_not_waited_for_for_ever(call, status):
    with refusing(None if status == "dead" else status) as port:
        code, lines, seconds = run(call, 1 if status == "dead" else port)
    assert code == 42
    assert lines[0].startswith("waiting for gs://bucket")
    assert "no answer from the bucket bucket" in lines[-1]
    assert "the same command again" in lines[-1]
    assert len(lines) <= 4
    assert seconds < 420


def test_what_is_waited_for_is_named_in_time_and_not_again_and_again(monkeypatch, capsys):
    monkeypatch.setattr(errors, "_told", [-errors._TOLD_AGAIN])
    for _ in range(2):
        with library_errors("gs://bucket/a", "read", patience=0.02):
            time.sleep(0.1)
    assert capsys.readouterr().err.count("waiting for gs://bucket/a") == 1
    with library_errors("folder/a", "read", patience=0.02):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
    assert errors._PATIENCE < 5


class Server(Exception):  # noqa: N818
    """An exception of a library that is not imported."""

    code = 503


Server.__module__ = "gcsfs.retry"


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (Server("busy"), RestartError, "no answer from the bucket b (503: busy)"),
        (
            ValueError("UNAVAILABLE: no [a='{}']"),
            RestartError,
            "no answer from the bucket b (UNAVAILABLE: no)",
        ),
        (ValueError("DATA_LOSS: bad checksum"), MachineError, "writing failed (DATA_LOSS: bad checksum)"),
        (OSError(28, "No space left on device"), MachineError, "the disk is full"),
        (PermissionError(13, "Permission denied"), MachineError, "writing failed ([Errno 13] Permission"),
        (
            IsADirectoryError(21, "Is a directory"),
            EyasError,
            "Is a directory); check the path, or name another",
        ),
        (
            OSError(36, "File name too long"),
            EyasError,
            "File name too long); check the path, or name another",
        ),
        (
            ValueError("UNKNOWN: Too many [os_error_code='40']"),
            EyasError,
            "(UNKNOWN: Too many); check the path",
        ),
        (ConnectionResetError("reset"), RestartError, "no answer from the bucket b (reset)"),
        (EyasError("of our own"), EyasError, "of our own"),
    ],
)
def test_every_kind_is_one_line(raised, kind, words):
    with pytest.raises(EyasError) as found, library_errors("gs://b/store"):
        raise raised
    assert type(found.value) is kind
    assert words in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("raised", "refused"),
    [
        (ValueError("RESOURCE_EXHAUSTED: Failed to fsync directory [os_error_code='28']"), True),
        (ValueError("PERMISSION_DENIED: Failed to open [os_error_code='13']"), True),
        (ValueError("UNKNOWN: Failed to open: Too many levels [os_error_code='40']"), False),
        (ValueError("DATA_LOSS: CRC-32C checksum verification failed"), False),
        (PermissionError(13, "Permission denied"), True),
        (FileNotFoundError(2, "No such file"), False),
    ],
)
def test_what_the_system_refuses_is_told_from_what_is_wrong_in_a_file(raised, refused):
    assert errors.is_refusal(raised) is refused


def test_an_array_whose_folder_cannot_be_flushed_is_the_machines_failure(tmp_path, monkeypatch):
    """Its description is there already, so that it looks as if it were wrong."""
    place, described = f"{tmp_path}/a", zarr.describe((2, 3), np.dtype(np.int32))
    zarr.open_array(place, described, create=True)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to fsync directory [os_error_code='28']")

    monkeypatch.setattr(zarr.ts, "open", full)
    with pytest.raises(MachineError, match="the disk is full"):
        zarr.open_array(place, described, create=True)


def test_a_mistake_of_ours_is_not_a_librarys():
    with pytest.raises(ZeroDivisionError), library_errors("gs://b/store"):
        print(1 / 0)


def test_the_cause_behind_a_long_path_is_told():
    said = reason(OSError(f"opening {'/deep' * 200}: Permission denied"))
    assert said.endswith("/deep: Permission denied")
    assert len(said) < 310
