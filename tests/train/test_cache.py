"""A store in a bucket through a cache on disk: each row crosses the network once, whoever is killed.

The libraries read where gs:// is when they are loaded, so whatever uses the server is a process of its own.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from common import zarr
from pipelines import cli
from tests.common.bucket import Bucket, serving
from tests.common.refusing import environment
from tests.train import small_store
from train.config import EvaluateConfig, TrainConfig
from train.order import order
from train.source import Source
from train.stream import Stream, View

ROOT = Path(__file__).parents[2]
URL = "gs://bucket/store"


def stream(cache: str, epochs: str, pause: str = "0") -> None:
    """Streams the train rows, and says what they were."""
    source = Source(URL, cache=cache or None)
    rows, workload = source.train_rows, source.workload(2)
    wanted = order(rows, 0, int(epochs) * len(rows) // 2, 2)
    view = View(wanted, workload, workload.capacity(wanted.rows, 1), "recompute", np.arange(4))
    total = 0
    source.frozen(np.arange(4), "recompute", np.float32)
    for ((_, batch),) in Stream(source.store, source.mesh, [view]).batches():
        for x in batch:
            total = total if x is None else zarr.crc32(np.asarray(x), total)
        time.sleep(float(pause))
        print(total, flush=True)


def started(port: int, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.train.test_cache", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment(port), **pipes)


def ended(process: subprocess.Popen) -> list[str]:
    said, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return said.split()


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != ".used")


@pytest.mark.slow
def test_rows_cross_the_network_once_whoever_is_killed(tmp_path):
    small_store.write_store(str(tmp_path / "store"))
    bucket = Bucket()
    for path in (tmp_path / "store").rglob("*"):
        if path.is_file():
            bucket.put(f"store/{path.relative_to(tmp_path / 'store')}", path.read_bytes(), None)
    cache = tmp_path / "cache"
    with serving(bucket) as port:
        plain = ended(started(port, "", "2"))
        without, bucket.sent = bucket.sent, 0
        # One is killed in the middle; two at once go on with what it left.
        process = started(port, f"{cache}:1GB", "2", "0.2")
        process.stdout.readline()
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        bucket.sent = 0
        both = [started(port, f"{cache}:1GB", "2") for _ in range(2)]
        assert [ended(one) for one in both] == [plain, plain]
        bucket.sent = 0
        assert ended(started(port, f"{cache}:1GB", "2")) == plain
        again, bucket.sent = bucket.sent, 0
        features = sum(x.nbytes for x in rows_of(str(tmp_path / "store")).values())
        assert without > features
        assert again < without - features, "no state is asked for again"
        # A cache that is too small for all of it holds its size and gives the same.
        small = tmp_path / "small"
        assert ended(started(port, f"{small}:30kB", "2")) == plain
        assert 10_000 < size_of(small) <= 30_000


def rows_of(url: str) -> dict[str, np.ndarray]:
    source = Source(url)
    return source.store.read(("aux_hidden", "last_hidden"), source.train_rows)


@pytest.mark.parametrize("kind", [TrainConfig, EvaluateConfig])
@pytest.mark.parametrize("cache", ["/mnt/ssd", "/mnt/ssd:lots", ":3GB"])
def test_a_cache_without_a_size_is_refused(kind, cache):
    with pytest.raises(ValueError, match="must be FOLDER:SIZE, such as /mnt/ssd:200GB"):
        kind("a", "b", cache=cache)


def test_a_cache_that_cannot_be_is_refused_before_anything_is_written(tmp_path):
    store = small_store.write_store(str(tmp_path / "store"))
    (tmp_path / "file").write_text("")
    options = ["--store", store, "--model", f"{store}/target", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.main, ["train", *options, "--cache", f"{tmp_path}/file:3GB"])
    assert done.exit_code == 2
    assert "is a file; name another place" in done.stderr
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    stream(*sys.argv[1:])
