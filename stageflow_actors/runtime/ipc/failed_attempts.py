"""`AttemptLimiter`: how many failed attempts of a stage become log records, and how many are only counted.

Each worker has one, so that a stage that fails thousands of times a second sends few records; the program has one too,
because several workers share a stage. A record has its number of failed attempts in the attribute `FAILED_ATTEMPTS`: 1
for one attempt with its traceback, and for a count its number.
"""

from __future__ import annotations

import logging

__all__ = ["COUNT_SECONDS", "FAILED_ATTEMPTS", "AttemptLimiter", "StageKey", "count_record"]

FAILED_ATTEMPTS = "failed_attempts"
"""The attribute of a log record about failed attempts: their number."""

MAX_RECORDS_PER_SECOND = 10
"""Most records per second and stage."""

COUNT_SECONDS = 10.0
"""Time between two records that count the others."""

MAX_STAGES = 10_000
"""Most stages for which a limiter keeps counts."""

StageKey = tuple[str, str]
"""Workflow id and stage id."""


class AttemptLimiter:
    """Limits records per stage and counts the others. The caller passes the time, monotonic in seconds."""

    def __init__(self) -> None:
        self._windows: dict[StageKey, tuple[float, int]] = {}
        self._counts: dict[StageKey, int] = {}
        self._counted_since = 0.0

    def admit(self, stage: StageKey, now: float) -> bool:
        """Return True if this failed attempt is logged; otherwise it is counted."""
        since, records = self._windows.get(stage, (now, 0))
        if now - since >= 1.0:
            since, records = now, 0
        if len(self._windows) >= MAX_STAGES:
            self._windows.clear()
        self._windows[stage] = since, records + 1
        if records < MAX_RECORDS_PER_SECOND:
            return True
        self.count(stage, 1, now)
        return False

    def count(self, stage: StageKey, attempts: int, now: float) -> None:
        """Count failed attempts that are not logged."""
        if not self._counts:
            self._counted_since = now
        self._counts[stage] = self._counts.get(stage, 0) + attempts

    @property
    def has_counts(self) -> bool:
        """True if attempts are counted that no record names yet."""
        return bool(self._counts)

    def take_counts(self, now: float, *, early: bool = False) -> dict[StageKey, int]:
        """Return the counts to log, and begin again: those of `COUNT_SECONDS`, or with `early` those so far."""
        if not self._counts or not (early or now - self._counted_since >= COUNT_SECONDS):
            return {}
        counts, self._counts = self._counts, {}
        return counts


def count_record(logger: logging.Logger, stage: StageKey, attempts: int) -> logging.LogRecord:
    """Return the record that counts failed attempts."""
    workflow_id, stage_id = stage
    return logger.makeRecord(
        logger.name,
        logging.WARNING,
        __file__,
        0,
        "%d more attempts of stage %r of workflow %r have failed in the last %g s (at most %d a second are logged)",
        (attempts, stage_id, workflow_id, COUNT_SECONDS, MAX_RECORDS_PER_SECOND),
        None,
        extra={"workflow_id": workflow_id, "stage_id": stage_id, FAILED_ATTEMPTS: attempts},
    )
