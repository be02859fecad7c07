"""Whatever is changed in a manifest or a table is told in one line, before anything is allocated."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import storage
from common.checked import sha256
from common.errors import EyasError
from common.manifest import SCHEMA, read_manifest
from common.store import Store
from tests.common.made_store import (
    A,
    H,
    R,
    T,
    V,
    edit,
    features,
    make_rows,
    problem,
    require_named,
    write_blocks,
)

HUGE = 10**15


def test_cut_and_edited_manifests(full):
    place = f"{full}/manifest.json"
    text = storage.read_bytes(place)
    edit(place, lambda m: m["features"]["target"].update(name="other"))
    with pytest.raises(EyasError, match="written under another manifest"):
        Store.open(full).require_complete()
    storage.write_bytes(place, text)
    edit(place, lambda m: m["rows"]["arrays"]["tokens"].update(dtype="int64"))
    with pytest.raises(EyasError, match=r"tokens is .*int64.*ask for .*int32"):
        Store.open(full)
    storage.write_bytes(place, text[:200])
    with pytest.raises(EyasError, match="is not JSON"):
        Store.open(full)
    for broken in ("[]", f'{{"schema": {SCHEMA}}}', f'{{"schema": {SCHEMA}, "rows": {{"rows": 0}}}}'):
        storage.write_bytes(place, broken.encode())
        with pytest.raises(EyasError):
            Store.open(full)


def test_newer_schema_is_refused(full):
    edit(f"{full}/manifest.json", lambda m: m.update(schema=SCHEMA + 1))
    with pytest.raises(EyasError, match=f"schema {SCHEMA + 1}, newer than {SCHEMA}.*update Eyas"):
        Store.open(full)


def test_older_schema_is_refused(full):
    edit(f"{full}/manifest.json", lambda m: m.update(schema=SCHEMA - 1))
    with pytest.raises(EyasError, match=f"schema {SCHEMA - 1}, older than {SCHEMA}.*prepare and dump"):
        Store.open(full)


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
    "precision that is not the arrays'": set_in("features", "precision", "bfloat16"),
    "a last state of no whole blocks": set_in("features", "arrays", "last_hidden", "shape", [R - 2, T, H]),
    "a last state of more rows": set_in("features", "arrays", "last_hidden", "shape", [2 * R, T, H]),
    "scales without need": set_in("features", "channels", {"aux_hidden": ["AAAA"]}),
    "target": set_in("features", "target", []),
    "features": set_in("features", 5),
    "index": set_in("rows", "files", "index.parquet", "a"),
    "sums": set_in("rows", "files", {}),
    "all larger": larger,
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.timeout(20)
def test_sizes_that_disagree_or_are_astronomical(full, name):
    edit(f"{full}/manifest.json", SIZES[name])
    require_named(
        "manifest.json", lambda: Store.open(full).require_complete(), lambda: Store.open(full).missing()
    )
    assert "manifest.json" in problem(full)


SCALES = {
    "none": None,
    "of no state": {"aux_hidden": ["AAAAAAAAAAA="], "other": []},
    "of one state": {"aux_hidden": ["A" * 32]},
    "of another size": {"aux_hidden": ["A" * 32], "last_hidden": ["AAAAAAAAAAAA"]},
    "no base64": {"aux_hidden": ["A" * 32], "last_hidden": ["AAAAAAAAAA!="]},
    "cut off": {"aux_hidden": ["A" * 32], "last_hidden": ["AAAAAAAAAAA"]},
    "no text": {"aux_hidden": ["A" * 32], "last_hidden": "AAAAAAAAAAA="},
    "a larger one": {"aux_hidden": ["A" * 31 + "B"], "last_hidden": ["AAAAAAAAAAA="]},
    "so small that states are infinite": {"aux_hidden": ["gICA" * 8], "last_hidden": ["AAAAAAAAAAA="]},
    "one of another": {"aux_hidden": ["A" * 30 + "D/"], "last_hidden": ["AAAAAAAAAAA="]},
}


@pytest.fixture
def quantised(tmp_path):
    """A store of int8 states, of which a block is committed."""
    values = features()
    states = {name: values[name].astype(np.int8) for name in ("aux_hidden", "last_hidden")}
    scales = {
        name.replace("hidden", "scale"): np.ones(x.shape[:-1], np.float32) for name, x in states.items()
    }
    channels = {"aux_hidden": ["A" * 32], "last_hidden": ["AAAAAAAAAAA="]}
    url = str(tmp_path / "quantised")
    make_rows(url)
    write_blocks(url, values | states | scales, channels=channels)
    assert problem(url) == ""
    return url


@pytest.mark.parametrize("name", SCALES)
def test_scales_of_channels_that_are_not_those_of_the_dump(quantised, name):
    place = f"{quantised}/manifest.json"
    if SCALES[name] is None:
        edit(place, lambda m: m["features"].pop("channels"))
    else:
        edit(place, lambda m: m["features"].update(channels=SCALES[name]))
    require_named(quantised, lambda: Store.open(quantised).require_complete())
    assert problem(quantised)


@pytest.mark.parametrize(
    "text", ["[]", "5", "null", "", "[" * 100_000, '{"schema": true}', '{"schema": "1"}']
)
def test_a_manifest_that_is_anything_else(full, text):
    with open(f"{full}/manifest.json", "w") as file:
        file.write(text)
    with pytest.raises(EyasError, match=r"manifest\.json"):
        Store.open(full)


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
