"""The delimiter of a file of rows, recognised by its header and first rows."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence

__all__ = ["DELIMITERS", "NAMES", "announced", "best_delimiter", "plain_delimiter"]

DELIMITERS = (",", ";", "\t", "|")

NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}

_COLUMN_NAME = re.compile(r"[^\W\d][\w .:/#%()\[\]-]{0,63}")


def announced(line: str) -> str | None:
    """Return the delimiter that a first line such as `sep=;`, of a spreadsheet, names; None for another line."""
    found = re.fullmatch(r'"?sep=([,;|\t])"?\s*', line, re.IGNORECASE)
    return found[1] if found else None


def best_delimiter(lines: Sequence[str], default: str) -> str:
    """Return the delimiter of a file of rows: `default`, unless it does not fit and another one does."""
    widths = {delimiter: _widths(lines, delimiter) for delimiter in DELIMITERS}
    if _is_even(widths[default]):
        return default
    others = [each for each in DELIMITERS if each != default and _is_even(widths[each])]
    if others and (len(lines) > 1 or widths[default][:1] == [1]):
        return max(others, key=lambda each: widths[each][0])
    if widths[default][:1] != [1]:
        return default
    # Rows of different lengths: the header decides, if only one delimiter is in it.
    others = [each for each in DELIMITERS if each != default and widths[each] and widths[each][0] > 1]
    return others[0] if len(others) == 1 else default


def plain_delimiter(lines: Sequence[str]) -> str | None:
    """Return the delimiter of a text that may hold anything; None unless it is plain that it holds rows."""
    if len(lines) < 2:
        return None
    for delimiter in DELIMITERS:
        if not _is_even(_widths(lines, delimiter)):
            continue
        names = next(csv.reader(lines[:1], delimiter=delimiter))
        if len(set(names)) == len(names) and all(_COLUMN_NAME.fullmatch(name) for name in names):
            return delimiter
    return None


def _widths(lines: Sequence[str], delimiter: str) -> list[int]:
    """Return the number of cells of each row; none for lines that are no rows."""
    try:
        return [len(row) for row in csv.reader(lines, delimiter=delimiter) if row]
    except csv.Error:
        return []


def _is_even(widths: list[int]) -> bool:
    return bool(widths) and widths[0] > 1 and len(set(widths)) == 1
