"""`FailureLog`: one WARNING per failed attempt, with its traceback.

A stage that fails thousands of times a second must not be slowed down by its log, nor fill it: see `AttemptLimiter`.
Nothing here may raise into an executor.
"""

from __future__ import annotations

import logging
import threading
import time

from msgspec import Struct

from stageflow_actors.core.envelope import Failure
from stageflow_actors.core.tracebacks.table import read_traceback
from stageflow_actors.runtime.ipc.failed_attempts import COUNT_SECONDS, FAILED_ATTEMPTS, AttemptLimiter, count_record

__all__ = ["FailedAttempt", "FailureLog", "log_nothing"]

logger = logging.getLogger("stageflow_actors.worker")


class FailedAttempt(Struct, frozen=True):
    """An attempt that has failed.

    `place` is the name of what failed, as `stage 'pay'`; `delay` are the seconds to the next attempt, or None if this
    was the last one.
    """

    workflow_id: str
    instance_id: str
    stage_id: str
    place: str
    attempt: int
    failure: Failure
    delay: float | None


def log_nothing(failed: FailedAttempt) -> None:
    """Do nothing with a failed attempt."""


class FailureLog:
    """Logs the failed attempts of one worker. Usable from any thread."""

    def __init__(self) -> None:
        self._limiter = AttemptLimiter()
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def __call__(self, failed: FailedAttempt) -> None:
        """Log a failed attempt, or count it."""
        if not logger.isEnabledFor(logging.WARNING):
            return
        with self._lock:
            if not self._limiter.admit((failed.workflow_id, failed.stage_id), time.monotonic()):
                self._start_timer()
                return
        logger.handle(_record(failed))

    def close(self) -> None:
        """Log the counts so far."""
        self._log_counts()

    def _start_timer(self) -> None:
        if self._timer is not None:
            return
        timer = threading.Timer(COUNT_SECONDS, self._log_counts)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError:
            return  # no thread can be started: the next failed attempt tries again
        self._timer = timer

    def _log_counts(self) -> None:
        with self._lock:
            timer, self._timer = self._timer, None
            counts = self._limiter.take_counts(time.monotonic(), early=True)
        if timer is not None:
            timer.cancel()
        for stage, attempts in counts.items():
            logger.handle(count_record(logger, stage, attempts))


def _record(failed: FailedAttempt) -> logging.LogRecord:
    record = logger.makeRecord(
        logger.name,
        logging.WARNING,
        __file__,
        0,
        "instance %r of workflow %r: attempt %d of %s failed%s: %s",
        (
            failed.instance_id,
            failed.workflow_id,
            failed.attempt,
            failed.place,
            _next_attempt(failed.delay),
            failed.failure.message,
        ),
        None,
        extra={
            "workflow_id": failed.workflow_id,
            "instance_id": failed.instance_id,
            "stage_id": failed.stage_id,
            "attempt": failed.attempt,
            FAILED_ATTEMPTS: 1,
        },
    )
    record.exc_text = read_traceback(failed.failure.traceback)
    return record


def _next_attempt(delay: float | None) -> str:
    if delay is None:
        return ""
    return f" (the next follows in {delay:.3g} s)" if delay else " (the next follows at once)"
