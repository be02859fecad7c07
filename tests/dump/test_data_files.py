"""Data sets are read however they are laid out: files, folders, patterns, URLs, packed or not."""

import bz2
import gzip
import json
import lzma
import socket

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import EyasError, MachineError, RestartError
from dump import data_files
from dump.clean import Cleaner
from dump.conversations import DataFile
from dump.data_files import find_files, opened, require_apart


def talk(number):
    turns = [
        {"role": "user", "content": f"Q{number}?"},
        {"role": "assistant", "content": f"A{number}. \u00e9"},
    ]
    return {"id": f"c{number}", "messages": turns}


TALKS = [talk(i) for i in range(300)]
LINES = "\n".join(json.dumps(t, ensure_ascii=False) for t in TALKS).encode()


def read(*paths):
    return [record for file in find_files(tuple(map(str, paths))) for record in DataFile.open(file).records()]


def write_shards(folder, count=3):
    folder.mkdir(parents=True)
    for i in range(count):
        shard = pa.Table.from_pylist(TALKS[i::count])
        pq.write_table(shard, folder / f"train-{i:05d}-of-{count:05d}.parquet")
    return sorted(TALKS, key=lambda t: int(t["id"][1:]) % count)


def test_a_folder_of_shards_is_read_in_order(tmp_path):
    expected = write_shards(tmp_path / "set" / "data")
    (tmp_path / "set" / "README.md").write_text("# A data set")
    (tmp_path / "set" / "dataset_infos.json").write_text("{}")
    (tmp_path / "set" / ".cache").mkdir()
    (tmp_path / "set" / ".cache" / "old.jsonl").write_bytes(LINES)
    assert read(tmp_path / "set") == read(tmp_path / "set" / "data") == expected


def test_a_pattern_chooses_files(tmp_path):
    write_shards(tmp_path / "data")
    assert read(tmp_path / "data" / "train-0000[01]-*.parquet") == TALKS[0::3] + TALKS[1::3]
    assert len(read(tmp_path / "**" / "*.parquet")) == 300


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    (tmp_path / "chats[1].jsonl").write_bytes(LINES)
    assert read(tmp_path / "chats[1].jsonl") == TALKS


@pytest.mark.parametrize("place", ["", "/*.parquet", "/**/train-*"])
def test_folders_and_patterns_of_urls(tmp_path, place):
    expected = write_shards(tmp_path / "data")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "data"), "/a-set/data", recursive=True)
    try:
        assert read("memory://a-set/data" + place) == expected
        assert find_files(("memory://a-set/data" + place,))[0].startswith("memory://")
    finally:
        memory.rm("/a-set", recursive=True)


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("ending", "pack"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)],
)
@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_packed_files_are_unpacked(tmp_path, ending, pack, kind):
    text = LINES if kind == ".jsonl" else json.dumps(TALKS, indent=1).encode()
    path = tmp_path / f"chats{kind}{ending}"
    path.write_bytes(pack(text[:9000]) + pack(text[9000:]))  # parallel packers write several parts
    assert read(path) == TALKS
    moved = []
    source = DataFile.open(str(path))
    assert len(list(source.records(moved.append))) == 300
    assert sum(moved) == source.bytes == path.stat().st_size


@pytest.mark.parametrize("form", ["file", "stream"])
def test_arrow_files_are_read(tmp_path, form):
    table = pa.Table.from_pylist(TALKS)
    new = {"file": pa.ipc.new_file, "stream": pa.ipc.new_stream}[form]
    with new(str(tmp_path / "data-00000.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    (tmp_path / "state.json").write_text("{}")
    assert read(tmp_path) == TALKS


@pytest.mark.parametrize("place", ["", "memory://"])
@pytest.mark.parametrize(
    ("path", "file", "found"),
    [
        ("data", "data/answers.jsonl", True),
        ("data", "data/inner/a.json", True),
        ("data", "data/.hidden/a.json", False),
        ("data", "data/a.settings.json", False),
        ("data", "data2/a.jsonl", False),
        ("data/chats.jsonl", "data/chats.jsonl", True),
        ("data/chats.jsonl", "data/answers.jsonl", False),
        ("data/*.json", "data/a.settings.json", True),
        ("data/*.json", "data/inner/a.json", False),
        ("**/*.json", "data/inner/a.json", True),
        ("data/[ab].json", "data/a.json", True),
    ],
)
def test_what_would_be_data_itself_is_not_written(tmp_path, place, path, file, found):
    """Else the same command would read other data when it goes on."""
    with fsspec.open(f"{place}{tmp_path}/data/chats.jsonl", "wb", auto_mkdir=True) as chats:
        chats.write(LINES)
    asked = [f"{place}{tmp_path}/{path}"], [f"{place}{tmp_path}/{file}"]
    require_apart(["https://host/a.jsonl", "hf://datasets/a/b", "gs://bucket/a"], asked[1])
    if not found:
        return require_apart(*asked)
    with pytest.raises(EyasError, match=r"would be data of .* itself; name another place"):
        require_apart(*asked)


def test_what_would_be_data_by_another_way_is_not_written(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "chats.jsonl").write_bytes(LINES)
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    for path, file in (("link", "data/a.json"), ("data", "link/a.json"), ("data/*", f"{tmp_path}/link/a")):
        with pytest.raises(EyasError, match="would be data of"):
            require_apart([path], [file])


def test_the_hub_is_a_folder_of_files(monkeypatch):
    """The Hub's file system, with the answers of its server put in."""
    from huggingface_hub import HfFileSystem

    listed = ["datasets/a/b/README.md", "datasets/a/b/data/x.jsonl"]
    monkeypatch.setattr(HfFileSystem, "isdir", lambda self, path: path == "datasets/a/b")
    monkeypatch.setattr(HfFileSystem, "find", lambda self, path: listed)
    assert find_files(("hf://datasets/a/b",)) == ["hf://datasets/a/b/data/x.jsonl"]


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    from huggingface_hub import HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError

    def unreachable(self, path):
        raise HfHubHTTPError.__bases__[0]("name not known")  # of the HTTP library that the Hub's client uses

    monkeypatch.setattr(HfFileSystem, "isdir", unreachable)
    with pytest.raises(
        MachineError, match=r"hf://datasets/a/b: no answer from the server \(name not known\)"
    ):
        find_files(("hf://datasets/a/b",))


def test_a_web_address_with_a_query_is_a_file():
    address = "https://example.org/chats.jsonl.gz?download=1"
    assert find_files((address,)) == [address]
    assert data_files.kind_of(address) == ".jsonl"
    assert data_files.name_of(address) == "chats.jsonl.gz"


@pytest.mark.parametrize(
    ("make", "path", "message"),
    [
        (lambda here: None, "nothing*.jsonl", "no file fits the pattern"),
        (lambda here: (here / "set").mkdir(), "set", "is a folder without data files"),
        (
            lambda here: [write_shards(here / "set"), (here / "set" / "a.jsonl").write_bytes(LINES)],
            "set",
            r"several kinds \(\.jsonl, \.parquet\); name those to read by a quoted pattern",
        ),
    ],
)
def test_what_names_no_data_is_one_line(tmp_path, make, path, message):
    make(tmp_path)
    with pytest.raises(EyasError, match=message) as error:
        find_files((str(tmp_path / path),))
    assert "\n" not in str(error.value)


PRETTY = json.dumps(TALKS[0], indent=2)


@pytest.mark.parametrize("name", ["chats.json", "chats.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(TALKS),
        json.dumps(TALKS, indent=1),
        "[\n" + ",\n".join(map(json.dumps, TALKS)) + "\n]\n",
        "\n".join(map(json.dumps, TALKS)),
        "\r\n\r\n".join(map(json.dumps, TALKS)),
        "\n".join(json.dumps(t, indent=2) for t in TALKS),
        "".join(map(json.dumps, TALKS)),
        "\ufeff" + json.dumps(TALKS),
        json.dumps({"version": 1, "data": TALKS}),
        json.dumps({"version": {"of": "it"}, "tags": ["a", "b"], "data": TALKS}, indent=1),
        json.dumps({"train": TALKS}),
        json.dumps({"conversations": TALKS}),
        json.dumps([TALKS[:100], TALKS[100:]]),
    ],
    ids=[
        "list", "pretty list", "list of lines", "lines", "lines with gaps", "pretty objects",
        "run together", "byte order mark", "wrapped", "wrapped and pretty", "wrapped split",
        "wrapped as turns", "lists of records",
    ],
)  # fmt: skip
def test_json_is_read_however_it_is_written(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read(tmp_path / name) == TALKS


def test_one_object_is_one_record(tmp_path):
    (tmp_path / "one.json").write_text(PRETTY)
    assert read(tmp_path / "one.json") == TALKS[:1]


def test_a_list_of_lists_of_turns(tmp_path):
    turns = [t["messages"] for t in TALKS]
    (tmp_path / "a.json").write_text(json.dumps(turns))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, turns)))
    assert read(tmp_path / "a.json") == read(tmp_path / "a.jsonl") == turns


def test_tables_put_together_from_two_sources(tmp_path):
    """Each row has its turns in one of two columns, and null in the other."""
    rows = [
        {"id": "a", "conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]},
        {"id": "b", "messages": TALKS[0]["messages"]},
        {"id": "c", "conversations": [], "messages": TALKS[1]["messages"]},
    ]
    names = ("id", "conversations", "messages")
    columns = pa.Table.from_pylist([rows[0] | {"messages": rows[1]["messages"]}]).select(names).schema
    pq.write_table(pa.Table.from_pylist(rows, columns), tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"messages": None} | row) for row in rows))
    for name in ("t.parquet", "t.jsonl"):
        cleaner = Cleaner()
        found = [cleaner.clean(record, i, name) for i, record in enumerate(read(tmp_path / name))]
        assert [c.messages[0]["content"] for c in found] == ["Q?", "Q0?", "Q1?"]


def test_a_web_server_that_does_not_answer_is_no_missing_file():
    with socket.socket() as closed:  # bound, and not listened at
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(RestartError, match="no answer from the server"):
            opened(f"http://127.0.0.1:{closed.getsockname()[1]}/a.jsonl").__enter__()


def test_an_address_that_cannot_be_is_a_mistake():
    with pytest.raises(EyasError, match="check the address") as found:
        find_files(("hf://datasets/nobody",))
    assert found.value.exit_code == 2
