"""A folder has one process at a time."""

import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from common.errors import EyasError
from common.lock import locked

HOLD = (
    "import sys; from common.lock import locked\nwith locked(sys.argv[1]): print('held', flush=True); input()"
)


def test_a_second_process_is_told_who_holds_the_folder_until_that_dies(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        told = f"in use by process {other.pid} on {socket.gethostname()}; wait"
        with pytest.raises(EyasError, match=told), locked(str(tmp_path)):
            raise AssertionError("two hold it")
        other.send_signal(signal.SIGKILL)
    with locked(str(tmp_path)):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()


def test_the_same_process_may_not_hold_it_twice_but_again(tmp_path):
    with (
        locked(str(tmp_path)),
        pytest.raises(EyasError, match=f"process {os.getpid()} "),
        locked(str(tmp_path)),
    ):
        raise AssertionError("held twice")
    with locked(str(tmp_path)):
        pass


def test_a_lock_that_leads_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EyasError), locked(str(tmp_path / "run")):
        raise AssertionError("followed")
    assert not (tmp_path / "elsewhere").exists()


def test_who_finds_the_folder_removed_or_taken_says_so(tmp_path):
    """Somebody deletes a run that still goes on, and begins it anew."""
    folder = tmp_path / "run"
    with locked(str(folder)) as check:
        check()
        shutil.rmtree(folder)
        with pytest.raises(EyasError, match=r"run was removed while this process was at work there"):
            check()
        with locked(str(folder)) as others:
            others()
            with pytest.raises(EyasError, match=r"run is in use by process"):
                check()
            others()


def test_a_lock_that_was_removed_alone_is_taken_again(tmp_path):
    with locked(str(tmp_path)) as check:
        (tmp_path / ".lock").unlink()
        check()
        with pytest.raises(EyasError, match=f"process {os.getpid()} "), locked(str(tmp_path)):
            raise AssertionError("held twice")
    with locked(str(tmp_path)):
        pass
