"""The output of commands: rows as a table for people, as JSON for programs, as CSV for spreadsheets.

Only the result of a command goes to stdout; notices go to stderr. JSON and CSV hold raw values (seconds, bytes,
seconds since the Unix epoch); tables hold readable ones.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import click

__all__ = [
    "Column",
    "ago",
    "clip",
    "console",
    "count",
    "emit",
    "json_default",
    "plain",
    "print_facts",
    "print_json",
    "size",
    "span",
    "table",
    "when",
]

STYLES = {
    "completed": "green",
    "compensated": "yellow",
    "compensating": "yellow",
    "failed": "red",
    "compensation_failed": "bold red",
    "parked": "magenta",
    "cancelled": "yellow",
    "paused": "yellow",
    "closed": "red",
}
"""Colour on a terminal of a cell that holds exactly this word."""


def plain(value: Any) -> str:
    """Return the value as text, empty for None."""
    return "" if value is None else str(value)


def count(value: Any) -> str:
    """Return a number with separators, as 12,345; empty for None."""
    return "" if value is None else f"{value:,}"


def size(value: Any) -> str:
    """Return a number of bytes as 12.3 MB."""
    number = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def span(value: Any) -> str:
    """Return seconds as 20 µs, 350 ms, 12.3 s, 5 min 02 s, 3 h 20 min or 4 d 2 h."""
    if value is None:
        return ""
    seconds = float(value)
    if 0 < seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02} s"
    if seconds < 86400:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02} min"
    return f"{int(seconds // 86400)} d {int(seconds % 86400 // 3600)} h"


def when(value: Any) -> str:
    """Return seconds since the Unix epoch as local time; empty for 0."""
    return f"{datetime.fromtimestamp(value).astimezone():%Y-%m-%d %H:%M:%S}" if value else ""


def ago(value: Any) -> str:
    """Return seconds since the Unix epoch as an age; empty for 0."""
    return span(max(0.0, time.time() - value)) if value else ""


def clip(longest: int) -> Callable[[Any], str]:
    """Return a function that shows a value in one line of at most `longest` characters."""

    def show(value: Any) -> str:
        text = " ".join(plain(value).split())
        return text if len(text) <= longest else text[: longest - 1] + "…"

    return show


class Column(NamedTuple):
    """A column: its key in the rows, the function that shows a value in a table, and if it is right-aligned.

    `title` is its heading in a table; empty for the key.
    """

    name: str
    show: Callable[[Any], str] = plain
    right: bool = False
    title: str = ""


def emit(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], output: str, *, empty: str = "nothing") -> None:
    """Print `rows`; a table without rows is the notice `empty` on stderr instead."""
    if output == "json":
        print_json(rows)
    elif output == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow([column.name for column in columns])
        writer.writerows([[row[column.name] for column in columns] for row in rows])
    elif rows:
        console().print(table(rows, columns))
    else:
        click.echo(empty, err=True)


def json_default(value: Any) -> Any:
    """Return a value that JSON lacks in a form that it has: a set as a list, anything else as text."""
    return list(value) if isinstance(value, (set, frozenset)) else str(value)


def print_json(value: Any) -> None:
    """Print plain values as indented JSON."""
    import json

    import orjson

    try:
        made = orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS, default=json_default)
    except TypeError:
        # A file name that is not UTF-8: json escapes it, and readers decode the same name.
        made = json.dumps(value, indent=2, default=json_default).encode()
    click.echo(made)  # bytes: JSON is UTF-8 in every locale


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names and values, one per line, without the empty ones."""
    width = max((len(name) for name in facts), default=0) + 2
    for name, value in facts.items():
        if value:
            click.echo(f"{name:<{width}}{value}")


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> Any:
    """Return the rows as a table of rich."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        made.add_column(
            column.title or column.name.replace("_", " "),
            justify="right" if column.right else "left",
            no_wrap=column.right or column.show is not plain,
            overflow="fold",
        )
    for row in rows:
        cells = [column.show(row[column.name]) for column in columns]
        made.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in cells))
    return made


def console() -> Any:
    """Return a console of rich on stdout."""
    from rich.console import Console

    # Not a terminal: grep needs whole lines.
    return Console() if sys.stdout.isatty() else Console(width=400)
