"""The input of `stageflow run`, line by line: JSON objects or CSV rows, each with its number and its instance's id.

A line that cannot be read is reported and skipped; a file with a wrong encoding or header is refused as a whole. The
file is never in memory as a whole, and only a regular file is read before the run begins.
"""

from __future__ import annotations

import csv
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import click

__all__ = ["InputLine", "Lines", "count_lines"]

Convert = Callable[[dict[str, Any]], dict[str, Any]]
"""From a row of strings to typed context fields. Raises for a row that does not fit."""

BOM = b"\xef\xbb\xbf"
OTHER_BOMS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""First bytes of files in other encodings; longer ones first, because one is a prefix of another."""

LEAST, MOST = -(2**63), 2**64 - 1
"""Range of integers that a context can hold."""

_MAYBE_WIDE = re.compile(rb"\d{19}")


class InputLine(dict[str, Any]):
    """A context as it was read, with its line number and the id of its instance."""

    def __init__(self, context: dict[str, Any], number: int, key: str) -> None:
        super().__init__(context)
        self.number = number
        self.key = key


class Lines:
    """Iterates over the input. `refuse(line number, reason)` is called for each line that is skipped.

    `key` names the field that holds the instance's id. Without it, the id is made of file name and line number.
    """

    def __init__(
        self,
        path: str,
        *,
        key: str | None,
        refuse: Callable[[int, str], None],
        convert: Convert | None = None,
        typed_keys: Convert | None = None,
    ) -> None:
        self._path = path
        self._key = key
        self._refuse = refuse
        self._convert = convert
        self._typed_keys = typed_keys
        self.name = "stdin" if path == "-" else Path(path).name

    @property
    def is_csv(self) -> bool:
        """True if the name of the input ends in .csv."""
        return self._path.lower().endswith(".csv")

    def check(self) -> None:
        """Raise `click.UsageError` for a file that cannot be read at all, before the cluster starts."""
        if self._path == "-":
            if sys.stdin is None:
                raise click.UsageError("--input - is standard input, and it is closed")
        elif _is_regular(self._path):
            with _opened(self._path) as file:
                lines = self._begun(file)
                if self.is_csv:
                    self._header(csv.reader((line.decode() for line in lines), strict=True))

    def __iter__(self) -> Iterator[InputLine]:
        with _opened(self._path) as file:
            parse = self._csv if self.is_csv else self._json
            yield from parse(file)

    def _json(self, file: BinaryIO) -> Iterator[InputLine]:
        import orjson

        for number, text in enumerate(self._begun(file), 1):
            if not text.strip():
                continue
            try:
                context = orjson.loads(text.strip())
            except orjson.JSONDecodeError as error:
                self._refuse(number, _not_utf8(text) or f"not valid JSON: {_json_reason(error)}")
                continue
            if not isinstance(context, dict):
                self._refuse(number, f"must be a JSON object, not {_json_kind(context)}")
                continue
            # The parser makes floats of integers that are too wide: two ids would become one.
            wide = _wide_integer(text) if _MAYBE_WIDE.search(text) else None
            if wide is not None:
                self._refuse(number, wide)
                continue
            yield from self._line(context if self._typed_keys is None else self._typed_keys(context), number)

    def _csv(self, file: BinaryIO) -> Iterator[InputLine]:
        number = 0

        def text(line: bytes) -> str:
            nonlocal number
            number += 1
            return line.decode()

        # A map continues behind a line that is not UTF-8; a generator would end.
        lines = map(text, self._begun(file))
        rows = csv.DictReader(lines, self._header(csv.reader(lines, strict=True)), strict=True)
        while True:
            try:
                row = next(rows, None)
            except (csv.Error, UnicodeDecodeError) as error:
                self._refuse(number, f"not valid CSV: {error}")
                continue
            if row is None:
                return
            if None in row:
                self._refuse(number, f"has more fields than the {len(rows.fieldnames or ())} of the header")
            elif None in row.values():
                self._refuse(number, f"has fewer fields than the {len(rows.fieldnames or ())} of the header")
            else:
                try:
                    context = self._convert(row) if self._convert is not None else row
                except Exception as error:  # noqa: BLE001 - `validate()` may raise anything
                    self._refuse(number, str(error))
                    continue
                yield from self._line(context, number)

    def _begun(self, file: BinaryIO) -> Iterator[bytes]:
        """Return the lines without a byte order mark. Raises `click.UsageError` for another encoding than UTF-8."""
        first = file.readline()
        for bom, name in OTHER_BOMS.items():
            if first.startswith(bom):
                raise click.UsageError(f"{self.name} is {name}: convert it to UTF-8 (iconv -f {name} -t UTF-8)")
        return chain([first.removeprefix(BOM)] if first else [], file)

    def _header(self, rows: Iterator[list[str]]) -> list[str]:
        """Return the names of the columns. Raises `click.UsageError` for a header that cannot be used."""
        try:
            names = next(rows, [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise click.UsageError(f"the header of {self._path} is not valid CSV: {error}") from None
        twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
        if twice is not None:
            raise click.UsageError(f"the header of {self._path} names the column {twice!r} more than once")
        return names

    def _line(self, context: dict[str, Any], number: int) -> Iterator[InputLine]:
        if self._key is None:
            # A file name may not be UTF-8; an id has to be.
            key = f"{self.name.encode(errors='backslashreplace').decode()}:{number}"
        else:
            value = context.get(self._key)
            if value is None or value == "" or isinstance(value, (dict, list)):
                what = "has no" if value is None else "has an empty" if value == "" else "has no plain"
                self._refuse(number, f"{what} {self._key!r}, the field of --key that holds the instance's id")
                return
            if isinstance(value, float):
                # Many ids become the float 1e23, and 1.10 becomes 1.1.
                self._refuse(number, f"has the float {value} as {self._key!r}: an id is a string or an integer")
                return
            key = str(value)
        yield InputLine(context, number, key)


def count_lines(path: str) -> int | None:
    """Return the number of lines, empty ones included, without a CSV header; None for a pipe."""
    if path == "-" or not _is_regular(path):
        return None
    with open(path, "rb") as file:
        total, last = 0, b"\n"
        while chunk := file.read(1 << 20):
            total += chunk.count(b"\n")
            last = chunk[-1:]
    total += last != b"\n"
    return max(0, total - 1) if path.lower().endswith(".csv") else total


def _is_regular(path: str) -> bool:
    """True if `path` can be read twice, which a pipe cannot. Opening it reports a path that does not exist."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    if path == "-":
        yield sys.stdin.buffer  # `check` has made sure that it is open
        return
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; the error is about this file only
    except OSError as error:
        raise click.UsageError(f"{path} cannot be read: {error.strerror}") from None
    with file:
        yield file


def _not_utf8(text: bytes) -> str:
    """Return the place where a line is not UTF-8; empty for a valid line."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return (
            f"not valid UTF-8: byte 0x{text[error.start]:02x} at column {error.start + 1}; is it in another encoding?"
        )
    return ""


def _json_reason(error: ValueError) -> str:
    text = str(error)
    return text.replace(": line 1 column", " at column").partition(" (char")[0]


def _json_kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names[type(value)]


class _Wide(str):
    """The digits of an integer that no context can hold."""

    __slots__ = ()


def _integer(digits: str) -> int | _Wide:
    if len(digits) > 20:
        return _Wide(digits)
    number = int(digits)
    return number if LEAST <= number <= MOST else _Wide(digits)


def _wide_integer(text: bytes) -> str | None:
    """Return the fault of a JSON object with an integer outside the range of contexts; None without one."""
    try:
        found: list[tuple[str, Any]] = [("", json.loads(text, parse_int=_integer))]
    except RecursionError:
        return "is nested too deeply"
    while found:
        path, value = found.pop()
        if isinstance(value, dict):
            found.extend((f"{path}.{name}" if path else name, each) for name, each in value.items())
        elif isinstance(value, list):
            found.extend((f"{path}[{at}]", each) for at, each in enumerate(value))
        elif isinstance(value, _Wide):
            shown = value if len(value) <= 40 else f"{value[:40]}…"
            return f"{path} is {shown}, which does not fit in 64 bits: write it as a string"
    return None
