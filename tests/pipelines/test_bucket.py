"""The whole way in a bucket: the bytes of a local store, whatever the network does; one line when it ends.

The server speaks the protocol of Google Cloud Storage but accepts writes of a stale generation; that of two
writers at once one wins is tested in tests/common/test_store_bucket.py, on a server that refuses them.
"""

import sys
import time

import numpy as np
import pytest

from common import storage
from common.mesh import make_mesh
from common.store import Store
from common.store_verify import verify
from dump import dump, prepare
from pipelines.bench import bucket
from tests import tiny_llama
from tests.bucket_process import ROOT, ended, ran, started, taken_away
from tests.dump import chats
from tests.faulty_proxy import FAULTS, Sometimes, faulty
from train.order import listed
from train.stored import whole_teacher
from train.stream import Stream, View
from train.workload import Workload

CHATS = str(ROOT / "tests" / "data" / "chats.jsonl")
URL = "gs://bucket/store"
KINDS = {
    "states": {"precision": "float32"},
    "int8": {},
    "topk": {"logits": "topk", "topk": 4, "last_hidden": "first"},
}  # of stores


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    chats.write_model(folder, max_position_embeddings=512)
    tiny_llama.write_weights(str(folder))
    return str(folder)


def make(model: str, url: str, kind: str) -> None:
    prepare.run(prepare.PrepareConfig((CHATS,), model, url, length=256, holdout=0.2))
    dump.run(dump.DumpConfig(model, url, block_rows=1, **KINDS[kind]))


def contents(url: str) -> dict[str, bytes]:
    fs, path = storage.filesystem(url)
    return {name.removeprefix(path): storage.read_bytes(fs.unstrip_protocol(name)) for name in fs.find(path)}


def batch(url: str) -> list[np.ndarray]:
    """What a trainer gets of all rows."""
    store = Store.open(url)
    store.require_complete()
    rows = np.arange(store.rows)
    workload, wanted = Workload(store, rows, ttt_steps=3), listed(rows[None])
    view = View(wanted, workload, workload.capacity(wanted.rows, 1), whole_teacher(store), np.arange(8))
    (((_, found),),) = Stream(store, make_mesh(), [view]).batches()
    return [np.asarray(x) for x in found if x is not None]


def round_trip(model: str, folder: str, kind: str) -> None:
    local = f"{folder}/store"
    for url in (local, URL):
        make(model, url, kind)
        found = verify(url)
        assert (found["damaged"], found["missing_blocks"]) == ([], 0)
    assert contents(URL) == contents(local)
    for ours, theirs in zip(batch(URL), batch(local), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_bucket_holds_what_a_folder_holds(model, tmp_path):
    with bucket.served("bucket") as server:
        code, said = ran(server, "tests.pipelines.test_bucket", model, str(tmp_path), "states")
    assert code == 0, "\n".join(said[-20:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_when_every_tenth_request_fails(model, tmp_path, kind):
    with bucket.served("bucket") as server, faulty(server, choose := Sometimes(0.1, len(kind))) as proxy:
        code, said = ran(proxy, "tests.pipelines.test_bucket", model, str(tmp_path), kind)
    assert code == 0, "\n".join(said[-20:])
    assert set(FAULTS) <= choose.seen.keys(), choose.seen
    assert 0.05 < 1 - choose.seen[None] / choose.seen.total() < 0.15, choose.seen


class After:
    """No fault until so many feature objects were written, and then one for every request while it lasts."""

    def __init__(self, objects: int, fault: str):
        self.left, self.fault, self.happened = objects, fault, 0

    def __call__(self, request: str) -> str | None:
        if request.startswith("POST") and "features" in request:
            self.left -= 1
        if self.left >= 0:
            return None
        self.happened += 1
        return self.fault


ENDS = {
    "401": (2, "the bucket bucket asks for valid credentials"),
    "403": (2, "this account may not write in the bucket bucket"),
    "404": (2, "the bucket bucket does not exist"),
    "503": (42, "no answer from the bucket bucket"),
    "refuse": (42, "no answer from the bucket bucket"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ENDS)
def test_what_ends_in_the_middle_is_one_line_and_continued(model, fault):
    with bucket.served("bucket") as server, faulty(server, choose := After(9, fault)) as proxy:
        command = ("pipelines", "dump", "--model", model, "--store", URL, "--block-rows", "1")
        command += ("--precision", "int8")
        prepared = started(server, "pipelines", "prepare", "--model", model, "--store", URL, "--data", CHATS)
        assert ended(prepared)[0] == 0
        start = time.monotonic()
        code, said = ran(proxy, *command)
        seconds = time.monotonic() - start
        assert choose.happened
        assert code == ENDS[fault][0], "\n".join(said)
        assert said[-1].startswith("Error: ")
        assert ENDS[fault][1] in said[-1]
        assert not any("Traceback" in line for line in said)
        assert seconds < 180
        code, said = ran(server, *command)
        assert code == 0, "\n".join(said)
        code, said = ran(server, "pipelines", "verify", "--store", URL)
        assert code == 0, "\n".join(said)


@pytest.mark.slow
def test_a_machine_that_is_taken_away_while_the_bucket_hangs(model):
    with bucket.served("bucket") as server, faulty(server, choose := After(9, "hang")) as proxy:
        prepared = started(server, "pipelines", "prepare", "--model", model, "--store", URL, "--data", CHATS)
        assert ended(prepared)[0] == 0
        dumping = started(proxy, "pipelines", "dump", "--model", model, "--store", URL, "--block-rows", "1")
        said = taken_away(dumping, lambda: choose.happened, 120)
        assert said.startswith("Error: dump stopped")


if __name__ == "__main__":
    round_trip(*sys.argv[1:])
