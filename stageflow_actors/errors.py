"""Every error a user of StageFlow can meet, in one tree.

::

    StageFlowError
    ├── WorkflowDefinitionError   the workflow as written cannot run
    ├── InvalidContext            a context or a result that would not survive the way
    ├── InstanceNotFound          no instance of that id is known
    ├── InstanceConflict          that id is taken, with another input
    ├── InstanceParked            the instance waits as a dead letter for somebody to look at it
    ├── WorkflowFailed            the instance ended other than completed
    ├── StageError                a stage says that it failed, in its own words
    ├── StageTimeout              an attempt ran past its timeout
    ├── WorkerDied                the worker process died during an attempt
    ├── BrokerUnavailable         the broker does not answer
    ├── QueueFull                 there is no room for new work now
    ├── PayloadTooLarge           a message is larger than the broker takes
    ├── JournalCorrupt            what is on disk is damaged
    └── JournalLocked             another program owns the data directory

Errors keep what they know as attributes and come through pickle with them. This module imports nothing of the
package and must never do so: each layer raises from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

__all__ = [
    "BrokerUnavailable",
    "InstanceConflict",
    "InstanceNotFound",
    "InstanceParked",
    "InvalidContext",
    "JournalCorrupt",
    "JournalLocked",
    "PayloadTooLarge",
    "QueueFull",
    "StageError",
    "StageFlowError",
    "StageTimeout",
    "WorkerDied",
    "WorkflowDefinitionError",
    "WorkflowFailed",
]


def _revive(cls: type[StageFlowError], args: tuple[Any, ...], state: dict[str, Any]) -> StageFlowError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class StageFlowError(Exception):
    """The root: `except StageFlowError` catches whatever StageFlow itself raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls `cls(*self.args)`, which breaks where a constructor takes fields instead of a message.
        return _revive, (type(self), self.args, dict(self.__dict__))


class WorkflowDefinitionError(StageFlowError):
    """The workflow as written cannot run; the message names the workflow or stage and the fix."""


class InvalidContext(StageFlowError):
    """A context, result or payload that was refused: wrongly typed, incomplete, or not serialisable faithfully.

    `stage` is the id of the stage it happened in (None: at the door), `field` the path of the offending field.
    """

    def __init__(self, message: str, *, stage: str | None = None, field: str | None = None) -> None:
        super().__init__(message)
        self.stage = stage
        self.field = field


class InstanceNotFound(StageFlowError):
    """No live or finished instance has that id."""

    def __init__(self, instance_id: str, message: str | None = None) -> None:
        super().__init__(
            message
            or f"no instance {instance_id!r} is known here: check the id and the data directory "
            "(a finished instance is forgotten after `history_retention`)"
        )
        self.instance_id = instance_id


class InstanceConflict(StageFlowError):
    """An instance of that id exists, and it was started with another input."""

    def __init__(self, instance_id: str, message: str | None = None) -> None:
        super().__init__(
            message
            or f"instance {instance_id!r} exists already and was started with another input: "
            "use another instance_id, or the same input to get the existing instance"
        )
        self.instance_id = instance_id


class InstanceParked(StageFlowError):
    """The instance waits in a dead-letter queue; requeue the dead letter to resume it at its failed stage.

    `queue` is the dead-letter queue, `reason` the failure that parked the instance.
    """

    def __init__(self, instance_id: str, queue: str | None = None, reason: str | None = None) -> None:
        where = f" in {queue}" if queue else ""
        why = f": {reason}" if reason else ""
        super().__init__(
            f"instance {instance_id!r} is parked{where}{why}; look at it with `stageflow dlq show`, "
            "then `stageflow dlq requeue` resumes it at the failed stage"
        )
        self.instance_id = instance_id
        self.queue = queue
        self.reason = reason


class InstanceResult(Protocol):
    """The attributes of `WorkflowResult` that `WorkflowFailed.result` has. Its docstrings describe them."""

    @property
    def instance_id(self) -> str: ...
    @property
    def workflow_id(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def success(self) -> bool: ...
    @property
    def context(self) -> Any: ...
    @property
    def error(self) -> str | None: ...
    @property
    def failed_stage(self) -> str | None: ...
    @property
    def stages(self) -> Sequence[Any]: ...
    @property
    def compensations(self) -> Sequence[Any]: ...
    @property
    def started_at(self) -> float: ...
    @property
    def finished_at(self) -> float: ...
    @property
    def duration(self) -> float: ...


class WorkflowFailed(StageFlowError):
    """The instance ended as something else than completed. `result` tells all, `failed_stage` which stage."""

    def __init__(self, result: InstanceResult) -> None:
        at = f" at stage {result.failed_stage!r}" if result.failed_stage else ""
        why = f": {result.error}" if result.error else ""
        super().__init__(f"instance {result.instance_id!r} of {result.workflow_id!r} ended {result.status}{at}{why}")
        self.result = result
        self.failed_stage: str | None = result.failed_stage


class StageError(StageFlowError):
    """Raise it in a handler to fail the stage in your own words.

    `retryable=True` asks the stage's retry policy for another attempt; otherwise the failure is final unless the
    policy's `retry_on` names `StageError`.
    """

    def __init__(self, message: str = "", retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class StageTimeout(StageFlowError):
    """An attempt ran longer than the stage's timeout and was stopped.

    Given without `seconds` the first argument is the whole message: so it is made anew from a message that came
    from another process.
    """

    def __init__(self, stage_id: str, seconds: float | None = None) -> None:
        if seconds is None:
            super().__init__(stage_id)
        else:
            super().__init__(f"stage {stage_id!r} ran longer than its timeout of {seconds:g} s")
        self.stage_id: str | None = None if seconds is None else stage_id
        self.seconds = seconds


class WorkerDied(StageFlowError):
    """The worker process died while it ran the stage: a crash, a kill, out of memory.

    Given without `reason` the first argument is the whole message, as in `StageTimeout`. `exit_code` follows
    `subprocess`: negative for the signal that killed the process.
    """

    def __init__(self, stage_id: str, reason: str | None = None, exit_code: int | None = None) -> None:
        if reason is None:
            super().__init__(stage_id)
        else:
            super().__init__(f"the worker died while running stage {stage_id!r}: {reason}")
        self.stage_id: str | None = None if reason is None else stage_id
        self.reason = reason
        self.exit_code = exit_code


class BrokerUnavailable(StageFlowError):
    """The broker does not answer: it is not running, still starting, or shutting down."""


class QueueFull(StageFlowError):
    """A new start was refused for want of room, in a queue or on disk; nothing was enqueued.

    `queue` is the queue without room, `limit` how many messages it takes.
    """

    def __init__(self, message: str, *, queue: str | None = None, limit: int | None = None) -> None:
        super().__init__(message)
        self.queue = queue
        self.limit = limit


class PayloadTooLarge(StageFlowError):
    """A message of `size` bytes is larger than `limit`; nothing was enqueued."""

    def __init__(self, message: str, *, size: int | None = None, limit: int | None = None) -> None:
        super().__init__(message)
        self.size = size
        self.limit = limit


class JournalCorrupt(StageFlowError):
    """What is on disk is damaged before its end; `file` and `offset` (bytes) say where."""

    def __init__(self, message: str, *, file: str | None = None, offset: int | None = None) -> None:
        super().__init__(message)
        self.file = file
        self.offset = offset


class JournalLocked(StageFlowError):
    """A live program owns the data directory. `data_dir` is that directory, `pid` its owner where known."""

    def __init__(self, message: str, *, data_dir: str | None = None, pid: int | None = None) -> None:
        super().__init__(message)
        self.data_dir = data_dir
        self.pid = pid
