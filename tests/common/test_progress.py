"""What a person sees of progress: on a terminal one line that changes, elsewhere lines."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from common import progress

ROOT = Path(__file__).parents[2]

CODE = """
import fcntl, struct, sys, termios, time
from common.progress import Progress, note
if sys.stderr.isatty():
    fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, {columns}, 0, 0))
with Progress("train", 300, "tok") as bar:
    for step in range(3):
        time.sleep(0.15)
        bar.update(100, f"loss {{3 - step}}.5, acc_0 {{step}}1.0%, acceptance length 1.9{{step}}")
        with Progress("evaluate", 2, "tok") as inner:
            for _ in range(2):
                time.sleep(0.12)
                inner.update(1)
        if step == 1:
            note("a note")
"""


def on_a_terminal(columns):
    """What a terminal shows in the end, and everything that was written to it."""
    ours, theirs = pty.openpty()
    code = CODE.format(columns=columns)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, cwd=ROOT)
    os.close(theirs)
    written = b""
    while True:
        try:
            found = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not found:
            break
        written += found
    os.close(ours)
    assert process.wait() == 0
    return shown(written.decode()), written.decode()


def shown(text):
    """The lines of a screen: carriage returns, line feeds, and going up."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|\r|\n|[^\r\n\x1b]+", text):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[A":
            row -= 1
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines if line.strip()]


def test_a_terminal_has_one_line_that_says_how_it_goes():
    lines, written = on_a_terminal(120)
    note, line = lines
    assert note == "a note"
    assert "100%" in line
    assert "tok/s, loss 1.5, acc_0 21.0%, acceptance length 1.92]" in line
    assert "evaluate:  50%" in written, "an evaluation has the line while it lasts"
    assert "\x1b" not in written, "nothing goes up or down"


def test_a_narrow_terminal_has_one_line_too():
    lines, _ = on_a_terminal(60)
    assert len(lines) == 2
    assert all(len(line) <= 60 for line in lines)


def test_a_file_has_plain_lines():
    command = [sys.executable, "-c", CODE.format(columns=80)]
    done = subprocess.run(command, stderr=subprocess.PIPE, cwd=ROOT, text=True, check=True)
    assert "\r" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train: 100% 300/300 [")
    assert done.stderr.splitlines()[-1].endswith("tok/s, loss 1.5, acc_0 21.0%, acceptance length 1.92]")


def test_the_end_is_one_line_in_a_file(monkeypatch, capsys):
    """Also where the last step came so late that it was due."""
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0)
    with progress.Progress("train", 3, "tok") as bar:
        for _ in range(3):
            bar.update(1)
    shares = [int(line.split("%")[0].split()[-1]) for line in capsys.readouterr().err.splitlines()]
    assert shares == [0, 33, 67, 100]
