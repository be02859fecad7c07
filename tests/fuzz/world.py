"""A model, data, a store and a head, all tiny and whole, and what a command does when one file is another."""

import os
import shutil
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from click.testing import CliRunner

from pipelines import cli
from tests import tiny_llama
from tests.dump import chats

CHATS = Path(__file__).parents[1] / "data" / "chats.jsonl"
SECONDS = 240  # that a command on tiny files may take on a busy machine, its compiling included
TRAIN = ["--steps", "2", "--batch-rows", "2", "--draft-vocab", "64", "--ttt-steps", "2"]
TRAIN += ["--save-every", "1", "--eval-every", "2"]


class Hang(BaseException):
    """A command took longer than it may."""


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Hang after so many seconds, again and again, because a callback may swallow it."""

    def end(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class World:
    """The folder `root` with model/, store/, run/ (an experiment) and chats.jsonl."""

    def __init__(self, root: Path):
        self.root = root
        chats.write_model(root / "model", max_position_embeddings=512)
        tiny_llama.write_weights(str(root / "model"))
        lines = CHATS.read_text().splitlines(keepends=True)
        (root / "chats.jsonl").write_text("".join(lines[:12]))
        place = ("--model", "model", "--store", "store")
        self.do("prepare", *place, "--data", "chats.jsonl", "--length", "128", "--holdout", "0.3")
        self.do("dump", *place, "--block-rows", "4", "--precision", "int8")
        self.do("train", *place, "--out", "run", *TRAIN)

    def do(self, *arguments: str) -> None:
        """The command, which must succeed."""
        result = self._invoke(arguments)
        assert result.exit_code == 0, f"{result.output}{result.exception!r}"

    def _invoke(self, arguments):
        here = os.getcwd()
        os.chdir(self.root)
        try:
            return CliRunner().invoke(cli.main, list(arguments))
        finally:
            os.chdir(here)

    def problem(self, file: str, data: bytes, arguments: list[str], *written: str) -> str | None:
        """What is wrong with how a command ends when `file` holds `data`; None if nothing is.

        The command may write into the folders and files `written`, and nowhere else.
        """
        path = self.root / file
        kept = path.read_bytes()
        backup = {name: self._keep(name) for name in written}
        path.write_bytes(data)
        before = self._listing(written)
        try:
            with bounded(SECONDS):
                result = self._invoke(arguments)
            return self._judge(result) or self._changes(before, self._listing(written))
        except Hang:
            return f"no end after {SECONDS} s"
        finally:
            path.parent.mkdir(parents=True, exist_ok=True)
            for name, content in backup.items():
                self._restore(name, content)
            path.write_bytes(kept)

    def _judge(self, result) -> str | None:
        if isinstance(result.exception, Hang):
            return f"no end after {SECONDS} s"
        if result.exception and not isinstance(result.exception, SystemExit):
            return f"{_place(result.exc_info[2])}: {result.exception!r:.200}"
        lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        if "Traceback" in result.output:
            return f"a trace in the output: {result.output[-300:]}"
        if result.exit_code not in (0, 1, 2) or len(lines) != (result.exit_code > 0):
            return f"exit code {result.exit_code} with {len(lines)} errors: {result.output[-300:]}"
        return None

    def _listing(self, written) -> dict[str, tuple[int, int]]:
        found = {}
        for folder, _, names in os.walk(self.root.parent):
            for name in names:
                path = Path(folder, name)
                if not any(path.is_relative_to(self.root / place) for place in written):
                    stat = path.lstat()
                    found[str(path)] = (stat.st_size, stat.st_mtime_ns)
        return found

    @staticmethod
    def _changes(before, after) -> str | None:
        changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
        return f"written outside: {changed[:3]}" if changed else None

    def _keep(self, name: str) -> Path | None:
        path, copy = self.root / name, self.root.parent / f"kept-{name.replace('/', '-')}"
        if not path.exists():
            return None
        if not copy.exists():  # the whole one, kept once
            shutil.copytree(path, copy, symlinks=True)
        return copy

    def _restore(self, name: str, copy: Path | None) -> None:
        shutil.rmtree(self.root / name, ignore_errors=True)
        if copy:
            shutil.copytree(copy, self.root / name, symlinks=True)


def _place(trace) -> str:
    """The last line of the project's own in a trace."""
    ours = [frame for frame in traceback.extract_tb(trace) if "site-packages" not in frame.filename]
    return f"{'/'.join(Path(ours[-1].filename).parts[-2:])}, line {ours[-1].lineno}"
