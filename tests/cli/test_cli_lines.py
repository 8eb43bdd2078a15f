"""Input files, line by line."""

from pathlib import Path
from typing import Any

import pytest

from stageflow_actors.cli.lines import Lines, count_lines

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


def test_a_broken_line_is_told_by_its_number_and_the_others_are_read(tmp_path: Path) -> None:
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
