"""The input of `stageflow run`, line by line: JSON objects or CSV rows, each with its number and the instance's id.

A line that cannot be read is told of and passed over. The file is never in memory as a whole.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import click

__all__ = ["InputLine", "Lines", "count_lines"]

Convert = Callable[[dict[str, Any]], dict[str, Any]]
"""From a row of strings to a context with what its fields need. May raise what is wrong with it."""

BOM = b"\xef\xbb\xbf"


class InputLine(dict[str, Any]):
    """A context as it was read, which knows its line number and the id of its instance."""

    def __init__(self, context: dict[str, Any], number: int, key: str) -> None:
        super().__init__(context)
        self.number = number
        self.key = key


class Lines:
    """Iterates over the input. `refuse(line number, reason)` is told of each line that is passed over.

    `key` names the field that holds the instance's id; without it a line is known by file name and line number.
    """

    def __init__(
        self,
        path: str,
        *,
        key: str | None,
        refuse: Callable[[int, str], None],
        convert: Convert | None = None,
    ) -> None:
        self._path = path
        self._key = key
        self._refuse = refuse
        self._convert = convert
        self.name = "stdin" if path == "-" else Path(path).name

    @property
    def is_csv(self) -> bool:
        """Whether the input is CSV, by the ending of its name."""
        return self._path.lower().endswith(".csv")

    def __iter__(self) -> Iterator[InputLine]:
        with _opened(self._path) as file:
            parse = self._csv if self.is_csv else self._json
            yield from parse(file)

    def _json(self, file: BinaryIO) -> Iterator[InputLine]:
        import orjson

        for number, text in enumerate(file, 1):
            if number == 1:
                text = text.removeprefix(BOM)
            if not text.strip():
                continue
            try:
                context = orjson.loads(text.strip())
            except orjson.JSONDecodeError as error:
                self._pass_over(number, f"not valid JSON: {_json_reason(error)}")
                continue
            if not isinstance(context, dict):
                self._pass_over(number, f"must be a JSON object, not {_json_kind(context)}")
                continue
            yield from self._line(context, number)

    def _csv(self, file: BinaryIO) -> Iterator[InputLine]:
        number = 0

        def text(line: bytes) -> str:
            nonlocal number
            number += 1
            return line.decode("utf-8-sig")

        # A map goes on behind a line that is no UTF-8, as a generator would not.
        rows = csv.DictReader(map(text, file), strict=True)
        while True:
            try:
                row = next(rows, None)
            except (csv.Error, UnicodeDecodeError) as error:
                self._pass_over(number, f"not valid CSV: {error}")
                continue
            if row is None:
                return
            if None in row:
                self._pass_over(number, f"has more fields than the {len(rows.fieldnames or ())} of the header")
            elif None in row.values():
                self._pass_over(number, f"has fewer fields than the {len(rows.fieldnames or ())} of the header")
            else:
                try:
                    context = self._convert(row) if self._convert is not None else row
                except Exception as error:  # noqa: BLE001 - `validate()` may raise whatever it likes
                    self._pass_over(number, str(error))
                    continue
                yield from self._line(context, number)

    def _line(self, context: dict[str, Any], number: int) -> Iterator[InputLine]:
        if self._key is None:
            key = f"{self.name}:{number}"
        else:
            value = context.get(self._key)
            if value is None or value == "" or isinstance(value, (dict, list)):
                what = "has no" if value is None else "has an empty" if value == "" else "has no plain"
                self._pass_over(number, f"{what} {self._key!r}, which --key says is the instance's id")
                return
            key = str(value)
        yield InputLine(context, number, key)

    def _pass_over(self, number: int, reason: str) -> None:
        self._refuse(number, reason)


def count_lines(path: str) -> int | None:
    """Lines in a file, empty ones included, without the header of CSV; None for stdin."""
    if path == "-":
        return None
    with open(path, "rb") as file:
        total, last = 0, b"\n"
        while chunk := file.read(1 << 20):
            total += chunk.count(b"\n")
            last = chunk[-1:]
    total += last != b"\n"
    return max(0, total - 1) if path.lower().endswith(".csv") else total


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    if path == "-":
        yield sys.stdin.buffer
        return
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; the error is about this file alone
    except OSError as error:
        raise click.UsageError(f"{path} cannot be read: {error.strerror}") from None
    with file:
        yield file


def _json_reason(error: ValueError) -> str:
    text = str(error)
    return text.replace(": line 1 column", " at column").partition(" (char")[0]


def _json_kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names[type(value)]
