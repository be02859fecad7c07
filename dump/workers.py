"""Processes that encode conversations, one a core; the results come in the order of the batches.

Each has a pipe of its own, on which it ends when this process does, however that may end. They are started
with Ctrl-C and SIGTERM blocked: this process decides what those mean, and ends them. In a worker the main
thread renders, so that the bounds of dump/template.py hold.
"""

import os
import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from common import progress, stopping
from common.errors import EyasError, MachineError
from dump.chat import Chat
from dump.clean import Conversation
from dump.encode import Encodings, encode

_ALONE = 32  # batches that this process encodes itself: workers take seconds to start
_MOST = 12  # each takes 0.2 GB, and one process cannot read and clean for many more
_LOOK = 0.2  # seconds between two looks at whether to stop
_DYING = 5.0  # seconds for a process that has closed its pipe
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Batch = list[Conversation]


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_all(chat: Chat, model: str, batches: Iterator[Batch], T: int) -> Iterator[tuple[Batch, Encodings]]:
    """Each batch and its encodings, in order; on all cores where there are many batches.

    MachineError if a worker dies, Stopped when asked to.
    """
    count = min(cores(), _MOST)
    for batch in islice(batches, _ALONE) if count > 1 else batches:
        yield batch, encode(chat, batch, T)
    for batch in batches:  # there are more
        with _started(model, T, count) as workers:
            yield from _dealt(workers, chain([batch], batches))


def _dealt(workers: list["_Worker"], batches: Iterator[Batch]) -> Iterator[tuple[Batch, Encodings]]:
    """Every worker has one batch; whoever has the oldest one gets the next, which is made meanwhile."""
    free, given = deque(workers), deque[tuple[_Worker, Batch]]()
    for batch in batches:
        done = None
        if not free:
            worker, before = given.popleft()
            done = before, worker.take()
            free.append(worker)
        worker = free.popleft()
        worker.give(batch)
        given.append((worker, batch))
        if done:
            yield done
    for worker, batch in given:
        yield batch, worker.take()


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection

    def give(self, batch: Batch) -> None:
        with self._alive():
            self.pipe.send(batch)

    def take(self) -> Encodings:
        """What became of the batch that was given last."""
        with self._alive():
            while not self.pipe.poll(_LOOK):
                stopping.check()
            found = self.pipe.recv()
        if isinstance(found, EyasError):
            raise found
        return found

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            stopping.check()
            self.process.join(_DYING)
            raise MachineError(
                f"a process that renders conversations has died (exit code {self.process.exitcode}); if "
                "memory is short, end other programs, and run the same command again"
            ) from None


@contextmanager
def _started(model: str, T: int, count: int) -> Iterator[list[_Worker]]:
    context, workers = get_context("spawn"), []
    resource_tracker.ensure_running()  # it unblocks the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, model, T), daemon=True)
                process.start()
                theirs.close()
                workers.append(_Worker(process, ours))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()


def _work(pipe: Connection, model: str, T: int) -> None:
    """A worker's life: a batch in, its encodings out, until it is killed or nobody gives more."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken by the other workers
    progress.silence()
    with suppress(ConnectionError):
        try:
            chat = Chat.load(model)
            for batch in _received(pipe):
                pipe.send(encode(chat, batch, T))
        except EyasError as error:
            pipe.send(error)


def _received(pipe: Connection) -> Iterator[Batch]:
    """What is sent, until the other end is closed."""
    while True:
        try:
            batch = pipe.recv()
        except (EOFError, OSError):  # the latter in the middle of one
            return
        yield batch
