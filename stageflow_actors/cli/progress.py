"""The progress of a run on stderr: a bar on a terminal, otherwise a line every two seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from stageflow_actors.runtime.client.progress_bar import ProgressBar

__all__ = ["Progress"]

LINE_SECONDS = 2.0
"""Seconds between two lines without a terminal."""

REDRAW_SECONDS = 0.1
"""Seconds between two updates of the bar: thousands of updates a second would cost more than they show."""


class Progress:
    """Context manager that shows progress. `total` is None if the number of instances is unknown."""

    def __init__(self, label: str, total: int | None) -> None:
        self._label = label
        self._total = total
        self._began = self._next = time.monotonic()
        self._bar: ProgressBar | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from stageflow_actors.runtime.client.progress_bar import ProgressBar

            self._bar = ProgressBar(self._label, self._total, transient=True)
        else:
            self._next += LINE_SECONDS
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Erase the bar; later lines stand alone. A second call does nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def update(self, done: int, note: str) -> None:
        """Show that `done` instances are finished. Cheap: most calls only read the clock."""
        now = time.monotonic()
        if now < self._next:
            return
        if self._bar is not None:
            self._next = now + REDRAW_SECONDS
            self._bar.update(done, note)
        else:
            self._next = now + LINE_SECONDS
            of = f" of {self._total:,}" if self._total is not None else ""
            click.echo(f"{self._label}: {done:,}{of} after {now - self._began:.0f} s{note and f', {note}'}", err=True)

    def print(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        if self._bar is not None:
            self._bar.print(text)
        else:
            click.echo(text, err=True)
