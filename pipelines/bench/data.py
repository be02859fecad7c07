"""Figures of the way to the trainer: prepare, dump, the store's size, streaming."""

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from common.mesh import make_mesh
from common.progress import note
from common.store import Store
from common.store_writer import FeatureWriter, create_features, describe_arrays, raw_bytes, write_rows
from dump import dump, prepare, target
from dump.plan import make_plan
from dump.prefill import Prefill
from dump.rounds import Discard, run_rounds
from dump.target_files import target_files, with_sums, write_target
from train import run as train
from train.stream import Stream, Workload, order

_CONVERSATIONS = 1_500
_DUMPED = 24  # rows of 512 tokens: a minute of forward passes on two cores
_STREAMED, _LENGTH, _HIDDEN = 256, 1024, 512  # 2.1 MB bfloat16 a row and aux state


def prepared(model: str, data: str, place: str) -> dict[str, dict[str, Any]]:
    """prepare.fill and prepare.tokens_per_s on real conversations at rows of 2,048 tokens."""
    note(f"bench: prepare, {_CONVERSATIONS:,} conversations")
    start = time.perf_counter()
    found = prepare.run(
        prepare.PrepareConfig((data,), model, f"{place}/prepared", max_conversations=_CONVERSATIONS)
    )
    seconds = time.perf_counter() - start
    read = found["tokens"] + found["counts"]["truncated_tokens"]
    return {
        "prepare.fill": {
            "value": found["fill"],
            "unit": "share",
            "at_least": 0.97,
            "compared_with": f"all {found['rows']} rows of {found['length']} tokens",
        },
        "prepare.tokens_per_s": {
            "value": read / seconds,
            "unit": "tokens/s",
            "compared_with": f"nothing; {read:,} tokens of {found['counts']['read']:,} conversations, "
            "reading and checking the file included",
        },
    }


def dumped(model: str, data: str, place: str) -> dict[str, dict[str, Any]]:
    """dump.overlap, dump.tokens_per_s and store.bytes_per_token_ratio, with the embedded target."""
    url = f"{place}/dumped"
    # More conversations than rows are wanted of: each is at most a row.
    prepare.run(prepare.PrepareConfig((data,), model, url, length=512, max_conversations=_DUMPED, holdout=0))
    plan = make_plan(dump.DumpConfig(model, url, block_rows=4))
    note(f"bench: dump, {plan.store.rows} rows of {plan.store.length} tokens")
    weights = target.load(model, plan.target, plan.mesh, jnp.dtype(plan.config.dtype))
    prefill = Prefill(plan, weights)
    prefill(*(np.zeros((prefill.rows, plan.store.length), np.int32),) * 3).into({})

    features = with_sums(plan.features, lambda: target_files(plan))

    def written() -> None:
        create_features(url, features, plan.draft_ids)
        with FeatureWriter(url) as writer:
            run_rounds(plan, prefill, writer)

    def dropped() -> None:
        run_rounds(plan, prefill, Discard())

    # Forward, both, forward: a machine that slows down or speeds up meanwhile hits both alike.
    first, wall, last = _seconds(dropped), _seconds(written), _seconds(dropped)
    alone, tokens = (first + last) / 2, plan.store.rows * plan.store.length
    write_target(Store.open(url), lambda: target_files(plan))
    raw = raw_bytes(plan.features["arrays"])
    on_disk = _size(f"{url}/features") + _size(f"{url}/commits")
    return {
        "dump.overlap": {
            "value": wall / alone,
            "unit": "times",
            "at_most": 1.10,
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
    note(f"bench: a store of {_STREAMED} rows of {_LENGTH} tokens to stream")
    store = _random_store(url)
    workload = Workload(store, np.arange(_STREAMED), ttt_steps=7)
    wanted = order(np.arange(_STREAMED), 0, _STREAMED // 4, 4)
    mesh = make_mesh()
    stream = Stream(store, workload, workload.capacity(wanted, 1), mesh, "recompute", np.arange(8))
    paths = [os.path.join(where, name) for where, _, names in os.walk(f"{url}/features") for name in names]
    raw = [_rate(lambda: _read_all(paths)) for _ in range(2)]
    shuffled = [_rate(lambda: _stream_all(stream, wanted)) for _ in range(3)]
    raw += [_rate(lambda: _read_all(paths)) for _ in range(2)]
    return {
        "stream.rate_vs_raw": {
            "value": max(shuffled) / max(raw),
            "unit": "share",
            "at_least": 0.7,
            "compared_with": f"file.read() of the same files, also cached, {max(raw) / 1e6:.0f} MB/s; "
            f"shuffled batches of 4 rows, put on the device: {max(shuffled) / 1e6:.0f} MB/s",
        }
    }


def _random_store(url: str) -> Store:
    rng = np.random.default_rng(0)
    R, T, H = _STREAMED, _LENGTH, _HIDDEN
    columns = {name: np.ones((R, T), np.int32) for name in ("tokens", "segment_ids", "positions")}
    columns["loss_mask"] = np.ones((R, T), np.uint8)
    index = pa.table({"id": ["a"], "split": ["train"], "row": [0], "length": [T]})
    write_rows(url, columns, np.ones(8, np.int64), index, {"rows": R, "length": T, "vocab_size": 8})
    kinds = {
        "aux_hidden": ((R, T, 3, H), jnp.bfloat16),
        "last_hidden": ((R, T, H), jnp.bfloat16),
        "argmax": ((R, T), np.int32),
        "logsumexp": ((R, T), np.float32),
    }
    features = {
        "target": {"name": "none", "architecture": "none", "config_hash": "0" * 64}
        | {"hidden_size": H, "vocab_size": 8, "layers": 8},
        "aux_layers": [2, 4, 5],
        "codec": {"name": "none", "size": 0},
        "precision": "bfloat16",
        "block_rows": 32,
        "arrays": describe_arrays(kinds, 32),
        "target_files": {},
    }
    create_features(url, features)
    with FeatureWriter(url) as writer:
        for block in range(writer.store.blocks):
            rows = len(writer.store.block_range(block))
            values = {
                name: rng.integers(0, 200, (rows, *shape[1:]), np.uint8).astype(dtype)
                for name, (shape, dtype) in kinds.items()
            }
            writer.write(block, values, 0, 0)
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


def _stream_all(stream: Stream, wanted: np.ndarray) -> int:
    total = 0
    for batch in stream.batches(wanted):
        arrays = (batch.aux_hidden, batch.last_hidden, batch.argmax, batch.logsumexp)
        jax.block_until_ready(arrays)
        total += sum(x.nbytes for x in arrays)
    return total


def stalled(place: str, store: str) -> dict[str, dict[str, Any]]:
    """train.stall: waiting for data in a training run on a dumped store."""
    note("bench: waiting for data while training")
    found = train.run(
        train.TrainConfig(store=store, out=f"{place}/stall", steps=8, draft_vocab=8192, batch_rows=2)
    )
    return {
        "train.stall": {
            "value": found["stall"],
            "unit": "share",
            "at_most": 0.03,
            "compared_with": f"{found['seconds']:.0f} s of training, compiling included; "
            f"{found['tokens_per_s']:.0f} tokens/s",
        }
    }
