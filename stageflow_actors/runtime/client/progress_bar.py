"""The progress bar on stderr, for `map(progress=True)` and `stageflow run`. rich is imported when a bar is made."""

from __future__ import annotations

__all__ = ["ProgressBar"]


class ProgressBar:
    """A bar with the number of finished instances, a note, the time elapsed and the time left.

    `total` is None if the number of instances is unknown. A `transient` bar is erased when it is closed.
    """

    def __init__(self, label: str, total: int | None, *, transient: bool = False) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=transient,
        )
        self._task = self._progress.add_task(label, total=total, note="")
        self._progress.start()

    def advance(self) -> None:
        """Count one more finished instance."""
        self._progress.advance(self._task)

    def update(self, done: int, note: str) -> None:
        """Set the number of finished instances and the note beside it."""
        self._progress.update(self._task, completed=done, note=note)

    def refresh(self) -> None:
        """Draw the bar now."""
        self._progress.refresh()

    def print(self, text: str) -> None:
        """Print a line above the bar, as it is."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stop drawing."""
        self._progress.stop()
