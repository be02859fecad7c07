"""A dump writes what the target computes, refuses what it cannot do, and goes on after any end."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import aiohttp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from gcsfs.retry import HttpError

from common import kvstore, storage
from common.errors import EyasError, MachineError
from common.mesh import make_mesh
from common.store import Store
from common.store_verify import verify
from dump import plan as planning
from dump import target
from dump.dump import DumpConfig, run
from dump.prefill import Prefill
from dump.rounds import Discard, deal, run_rounds
from tests.dump import tiny

ROWS = 11


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    model = tiny.write_model(f"{folder}/model")
    return model, tiny.write_store(f"{folder}/store", model, ROWS)


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """Every file of an uninterrupted dump in blocks of one row."""
    model, rows = made
    store = f"{tmp_path_factory.mktemp('whole')}/store"
    os.system(f"cp -r {rows} {store}")
    run(DumpConfig(model, store, logits="topk", topk=4, block_rows=1))
    return contents(store)


@pytest.fixture
def config(tmp_path, made):
    """A model folder and a store of rows of the test's own."""
    for folder, place in zip(made, ("model", "store"), strict=True):
        os.system(f"cp -r {folder} {tmp_path}/{place}")
    return DumpConfig(f"{tmp_path}/model", f"{tmp_path}/store", logits="topk", topk=4, block_rows=4)


def contents(folder: str) -> dict[str, bytes]:
    """Every file by its path, hidden ones too."""
    paths = (os.path.join(where, name) for where, _, names in os.walk(folder) for name in names)
    return {os.path.relpath(path, folder): storage.read_bytes(path) for path in paths}


def expected(config: DumpConfig, rows: np.ndarray):
    """(aux, last, logits) of the rows in f32, straight from the target's functions."""
    cfg = target.read_config(config.model)
    weights = target.load(config.model, cfg, make_mesh(), jnp.float32)
    inputs = Store.open(config.store).read(("tokens", "segment_ids", "positions"), rows)
    aux, last = target.forward(cfg, weights, *map(jnp.asarray, inputs.values()), (2, 4, 5))
    return (
        np.asarray(aux),
        np.asarray(last),
        np.asarray(target.logits(cfg, weights, last)),
    )


def test_store_holds_what_the_target_computes(config):
    found = run(config)
    assert (found["rows"], found["blocks"], found["blocks_before"]) == (ROWS, 3, 0)
    store = Store.open(config.store)
    store.require_complete()
    assert verify(config.store)["damaged"] == []
    rows = np.array([10, 3, 0, 7])  # of three blocks, the last one short
    aux, last, logits = expected(config, rows)
    got = store.read(list(store.features["arrays"]), rows)
    real = store.read(["segment_ids"], rows)["segment_ids"] > 0
    near = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(got["aux_hidden"][real], aux[real], **near)
    np.testing.assert_allclose(got["last_hidden"][real], last[real], **near)
    np.testing.assert_array_equal(got["argmax"][real], logits.argmax(-1)[real])
    np.testing.assert_array_equal(got["topk_ids"][..., 0], got["argmax"])
    np.testing.assert_allclose(
        got["topk_logits"][real], -np.sort(-logits, -1)[real][:, :4], rtol=1e-3, atol=1e-3
    )
    # Positions restart, and every one but the padding is a token of the marker's count.
    assert store.commit(2)["tokens"] == 3 * (tiny.T - 2)
    # The logits are a function of the store alone.
    head = store.target_tensor("lm_head").astype(np.float64)
    again = np.log(np.exp(got["last_hidden"].astype(np.float64) @ head.T).sum(-1))
    np.testing.assert_allclose(got["logsumexp"], again, rtol=1e-5)
    assert store.target_config()["architectures"] == ["LlamaForCausalLM"]
    store.require_target(store.features["target"]["config_hash"])


def test_a_packed_document_gives_what_it_gives_alone(config, tmp_path):
    run(config)
    alone = replace(config, store=tiny.write_store(f"{tmp_path}/alone", config.model, ROWS, alone=True))
    run(alone)
    packed, apart = Store.open(config.store), Store.open(alone.store)
    names = list(packed.features["arrays"])
    got, wanted = packed.read(names, np.arange(ROWS)), apart.read(names, np.arange(2 * ROWS))
    cut, end = tiny.T // 2 - 3, tiny.T - 2
    for name in names:
        near = {"rtol": 2e-3, "atol": 2e-3} if name == "topk_logits" else {"rtol": 1e-5, "atol": 1e-5}
        np.testing.assert_allclose(got[name][:, :cut], wanted[name][:ROWS, :cut], **near)
        np.testing.assert_allclose(got[name][:, cut:end], wanted[name][ROWS:, : end - cut], **near)


def test_mesh_precision_and_other_codecs(config, tmp_path):
    """A (2, 2) mesh, float8 states and draft logits, against f32 of one device."""
    mixed = replace(config, dp=2, tp=2, precision="float8_e4m3fn", logits="draft", draft_vocab=10)
    run(mixed)
    store = Store.open(mixed.store)
    aux, last, logits = expected(config, np.arange(ROWS))
    got = store.read(list(store.features["arrays"]), np.arange(ROWS))
    assert got["last_hidden"].dtype == ml_dtypes.float8_e4m3fn
    back = got["last_hidden"].astype(np.float32) * got["last_scale"][..., None]
    real = store.read(["segment_ids"], np.arange(ROWS))["segment_ids"] > 0
    assert np.abs(back - last)[real].max() < np.abs(last).max() / 14
    back = got["aux_hidden"].astype(np.float32) * got["aux_scale"][..., None]
    assert np.abs(back - aux)[real].max() < np.abs(aux).max() / 14
    ids = store.draft_ids()
    assert verify(mixed.store)["damaged"] == []
    for path in ("c/0", "zarr.json"):
        os.rename(f"{mixed.store}/features/draft_ids/{path}", f"{tmp_path}/aside")
        assert any("draft_ids" in line for line in verify(mixed.store)["damaged"])
        run(mixed)
        assert verify(mixed.store)["damaged"] == []
    assert ids.tolist() == sorted(np.argsort(-store.token_counts(), kind="stable")[:10])
    np.testing.assert_allclose(got["draft_logits"][real], logits[real][:, ids], rtol=1e-2, atol=1e-2)
    np.testing.assert_array_equal(got["argmax"][real], logits.argmax(-1)[real])


def test_tied_target_and_full_logits(tmp_path):
    model = tiny.write_model(f"{tmp_path}/model", tied=True)
    config = DumpConfig(
        model, tiny.write_store(f"{tmp_path}/store", model, 3), logits="full", dtype="bfloat16"
    )
    run(config)
    store = Store.open(config.store)
    np.testing.assert_array_equal(store.target_tensor("lm_head"), store.target_tensor("embed_tokens"))
    got = store.read(["full_logits", "argmax"], [2])
    assert got["full_logits"].shape == (1, tiny.T, tiny.V)
    assert got["full_logits"].dtype == ml_dtypes.bfloat16
    at = np.take_along_axis(got["full_logits"], got["argmax"][..., None], -1)[..., 0]
    np.testing.assert_array_equal(at, got["full_logits"].max(-1))


def test_forward_passes_can_be_timed_without_writing(config):
    plan = planning.make_plan(config)
    weights = target.load(config.model, plan.target, plan.mesh, jnp.float32)
    before = contents(config.store)
    run_rounds(plan, Prefill(plan, weights), Discard())
    assert contents(config.store) == before


def test_memory_that_does_not_suffice_is_one_line_and_nothing_is_begun(config, monkeypatch):
    before = contents(config.store)
    too_much = lambda *_: jax.block_until_ready(jnp.zeros((2**44,), jnp.uint8))  # noqa: E731
    monkeypatch.setattr("dump.prefill.Program.compile", too_much)
    with pytest.raises(EyasError, match=r"memory of the chips .* \(--chip-tokens, --batch-rows\)"):
        run(config)
    assert contents(config.store) == before


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


def emptied(path):
    storage.write_json(path, {})


def swapped(path):
    """The output head in the place of the embeddings."""
    shutil.copy(f"{os.path.dirname(path)}/lm_head.safetensors", path)


def linked(path):
    os.rename(path, f"{path}.aside")
    storage.write_bytes(f"{path}.other", b"{}")
    os.symlink(f"{path}.other", path)


def cut(path):
    os.truncate(path, os.path.getsize(path) - 1)


@pytest.mark.parametrize("damage", [os.unlink, emptied, linked, cut, swapped])
@pytest.mark.parametrize("name", ["config.json", "embed_tokens.safetensors", "tokenizer.json"])
def test_what_training_takes_of_the_target_is_checked_and_restored(config, dumped, name, damage):
    path = f"{dumped}/target/{name}"
    whole = storage.read_bytes(path)
    damage(path)
    store = Store.open(dumped)
    with pytest.raises(EyasError, match=rf"target/{name} is (missing|damaged)"):
        store.target_file(name)
    if name != "tokenizer.json":
        with pytest.raises(EyasError, match=rf"target/{name} is (missing|damaged)"):
            store.target_config() if name == "config.json" else store.target_tensor("embed_tokens")
    assert any(name in line for line in verify(dumped)["damaged"])
    run(replace(config, store=dumped, block_rows=1))
    assert storage.read_bytes(path) == whole
    assert not os.path.islink(path)
    assert verify(dumped)["damaged"] == []


def test_a_target_is_not_restored_from_another(config, dumped):
    os.unlink(f"{dumped}/target/tokenizer_config.json")
    storage.write_json(f"{config.model}/tokenizer_config.json", {"chat_template": "another"})
    with pytest.raises(EyasError, match=r"the model's tokenizer_config\.json has changed since"):
        run(replace(config, store=dumped, block_rows=1))


@pytest.fixture
def dumped(config, whole, tmp_path):
    """A complete store, copied."""
    for name, data in whole.items():
        storage.write_bytes(f"{tmp_path}/dumped/{name}", data)
    return f"{tmp_path}/dumped"


@pytest.mark.parametrize("array", ["tokens", "positions", "segment_ids", "loss_mask"])
def test_damaged_rows_are_refused_before_they_are_computed(config, array):
    with open(f"{config.store}/rows/{array}/c/0/0", "r+b") as file:
        file.write(b"\7")
    with pytest.raises(EyasError, match=rf"{array} rows \[0\]: damaged on disk"):
        run(config)
    assert Store.open(config.store).committed() == set()


def test_documents_longer_than_the_targets_positions_are_refused(config):
    """Rows may be longer: positions restart in every document."""
    place = f"{config.model}/config.json"
    raw = storage.read_json(place)
    longest, before = tiny.T // 2 - 3, contents(config.store)
    for change, limit in (
        ({}, longest - 1),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, (longest - 1) // 2),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 2}}, longest - 1),
    ):
        storage.write_json(place, raw | {"max_position_embeddings": limit} | change)
        with pytest.raises(EyasError, match=rf"document of {longest} tokens, but .* --length \d+ or less"):
            run(config)
    assert contents(config.store) == before
    extended = {"max_position_embeddings": 4, "rope_scaling": YARN | {"original_max_position_embeddings": 4}}
    for change in ({"max_position_embeddings": longest}, extended):
        storage.write_json(place, raw | change)
        assert len(planning.make_plan(config).blocks) == 3


YARN = {"rope_type": "yarn", "factor": 4.0}


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


def test_other_options_are_refused_by_field(config, tmp_path):
    run(config)
    before = contents(config.store)
    for change, named in (
        ({"topk": 5}, r"codec\.size: 4 there, 5 here"),
        ({"aux_layers": (1, 2)}, r"aux_layers: \[2, 4, 5\] there, \[1, 2\] here"),
        ({"precision": "bfloat16"}, 'precision: "float32" there, "bfloat16" here'),
        ({"model": tiny.write_model(f"{tmp_path}/other", seed=1)}, r"target\.weights_hash"),
    ):
        with pytest.raises(EyasError, match=f"was dumped otherwise: {named}.*or a new store"):
            run(replace(config, **change))
    os.rename(config.model, f"{tmp_path}/renamed")
    run(replace(config, model=f"{tmp_path}/renamed"))
    assert contents(config.store) == before


def test_bad_input_writes_nothing(config, tmp_path):
    before = contents(config.store)
    few = tiny.write_model(f"{tmp_path}/few", layers=6)
    storage.write_json(f"{tmp_path}/empty/config.json", {})
    other = tiny.write_model(f"{tmp_path}/other")
    storage.write_json(f"{other}/tokenizer.json", {"name": "another"})
    broken = tiny.write_model(f"{tmp_path}/broken")
    os.truncate(f"{broken}/model.safetensors", 40_000)
    for change, message in (
        ({"model": few}, "6 layers; the default aux layers need at least 7"),
        ({"model": f"{tmp_path}/nowhere"}, "config.json is missing"),
        ({"model": f"{tmp_path}/empty"}, "supported: "),
        ({"model": other}, "made with another tokenizer"),
        ({"model": broken}, "cut off"),
        ({"store": f"{tmp_path}/nowhere"}, "is no feature store"),
        ({"topk": 100}, "topk=100, but the target has 64 tokens"),
        ({"logits": "draft"}, "draft_vocab=32000, but the target has 64 tokens"),
        ({"aux_layers": (3, 99)}, "aux_layers"),
        ({"dp": 8, "block_rows": 8}, "needs 8 devices"),
    ):
        with pytest.raises(EyasError, match=message) as found:
            run(replace(config, **change))
        assert "\n" not in str(found.value)
    assert contents(config.store) == before


@pytest.mark.parametrize(
    "change",
    [
        {"logits": "some"},
        {"precision": "int8"},
        {"dtype": "float64"},
        {"topk": 0},
        {"batch_rows": 3},
        {"dp": 3},
        {"share": "0/2"},
        {"share": "3/2"},
        {"share": "half"},
    ],
)
def test_bad_options_are_named(config, change):
    with pytest.raises(ValueError, match=next(iter(change)) if "dp" not in change else "block_rows=4"):
        planning.make_plan(replace(config, **change))


def test_default_batches_divide_blocks():
    config = DumpConfig("m", "s")
    assert [config.batch(length, 1) for length in (512, 2048, 700, 10)] == [4, 1, 2, 32]
    assert replace(config, dp=2, tp=8).batch(512, 16) == 32
    assert replace(config, dp=2, tp=8).batch(512, 4) == 64
    assert replace(config, dp=2, tp=4).batch(2048, 8) == 8
    assert replace(config, dp=3).batch(512, 2, 1) == 12
    with pytest.raises(ValueError, match="multiple of the 3 rows that a process with 3 of 4 chips"):
        replace(config, dp=4).batch(512, 1, 3)
    assert [deal((0, 1, 2, 5, 7), p, 2) for p in (0, 1)] == [(0, 2, 7), (1, 5)]


def test_the_largest_numbers_are_planned_at_once(config):
    """A prime number of rows has no parts; they are not looked for one by one."""
    start = time.monotonic()
    planning.make_plan(replace(config, block_rows=2**31 - 1, chip_tokens=2**31 - 1))
    assert time.monotonic() - start < 20


def test_rows_that_have_no_parts_for_objects_are_refused(config, monkeypatch):
    """Rows of a prime number of tokens, each larger than an object, would be an object a token."""
    before = contents(config.store)
    monkeypatch.setattr("common.zarr.CHUNK_BYTES", 200)
    monkeypatch.setattr("common.zarr.SHARD_BYTES", 200)
    with pytest.raises(EyasError, match=r"aux_hidden would be 24 objects .* prepare with --length 256"):
        run(config)
    assert contents(config.store) == before


def test_too_small_a_disk_is_refused_before_the_run(config, monkeypatch):
    before = contents(config.store)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 70_000}))
    with pytest.raises(EyasError, match=r"need 77\.6kB, the disk of .* has 70\.0kB left; use --precision"):
        run(config)
    assert contents(config.store) == before


def test_disk_that_fills_up_is_one_line_and_resumable(config):
    """A limit on the size of a file stands in for a full disk."""
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


def test_numbers_that_are_not_finite_are_refused(config):
    weights = f"{config.model}/model.safetensors"
    data = bytearray(storage.read_bytes(weights))
    data[-4:] = np.float32(np.nan).tobytes()
    storage.write_bytes(weights, bytes(data))
    with pytest.raises(EyasError, match="row 0: the target's logits are not finite"):
        run(config)
