"""A long run takes no more memory than a short one, and the figures of it would tell if it did."""

import gc
import subprocess
import sys

import numpy as np
import pytest

from common.store import Store
from common.store_writer import FeatureWriter
from dump.rounds import run_rounds
from pipelines.bench import made, memory
from pipelines.bench.memory import Sample
from tests.train import small_run, small_store
from train.run import run
from train.trainer import Trainer

_ARENAS = """
import ctypes, os, sys, threading
from pipelines import __main__, streams

def begun():
    "Comes when what has to be done before there are threads is done."
    assert len(os.listdir("/proc/self/task")) == 1
    barrier = threading.Barrier(8)
    threads = [threading.Thread(target=barrier.wait) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    c = ctypes.CDLL(None)
    c.fdopen.restype = ctypes.c_void_p
    stdout = ctypes.c_void_p(c.fdopen(1, b"w"))
    c.malloc_info(0, stdout)
    c.fflush(stdout)
    os._exit(0)

streams.secure = begun
sys.argv = ["eyas", "dump"]
__main__.main()
"""


def test_threads_of_a_dump_share_one_arena():
    """Each would keep what was freed in it: with eight a core, the blocks in flight many times over."""
    found = subprocess.run([sys.executable, "-c", _ARENAS], stdout=subprocess.PIPE, text=True, check=True)
    assert found.stdout.count("<heap nr=") == 1


def _held():
    """What is in use, in malloc's bytes and in Python's blocks of memory."""
    gc.collect()
    return np.array((memory.in_use(), sys.getallocatedblocks()))


class _Counted(FeatureWriter):
    """Notes what is in use after some blocks."""

    def write(self, block, *rest):
        super().write(block, *rest)
        while self._pending:
            self._await_oldest()
        if block % 50 == 49:
            self.found = [*getattr(self, "found", []), _held()]


def test_nothing_is_kept_of_blocks_that_are_written_or_read(tmp_path):
    url, blocks = f"{tmp_path}/store", 400
    store = made.empty_store(url, 2 * blocks, 8, 16, 2)
    with _Counted(url) as writer:
        run_rounds(made.MadePlan(store, tuple(range(blocks))), made.MadePrefill(2, 8, 16), writer)
    assert ((writer.found[-1] - writer.found[3]) / 200 < (1000, 5)).all()  # after 200 blocks
    store = Store.open(url)
    read = []
    for part in (range(200), range(200, blocks), range(blocks)):  # the second half is read for the first time
        for block in part:
            store.read(["aux_hidden", "argmax"], [2 * block])
        read.append(_held())
    assert ((read[1] - read[0]) / 200 < (1000, 5)).all()
    assert ((read[2] - read[1]) / blocks < (1000, 1)).all()


@pytest.mark.slow
def test_nothing_is_kept_of_steps_that_are_done(tmp_path, monkeypatch):
    """Each takes a row that was not read before, and has a line of metrics."""
    take, found = Trainer.take, {}

    def counted(self, batch):
        take(self, batch)
        if self.step in (100, 300):
            found[self.step] = _held()

    monkeypatch.setattr(Trainer, "take", counted)
    url = small_store.write_store(f"{tmp_path}/store", rows=300, test=False)
    often = {"steps": 300, "batch_rows": 1, "log_every": 1, "eval_every": 1000, "save_every": 1000}
    run(small_run.short_run(url, f"{tmp_path}/out", **often))
    assert ((found[300] - found[100]) / 200 < (1000, 5)).all()


def test_what_is_kept_shows():
    """In the middle of a run, whatever lies on both sides of it and goes up and down within."""
    rng = np.random.default_rng(0)
    for kept in (0, 2000):
        passing = rng.integers(10**5, size=1000) + 10**7 * (rng.random(1000) < 0.2)
        middle = [Sample(n, 10**8, 10**7 + kept * n + int(passing[n])) for n in range(1000)]
        ends = [Sample(0, 1, 10**8)], [Sample(1000, 1, 10**8)]
        assert memory.kept([*ends[0], *middle, *ends[1]]) == pytest.approx(kept, abs=100)


def test_growth_is_of_the_second_half_over_the_first_quarter():
    samples = [Sample(0, 900, 0), Sample(2, 200, 0), Sample(5, 300, 0), Sample(7, 260, 0), Sample(8, 100, 0)]
    assert memory.growth(samples) == 1.5


def test_a_watched_run_is_sampled_to_its_end(tmp_path):
    code = (
        f"import os, time\nfor n in range(20): os.mkdir({str(tmp_path)!r} + f'/done/{{n}}'); time.sleep(0.02)"
    )
    (tmp_path / "done").mkdir()
    found = memory.watched(code, [], f"{tmp_path}/done", f"{tmp_path}/samples")
    assert 10 < found[-1].done <= 20
    assert all(s.resident > 10**7 and 10**6 < s.in_use < 10**9 for s in found)
