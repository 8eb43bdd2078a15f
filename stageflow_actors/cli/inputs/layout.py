"""Recognises how the records of an input are written, by its first bytes; its name decides where they leave it open."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

import click

from stageflow_actors.cli.inputs.delimiters import announced, best_delimiter, plain_delimiter
from stageflow_actors.cli.inputs.json_elements import BrokenJson, Element, elements
from stageflow_actors.cli.inputs.json_text import NotAContext, kind_of, loads
from stageflow_actors.cli.inputs.other_kinds import named_binary, named_page, named_text, other_encoding
from stageflow_actors.cli.inputs.source import HEAD_BYTES, Source

__all__ = ["BOM", "Form", "Layout", "layout_of"]

BOM = b"\xef\xbb\xbf"

_READ = "stageflow run reads JSON lines, a JSON array, CSV and TSV with a header, each also as .gz"

_LONGEST_MARK = 8
"""The least number of bytes from which the kind of a file can be recognised."""

_ROWS_TO_COMPARE = 20
"""Rows of the head that decide on the delimiter."""


class Form(Enum):
    """How the records of an input are written."""

    LINES = "one JSON object per line"
    ARRAY = "a JSON array of objects"
    OBJECTS = "JSON objects of several lines"
    ROWS = "rows of cells"


class Layout(NamedTuple):
    """`ending`: the line end, which is "\\r" in old files; `skipped`: lines before the header of rows."""

    form: Form
    ending: bytes = b"\n"
    delimiter: str = ","
    skipped: int = 0


class _MoreNeeded(Exception):
    """The head is too short for a decision."""


def layout_of(source: Source, path: str, name: str) -> Layout:
    """Return how the records of `source` are written, without reading more of a pipe than is needed for that.

    Raises `click.UsageError`, in one line, for an input that is not read.
    """
    while True:
        whole = source.ended or source.damage is not None or len(source.head) >= HEAD_BYTES
        if source.damage is not None and not source.head:
            raise click.UsageError(f"{name} cannot be read: {source.damage}")
        if whole or len(source.head) >= _LONGEST_MARK:
            try:
                return _Head(source.head, path, name, whole=whole, entire=source.ended).layout()
            except _MoreNeeded:
                pass
        source.look()


class _Head:
    """The first bytes of an input. `whole`: there are no more, or enough; `entire`: they are the whole input."""

    def __init__(self, head: bytes, path: str, name: str, *, whole: bool, entire: bool) -> None:
        self._head = head
        self._text = head.removeprefix(BOM)
        self._begin = self._text.lstrip(b" \t\r\n")
        self._name = name
        self._whole = whole
        self._entire = entire
        lower = path.lower().removesuffix(".gz")
        self._rows_by_name = "\t" if lower.endswith((".tsv", ".tab")) else "," if lower.endswith(".csv") else None
        self._ending = b"\n"

    def layout(self) -> Layout:
        encoding = other_encoding(self._head)
        if encoding is not None:
            advice = f"convert it to UTF-8 (iconv -f {encoding} -t UTF-8)"
            raise click.UsageError(f"{self._name} is {encoding}: {advice}")
        other = named_binary(self._head)
        if other is not None:
            raise self._refused(*other)
        if not self._begin:
            self._wait()
            return Layout(Form.LINES)
        if b"\n" not in self._begin and b"\r" in self._begin:
            self._wait()
            self._ending = b"\r"
        first = self._begin[:1]
        json = self._object() if first == b"{" else self._array() if first == b"[" else None
        if json is not None:
            return json._replace(ending=self._ending)
        # A page of HTML is often saved under the name of the table that was asked for.
        other = named_page(self._begin)
        if other is not None:
            raise self._refused(*other)
        if self._rows_by_name is not None:
            return self._rows(self._rows_by_name)
        other = named_text(self._begin)
        if any(_is_object(line) for line in self._lines()):
            return Layout(Form.LINES, self._ending)
        self._wait()
        delimiter = plain_delimiter(self._texts()[:_ROWS_TO_COMPARE]) if other is None else None
        if delimiter is not None or announced(next(iter(self._texts()), "")):
            return self._rows(delimiter or ",")
        raise self._refused(*(other or self._other_text()))

    def _object(self) -> Layout | None:
        """Return the layout of a text that begins with a brace; None for a text that is no JSON."""
        lines = self._lines()
        if not lines:
            self._wait()
        if lines and _is_object(lines[0]):
            return Layout(Form.LINES)
        if len(lines) > 1 and any(_is_object(line) for line in lines[1:3]):
            # One bad line among good ones, which is reported with its number.
            return Layout(Form.LINES)
        found, broken = self._elements(array=False)
        if found:
            return Layout(Form.OBJECTS)
        self._wait()
        other = named_text(self._begin)
        if other is not None:
            raise self._refused(*other)
        if any(_is_object(line) for line in lines) or self._ending not in self._begin.rstrip():
            return Layout(Form.LINES)
        if self._rows_by_name is not None:
            return None
        if broken is not None and (self._entire or not broken.at_end):
            if sum(line.startswith(b"{") for line in lines) > 1:
                return Layout(Form.LINES)
            raise click.UsageError(f"{self._name} is not valid JSON: {broken}")
        return Layout(Form.OBJECTS)

    def _array(self) -> Layout | None:
        """Return the layout of a text that begins with a bracket; None for a text that is no JSON."""
        lines = self._lines()
        if lines and _kind(lines[0]) is list and len(lines) > 1:
            if any(_is_object(line) for line in lines[1:]):
                return Layout(Form.LINES)
            raise self._refused("JSON with an array on each line", "write an object per line")
        found, broken = self._elements(array=True)
        kinds = [_kind(element.text) for element in found]
        if dict in kinds or _NO_JSON_KIND in kinds or (not kinds and broken is None):
            return Layout(Form.ARRAY)
        self._wait()
        if kinds:
            value = loads(found[0].text)
            what = f"a JSON array whose elements are no objects (the first is {kind_of(value)})"
            raise self._refused(what, "write an object for each")
        if self._rows_by_name is not None and self._begin[1:].lstrip()[:1] != b"{":
            return None
        other = named_text(self._begin)
        if other is not None:
            raise self._refused(*other)
        if broken is not None and (self._entire or not broken.at_end):
            raise click.UsageError(f"{self._name} is not valid JSON: {broken}")
        return Layout(Form.ARRAY)

    def _rows(self, default: str) -> Layout:
        lines = self._texts()
        if not lines:
            self._wait()
        delimiter = announced(lines[0]) if lines else None
        if delimiter is not None:
            blank = self._text.count(self._ending, 0, len(self._text) - len(self._begin))
            return Layout(Form.ROWS, self._ending, delimiter, skipped=blank + 1)
        others = [each for each in ",;\t|" if each != default and lines and each in lines[0]]
        if others and len(lines) < _ROWS_TO_COMPARE:
            self._wait()
        return Layout(Form.ROWS, self._ending, best_delimiter(lines[:_ROWS_TO_COMPARE], default))

    def _wait(self) -> None:
        """Raise `_MoreNeeded` unless there is nothing more to be looked at."""
        if not self._whole:
            raise _MoreNeeded

    def _lines(self) -> list[bytes]:
        """Return the complete lines of the head that are not blank."""
        lines = self._begin.split(self._ending)
        if not self._entire:
            lines.pop()
        return [line for line in lines if line.strip()]

    def _texts(self) -> list[str]:
        return [line.decode(errors="replace") for line in self._lines()]

    def _elements(self, *, array: bool) -> tuple[list[Element], BrokenJson | None]:
        """Return the elements that the head holds as a whole, and the error that follows them."""
        rest = [self._text]
        found: list[Element] = []
        try:
            each: Iterator[Element] = elements(lambda _: rest.pop() if rest else b"", array=array, limit=HEAD_BYTES)
            found.extend(itertools.islice(each, 100))
        except BrokenJson as error:
            return found, error
        return found, None

    def _other_text(self) -> tuple[str, str]:
        line = self._begin.splitlines()[0]
        try:
            begin = line.decode()
        except UnicodeDecodeError:
            if not self._begin[:200].isascii() and sum(byte > 126 for byte in self._begin[:200]) > 60:
                return "binary data", "export it as CSV or as JSON lines"
            begin = line.decode("latin-1")
        value = _value_of(line)
        if value is not _NO_JSON:
            return f"JSON that is no object but {kind_of(value)}", "write an object per line"
        shown = begin if len(begin) <= 40 else f"{begin[:40]}…"
        return f"text that begins with {shown!r}", "name a table .csv, whatever its delimiter is"

    def _refused(self, kind: str, advice: str) -> click.UsageError:
        return click.UsageError(f"{self._name} looks like {kind}; {_READ}: {advice}")


_NO_JSON = object()
_NO_JSON_KIND = type(_NO_JSON)


def _value_of(text: bytes) -> object:
    try:
        return loads(text)
    except NotAContext:
        return _NO_JSON


def _kind(text: bytes) -> type[object]:
    return type(_value_of(text))


def _is_object(line: bytes) -> bool:
    return line.lstrip().startswith(b"{") and _kind(line) is dict
