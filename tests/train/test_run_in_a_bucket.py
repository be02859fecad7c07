"""A run in a bucket: stopped and continued it is the run of a local folder; it has one process at a time.

Whatever uses the server is a process of its own.
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from common import kvstore, lease, storage
from common.errors import EyasError, RestartError
from common.lock import FILE, locked
from common.store import Store
from pipelines.bench import bucket
from pipelines.compare import runs
from pipelines.copy_head import copy_head
from tests.bucket_process import ran, started, taken_away
from tests.faulty_proxy import Sometimes, faulty
from tests.train import small_run, small_store
from tests.train.small_run import assert_same_run, lines_of
from tests.train.test_resume import stopped_at
from train import evaluate, sweep
from train.config import EvaluateConfig
from train.run import TrainConfig, run

OUT = "gs://bucket/runs/one"
HOLD = (
    "import sys; from common.lock import locked\nwith locked(sys.argv[1]): print('held', flush=True); input()"
)


def config_of(folder: str) -> TrainConfig:
    return small_run.short_run(f"{folder}/store", f"{folder}/out")


def fetched(url: str, folder: str) -> str:
    """A local copy of everything below `url`."""
    fs, path = storage.filesystem(url)
    for name in fs.find(path):
        storage.write_bytes(f"{folder}{name.removeprefix(path)}", fs.cat_file(name))
    return folder


def whole_way(folder: str) -> None:
    config = config_of(folder)
    run(config)
    here = replace(config, out=OUT)
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(4, here, patch)
    assert [line["step"] for line in lines_of(fetched(OUT, f"{folder}/stopped"))] == [1, 2, 3, 4]
    assert runs.read(OUT, 10).state == "stopped"
    one_at_a_time(here)
    assert run(here)["steps_before"] == 4
    assert_same_run(fetched(OUT, f"{folder}/continued"), config.out)
    assert runs.read(OUT, 10).state == "done"
    head_is_used(here, config)
    # Of a machine that died while it wrote its last state, everything is there but the mark.
    fs, path = storage.filesystem(f"{OUT}/state/7/commit_success.txt")
    with suppress(FileNotFoundError):  # asked again, where the answer to the first request was lost
        fs.rm_file(path)
    assert run(here)["steps_before"] == 6
    assert_same_run(fetched(OUT, f"{folder}/again"), config.out)


def sweep_in_pieces(folder: str) -> None:
    """Rows on two chips, of states in 8 bits and logits, most last states left out; a head begins with
    another's weights."""
    jax.config.update("jax_num_cpu_devices", 2)
    local, there = f"{folder}/few", "gs://bucket/few"
    for url in (local, there):
        small_store.write_store(url, "topk", "int8", last_rows=8)
    first = small_run.short_run(local, f"{folder}/first", sp=2, init="fitted")
    run(first)
    names = {"new": {}, "warm": {"init": f"{folder}/first/best", "draft_vocab": None}}
    for url, out in ((local, f"{folder}/heads"), (there, "gs://bucket/heads")):
        heads = {name: replace(first, store=url, out=f"{out}/{name}", **own) for name, own in names.items()}
        assert not sweep.run(heads, out)["failed"]
    for name in names:
        assert_same_run(
            fetched(f"gs://bucket/heads/{name}", f"{folder}/again/{name}"), f"{folder}/heads/{name}"
        )


def one_at_a_time(config: TrainConfig) -> None:
    command = [sys.executable, "-c", HOLD, OUT]
    told = rf"{OUT} is in use by process {{}} on {socket.gethostname()}, which said so \d+ seconds ago; wait"
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RestartError, match=told.format(other.pid)):
            run(config)
        assert runs.read(OUT, 10).state == "running"
        other.kill()
    with pytest.raises(RestartError, match=told.format(other.pid)):  # nobody can know yet
        run(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "_STALE", 0.0)
        with locked(OUT):
            pass
    assert not storage.exists(f"{OUT}/{FILE}")


def head_is_used(there: TrainConfig, here: TrainConfig) -> None:
    measured = [evaluate.run(EvaluateConfig(f"{x.out}/best", x.store, ttt_steps=2)) for x in (there, here)]
    assert measured[0] == measured[1]
    copied = "gs://bucket/heads/one"
    assert copy_head(f"{OUT}/best", Store.open(here.store), copied)[0] == f"{copied}: written and checked"
    for name in storage.list_names(copied):
        assert storage.read_bytes(f"{copied}/{name}") == storage.read_bytes(f"{here.out}/best/{name}")


def overwritten(place: str, data: bytes, check: Callable[[], None]) -> None:
    """Puts `data` there until the holder sees it: this server takes a renewal that comes in between."""
    while True:
        storage.write_bytes(place, data)
        check()


def lease_alone() -> None:
    """It is renewed; who finds it taken says so, and then leaves the other's in its place."""
    place, other = f"{OUT}/{FILE}", b'{"holder":"another process","time":0.0}'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "_RENEWED", 0.05)
        with locked(OUT) as check:
            first = storage.read_bytes(place)
            while storage.read_bytes(place) == first:
                check()
            with pytest.raises(RestartError, match="another process works in the folder"):
                overwritten(place, other, check)
        assert storage.read_bytes(place) == other
        assert kvstore.remove_file(place, other)
    # A process that died while its clock was a year ahead, or behind, holds nothing.
    for year in (1, -1):
        then = time.time() + year * 365 * 86400
        storage.write_bytes(place, json.dumps({"holder": "a dead process", "time": then}).encode())
        assert lease.holder(place) is None
        with locked(OUT) as check:
            check()
    storage.write_bytes(place, b"[]")
    with (
        pytest.raises(EyasError, match=r"\.lock: it holds \[\].*delete it if no process works there"),
        locked(OUT),
    ):
        raise AssertionError("taken")
    storage.filesystem(place)[0].rm_file(storage.filesystem(place)[1])


def test_a_folder_of_a_bucket_has_one_process_at_a_time():
    with bucket.served("bucket") as server:
        code, said = ran(server, "tests.train.test_run_in_a_bucket")
    assert code == 0, "\n".join(said[-30:])


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_of_a_folder(tmp_path):
    small_store.write_store(f"{tmp_path}/store")
    with bucket.served("bucket") as server:
        code, said = ran(server, "tests.train.test_run_in_a_bucket", "run", str(tmp_path))
    assert code == 0, "\n".join(said[-30:])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", ["run", "sweep"])
def test_the_same_heads_when_every_tenth_request_fails(tmp_path, what):
    small_store.write_store(f"{tmp_path}/store")
    with bucket.served("bucket") as server, faulty(server, Sometimes(0.1, 0)) as proxy:
        code, said = ran(proxy, "tests.train.test_run_in_a_bucket", what, str(tmp_path))
    assert code == 0, "\n".join(said[-30:])


class Once:
    """No fault until a request names `place`, and then one for every request."""

    def __init__(self, place: str, fault: str):
        self.place, self.fault, self.begun = place, fault, False

    def __call__(self, request: str) -> str | None:
        self.begun = self.begun or self.place in request
        return self.fault if self.begun else None


def command(folder: Path) -> tuple[str, ...]:
    """A run in the bucket, of a store that is written to a folder."""
    config = config_of(str(folder))
    small_store.write_store(config.store)
    names = ("steps", "batch_rows", "ttt_steps", "optimizer", "learning_rate", "eval_every", "save_every")
    options = [x for n in names for x in (f"--{n.replace('_', '-')}", str(getattr(config, n)))]
    place = ("--model", "owner/made-up", "--store", config.store, "--out", OUT)
    return ("pipelines", "train", *place, *options)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["one/last/", "state%2F3"])
def test_a_machine_that_is_taken_away_while_the_bucket_hangs(tmp_path, place):
    """Whatever is written then, a head or a state, is not waited for."""
    with bucket.served("bucket") as server, faulty(server, choose := Once(place, "hang")) as proxy:
        said = taken_away(started(proxy, *command(tmp_path)), lambda: choose.begun, 200)
        assert "stopped; " in said
        assert said.startswith("Error: ")


ENDS = {
    "401": (2, "the bucket bucket asks for valid credentials"),
    "403": (2, "this account may not"),
    "404": (2, "the bucket bucket does not exist"),
    "503": (42, "no answer from the bucket bucket"),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", [".lock", "state%2F3", "state%2F7"])
@pytest.mark.parametrize("fault", ENDS)
def test_a_bucket_that_refuses_a_run_is_one_line(tmp_path, place, fault):
    with bucket.served("bucket") as server, faulty(server, choose := Once(place, fault)) as proxy:
        code, said = ran(proxy, *command(tmp_path))
        assert choose.begun
        assert code == ENDS[fault][0], "\n".join(said)
        assert said[-1].startswith("Error: ")
        assert ENDS[fault][1] in said[-1]
        assert not any("Traceback" in line for line in said)


if __name__ == "__main__":
    {"": lease_alone, "run": whole_way, "sweep": sweep_in_pieces}["".join(sys.argv[1:2])](*sys.argv[2:])
