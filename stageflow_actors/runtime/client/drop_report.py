"""`DropReport`: counts log records and lines that were dropped, and words the warnings about them.

The first warning comes at once, the next ones after intervals that double, so that a stage that logs too much for an
hour does not fill the log with warnings.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["DropReport"]

FIRST_INTERVAL_SECONDS = 1.0
MAX_INTERVAL_SECONDS = 300.0
"""The first and the longest time between two warnings."""


class DropReport:
    """What has been dropped since the last warning, and in all."""

    def __init__(self) -> None:
        self._records = self._lines = 0
        self._all_records = self._all_lines = 0
        self._last: Mapping[str, Any] = {}
        self._interval = FIRST_INTERVAL_SECONDS
        self._due = 0.0

    @property
    def is_empty(self) -> bool:
        """True if nothing has been dropped since the last warning."""
        return not self._records and not self._lines

    def count_records(self, count: int, last: Mapping[str, Any]) -> None:
        """Count dropped records; `last` has the attributes of one of them."""
        self._records += count
        self._last = last

    def count_lines(self, count: int) -> None:
        """Count dropped lines of output."""
        self._lines += count

    def make_due(self) -> None:
        """Let the next warning come at once, at the end of the cluster."""
        self._due = 0.0

    def take(self) -> Iterator[tuple[int, str]]:
        """Yield the number of what was dropped and the text of the warning, if one is due."""
        now = time.monotonic()
        if self.is_empty or now < self._due:
            return
        self._due = now + self._interval
        self._interval = min(2 * self._interval, MAX_INTERVAL_SECONDS)
        records, self._records = self._records, 0
        lines, self._lines = self._lines, 0
        self._all_records += records
        self._all_lines += lines
        if records:
            yield records, _RECORDS.format(records, _of(self._last), _in_all(records, self._all_records))
        if lines:
            yield lines, _LINES.format(lines, _in_all(lines, self._all_lines))


_RECORDS = (
    "{} log records {}were dropped{}, because they came faster than the program's logging handles them: log less in "
    "stages, raise the level of the logger, or use a faster handler"
)
_LINES = (
    "{} lines of handlers' output were dropped{}, because they came faster than the reader of the program's output "
    "takes them: print less in stages, or write to a file"
)


def _of(last: Mapping[str, Any]) -> str:
    """Return which logger and stage a dropped record came from; the others need not be of the same."""
    logger, stage, workflow = (last.get(name) for name in ("name", "stage_id", "workflow_id"))
    if not logger:
        return "of other processes "
    return (
        f"(the latest of logger {logger!r}" + (f" in stage {stage!r} of workflow {workflow!r}" if stage else "") + ") "
    )


def _in_all(count: int, total: int) -> str:
    return "" if count == total else f" ({total} since the start)"
