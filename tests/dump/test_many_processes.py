"""A dump on several processes writes what one process writes, and ends on all of them alike."""

import os
import random
import shutil
import signal
import time
from dataclasses import asdict, replace

import numpy as np
import pytest

from common import storage
from common.store import Store
from common.store_verify import verify
from dump.dump import DumpConfig, run
from tests import pod as miniature
from tests import tiny_llama
from tests.dump import tiny
from tests.dump.tiny import contents
from tests.goldens import golden

ROWS = 21
DUMP = """
from dump.dump import DumpConfig, run
found = run(DumpConfig(**{config}))
print(found["blocks_before"], found["blocks"])
"""


@pytest.fixture
def config(tmp_path):
    model = tiny.write_model(f"{tmp_path}/model")
    store = tiny.write_store(f"{tmp_path}/store", model, ROWS)
    # What is compared is rounding's: in 8 bits a difference in the last digit may be one of a whole step.
    return DumpConfig(model, store, block_rows=4, logits="topk", topk=4, precision="float32")


def dump(config: DumpConfig, processes: int, devices: int, prelude: str = "") -> list[miniature.Ended]:
    return miniature.wait(miniature.start(prelude + DUMP.format(config=asdict(config)), processes, devices))


def alone(config: DumpConfig, folder) -> Store:
    """The same dump by one process."""
    shutil.copytree(config.store, f"{folder}/alone")
    run(replace(config, store=f"{folder}/alone", dp=1, tp=1))
    return Store.open(f"{folder}/alone")


def require_same(found: Store, wanted: Store) -> None:
    """rows/ bit for bit, features within float32 rounding, by which few integers are the next one."""
    rows = np.arange(wanted.rows)
    for name in ("tokens", "segment_ids", "positions", "loss_mask"):
        np.testing.assert_array_equal(found.read([name], rows)[name], wanted.read([name], rows)[name])
    real = wanted.read(["segment_ids"], rows)["segment_ids"] > 0
    for name in wanted.features["arrays"]:
        got, want = (store.read([name], rows)[name][real] for store in (found, wanted))
        tolerance = {"rtol": 2e-3, "atol": 2e-3} if name == "topk_logprobs" else {"rtol": 1e-4, "atol": 1e-5}
        if got.dtype == np.int8:
            assert (got != want).mean() < 0.01, name
            tolerance = {"rtol": 0, "atol": 1}
        np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), **tolerance, err_msg=name)


def test_two_processes_write_what_one_writes(config, tmp_path):
    wanted = alone(config, tmp_path)
    found = dump(replace(config, dp=2, tp=2), 2, 2)
    assert [p.code for p in found] == [0, 0], found
    checked = verify(config.store)
    assert (checked["damaged"], checked["missing_blocks"]) == ([], 0)
    require_same(Store.open(config.store), wanted)
    assert not found[1].err.strip(), "one process tells what happens, the others are silent"


def test_two_processes_have_one_scale_a_channel(config, tmp_path):
    """Found by both together, from rows of which each computes a part."""
    config = replace(config, precision="int8", logits="none", topk=64)
    wanted = alone(config, tmp_path)
    found = dump(replace(config, dp=4, tp=1), 2, 2)
    assert [p.code for p in found] == [0, 0], found
    assert verify(config.store)["damaged"] == []
    store = Store.open(config.store)
    assert store.features["channels"] == wanted.features["channels"]
    require_same(store, wanted)


def test_an_error_of_one_process_ends_both(config):
    """A row that cannot be read by one of them; what is committed stays, and the same command goes on."""
    broken = """
from common import store
if me == 1:
    read = store.Store.read
    def fail(self, names, rows):
        if max(rows) > 19:
            raise store.EyasError(f"row {max(rows)} is damaged; prepare it anew")
        return read(self, names, rows)
    store.Store.read = fail
"""
    spread = replace(config, dp=4)
    found = dump(spread, 2, 2, broken)
    assert [p.code for p in found] == [2, 2], found
    assert "Error: process 1: row 20 is damaged; prepare it anew" in found[0].err
    assert "Error: row 20 is damaged; prepare it anew" in found[1].err
    assert not any("Traceback" in p.err for p in found)
    committed = Store.open(config.store).committed()
    assert 0 < len(committed) < 6
    found = dump(spread, 2, 2)
    assert [p.code for p in found] == [0, 0], found
    assert found[0].out.splitlines()[-1] == f"{len(committed)} 6"


@pytest.mark.slow
def test_what_hosts_do_not_share_is_refused_on_all(config, tmp_path):
    """Other options, other weights, and a store that each has a copy of: nothing is written."""
    other = tiny.write_model(f"{tmp_path}/other", seed=1)
    shutil.copytree(config.store, f"{tmp_path}/copy")
    tries = f"""
from dataclasses import replace
from dump.dump import DumpConfig, run
config = DumpConfig(**{asdict(replace(config, dp=2))})
one, two = {{"logits": "full", "topk": 64}}, {{"block_rows": 2}}
for changed in (one, two, {{"model": "{other}"}}, {{"store": "{tmp_path}/copy"}}):
    try:
        run(replace(config, **changed) if me else config)
    except EyasError as error:
        print(error)
"""
    found = miniature.wait(miniature.start(tries, 2))
    for process in found:
        lines = process.out.splitlines()
        assert len(lines) == 4, found
        assert 'logits: "full" there, "topk" here' in lines[0]
        assert "block_rows: 2 there, 4 here" in lines[1]
        assert "weights_hash" in lines[2]
        assert "is not on this host what it is on the first one" in lines[3]
    assert not Store.open(config.store).committed()


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "mesh"), [((2, 1), {"dp": 3}), ((1, 3), {"dp": 2, "tp": 2})])
def test_processes_may_have_different_numbers_of_chips(devices, mesh, config, tmp_path):
    """Each computes as many rows a round as its chips take; all agree on how many rounds there are."""
    wanted, config = alone(config, tmp_path), replace(config, block_rows=6, chip_tokens=4 * tiny.T, **mesh)
    started = miniature.start(DUMP.format(config=asdict(config)), 2, devices)
    assert [p.code for p in miniature.wait(started)] == [0, 0]
    require_same(Store.open(config.store), wanted)


def test_shares_are_taken_apart_and_put_together(config, tmp_path):
    wanted = alone(config, tmp_path)
    run(replace(config, share="2/3"))
    assert Store.open(config.store).committed() == {1, 4}
    run(replace(config, share="1/3"))
    assert run(config)["blocks_before"] == 4
    require_same(Store.open(config.store), wanted)


def test_chips_that_would_idle_are_named(config):
    found = dump(replace(config, dp=2), 2, 2)
    assert [p.code for p in found] == [2, 2]
    assert "dp*tp=2, but the 2 processes have 4 chips" in found[0].err
    assert not os.path.exists(f"{config.store}/commits")


_SIZES = {"vocab_size": tiny.V, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8}
_EXPERTS = {"moe_intermediate_size": 16}
TARGETS = {
    "dense": lambda: tiny_llama.CONFIG | _SIZES | _HEADS | {"num_attention_heads": 16, "head_dim": 4},
    "moe": lambda: golden.config("qwen3_moe") | _SIZES | _HEADS | _EXPERTS | {"num_experts": 16},
    "mla": lambda: (
        golden.config("deepseek_v2")
        | (_SIZES | _HEADS | _EXPERTS | {"n_routed_experts": 16, "kv_lora_rank": 16})
    ),
    "hybrid": lambda: (
        golden.config("qwen3_next")
        | (_SIZES | _HEADS | _EXPERTS | {"num_experts": 16, "shared_expert_intermediate_size": 16})
        | {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
    ),
}


def write_target(folder: str, name: str) -> str:
    storage.write_json(f"{folder}/config.json", TARGETS[name]())
    storage.write_json(f"{folder}/tokenizer.json", {"name": "tiny"})
    tiny_llama.write_weights(folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "dp", "tp"),
    [("dense", 2, 8), *((name, *mesh) for name in TARGETS for mesh in ((4, 4), (16, 1)))],
)
def test_sixteen_chips_on_four_hosts_write_what_one_chip_writes(name, dp, tp, tmp_path):
    model = write_target(f"{tmp_path}/model", name)
    store = tiny.write_store(f"{tmp_path}/store", model, 38)
    config = DumpConfig(model, store, block_rows=4, precision="float32")
    wanted = alone(config, tmp_path)
    found = miniature.wait(
        miniature.start(DUMP.format(config=asdict(replace(config, dp=dp, tp=tp))), 4, 4), seconds=600
    )
    assert [p.code for p in found] == [0] * 4, found
    checked = verify(config.store)
    assert (checked["damaged"], checked["missing_blocks"]) == ([], 0)
    require_same(Store.open(config.store), wanted)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dump_goes_on_with_other_numbers_of_processes(config, tmp_path):
    """Four processes are stopped by SIGTERM, two by SIGINT, and one ends it."""
    rows = 96
    config = replace(config, store=tiny.write_store(f"{tmp_path}/long", config.model, rows))
    wanted, config = alone(config, tmp_path), replace(config, dp=4)
    for processes, kind in ((4, signal.SIGTERM), (2, signal.SIGINT)):
        begun = committed(config.store)
        started = miniature.start(SLOWLY + DUMP.format(config=asdict(config)), processes, 4 // processes)
        moment = time.monotonic() + 120
        while committed(config.store) == begun and time.monotonic() < moment:
            time.sleep(0.02)
        started[-1].send_signal(kind)  # one of them is asked; all stop
        ended = miniature.wait(started)
        assert all("dump stopped" in p.err for p in ended), ended
        assert begun < committed(config.store) < rows // 4
    assert dump(config, 1, 4)[0].code == 0
    require_same(Store.open(config.store), wanted)


def committed(store: str) -> int:
    return len(os.listdir(f"{store}/commits")) if os.path.exists(f"{store}/commits") else 0


SLOWLY = """
print("joined", flush=True)
import time
from common.store_writer import FeatureWriter
pod.LOST_SECONDS = 3
write = FeatureWriter.write
FeatureWriter.write = lambda self, *a: (time.sleep(0.2), write(self, *a))
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_thirty_kills_leave_the_bytes_of_a_dump_left_alone(tmp_path):
    """Single processes and whole jobs, at random moments; each time the same command goes on."""
    model = tiny.write_model(f"{tmp_path}/model")
    blocks = 240  # more than are written before the last kill
    store = tiny.write_store(f"{tmp_path}/store", model, blocks)
    shutil.copytree(store, f"{tmp_path}/killed")
    config = DumpConfig(model, store, block_rows=1, dp=2)
    assert [p.code for p in dump(config, 2, 1)] == [0, 0]
    rng, config = random.Random(5), replace(config, store=f"{tmp_path}/killed")
    for kill in range(30):
        started = miniature.start(SLOWLY + DUMP.format(config=asdict(config)), 2, 1)
        for process in started:  # one that never comes is waited for, for minutes
            while "joined" not in process.stdout.readline():
                assert process.poll() is None
        before, moment = committed(config.store), time.monotonic() + 60
        while kill % 3 and committed(config.store) == before and time.monotonic() < moment:
            if any(process.poll() is not None for process in started):
                break
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 3 if kill % 3 == 0 else 0.6))  # a third while they begin
        for victim in started if kill % 2 else [rng.choice(started)]:
            victim.send_signal(signal.SIGKILL)
        ended = miniature.wait(started)
        assert all(p.code in (42, -signal.SIGKILL, -signal.SIGABRT) for p in ended), ended
    assert 20 < committed(config.store) < blocks, "every kill met a dump at work"
    assert [p.code for p in dump(config, 2, 1)] == [0, 0]
    assert contents(config.store) == contents(store)
