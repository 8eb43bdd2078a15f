"""The rows of a CSV or TSV file as dicts of strings, each with the number of its last line."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from typing import Any

import click

from stageflow_actors.cli.inputs.json_text import not_utf8

__all__ = ["cell_rows", "set_largest_cell"]


def set_largest_cell(characters: int) -> None:
    """Set the size of the largest cell for this process; the limit of the module `csv` is 131,072."""
    csv.field_size_limit(characters)


def cell_rows(
    lines: Iterator[bytes], name: str, *, delimiter: str, skipped: int, refuse: Callable[[int, str], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row with its line number; `refuse` is called for each one that is no row of the table.

    `skipped`: lines before the header. Raises `click.UsageError` for a header that cannot be used.
    """
    number = 0

    def text(line: bytes) -> str:
        nonlocal number
        number += 1
        if not line:
            raise csv.Error("the line is longer than a context may be")
        try:
            return line.decode()
        except UnicodeDecodeError:
            raise csv.Error(not_utf8(line)) from None

    # A map continues behind a line that is not UTF-8; a generator would end.
    texts = map(text, lines)
    for _ in range(skipped):
        next(texts, None)
    header = _header(csv.reader(texts, delimiter=delimiter, strict=True), name)
    rows = csv.DictReader(texts, header, strict=True, delimiter=delimiter)
    while True:
        last = number
        try:
            row = next(rows, None)
        except csv.Error as error:
            refuse(number, f"not valid CSV: {error}{_unclosed(last + 1, number)}")
            continue
        if row is None:
            return
        if None in row:
            refuse(number, f"has more fields than the {len(header)} of the header")
        elif None in row.values():
            refuse(number, f"has fewer fields than the {len(header)} of the header")
        else:
            yield number, row


def _unclosed(first: int, last: int) -> str:
    """Return a hint for a row of several lines: most of them are no rows, but follow a quote that is not closed."""
    return f"; the row begins at line {first}: is a quote not closed there?" if last > first else ""


def _header(rows: Iterator[list[str]], name: str) -> list[str]:
    try:
        names = next((row for row in rows if row), [])
    except csv.Error as error:
        raise click.UsageError(f"the header of {name} is not valid CSV: {error}") from None
    twice = next((each for at, each in enumerate(names) if each in names[:at]), None)
    if twice:
        raise click.UsageError(f"the header of {name} names the column {twice!r} more than once")
    unnamed = next((at for at, each in enumerate(names, 1) if not each.strip()), None)
    if unnamed is not None:
        raise click.UsageError(
            f"the header of {name} has no name for column {unnamed} of {len(names)}: name it, or leave the column out"
            + (" (pandas: to_csv(index=False))" if unnamed == 1 else "")
        )
    return names
