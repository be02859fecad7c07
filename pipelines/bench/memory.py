"""Figures of memory over a long run: how much it takes, whether it goes on growing, what it keeps for good.

Runs are watched from within, ten times a second: what they have in memory, and what of it is in use. Both are
needed: the first has room in it that compiling has left, in which a run can grow unseen for thousands of
blocks; the second says nothing of memory that is free and in pieces too small to be used again. Python
collects cycles of old objects rarely, a kilobyte a step of training until then: here it does every two
seconds, for that is not kept.
"""

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

import numpy as np

from common import storage
from common.errors import MachineError
from common.progress import note
from dump import prepare
from train.names import METRICS

_SECONDS, _COLLECTED = 0.1, 2.0  # between two looks, between two collections of cycles
_WIDE = 256  # blocks of 17 MB
_CONVERSATIONS, _LENGTH = 1_500, 64  # some 780 rows, a block and a forward pass each
_STEPS = 500
_COMMAND = "from pipelines.__main__ import main; main()"
_WRITING = "from pipelines.bench import writing; writing.write_blocks({url!r}, {blocks}, 512)"


class Sample(NamedTuple):
    """`done` steps or blocks; bytes that are resident, and bytes in use."""

    done: int
    resident: int
    in_use: int


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def in_use() -> int:
    """The bytes that this process has from malloc and has not freed; 0 where the C library does not say.

    Small Python objects are among them where PYTHONMALLOC is malloc.
    """
    look = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if look is None:
        return 0
    look.restype = _Mallinfo
    found = look()
    return found.uordblks + found.hblkhd


def watch(progress: str, to: str) -> None:
    """From now on a thread writes samples to the file `to`; what is done are the names in the folder
    `progress`, or the lines of that file."""
    threading.Thread(target=_watch, args=(progress, to), daemon=True).start()


def _watch(progress: str, to: str) -> None:
    collected = time.monotonic()
    with open(to, "w") as file:
        while True:
            if time.monotonic() - collected > _COLLECTED:
                gc.collect()
                collected = time.monotonic()
            with open("/proc/self/statm") as statm:
                resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            file.write(json.dumps(Sample(_done(progress), resident, in_use())) + "\n")
            file.flush()
            time.sleep(_SECONDS)


def _done(progress: str) -> int:
    try:
        return len(os.listdir(progress))
    except FileNotFoundError:
        return 0
    except NotADirectoryError:
        return storage.read_bytes(progress).count(b"\n")


def watched(code: str, arguments: list[str], progress: str, to: str) -> list[Sample]:
    """The samples of a process that runs `code` with these arguments; MachineError if it fails.

    It has one arena unless it trains, as commands have; set here, before there is the thread that watches.
    """
    watching = f"from pipelines.bench import memory; memory.watch({progress!r}, {to!r})\n"
    if "train" not in arguments[:1]:
        watching = f"from pipelines import arenas; arenas.share()\n{watching}"
    done = subprocess.run(
        [sys.executable, "-c", f"{watching}{code}", *arguments],
        env=os.environ | {"PYTHONMALLOC": "malloc"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise MachineError(f"a run that was watched ended with {done.returncode}: {done.stderr[-200:]}")
    return [Sample(*json.loads(line)) for line in storage.read_bytes(to).splitlines()]


def growth(samples: list[Sample]) -> float:
    """The most resident bytes of a run's second half over those of its first quarter."""
    total = samples[-1].done
    first = max(s.resident for s in samples if 0 < s.done <= total / 4)
    return max(s.resident for s in samples if s.done > total / 2) / first


def kept(samples: list[Sample]) -> float:
    """The bytes by which what is in use grows with everything that is done, from a run's second quarter to
    its last: medians, for what is on its way at one moment comes and goes."""
    total = samples[-1].done

    def usual(start: float, end: float) -> float:
        return float(np.median([s.in_use for s in samples if start * total < s.done <= end * total]))

    return (usual(0.7, 0.95) - usual(0.25, 0.5)) / (0.45 * total)  # between the middles of the two


def figures(model: str, data: str, place: str) -> dict[str, dict[str, Any]]:
    """dump.rss_growth of wide blocks, and what dump and train keep for good of each block and step."""
    note("bench: memory of a dump of wide blocks, of one of many small ones, and of many steps")
    url, small, out = (f"{place}/{name}" for name in ("wide", "small", "kept"))
    wide = watched(_WRITING.format(url=url, blocks=_WIDE), [], f"{url}/commits", f"{place}/wide.samples")
    shutil.rmtree(url)
    rows = {"length": _LENGTH, "holdout": 0.0, "max_conversations": _CONVERSATIONS}
    prepare.run(prepare.PrepareConfig((data,), model, small, **rows))
    dump = ["dump", "--model", model, "--store", small, "--block-rows", "1"]
    dumped = watched(_COMMAND, dump, f"{small}/commits", f"{place}/dump.samples")
    steps = ["--steps", str(_STEPS), "--log-every", "1", "--save-every", str(_STEPS)]
    smaller = ["--batch-rows", "1", "--ttt-steps", "2", "--draft-vocab", "1024"]
    train = ["train", "--store", small, "--out", out, *steps, *smaller]
    trained = watched(_COMMAND, train, f"{out}/{METRICS}", f"{place}/train.samples")
    return {
        "dump.rss_growth": {
            "value": growth(wide),
            "unit": "times",
            "at_most": 1.1,
            "compared_with": f"the peak of the first quarter of {_WIDE} blocks of 17 MB; at most "
            f"{max(s.resident for s in wide) / 1e6:.0f} MB; forward passes left out",
        },
        "dump.kept_per_block": _kept(dumped, f"a whole dump of {_LENGTH} tokens a block"),
        "train.kept_per_step": _kept(trained, f"a whole run of steps of {_LENGTH} tokens"),
    }


def _kept(samples: list[Sample], what: str) -> dict[str, Any]:
    if not samples[-1].in_use:
        return {"value": None, "why": "this C library does not say what is in use; glibc does"}
    return {
        "value": kept(samples),
        "unit": "bytes",
        "at_most": 1000,
        "compared_with": f"nothing; {what}, {samples[-1].done:,} in all; at most "
        f"{max(s.resident for s in samples) / 1e6:.0f} MB, growth {growth(samples):.3f}",
    }
