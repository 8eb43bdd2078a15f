"""How far a run is, on stderr: a bar on a terminal, otherwise a plain line every two seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

import click

__all__ = ["Progress"]

EVERY = 2.0
"""Seconds between two lines where there is no terminal."""

REDRAW = 0.1
"""Seconds between two updates of the bar: telling it of each of thousands a second would cost more than it shows."""


class Progress:
    """A context manager. `total` may be None, where nobody knows how much will come."""

    def __init__(self, what: str, total: int | None) -> None:
        self._what = what
        self._total = total
        self._began = self._next = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total, note="")
        else:
            self._next += EVERY
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Takes the bar away; later lines stand alone. May be called twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, done: int, note: str, *, total: int | None = None) -> None:
        """`done` of the total are through; `note` says more. Cheap: most calls only look at the clock."""
        now = time.monotonic()
        if now < self._next:
            return
        if total is not None:
            self._total = total
        if self._bar is not None:
            self._next = now + REDRAW
            self._bar.update(self._task, completed=done, total=self._total, note=note)
        else:
            self._next = now + EVERY
            of = f" of {self._total:,}" if self._total is not None else ""
            click.echo(f"{self._what}: {done:,}{of} after {now - self._began:.0f} s, {note}", err=True)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            click.echo(text, err=True)
