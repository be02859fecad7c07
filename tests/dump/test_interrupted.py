"""A dump that is stopped, killed or refused by its disk goes on to the same bytes."""

import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import aiohttp
import jax
import pytest
import tensorstore as ts
from gcsfs.retry import HttpError

from common import kvstore, storage
from common.errors import EyasError, MachineError
from common.store import Store
from common.store_verify import verify
from dump.dump import DumpConfig, run
from tests.dump.tiny import ROWS, contents


def script(config: DumpConfig) -> list[str]:
    """The command itself, not faster than a test can follow."""
    code = (
        "import time\n"
        "from common.store_writer import FeatureWriter\n"
        "from pipelines.cli import main\n"
        "write = FeatureWriter.write\n"
        "FeatureWriter.write = lambda self, *a: (time.sleep(0.1), write(self, *a))\n"
        "main()\n"
    )
    options = [
        "--logits",
        "topk",
        "--topk",
        "4",
        "--model",
        config.model,
        "--store",
        config.store,
        "--block-rows",
        "1",
    ]
    return [sys.executable, "-c", code, "dump", *options]


def start_and_wait_for_a_commit(config: DumpConfig) -> subprocess.Popen:
    process = subprocess.Popen(script(config), stderr=subprocess.PIPE, text=True)
    for _ in range(6000):
        if Store.open(config.store).committed() or process.poll() is not None:
            break
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_dump_continues_to_the_same_bytes(config, whole, kind):
    config = replace(config, block_rows=1)
    process = start_and_wait_for_a_commit(config)
    process.send_signal(kind)
    _, errors = process.communicate(timeout=60)
    for name in (".index.parquet.abc.partial", "target/.config.json.abc.partial"):  # killed in mid-write
        storage.write_bytes(f"{config.store}/{name}", b"cut")
    left = ROWS - len(Store.open(config.store).committed())
    assert 0 < left < ROWS, errors
    if kind == signal.SIGKILL:
        assert process.returncode == -kind
    else:
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 42}[kind]
        assert errors.strip().splitlines()[-1].startswith("Error: dump stopped; ")
        assert "same command" in errors
        assert "Traceback" not in errors
    with pytest.raises(EyasError, match=f"{left} of {ROWS} blocks are missing"):
        Store.open(config.store).require_complete()
    assert run(config)["blocks_before"] == ROWS - left
    assert contents(config.store) == whole


@pytest.mark.slow
def test_two_dumps_at_once_make_one_store(config, whole):
    """Neither undoes what the other has done, at whatever moment the second one starts."""
    config = replace(config, block_rows=1)
    first = start_and_wait_for_a_commit(config)
    others = [subprocess.Popen(script(config), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in (first, *others):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert verify(config.store)["damaged"] == []
    assert contents(config.store) == whole


def test_damaged_block_is_written_anew(config):
    run(config)
    before = contents(config.store)
    os.unlink(f"{config.store}/features/aux_hidden/c/1/0/0/0")
    os.unlink(f"{config.store}/commits/000001.json")
    os.unlink(f"{config.store}/target/config.json")
    assert run(config)["blocks_before"] == 2
    assert contents(config.store) == before


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("gone"),
        aiohttp.ServerDisconnectedError("gone"),
        HttpError({"code": 503, "message": "gone"}),
        OSError(5, "gone"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("failing", [0, 2])
def test_a_block_that_is_not_written_is_never_reported(config, monkeypatch, error, failing):
    """Whatever kind of error a library raises, in the last block as in the first."""
    open_kvstore, create = ts.KvStore.open, kvstore.create_file

    def refuse(*given, **options):
        raise error

    def fail(place, data):
        with monkeypatch.context() as patch:
            if place.endswith(f"commits/{failing:06d}.json"):
                patch.setattr(ts.KvStore, "open", refuse)
            return create(place, data)

    with monkeypatch.context() as patch:
        patch.setattr(kvstore, "create_file", fail)
        with pytest.raises(
            RuntimeError if isinstance(error, RuntimeError) else MachineError, match="gone"
        ) as found:
            run(config)
    assert ts.KvStore.open is open_kvstore
    assert "\n" not in str(found.value)
    assert failing not in Store.open(config.store).committed()
    run(config)
    assert verify(config.store)["damaged"] == []


def test_a_marker_that_disappears_is_told(config, monkeypatch):
    monkeypatch.setattr(kvstore, "create_file", lambda place, data: True)
    with pytest.raises(MachineError, match=r"3 blocks of .* are not there"):
        run(config)


def test_disk_that_fills_up_is_one_line_and_resumable(config):
    """A limit on the size of a file stands in for a full disk."""
    config = replace(config, precision="float32")
    run(config)
    whole = contents(config.store)
    for block in (0, 1):
        os.unlink(f"{config.store}/commits/{block:06d}.json")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limit[1]))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # programs would meet it too
    try:
        with pytest.raises(EyasError, match=r"block 0 of 3: the disk is full; make room") as found:
            run(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    assert "\n" not in str(found.value)
    assert Store.open(config.store).committed() == {2}
    assert run(config)["blocks_before"] == 1
    assert contents(config.store) == whole
