"""Inputs of other kinds than JSON lines and CSV: read where the kind is plain, else refused by its name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import math
import os
import pickle
import random
import sqlite3
import sys
import tarfile
import threading
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from stageflow_actors.cli.input_file import Lines, count_lines

Found = list[tuple[str, dict[str, Any]]]
Refused = list[tuple[int, str]]

ROWS = [{"id": number, "v": number / 2} for number in range(3)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(path: Path | str, **options: Any) -> tuple[Found, Refused]:
    refused: Refused = []
    lines = Lines(str(path), key=None, refuse=lambda number, reason: refused.append((number, reason)), **options)
    lines.check()
    return [(line.key, dict(line)) for line in lines], refused


def numbered(name: str, rows: list[dict[str, Any]], first: int = 1) -> Found:
    return [(f"{name}:{number}", row) for number, row in enumerate(rows, first)]


AS_JSON = {
    "compressed.jsonl.gz": gzip.compress(JSONL),
    "compressed without its suffix.jsonl": gzip.compress(JSONL),
    "two members.gz": gzip.compress(JSONL[:20]) + gzip.compress(JSONL[20:]),
    "array.json": json.dumps(ROWS).encode(),
    "array under another name.jsonl": json.dumps(ROWS).encode(),
    "array under the name of a table.csv": json.dumps(ROWS).encode(),
    "pretty array.json": json.dumps(ROWS, indent=2).encode(),
    "pretty array with a mark.json": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode(),
    "array.json.gz": gzip.compress(json.dumps(ROWS, indent="\t").encode()),
    "array of an old Macintosh.json": json.dumps(ROWS, indent=1).replace("\n", "\r").encode(),
    "an element per line.json": b"[" + b",\n".join(JSONL.splitlines()) + b"]\n",
    "blank lines before.json": b"\n\n" + json.dumps(ROWS).encode(),
    "jq.json": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "without line ends.json": "".join(json.dumps(row) for row in ROWS).encode(),
    "a comma behind each line.jsonl": JSONL.replace(b"}\n", b"},\n"),
    "lines of an old Macintosh.jsonl": JSONL.replace(b"\n", b"\r"),
    "windows.jsonl": JSONL.replace(b"\n", b"\r\n"),
    "no end of line.jsonl": JSONL.rstrip(),
    "lines under the name of a table.csv": JSONL,
    "without a suffix": JSONL,
}


@pytest.mark.parametrize("name", AS_JSON)
def test_objects_are_read_however_they_are_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(AS_JSON[name])
    assert read(path) == (numbered(name, ROWS), [])


CELLS = [{"id": "1", "v": "a"}, {"id": "2", "v": "b"}]

AS_ROWS = {
    "semicolon.csv": b"id;v\n1;a\n2;b\n",
    "tab.tsv": b"id\tv\n1\ta\n2\tb\n",
    "TAB.TSV": b"id\tv\r\n1\ta\r\n2\tb\r\n",
    "tab.csv": b"id\tv\n1\ta\n2\tb\n",
    "comma.tsv": b"id,v\n1,a\n2,b\n",
    "bar.csv": b"id|v\n1|a\n2|b\n",
    "old Macintosh.csv": b"id,v\r1,a\r2,b\r",
    "old Macintosh without an end.csv": b"id;v\r1;a\r2;b",
    "quoted.csv": b'"id";"v"\r\n"1";"a"\r\n"2";"b"\r\n',
    "mark.csv": b"\xef\xbb\xbfid;v\n1;a\n2;b\n",
    "compressed.csv.gz": gzip.compress(b"id;v\n1;a\n2;b\n"),
    "compressed.tsv.gz": gzip.compress(b"id\tv\n1\ta\n2\tb\n"),
    "table.txt": b"id,v\n1,a\n2,b\n",
    "table.json": b"id\tv\n1\ta\n2\tb\n",
}


@pytest.mark.parametrize("name", AS_ROWS)
def test_rows_are_read_whatever_separates_their_cells(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(AS_ROWS[name])
    assert read(path) == (numbered(name, CELLS, first=2), [])
    assert count_lines(str(path)) == (None if path.suffix == ".gz" else 2)


def test_a_delimiter_that_the_first_line_announces_is_used(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_bytes(b"sep=;\r\nid;v\r\n1;a\r\n2;b\r\n")
    assert read(path) == (numbered("excel.csv", CELLS, first=3), [])
    assert count_lines(str(path)) == 2


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (b"id;v,w\n1;2,3\n", [{"id;v": "1;2", "w": "3"}]),
        (b"name;price\nab;1,50\ncd;2,75\n", [{"name": "ab", "price": "1,50"}, {"name": "cd", "price": "2,75"}]),
        (b"what, or more;price\na, b, c;1\n", [{"what, or more": "a, b, c", "price": "1"}]),
        (b"id\na;b\nc;d\n", [{"id": "a;b"}, {"id": "c;d"}]),
        (b'id;note\n1;"two\nlines"\n', [{"id": "1", "note": "two\nlines"}]),
        (b"\n\nid,v\n1,2\n", [{"id": "1", "v": "2"}]),
    ],
)  # fmt: skip
def test_a_delimiter_is_one_that_fits_the_rows_and_the_comma_wins(
    tmp_path: Path, text: bytes, rows: list[dict[str, str]]
) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(text)
    found, refused = read(path)
    assert ([row for _, row in found], refused) == (rows, [])


def test_floats_that_json_has_no_word_for_are_read_as_python_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"
    values = [math.nan, math.inf, -math.inf, 1.5]
    path.write_text("".join(json.dumps({"v": [value]}) + "\n" for value in values) + '{"v": NaNN}\n')
    found, refused = read(path)
    assert [repr(row["v"][0]) for _, row in found] == ["nan", "inf", "-inf", "1.5"]
    assert [(number, reason.split(":")[0]) for number, reason in refused] == [(5, "not valid JSON")]
    path.write_text(json.dumps([{"v": value} for value in values]))
    assert [repr(row["v"]) for _, row in read(path)[0]] == ["nan", "inf", "-inf", "1.5"]


@pytest.mark.parametrize(
    "text", [b'{"v": 1, "w": {"v": 1}, "v": 2}\n', b'{"w": [{"a": 1, "b": {}, "a": 1}]}\n'], ids=["outside", "within"]
)
def test_a_name_that_stands_twice_in_an_object_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "orders.jsonl"
    fine = b'{"v": {"v": [{"v": "\\"v\\":"}]}}\n'
    path.write_bytes(fine + text)
    found, refused = read(path)
    assert len(found) == 1
    assert [number for number, _ in refused] == [2]
    assert "more than once" in refused[0][1]


@pytest.mark.parametrize("name", ["large.csv", "large.jsonl", "large.json"])
def test_a_value_may_be_as_large_as_a_context(tmp_path: Path, name: str) -> None:
    large, larger = "x" * 190_000, "x" * 3_000_000
    path = tmp_path / name
    if name == "large.csv":
        path.write_text(f"id,v\n1,{large}\n2,{larger}\n3,y\n")
    else:
        lines = [json.dumps({"id": str(number), "v": v}) for number, v in ((1, large), (2, larger), (3, "y"))]
        path.write_text("\n".join(lines) if name == "large.jsonl" else "[" + ",".join(lines) + "]")
    found, refused = read(path, largest=200_000)
    number = 3 if name == "large.csv" else 2
    assert [number for number, _ in refused] == [number]
    # Behind an element without an end nothing can be read: where the next one begins is not known.
    assert [row["id"] for _, row in found] == (["1"] if name == "large.json" else ["1", "3"])
    assert len(found[0][1]["v"]) == 190_000


def database() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table orders (id)")
    return connection.serialize()


def archive(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        for name in names:
            target.writestr(name, "<a/>")
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as target:
        target.addfile(tarfile.TarInfo("orders.jsonl"))
    return file.getvalue()


REFUSED = {
    "Parquet": b"PAR1\x15\x04\x15\x1a" + bytes(100),
    "ORC": b"ORC\x0a\x03" + bytes(100),
    "Avro": b"Obj\x01\x04\x14avro.codec",
    "Arrow": b"ARROW1\0\0\xff\xff\xff\xff",
    ".xlsx": archive("[Content_Types].xml", "xl/workbook.xml"),
    "zip archive": archive("orders.jsonl"),
    ".xls": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(100),
    "SQLite": database(),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "NumPy": b"\x93NUMPY\x01\0v\0{'descr': '<i8'}",
    "pickle": pickle.dumps(ROWS),
    "pickle ": pickle.dumps({"id": 1}, protocol=2),
    "pickle  ": pickle.dumps(ROWS, protocol=0),
    "text sequence": b'\x1e{"id": 1}\n\x1e{"id": 2}\n',
    "PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "JPEG": b"\xff\xd8\xff\xe0\0\x10JFIF",
    "PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "bzip2": bz2.compress(JSONL),
    "xz": lzma.compress(JSONL),
    "zstd": b"\x28\xb5\x2f\xfd\x24\x1c" + bytes(20),
    "tar archive": tar(),
    "inside a gzip": gzip.compress(gzip.compress(JSONL)),
    "HTML": b"\n<!DOCTYPE html>\n<html><body>Log in</body></html>\n",
    "HTML ": b"<html>\n<table><tr><td>a,b</td></tr></table>\n",
    "XML": b"<?xml version='1.0'?>\n<orders><order id='1'/></orders>\n",
    "XML ": b"<orders><order id='1'/></orders>\n",
    "YAML": b"---\n- id: 1\n  v: 2\n- id: 2\n  v: 3\n",
    "YAML ": b"id: 1\nv: 2\n",
    "TOML": b"[orders]\nid = 1\n",
    "TOML ": b"[[orders]]\nid = 1\n",
    "TOML  ": b'title = "orders"\n[orders]\nid = 1\n',
    "psql": b" id | v \n----+---\n  1 | 2\n(1 row)\n",
    "mysql": b"+----+---+\n| id | v |\n+----+---+\n|  1 | 2 |\n",
    "json.dumps": b"{'id': 1, 'v': None}\n{'id': 2, 'v': None}\n",
    "json.dumps ": b"[{'id': 1}, {'id': 2}]\n",
    "SQL": b"INSERT INTO orders VALUES (1, 2);\n",
    "UTF-16LE": '{"id": 1}\n'.encode("utf-16-le"),
    "UTF-16BE": "id,v\n1,2\n".encode("utf-16-be"),
    "zero bytes": bytes(5000),
    "binary data": bytes(range(1, 256)) * 4,
    "begins with 'Dear reader'": b"Dear reader\nthere is no order today.\n",
    "begins with 'Hello, world'": b"Hello, world\nThis is, text\n",
    "begins with 'Gr\\xfc\\xdfe'": b"Gr\xfc\xdfe\nund Kuesse\n",
    "a number": b"1\n2\n3\n",
    "a string": b'"a"\n"b"\n',
    "null": b"null\n",
    "first is a number": b"[1, 2, 3]\n",
    "first is an array": b"[[1, 2],\n [3, 4]]\n",
    "an array on each line": b"[1, 2]\n[3, 4]\n",
}


MAY_BE_A_TABLE = {"pickle  ", "YAML ", "TOML", "TOML ", "TOML  ", "SQL", "a number", "a string", "null"}
"""Texts that may be a table of one column, which a file named .csv is."""


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        (kind, suffix)
        for kind in REFUSED
        for suffix in ("jsonl", "csv", "gz")
        if suffix != "csv" or not (kind in MAY_BE_A_TABLE or kind.startswith("begins"))
    ],
)
def test_an_input_of_another_kind_is_refused_by_the_name_of_its_kind(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"orders.{suffix}"
    path.write_bytes(gzip.compress(REFUSED[kind]) if suffix == "gz" and "gzip" not in kind else REFUSED[kind])
    with pytest.raises(click.UsageError) as caught:
        read(path)
    said = caught.value.message
    assert said.startswith(f"orders.{suffix} looks like ")
    assert kind.strip().encode().decode("unicode_escape") in said
    assert "stageflow run reads JSON lines, a JSON array, CSV and TSV" in said
    assert "\n" not in said
    assert len(said) < 300


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (b'{\n "id": 1,\n "v": }\n', "line 3, column 7"),
        (b'{\n "id": 1,\n "v": 2\n', "line 4, column 1"),
        (b'[\n {"id" 1}\n]\n', "line 2, column 8"),
        (b'\n[{"id": 1', "line 2, column 10"),
    ],
)
def test_json_that_breaks_before_its_first_object_is_refused_with_the_place(
    tmp_path: Path, text: bytes, place: str
) -> None:
    path = tmp_path / "orders.json"
    path.write_bytes(text)
    with pytest.raises(click.UsageError) as caught:
        read(path)
    assert caught.value.message.startswith("orders.json is not valid JSON: ")
    assert caught.value.message.endswith(f"({place})")


@pytest.mark.parametrize(
    ("text", "number", "place", "reason"),
    [
        (b'[{"id": 0},\n {"id": 1},\n {"id": 2', 3, "line 3, column", "the text ends"),
        (b'[{"id": 0},\n {"id": 1}\n', 3, "line 3, column 1", "the text ends"),
        (b'[{"id": 0},\n {"id": 1},\n', 3, "line 3, column 1", "the text ends"),
        (b'[{"id": 0},\n {"id": 1},\n {"id" 2}, {"id": 3}]', 3, "line 3, column 8", "expecting ':'"),
        (b'[{"id": 0},\n {"id": 1}\n {"id": 2}]', 3, "line 3, column 2", "expecting ','"),
        (b'[{"id": 0},\n {"id": 1}]\n{"id": 2}\n', 3, "line 3, column 1", "the array has ended"),
        (b'[{"id": 0},\n {"id": 1},\n]', 3, "line 3, column 1", "expecting value"),
    ],
)
def test_an_array_is_read_up_to_the_place_where_it_breaks(
    tmp_path: Path, text: bytes, number: int, place: str, reason: str
) -> None:
    path = tmp_path / "orders.json"
    path.write_bytes(text)
    found, refused = read(path)
    assert found == numbered("orders.json", [{"id": 0}, {"id": 1}])
    assert [at for at, _ in refused] == [number]
    assert reason in refused[0][1]
    assert place in refused[0][1]
    assert "nothing from here on was read" in refused[0][1]


def test_a_bad_element_is_refused_with_its_line_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "orders.json"
    path.write_bytes(
        b'[\n{"id": 1},\nnull,\n{"id": "\xff"},\n{"id": 99999999999999999999991},\n'
        b'{"id": 5,\n "id": 6},\n7,\n{"id": 8},\n{"id": ' + b"1" * 5_000 + b"}]"
    )
    found, refused = read(path)
    assert found == [("orders.json:1", {"id": 1}), ("orders.json:7", {"id": 8})]
    assert [(number, reason[reason.rindex("(") :]) for number, reason in refused] == [
        (2, "(line 3)"),
        (3, "(line 4)"),
        (4, "(line 5)"),
        (5, "(line 6)"),
        (6, "(line 8)"),
        (8, "(line 10)"),
    ]


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[: len(data) // 2] + bytes(1000) + data[len(data) // 2 + 1000 :], "damaged"),
        (lambda data: data[:-8] + bytes(8), "damaged"),
        (lambda data: data[:-3], "truncated"),
    ],
    ids=["cut", "overwritten", "wrong checksum", "without its end"],
)
def test_damaged_gzip_is_read_up_to_the_damage_which_is_reported(
    tmp_path: Path, damage: Callable[[bytes], bytes], word: str
) -> None:
    rows = [{"id": number, "v": random.Random(number).randbytes(20).hex()} for number in range(10_000)]
    data = damage(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), 1))
    path = tmp_path / "orders.jsonl.gz"
    path.write_bytes(data)
    found, refused = read(path)
    assert len(found) > 2_000
    assert [row for _, row in found][:2_000] == rows[:2_000]
    # Bytes that were overwritten may decompress to anything before that is noticed.
    assert f"the gzip data are {word}" in refused[-1][1]
    assert refused[-1][1].endswith("nothing from here on was read")
    assert refused[-1][0] > len(found)


def test_gzip_of_which_nothing_can_be_read_is_refused_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "orders.jsonl.gz"
    path.write_bytes(gzip.compress(JSONL)[:10])
    with pytest.raises(click.UsageError, match="cannot be read: the gzip data are truncated"):
        read(path)


def test_a_row_with_a_quote_that_is_not_closed_is_reported_with_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_bytes(b'id,v\n1,a\n2,"b\n3,c\n4,d\n')
    found, refused = read(path)
    assert found == [("orders.csv:2", {"id": "1", "v": "a"})]
    assert [number for number, _ in refused] == [5]
    assert "the row begins at line 3" in refused[0][1]


@pytest.mark.parametrize(
    ("header", "word"),
    [(b",id,v\n", "no name for column 1 of 3"), (b"id,v,\n", "column 3 of 3"), (b"id; ;v\n", "column 2 of 3")],
)
def test_a_header_without_all_names_is_refused(tmp_path: Path, header: bytes, word: str) -> None:
    path = tmp_path / "orders.csv"
    path.write_bytes(header + header.replace(b"id", b"1").replace(b"v", b"2"))
    with pytest.raises(click.UsageError, match=word):
        read(path)


def test_text_of_another_encoding_is_reported_by_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_bytes("id;v\n1;a\n2;Größe\n3;c\n".encode("latin-1"))
    found, refused = read(path)
    assert [row["id"] for _, row in found] == ["1", "3"]
    assert refused == [(3, "not valid CSV: not valid UTF-8: byte 0xf6 at column 5; is it in another encoding?")]


def through_a_pipe(tmp_path: Path, data: list[bytes]) -> tuple[Found, Refused]:
    """Read from a pipe whose writer writes the next piece when the reader may have seen the last one."""
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write() -> None:
        with open(path, "wb", buffering=0) as file:
            for piece in data:
                file.write(piece)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        return read(path)
    finally:
        writer.join()


@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize(
    ("data", "rows", "first"),
    [
        (JSONL, ROWS, 1),
        (json.dumps(ROWS, indent=1).encode(), ROWS, 1),
        (gzip.compress(JSONL), ROWS, 1),
        (JSONL.replace(b"\n", b"\r"), ROWS, 1),
        (b"id\tv\n1\ta\n2\tb\n", CELLS, 2),
        (gzip.compress(b"id;v\r\n1;a\r\n2;b\r\n"), CELLS, 2),
    ],
    ids=["lines", "pretty", "gzip", "old lines", "tab", "compressed rows"],
)
def test_a_pipe_is_recognised_in_whatever_pieces_it_arrives(
    tmp_path: Path, data: bytes, rows: list[dict[str, Any]], first: int, size: int
) -> None:
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    assert through_a_pipe(tmp_path, pieces) == (numbered("pipe", rows, first), [])


@pytest.mark.parametrize("first", [b'{"id": 1}\n', b'[{"id": 1},', b'{\n"id": 1}\n'], ids=["lines", "array", "objects"])
def test_the_first_objects_of_a_pipe_are_read_while_it_is_open(monkeypatch: pytest.MonkeyPatch, first: bytes) -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as pipe:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(pipe))
        os.write(write_end, first)
        lines = Lines("-", key="id", refuse=lambda number, reason: None)
        lines.check()
        found = iter(lines)
        assert next(found).key == "1"
        os.close(write_end)
        assert list(found) == []
        sys.stdin.detach()


def test_a_large_array_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "large.json.gz"
    count, note = 1_500, "x" * 3_000
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.write("[")
        for number in range(count):
            file.write(f'{"," if number else ""}\n{{"id": {number},\n "note": "{note}"}}')
        file.write("]")
    tracemalloc.start()
    try:
        lines = Lines(str(path), key="id", refuse=lambda number, reason: None)
        assert sum(1 for _ in lines) == count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_500_000, "of four and a half million characters"
