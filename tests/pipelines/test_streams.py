"""A command whose stdout or stderr is closed, or read by nobody, does its work, and writes nowhere else."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys, click
from common.progress import Progress, note
from pipelines import cli
from pipelines.__main__ import main
@cli.main.command()
def work():
    with open("result", "w") as file, Progress("work", 1, "step") as progress:
        note("told")
        progress.update(1)
        os.kill(os.getpid(), signal.SIGINT)
        file.write("done")
    click.echo("shown")
sys.argv = ["eyas", "work"]
main()
"""


@pytest.mark.parametrize(
    "how", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "| true", "2>&1 | true", "2>/dev/full"]
)
def test_the_work_is_done_where_nobody_reads(tmp_path, how):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"$0" -c "$1" {how}', sys.executable, code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, (tmp_path / "result").read_text()) == (0, "done"), done.stderr
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


def test_a_result_that_cannot_be_written_is_an_error(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}"
    command = ["bash", "-c", '"$0" -c "$1" >/dev/full', sys.executable, code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: the disk is full")
