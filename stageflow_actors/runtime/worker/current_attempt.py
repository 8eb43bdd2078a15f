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


_latest: list[Attempt | None] = [None]
"""The attempt entered last."""
_concurrent: list[bool] = []
"""Not empty if several attempts may be in work at once, each in a `contextvars` context of its own."""


def enter_attempt(attempt: Attempt) -> None:
    """Record the attempt whose user code follows in this context."""
    _latest[0] = attempt
    if _concurrent:
        _ATTEMPT.set(attempt)


class AttemptAnnotator:
    """Gives a log record the attributes `workflow_id`, `instance_id`, `stage_id` and `attempt`.

    In a worker that runs one message at a time, `slot`, all records that are made until its end belong to it: threads
    that user code has started have no context of the message.
    """

    def __init__(self, slot: Slot, lanes: int) -> None:
        self._slot = slot
        _concurrent[:] = [True] * (lanes > 1)

    def __call__(self, record: logging.LogRecord) -> None:
        """Add the attributes, unless the record is of no attempt."""
        if _concurrent:
            attempt = _ATTEMPT.get()
        else:
            attempt = _latest[0] if self._slot.is_busy else None
        if attempt is not None:
            fields = record.__dict__
            for name, value in zip(_NAMES, attempt, strict=True):
                fields.setdefault(name, value)
