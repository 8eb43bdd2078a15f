"""The attempt that is in work: log records take their attributes from it.

Executors set it for each message, so it must stay as cheap as an assignment.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar

from stageflow_actors.runtime.ipc.slots import Slot

__all__ = ["AttemptAnnotator", "enter_attempt"]

Attempt = tuple[str, str, str, int]
"""Workflow id, instance id, stage id and number of the attempt."""

_NAMES = ("workflow_id", "instance_id", "stage_id", "attempt")
_ATTEMPT: ContextVar[Attempt | None] = ContextVar("stageflow_attempt", default=None)


class _Current:
    """The attempt entered last, and whether others may be in work beside it, in `contextvars` contexts of their own."""

    attempt: Attempt | None = None
    concurrent = False


def enter_attempt(attempt: Attempt) -> None:
    """Record the attempt whose user code follows in this context."""
    _Current.attempt = attempt
    if _Current.concurrent:
        _ATTEMPT.set(attempt)


class AttemptAnnotator:
    """Gives a log record the attributes `workflow_id`, `instance_id`, `stage_id` and `attempt`.

    In a worker that runs one message at a time, `slot`, all records that are made until its end belong to it: threads that
    user code has started have no context of the message.
    """

    def __init__(self, slot: Slot, lanes: int) -> None:
        self._slot = slot
        _Current.concurrent = lanes > 1

    def __call__(self, record: logging.LogRecord) -> None:
        """Add the attributes, unless the record is of no attempt."""
        if _Current.concurrent:
            attempt = _ATTEMPT.get()
        else:
            attempt = _Current.attempt if self._slot.is_busy else None
        if attempt is not None:
            fields = record.__dict__
            for name, value in zip(_NAMES, attempt, strict=True):
                fields.setdefault(name, value)
