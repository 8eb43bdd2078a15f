"""The input of `stageflow run`, record by record: each with its number and the id of its instance.

A record that cannot be read is reported and skipped; an input of another kind, with a wrong encoding or header is
refused as a whole. The input is never in memory as a whole. Of a pipe, only the first bytes are read before the run
begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stageflow_actors.cli.inputs.cell_rows import cell_rows, set_largest_cell
from stageflow_actors.cli.inputs.json_elements import BrokenJson, elements
from stageflow_actors.cli.inputs.json_text import NotAContext, read_context
from stageflow_actors.cli.inputs.layout import BOM, Form, Layout, layout_of
from stageflow_actors.cli.inputs.physical_lines import physical_lines
from stageflow_actors.cli.inputs.source import Damaged, Source, is_regular, open_source

if TYPE_CHECKING:
    from io import BufferedReader

__all__ = ["InputLine", "Lines", "count_lines"]

Convert = Callable[[dict[str, Any]], dict[str, Any]]
"""From a row of strings to typed context fields. Raises for a row that does not fit."""

LARGEST_CONTEXT = 16 << 20

_TEXT_PER_CONTEXT = 6
"""Bytes of JSON per byte of a context, at most: a control character is written as six."""


class InputLine(dict[str, Any]):
    """A context as it was read, with the number of its line or element and the id of its instance."""

    def __init__(self, context: dict[str, Any], number: int, key: str) -> None:
        super().__init__(context)
        self.number = number
        self.key = key


class Lines:
    """Iterates over the input. `refuse(number, reason)` is called for each line, or element, that is skipped.

    `key` names the field that holds the instance's id. Without it, the id is made of file name and number. `largest`:
    bytes of the largest context, which limits what is held in memory.
    """

    def __init__(
        self,
        path: str,
        *,
        key: str | None,
        refuse: Callable[[int, str], None],
        convert: Convert | None = None,
        typed_keys: Convert | None = None,
        largest: int = LARGEST_CONTEXT,
    ) -> None:
        self._path = path
        self._key = key
        self._refuse = refuse
        self._convert = convert
        self._typed_keys = typed_keys
        self._largest = largest
        self._longest = _TEXT_PER_CONTEXT * largest + len(BOM)
        self._number = 0
        self._looked_at: tuple[Source, Layout] | None = None
        self.name = _name_of(path)
        # A file name may not be UTF-8; an id has to be.
        self._id_prefix = self.name.encode(errors="backslashreplace").decode()
        self.unit = "line"

    def check(self) -> None:
        """Raise `click.UsageError` for an input that cannot be read at all, before the cluster starts."""
        source, layout = self._open()
        if layout.form is Form.ROWS and is_regular(self._path):
            with source.buffered() as file:
                next(self._rows(file, layout, lambda number, reason: None), None)
        elif is_regular(self._path):
            source.close()
        else:
            self._looked_at = source, layout

    def __iter__(self) -> Iterator[InputLine]:
        source, layout = self._looked_at or self._open()
        self._looked_at = None
        with source.buffered() as file:
            try:
                if layout.form is Form.LINES:
                    yield from self._json_lines(file, layout)
                elif layout.form is Form.ROWS:
                    yield from self._cells(file, layout)
                else:
                    yield from self._json_elements(file, layout)
            except Damaged as error:
                self._refuse(self._number + 1, f"{error}: nothing from here on was read")

    def _open(self) -> tuple[Source, Layout]:
        source = open_source(self._path)
        try:
            layout = layout_of(source, self._path, self.name)
        except BaseException:
            source.close()
            raise
        self.unit = "element" if layout.form in (Form.ARRAY, Form.OBJECTS) else "line"
        return source, layout

    def _json_lines(self, file: BufferedReader, layout: Layout) -> Iterator[InputLine]:
        for number, text in enumerate(_without_bom(physical_lines(file, layout.ending, self._longest)), 1):
            self._number = number
            if text.isspace():
                continue
            line = self._json(number, text)
            if line is not None:
                yield line

    def _json_elements(self, file: BufferedReader, layout: Layout) -> Iterator[InputLine]:
        found = elements(
            file.read1, array=layout.form is Form.ARRAY, limit=self._longest, old_line_ends=layout.ending == b"\r"
        )
        try:
            for number, begins, text in found:
                self._number = number
                line = self._json(number, text, f" (line {begins})")
                if line is not None:
                    yield line
        except BrokenJson as error:
            self._refuse(error.number, f"not valid JSON: {error}: nothing from here on was read")

    def _json(self, number: int, text: bytes, where: str = "") -> InputLine | None:
        try:
            context = read_context(text)
        except NotAContext as error:
            # An empty text is what is left of a line that is too long.
            self._refuse(number, f"{error}{where}" if text else self._too_long())
            return None
        return self._line(context if self._typed_keys is None else self._typed_keys(context), number)

    def _cells(self, file: BufferedReader, layout: Layout) -> Iterator[InputLine]:
        for number, row in self._rows(file, layout, self._refuse):
            self._number = number
            try:
                context = self._convert(row) if self._convert is not None else row
            except Exception as error:  # noqa: BLE001 - `validate()` may raise anything
                self._refuse(number, str(error))
                continue
            line = self._line(context, number)
            if line is not None:
                yield line

    def _rows(
        self, file: BufferedReader, layout: Layout, refuse: Callable[[int, str], None]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        set_largest_cell(self._largest)
        lines = _without_bom(physical_lines(file, layout.ending, self._longest))
        name = "stdin" if self._path == "-" else self._path
        return cell_rows(lines, name, delimiter=layout.delimiter, skipped=layout.skipped, refuse=refuse)

    def _line(self, context: dict[str, Any], number: int) -> InputLine | None:
        if self._key is None:
            key = f"{self._id_prefix}:{number}"
        else:
            value = context.get(self._key)
            if value is None or value == "" or isinstance(value, (dict, list)):
                what = "has no" if value is None else "has an empty" if value == "" else "has no plain"
                from stageflow_actors.definition.guesses import closest  # slow to import, and only mistakes need it

                meant = closest(self._key, context) if value is None else None
                hint = f" (did you mean {meant!r}?)" if meant else ""
                self._refuse(number, f"{what} {self._key!r}{hint}, the field of --key that holds the instance's id")
                return None
            if isinstance(value, float):
                # Many ids become the float 1e23, and 1.10 becomes 1.1.
                self._refuse(number, f"has the float {value} as {self._key!r}: an id is a string or an integer")
                return None
            key = str(value)
        return InputLine(context, number, key)

    def _too_long(self) -> str:
        return f"is longer than {self._longest:,} bytes: a context has {self._largest:,} at most (max_message_bytes)"


def count_lines(path: str) -> int | None:
    """Return the number of lines, empty ones included, without a CSV header; None if counting needs another look.

    That is the case for a pipe, for compressed data and for JSON values of several lines.
    """
    if not is_regular(path):
        return None
    with open_source(path) as source:
        layout = Layout(Form.LINES)
        with suppress(click.UsageError):  # `check` reports it
            layout = layout_of(source, path, _name_of(path))
        if source.compressed or layout.form not in (Form.LINES, Form.ROWS):
            return None
        total, last = 0, layout.ending
        file = source.buffered()
        while chunk := file.read1(1 << 20):
            total += chunk.count(layout.ending)
            last = chunk[-1:]
    total += last != layout.ending
    return max(0, total - 1 - layout.skipped) if layout.form is Form.ROWS else total


def _name_of(path: str) -> str:
    return "stdin" if path == "-" else Path(path).name


def _without_bom(lines: Iterator[bytes]) -> Iterator[bytes]:
    first = next(lines, None)
    return iter(()) if first is None else chain([first.removeprefix(BOM)], lines)
