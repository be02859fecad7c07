"""Figures of a dump without its forward passes: the rate of writing, the start on a huge store."""

import os
import shutil
import time
from typing import Any

import numpy as np

from common.progress import note
from common.store import Store
from common.store_writer import FeatureWriter, raw_bytes
from dump.rounds import deal, run_rounds
from pipelines.bench import made

_HIDDEN, _BLOCK = 2048, 2  # 34 kB a token
_WRITTEN, _LENGTH = 32, 512  # blocks of 17 MB
_IN_FLIGHT = 64 << 20
_TOKENS, _HOSTS = 10**9, 64


def write_blocks(url: str, blocks: int, length: int) -> float:
    """Makes a store and writes so many blocks as fast as the disk takes them; returns the bytes a second."""
    store = made.empty_store(url, blocks * _BLOCK, length, _HIDDEN, _BLOCK)
    plan = made.MadePlan(store, tuple(range(blocks)))
    prefill = made.MadePrefill(_BLOCK, length, _HIDDEN)
    start = time.perf_counter()
    with FeatureWriter(url, _IN_FLIGHT) as writer:
        run_rounds(plan, prefill, writer)
    return raw_bytes(store.features["arrays"]) / (time.perf_counter() - start)


def write_rate(place: str) -> dict[str, dict[str, Any]]:
    """dump.write_rate_vs_raw: blocks through rounds and writer against the same bytes written plainly."""
    note(f"bench: writing {_WRITTEN} blocks")
    prefill = made.MadePrefill(_BLOCK, _LENGTH, _HIDDEN)
    shapes = made.kinds(_BLOCK, _LENGTH, _HIDDEN).items()

    def plain() -> float:
        start = time.perf_counter()
        size = 0
        for block in range(_WRITTEN):
            host = {name: np.empty(shape, dtype) for name, (shape, dtype) in shapes}
            prefill.into(host)
            for name, value in host.items():
                os.makedirs(f"{place}/plain/{name}", exist_ok=True)
                with open(f"{place}/plain/{name}/{block}", "wb") as file:
                    size += file.write(value.reshape(-1).view(np.uint8).data)
                    file.flush()
                    os.fsync(file.fileno())
        rate = size / (time.perf_counter() - start)
        shutil.rmtree(f"{place}/plain")
        return rate

    def ours() -> float:
        rate = write_blocks(f"{place}/written", _WRITTEN, _LENGTH)
        shutil.rmtree(f"{place}/written")
        return rate

    rates = [(plain(), ours()) for _ in range(3)]
    raw, found = (max(rate) for rate in zip(*rates, strict=True))
    return {
        "dump.write_rate_vs_raw": {
            "value": found / raw,
            "unit": "share",
            "at_least": 0.7,
            "compared_with": f"a loop of file.write() and fsync of the same arrays, {raw / 1e6:.0f} MB/s",
        }
    }


def first_round(place: str) -> dict[str, dict[str, Any]]:
    """dump.first_round_s: 64 hosts take their parts of a store of a billion tokens, half written."""
    note(f"bench: {_HOSTS} hosts deal themselves a store of {_TOKENS:,} tokens")
    url, rows = f"{place}/huge", _TOKENS // 2048 + 1
    blocks = -(-rows // 32)
    made.huge_store(url, rows, 2048, 32, list(range(0, blocks, 2)))
    start = time.perf_counter()
    parts = deal_to_hosts(url, _HOSTS)
    seconds = time.perf_counter() - start
    return {
        "dump.first_round_s": {
            "value": seconds,
            "unit": "s",
            "at_most": 10,
            "compared_with": f"nothing; {blocks:,} blocks of 32 rows of 2,048 tokens, every second one "
            f"written; the largest part has {max(map(len, parts)):,}",
        }
    }


def deal_to_hosts(url: str, hosts: int) -> list[tuple[int, ...]]:
    """The blocks that each of so many hosts computes of a store; one of them looks, and tells the others."""
    missing = tuple(Store.open(url).missing())
    return [deal(missing, host, hosts) for host in range(hosts)]
