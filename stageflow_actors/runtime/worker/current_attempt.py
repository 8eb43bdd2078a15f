"""The attempt that is in work in this context: log records take their attributes from it.

Executors set it for each message, so it must stay as cheap as setting a `contextvars` variable.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar

from stageflow_actors.runtime.ipc.slots import Slot

__all__ = ["AttemptAnnotator", "enter_attempt"]

Attempt = tuple[str, str, str, int]
"""Workflow id, instance id, stage id and number of the attempt."""

_ATTEMPT: ContextVar[Attempt | None] = ContextVar("stageflow_attempt", default=None)
_latest: list[Attempt | None] = [None]


def enter_attempt(attempt: Attempt) -> None:
    """Record the attempt whose user code follows in this context."""
    _latest[0] = attempt
    _ATTEMPT.set(attempt)


class AttemptAnnotator:
    """Gives a log record the attributes `workflow_id`, `instance_id`, `stage_id` and `attempt`.

    A thread that user code has started has no `contextvars` context of the message. In a worker that runs one message
    at a time, `slot`, its records belong to the message in work.
    """

    def __init__(self, slot: Slot, lanes: int) -> None:
        self._slot = slot if lanes == 1 else None

    def __call__(self, record: logging.LogRecord) -> None:
        """Add the attributes, unless the record is of no attempt."""
        attempt = _ATTEMPT.get()
        if self._slot is not None and (attempt is None or attempt is not _latest[0]):
            attempt = _latest[0]
        if attempt is None or (self._slot is not None and not self._slot.is_busy):
            return
        fields = record.__dict__
        for name, value in zip(("workflow_id", "instance_id", "stage_id", "attempt"), attempt, strict=True):
            fields.setdefault(name, value)
