"""Input files, line by line."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import pydantic
import pytest

from stageflow_actors.cli.csv_values import row_reader
from stageflow_actors.cli.input_file import Lines, count_lines
from stageflow_actors.core.codec import ContextCodec

Refused = list[tuple[int, str]]


def read(path: Path, key: str | None = None, **options: Any) -> tuple[list[tuple[str, int, dict[str, Any]]], Refused]:
    refused: Refused = []
    lines = Lines(str(path), key=key, refuse=lambda number, reason: refused.append((number, reason)), **options)
    return [(line.key, line.number, dict(line)) for line in lines], refused


def test_lines_are_known_by_file_and_number_or_by_their_key(tmp_path: Path) -> None:
    path = tmp_path / "orders.jsonl"
    path.write_text('{"id": "a"}\n\n{"id": 7}\n')
    assert read(path) == ([("orders.jsonl:1", 1, {"id": "a"}), ("orders.jsonl:3", 3, {"id": 7})], [])
    assert read(path, "id")[0] == [("a", 1, {"id": "a"}), ("7", 3, {"id": 7})]


def test_a_broken_line_is_reported_by_its_number_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "orders.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"id": "a"}\n{"id": \n[1]\n{"id": "\xff"}\nnull\n{"x": 1}\n{"id": ""}\n{"id": []}\n{"id": "b"}'
    )
    found, refused = read(path, "id")
    assert [key for key, _, _ in found] == ["a", "b"]
    assert [number for number, _ in refused] == [2, 3, 4, 5, 6, 7, 8]
    reasons = [reason for _, reason in refused]
    assert reasons[0].startswith("not valid JSON: ")
    assert "column 7" in reasons[0]
    assert reasons[1:4:2] == ["must be a JSON object, not an array", "must be a JSON object, not null"]
    assert all("'id'" in reason for reason in reasons[4:])


def test_csv_rows_are_contexts_of_strings(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_bytes(b'\xef\xbb\xbfid,note\r\na,"two\r\nlines"\r\nb\r\nc,x,y\r\n\xff,q\r\nd,last\r\n')
    found, refused = read(path, "id")
    assert found == [("a", 3, {"id": "a", "note": "two\r\nlines"}), ("d", 7, {"id": "d", "note": "last"})]
    assert [number for number, _ in refused] == [4, 5, 6]
    assert [reason.split(":")[0] for _, reason in refused] == [
        "has fewer fields than the 2 of the header",
        "has more fields than the 2 of the header",
        "not valid CSV",
    ]


def test_csv_rows_are_converted_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "orders.CSV"
    path.write_text("n\n1\nx\n3\n")

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"n": int(row["n"])}

    found, refused = read(path, convert=convert)
    assert [context for _, _, context in found] == [{"n": 1}, {"n": 3}]
    assert [number for number, _ in refused] == [3]


@pytest.mark.parametrize(("text", "count"), [("", 0), ("a", 1), ("a\n", 1), ("a\n\nb", 3)])
def test_lines_are_counted_without_being_read(tmp_path: Path, text: str, count: int) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    assert count_lines(str(path)) == count
    assert count_lines("-") is None


def test_the_header_of_csv_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("n\n1\n2\n")
    assert count_lines(str(path)) == 2


def test_what_can_be_read_only_once_is_not_counted(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, b"{}\n{}\n")
        assert count_lines(f"/dev/fd/{read_end}") is None
        assert os.read(read_end, 100) == b"{}\n{}\n"
    finally:
        os.close(read_end)
        os.close(write_end)


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (b'{"id": 99999999999999999999991}', "id is 99999999999999999999991"),
        (b'{"id": 18446744073709551616}', "id is 18446744073709551616"),
        (b'{"id": "a", "of": [1, {"n": -9223372036854775809}]}', "of[1].n is -9223372036854775809"),
        (b'{"id": ' + b"9" * 100 + b"}", "id is " + "9" * 40 + "…"),
    ],
)
def test_whole_numbers_of_more_than_64_bits_are_refused_by_line_and_field(
    tmp_path: Path, line: bytes, field: str
) -> None:
    path = tmp_path / "orders.jsonl"
    path.write_bytes(b'{"id": 1}\n' + line + b"\n")
    found, refused = read(path, "id")
    assert [key for key, _, _ in found] == ["1"]
    assert refused == [(2, f"{field}, which does not fit in 64 bits: write it as a string")]


def test_whole_numbers_of_64_bits_and_long_digits_that_are_none_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "orders.jsonl"
    path.write_text(
        '{"id": 18446744073709551615}\n{"id": -9223372036854775808}\n'
        '{"id": "99999999999999999999991", "part": 0.12345678901234567890123}\n'
    )
    found, refused = read(path, "id")
    assert refused == []
    assert [key for key, _, _ in found] == ["18446744073709551615", "-9223372036854775808", "99999999999999999999991"]
    assert found[2][2]["part"] == 0.12345678901234568


def test_a_float_is_no_id(tmp_path: Path) -> None:
    path = tmp_path / "orders.jsonl"
    path.write_text('{"id": 1.10}\n{"id": 1e23}\n{"id": 1}\n')
    found, refused = read(path, "id")
    assert [key for key, _, _ in found] == ["1"]
    assert [number for number, _ in refused] == [1, 2]
    assert all("has the float" in reason for _, reason in refused)


@dataclass
class Row:
    id: str
    amount: int | None
    note: str | None = "none"
    name: str = ""


class StructRow(msgspec.Struct, rename="camel"):
    id: str
    amount: int | None
    note: str | None = "none"
    name: str = ""


class ModelRow(pydantic.BaseModel):
    id: str
    amount: int | None
    note: str | None = "none"
    name: str = ""


@pytest.mark.parametrize("kind", [Row, StructRow, ModelRow])
def test_an_empty_cell_is_none_where_the_field_allows_that(tmp_path: Path, kind: type[Any]) -> None:
    path = tmp_path / "orders.csv"
    path.write_text("id,amount,note,name\na,,,\nb,5,x,y\n")
    found, refused = read(path, "id", convert=row_reader(ContextCodec(kind)))
    assert refused == []
    assert [context for _, _, context in found] == [
        {"id": "a", "amount": None, "note": None, "name": ""},
        {"id": "b", "amount": 5, "note": "x", "name": "y"},
    ]


def test_a_row_of_a_dict_stays_as_it_is() -> None:
    assert row_reader(ContextCodec(dict)) is None


@pytest.mark.parametrize(
    ("header", "word"), [(b"id,n,id\n", "names the column 'id' more than once"), (b"id,\xfc\n", "not valid CSV")]
)
def test_a_csv_without_a_clear_header_is_refused_as_a_whole(tmp_path: Path, header: bytes, word: str) -> None:
    path = tmp_path / "orders.csv"
    path.write_bytes(header + b"1,2,3\n")
    with pytest.raises(click.UsageError, match=word):
        Lines(str(path), key=None, refuse=lambda number, reason: None).check()
    with pytest.raises(click.UsageError, match=word):
        read(path)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["orders.jsonl", "orders.csv"])
def test_a_file_of_another_encoding_is_refused_as_a_whole(tmp_path: Path, name: str, encoding: str) -> None:
    path = tmp_path / name
    path.write_bytes('\ufeff{"id": 1}\n{"id": 2}\n'.encode(encoding))
    expected = f"{name} is {encoding[:6].upper()}: convert it to UTF-8"
    with pytest.raises(click.UsageError, match=expected):
        Lines(str(path), key=None, refuse=lambda number, reason: None).check()
    with pytest.raises(click.UsageError, match=expected):
        read(path)
