"""Records of JSON, JSONL and Parquet files, whole or damaged; one line for what cannot be read."""

import gzip
import json
import lzma
import tracemalloc

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import EyasError
from dump import json_records
from dump.conversations import DataFile

RECORDS = [
    {
        "id": f"c{i}",
        "conversations": [
            {"from": "human", "value": f'é🌉 [{i}] \\ " {{'},
            {"from": "gpt", "value": "x" * i},
        ],
    }
    for i in range(40)
]


def read(path):
    source = DataFile.open(str(path))
    return list(source.records()), source


@pytest.fixture
def tiny_pieces(monkeypatch):
    """Every record, character and escape meets the border of a piece somewhere."""
    monkeypatch.setattr(json_records, "_PIECE", 7)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_a_json_array_is_read_in_pieces(tmp_path, tiny_pieces, indent, ascii_only):
    path = tmp_path / "chats.json"
    path.write_text(json.dumps(RECORDS, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    assert read(path)[0] == RECORDS


def test_every_cut_of_a_json_array_gives_the_whole_records_before_it(tmp_path, tiny_pieces, capfd):
    whole = json.dumps(RECORDS[:3], ensure_ascii=False).encode()
    ends = [whole.index(json.dumps(r, ensure_ascii=False).encode()) for r in RECORDS[:3]]
    ends = [
        start + len(json.dumps(r, ensure_ascii=False).encode())
        for start, r in zip(ends, RECORDS, strict=False)
    ]
    path = tmp_path / "chats.json"
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        records, source = read(path)
        assert len(records) == sum(end <= cut for end in ends), cut
        assert source.cut_off
        warning = capfd.readouterr().err
        assert f"cut off at byte {cut}," in warning
        assert "é" not in warning


def test_the_warning_of_a_cut_names_the_byte_where_the_lost_record_begins(tmp_path, capfd):
    text = json.dumps(RECORDS, ensure_ascii=False).encode()
    lost = text.index(b'{"id": "c30"')
    (tmp_path / "chats.json").write_bytes(text[: lost + 50])
    records, _ = read(tmp_path / "chats.json")
    assert records == RECORDS[:30]
    assert f"begins at byte {lost};" in capfd.readouterr().err


def test_memory_does_not_grow_with_a_json_file(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "_PIECE", 1 << 16)
    record = json.dumps({"id": "a", "conversations": [{"from": "gpt", "value": "x" * 1000}]})
    (tmp_path / "big.json").write_text("[" + ",\n".join([record] * 8000) + "]")
    source = DataFile.open(str(tmp_path / "big.json"))
    tracemalloc.start()
    count = sum(1 for _ in source.records())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8000
    assert peak < 3 << 20  # of 8 MB; 1 MiB at the beginning is looked at as a whole


def test_a_fault_inside_a_json_array_is_refused_with_its_place(tmp_path):
    text = json.dumps(RECORDS)
    broken = text.replace('"id": "c7"', '"id" "c7"')
    (tmp_path / "chats.json").write_text(broken)
    with pytest.raises(EyasError, match="record 8, which begins at byte") as error:
        read(tmp_path / "chats.json")
    assert str(broken.index('{"id" "c7"')) in str(error.value)


def test_a_number_of_too_many_digits_is_a_fault_and_no_crash(tmp_path):
    (tmp_path / "chats.json").write_text(json.dumps(RECORDS)[:-1] + ', {"id": ' + "9" * 5000 + "}]")
    with pytest.raises(EyasError, match=r"record 41, .* is not JSON \(a number is too long\)"):
        read(tmp_path / "chats.json")


def test_json_lines_named_json_are_read(tmp_path):
    (tmp_path / "chats.json").write_text("\n".join(map(json.dumps, RECORDS)))
    assert read(tmp_path / "chats.json")[0] == RECORDS


def lines(bad, total=400):
    good = [json.dumps(RECORDS[i % 40]) for i in range(total)]
    return "\n".join('{"id": "cut' if i in bad else line for i, line in enumerate(good))


def test_fewer_than_one_percent_of_bad_lines_are_skipped_and_counted(tmp_path):
    (tmp_path / "chats.jsonl").write_text(lines({5, 100, 399}))
    records, source = read(tmp_path / "chats.jsonl")
    source.require_json()
    assert (len(records), source.lines, source.bad_lines) == (397, 400, 3)


def test_one_percent_of_bad_lines_is_refused_and_the_first_is_named(tmp_path):
    (tmp_path / "chats.jsonl").write_text("\n" + lines({5, 100, 200, 399}))
    _, source = read(tmp_path / "chats.jsonl")
    with pytest.raises(EyasError, match="4 of 400 lines are not JSON, the first is line 7;"):
        source.require_json()


def test_bytes_that_are_no_text_are_a_bad_line(tmp_path):
    (tmp_path / "chats.jsonl").write_bytes(lines(set()).encode() + b'\n{"id": "\xff\xfe"}\n')
    records, source = read(tmp_path / "chats.jsonl")
    assert (len(records), source.bad_lines, source.first_bad_line) == (400, 1, 401)


@pytest.mark.parametrize("keys", [("conversations", "from", "value"), ("messages", "role", "content")])
def test_parquet_gives_the_same_records(tmp_path, keys):
    column, role, text = keys
    records = [
        {"id": r["id"], column: [{role: t["from"], text: t["value"]} for t in r["conversations"]]}
        for r in RECORDS
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "chats.parquet", row_group_size=7)
    assert [{"id": r["id"], column: r[column]} for r in read(tmp_path / "chats.parquet")[0]] == records


def test_a_url_is_read_through_fsspec():
    with fsspec.open("memory://bucket/chats.jsonl", "w") as file:
        file.write(lines(set()))
    records, source = read("memory://bucket/chats.jsonl")
    assert len(records) == 400
    assert source.name == "chats.jsonl"


def _parquet_without_turns(path):
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), path)


def _cut_parquet(path):
    pq.write_table(pa.Table.from_pylist(RECORDS), path)
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("missing.jsonl", lambda path: None, "does not exist"),
        ("empty.json", lambda path: path.touch(), "is empty"),
        ("chats.csv", lambda path: path.touch(), r"unknown kind; expected one of \.json, "),
        ("folder.json", lambda path: path.mkdir(), "is a folder"),
        ("text.json", lambda path: path.write_text("hello"), r"expected UTF-8 that begins with \["),
        ("deep.json", lambda path: path.write_text("[" * 100_000), "nested too deeply"),
        ("no.parquet", lambda path: path.write_text("hello"), "no whole Parquet file"),
        ("cut.parquet", _cut_parquet, "no whole Parquet file"),
        ("other.parquet", _parquet_without_turns, "has the columns text, label; expected"),
        ("no.arrow", lambda path: path.write_text("hello"), "no whole Arrow file"),
        ("no.json.gz", lambda path: path.write_text("hello"), "cannot be unpacked .Not a gzipped file"),
        (
            "cut.jsonl.gz",
            lambda path: path.write_bytes(gzip.compress(lines(set()).encode())[:-40]),
            "unpacked",
        ),
        (
            "cut.jsonl.xz",
            lambda path: path.write_bytes(lzma.compress(lines(set()).encode())[:-40]),
            "unpacked",
        ),
        ("no.jsonl.zst", lambda path: path.write_text("hello"), "cannot be unpacked"),
        ("table.parquet.gz", lambda path: path.write_text("hello"), "of an unknown kind"),
    ],
)
def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(EyasError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_an_unknown_protocol_is_refused_in_one_line():
    with pytest.raises(EyasError, match=r"nowhere://x/chats\.jsonl cannot be read"):
        read("nowhere://x/chats.jsonl")


@pytest.mark.slow
def test_the_embedded_file_gives_every_whole_record(tmp_path, capfd):
    from pipelines.embedded import fetch_conversations

    records, source = read(fetch_conversations(str(tmp_path)))
    assert len(records) == 17_671
    assert source.cut_off
    assert (
        "cut off at byte 125509632, inside the record that begins at byte 125506645;"
        in capfd.readouterr().err
    )
