"""Whatever is changed, cut off or swapped in a store is told in one line, and no creator undoes another."""

import json
import math
import os
import shutil
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import kvstore, storage, store_writer
from common.checked import sha256
from common.errors import DamagedError, EyasError, MachineError
from common.manifest import read_manifest
from common.store import Store, has_rows
from common.store_verify import verify
from tests.common.test_store import (
    BLOCK,
    A,
    H,
    R,
    T,
    V,
    contents,
    described,
    edit,
    features,
    make_rows,
    write_blocks,
)

HUGE = 10**15


@pytest.fixture
def full(tmp_path) -> str:
    make_rows(f"{tmp_path}/store")
    write_blocks(f"{tmp_path}/store", features())
    return f"{tmp_path}/store"


def problem(url: str) -> str:
    """What verify finds, "" if nothing; always lines."""
    try:
        found = verify(url)
    except EyasError as error:
        lines = [str(error)]
    else:
        lines = found["damaged"] + (["blocks are missing"] if found["missing_blocks"] else [])
    assert not any("\n" in line for line in lines)
    return "; ".join(lines)


def test_every_byte_of_every_file_counts(full):
    """One flipped bit, anywhere: all of a small file's bytes, some of a large one's."""
    assert problem(full) == ""
    rng = np.random.default_rng(0)
    paths = [os.path.join(where, name) for where, _, names in os.walk(full) for name in names]
    assert len(paths) > 30
    for path in paths:
        whole = storage.read_bytes(path)
        for at in rng.permutation(len(whole))[:5].tolist():
            with open(path, "r+b") as file:
                file.seek(at)
                file.write(bytes([whole[at] ^ 1 << int(rng.integers(8))]))
            assert problem(full), (path, at)
        storage.write_bytes(path, whole)
    assert problem(full) == ""


@pytest.mark.slow
def test_no_file_can_be_taken_for_another(full):
    """Each file in the place of each other one, as far as its content differs."""
    paths = [os.path.join(where, name) for where, _, names in os.walk(full) for name in names]
    for path in paths:
        whole = storage.read_bytes(path)
        for other in paths[:: len(paths) // 5]:
            if storage.read_bytes(other) != whole:
                shutil.copy(other, path)
                assert problem(full), (path, other)
                storage.write_bytes(path, whole)
        os.unlink(path)
        assert problem(full), path
        os.mkdir(path)
        assert problem(full), path
        os.rmdir(path)
        storage.write_bytes(path, whole)
    assert problem(full) == ""


@pytest.mark.timeout(120)
def test_a_pipe_in_the_place_of_any_file_is_told_and_not_waited_for(full):
    paths = [os.path.join(where, name) for where, _, names in os.walk(full) for name in names]
    for path in paths:
        os.rename(path, f"{full}/aside")
        os.mkfifo(path)
        assert "is a pipe or a device" in problem(full), path
        os.replace(f"{full}/aside", path)
    assert problem(full) == ""


def test_a_shard_that_may_not_be_read_is_the_machines_failure_and_no_damage(full):
    store = Store.open(full)
    store.read(["argmax", "tokens"], [3])
    os.chmod(f"{full}/features/argmax/c/1/0", 0)
    user = os.geteuid()
    if user == 0:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(MachineError, match="Permission denied") as found:
            store.read(["argmax"], [3])
    finally:
        os.seteuid(user)
    assert not isinstance(found.value, DamagedError)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(("one", "other"), [("tokens", "positions"), ("tokens", "segment_ids")])
def test_training_refuses_swapped_rows(full, one, other):
    os.rename(f"{full}/rows/{one}", f"{full}/rows/aside")
    os.rename(f"{full}/rows/{other}", f"{full}/rows/{one}")
    os.rename(f"{full}/rows/aside", f"{full}/rows/{other}")
    with pytest.raises(EyasError, match=rf"{one} rows \[3\]: damaged on disk"):
        Store.open(full).read([one], [3])


def of_marker(**change):
    return lambda marker: marker.update(change)


MARKERS = {
    "another key": lambda m: m.update(sums=m.pop("crc32c")),
    "another store": of_marker(store="b" * 64),
    "no text": of_marker(store=5),
    "another number": of_marker(block=0),
    "no number": of_marker(block=True),
    "others' rows": of_marker(rows=[0, 3]),
    "no rows": of_marker(rows=None),
    "other counts": of_marker(tokens=11),
    "sums of no array": lambda m: m["crc32c"].update(other=[1, 2, 3]),
    "no sums of an array": lambda m: m["crc32c"].pop("argmax"),
    "too few sums": lambda m: m["crc32c"]["argmax"].pop(),
    "sums of text": lambda m: m["crc32c"].update(argmax=["1", "2", "3"]),
    "sums of other numbers": lambda m: m["crc32c"].update(argmax=[1, 2, 3]),
    "negative sums": lambda m: m["crc32c"].update(argmax=[-1, 2, 3]),
    "a list of sums": of_marker(crc32c=[1, 2, 3]),
    "a number that is none": of_marker(more=math.nan),
}


@pytest.mark.parametrize("name", MARKERS)
def test_a_marker_is_whole_and_its_blocks(full, name):
    place = f"{full}/commits/000001.json"
    marker = storage.read_json(place)
    MARKERS[name](marker)
    with open(place, "w") as file:
        json.dump(marker, file)
    for use in (lambda s: s.read(["argmax"], [4]), Store.commits):
        with pytest.raises(EyasError, match=r"commits/000001\.json") as found:
            use(Store.open(full))
        assert "\n" not in str(found.value)
    assert "000001.json" in problem(full)


@pytest.mark.parametrize("text", ["[]", "5", "null", '"text"', "", "[" * 100_000, '{"block": 1'])
def test_a_marker_that_is_anything_else(full, text):
    with open(f"{full}/commits/000001.json", "w") as file:
        file.write(text)
    with pytest.raises(EyasError, match=r"commits/000001\.json"):
        Store.open(full).commits()


def test_a_marker_that_is_a_folder_or_of_no_block(full):
    os.rename(f"{full}/commits/000001.json", f"{full}/commits/000003.json")
    assert "commits/000003.json is no block's" in problem(full)
    os.mkdir(f"{full}/commits/000001.json")
    with pytest.raises(EyasError, match=r"000001\.json is a folder"):
        Store.open(full).commits()
    with pytest.raises(EyasError, match=r"000001\.json is a folder"):
        Store.open(full).read(["argmax"], [4])


def test_a_million_blocks_are_seen(full):
    store = Store.open(full)
    store.rows = BLOCK * 2_000_000
    for name in ("1234567.json", "0000001.json", "2000000.json", "12345678901234567890.json"):
        storage.write_bytes(f"{full}/commits/{name}", b"{}")
    assert store.committed() == {0, 1, 2, 1_234_567}
    assert store.marker_place(1_234_567) == f"{full}/commits/1234567.json"


def set_in(*path_and_value):
    *path, last, value = path_and_value

    def change(manifest):
        for key in path:
            manifest = manifest[key]
        manifest[last] = value

    return change


def larger(manifest):
    """A store of astronomically many rows that agrees with itself."""
    manifest["rows"]["rows"] = HUGE
    for section in ("rows", "features"):
        for name, array in manifest[section]["arrays"].items():
            if name != "token_counts":
                array["shape"][0] = HUGE


SIZES = {
    "rows": set_in("rows", "rows", HUGE),
    "rows as text": set_in("rows", "rows", "7"),
    "rows true": set_in("rows", "rows", True),
    "no rows": set_in("rows", "rows", 0),
    "infinitely many": set_in("rows", "rows", math.inf),
    "length": set_in("rows", "length", HUGE),
    "vocabulary": set_in("rows", "vocab_size", V + 1),
    "another vocabulary": set_in("features", "target", "vocab_size", V + 1),
    "block of nothing": set_in("features", "block_rows", 0),
    "larger blocks": set_in("features", "block_rows", HUGE),
    "smaller blocks": set_in("features", "block_rows", 1),
    "hidden size": set_in("features", "target", "hidden_size", H + 1),
    "aux layers": set_in("features", "aux_layers", [1]),
    "shape": set_in("features", "arrays", "argmax", "shape", [R, T + 1]),
    "shape of text": set_in("features", "arrays", "argmax", "shape", "7"),
    "chunk": set_in("features", "arrays", "argmax", "chunk", [1]),
    "shard": set_in("features", "arrays", "argmax", "shard", [HUGE, T]),
    "dtype": set_in("features", "arrays", "argmax", "dtype", "object"),
    "no arrays": set_in("features", "arrays", None),
    "a name out of the folder": set_in("features", "target_files", "../manifest.json", "a" * 64),
    "codec": set_in("features", "codec", {"name": "draft", "size": 5}),
    "precision": set_in("features", "precision", ["float32"]),
    "target": set_in("features", "target", []),
    "features": set_in("features", 5),
    "index": set_in("rows", "files", "index.parquet", "a"),
    "sums": set_in("rows", "files", {}),
    "all larger": larger,
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.timeout(20)
def test_sizes_that_disagree_or_are_astronomical(full, name):
    place = f"{full}/manifest.json"
    manifest = storage.read_json(place)
    SIZES[name](manifest)
    with open(place, "w") as file:
        json.dump(manifest, file)
    for use in (lambda: Store.open(full).require_complete(), lambda: Store.open(full).missing()):
        with pytest.raises(EyasError, match=r"manifest\.json") as found:
            use()
        assert "\n" not in str(found.value)
    assert "manifest.json" in problem(full)


@pytest.mark.parametrize(
    "text", ["[]", "5", "null", "", "[" * 100_000, '{"schema": true}', '{"schema": "1"}']
)
def test_a_manifest_that_is_anything_else(full, text):
    with open(f"{full}/manifest.json", "w") as file:
        file.write(text)
    with pytest.raises(EyasError, match=r"manifest\.json"):
        Store.open(full)


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([0, HUGE]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    """The paths of everything in a JSON value."""
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in children:
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["manifest.json", "commits/000001.json"])
def test_anything_in_the_place_of_anything(tmp_path, name):
    """Either the file says what it said, or one line says what is wrong with it, in a moment."""
    full = f"{tmp_path}/store"
    make_rows(full)
    write_blocks(full, features())
    whole = storage.read_json(f"{full}/{name}")

    @settings(max_examples=500, deadline=10_000, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(place=st.sampled_from(list(places(whole))), value=ANY, delete=st.booleans())
    def change(place, value, delete):
        changed = json.loads(json.dumps(whole))
        *outer, last = place
        part = changed
        for key in outer:
            part = part[key]
        if delete:
            del part[last]
        else:
            part[last] = value
        with open(f"{full}/{name}", "w") as file:
            json.dump(changed, file)
        assert problem(full) or changed == whole

    change()


def test_of_two_prepares_at_once_one_wins(tmp_path):
    url, found = f"{tmp_path}/store", {}
    gate = threading.Barrier(4)

    def prepare(seed: int) -> None:
        gate.wait()
        try:
            make_rows(url, seed)
            found[seed] = None
        except EyasError as error:
            found[seed] = str(error)

    threads = [threading.Thread(target=prepare, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [seed for seed, error in found.items() if error is None]
    assert all("is a store already" in e or "the beginning of other rows" in e for e in found.values() if e)
    assert problem(url) == ""
    make_rows(f"{tmp_path}/alone", winner)
    assert contents(url) == contents(f"{tmp_path}/alone")


def test_an_interrupted_prepare_is_no_store_and_is_continued(tmp_path, monkeypatch):
    url = f"{tmp_path}/store"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            make_rows(url)
    assert not has_rows(url)
    for use in (Store.open, lambda url: write_blocks(url, features())):
        with pytest.raises(EyasError, match="prepare was stopped; run the same command again"):
            use(url)
    before = contents(url)
    with pytest.raises(EyasError, match=r"the beginning of other rows: .*files"):
        make_rows(url, seed=1)
    assert contents(url) == before
    make_rows(url)
    assert has_rows(url)
    assert problem(url) == ""


def test_of_two_dumps_at_once_one_wins_and_the_same_continue(tmp_path, monkeypatch):
    """All have seen a store without features when they begin to make them."""
    url, values, found = f"{tmp_path}/store", features(), {}
    make_rows(url)
    gate, waited = threading.Barrier(4), threading.local()
    find = store_writer.find_features

    def together(*arguments):
        result = find(*arguments)
        if not hasattr(waited, "once"):
            waited.once = gate.wait()
        return result

    monkeypatch.setattr(store_writer, "find_features", together)

    def dump(number: int) -> None:
        wanted = described(values) | {"compute_dtype": "bfloat16" if number % 2 else "float32"}
        try:
            store_writer.create_features(url, wanted)
            found[number] = wanted["compute_dtype"]
        except EyasError as error:
            found[number] = str(error)

    threads = [threading.Thread(target=dump, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = Store.open(url).features["compute_dtype"]
    for number, result in found.items():
        mine = "bfloat16" if number % 2 else "float32"
        assert result == kept if mine == kept else "was dumped otherwise: compute_dtype" in result


def test_committed_blocks_are_never_written_again(full):
    before = contents(f"{full}/features") | contents(f"{full}/commits")
    others = {name: value[::-1] for name, value in features().items()}
    write_blocks(full, others)
    assert contents(f"{full}/features") | contents(f"{full}/commits") == before
    assert problem(full) == ""


def test_a_block_that_two_dumps_write_differently_is_told(tmp_path, monkeypatch):
    """The other dump commits between our look and our own marker."""
    url = f"{tmp_path}/store"
    make_rows(url)
    write_blocks(url, features(), [0])
    theirs = storage.read_bytes(f"{url}/commits/000000.json")
    os.unlink(f"{url}/commits/000000.json")
    create = kvstore.create_file

    def later(place, data):
        create(place, theirs)
        return create(place, data)

    monkeypatch.setattr(kvstore, "create_file", later)
    write_blocks(url, features(), [0])  # the same numbers: committed, by whomever
    os.unlink(f"{url}/commits/000000.json")
    others = {name: value[::-1] for name, value in features().items()}
    with pytest.raises(EyasError, match="by another dump at the same time, with other numbers"):
        write_blocks(url, others, [0])
    assert storage.read_bytes(f"{url}/commits/000000.json") == theirs


def test_files_are_created_and_replaced_on_condition_only(tmp_path):
    place = f"{tmp_path}/folder/a.json"
    assert not kvstore.replace_file(place, b"old", b"new")
    assert kvstore.create_file(place, b"old")
    assert not kvstore.create_file(place, b"other")
    assert not kvstore.replace_file(place, b"other", b"new")
    assert storage.read_bytes(place) == b"old"
    assert kvstore.replace_file(place, b"old", b"new")
    assert storage.read_bytes(place) == b"new"
    assert os.listdir(f"{tmp_path}/folder") == ["a.json"]


@pytest.mark.parametrize("field", ["data_type", "shape", "chunk_grid", "codecs", "fill_value"])
def test_an_arrays_own_description_must_agree_with_the_manifest(full, field):
    place = f"{full}/features/aux_hidden/zarr.json"
    value = storage.read_json(place)
    chunks = {"name": "regular", "configuration": {"chunk_shape": [R, T, A, H]}}
    plain = [{"name": "bytes", "configuration": {"endian": "big"}}]
    other = {"data_type": "int32", "shape": [R + 1, T, A, H], "chunk_grid": chunks, "codecs": plain}
    value[field] = (other | {"fill_value": 1})[field]
    storage.write_json(place, value)
    with pytest.raises(EyasError, match="aux_hidden cannot be opened as float32"):
        Store.open(full).read(["aux_hidden"], [0])
    assert "aux_hidden" in problem(full)


@pytest.mark.parametrize("name", ["index.parquet", "row_sums.parquet"])
@pytest.mark.parametrize("table", [{"row": [0]}, {"split": [1], "row": ["a"], "length": [1], "tokens": [-1]}])
def test_tables_that_the_manifest_names_but_prepare_never_wrote(full, name, table):
    pyarrow.parquet.write_table(pa.table(table), f"{full}/{name}")
    sums = sha256(storage.read_bytes(f"{full}/{name}"))
    edit(f"{full}/manifest.json", lambda m: m["rows"]["files"].update({name: sums}))
    store = Store.open(full)
    with pytest.raises(EyasError, match=f"{name} is not what prepare writes") as found:
        store.split_rows("train") if name == "index.parquet" else store.read(["tokens"], [0])
    assert "\n" not in str(found.value)
    assert name in problem(full)


def test_the_manifest_can_be_read_by_a_person(full):
    lines = storage.read_bytes(f"{full}/manifest.json").decode().splitlines()
    assert max(map(len, lines)) < 120
    assert read_manifest(full)["rows"]["files"].keys() == {"index.parquet", "row_sums.parquet"}
    edit(f"{full}/manifest.json", lambda m: None)  # written again by our own hand: the same
    assert problem(full) == ""
