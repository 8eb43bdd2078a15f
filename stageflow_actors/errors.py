"""The errors of StageFlow, in one tree.

::

    StageFlowError
    ├── WorkflowDefinitionError   the workflow cannot run as it is defined
    ├── InvalidContext            a context, result or payload has a wrong type or cannot be serialised
    ├── InstanceNotFound          no instance has this id
    ├── InstanceConflict          the id is in use by an instance with another input
    ├── InstanceParked            the instance waits as a dead letter
    ├── WorkflowFailed            the instance ended with another status than completed
    ├── StageError                raised by a handler to fail its stage
    ├── StageTimeout              an attempt exceeded its timeout
    ├── WorkerDied                the worker process died during an attempt
    ├── BrokerUnavailable         the broker does not answer
    ├── QueueFull                 a queue or the disk is full
    ├── PayloadTooLarge           a message exceeds the size limit
    ├── JournalCorrupt            the journal on disk is damaged
    └── JournalLocked             another program uses the data directory

Errors have their details as attributes, which survive pickling. This module must not import other modules of the
package: each of them raises these errors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
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
    """The base class of all errors of StageFlow."""

    _noticed = False
    """True once the text is on stderr, so that a command does not print it a second time."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls `cls(*self.args)`, which fails where a constructor takes other arguments than the message.
        return _revive, (type(self), self.args, dict(self.__dict__))


def find_place() -> str | None:
    """Return the nearest line of user code that is being run, as `orders.py, line 12`; None if there is none.

    Neither this package, nor the standard library, nor an installed package counts as user code.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        file = frame.f_code.co_filename
        if file == "<stdin>" or file.startswith("<doctest"):
            return None
        if "ipykernel" in file or file.startswith("<ipython-input"):
            return f"line {frame.f_lineno} of the cell"
        if not file.startswith("<") and not _is_installed(file):
            return f"{_shorten(file)}, line {frame.f_lineno}"
    return None


def _is_installed(file: str) -> bool:
    """Return True for a file of this package, of Python, or of another installed package or command."""
    return (
        file.startswith((_PACKAGE, _STANDARD_LIBRARY))
        or "-packages" + os.sep in file
        or (bool(sys.executable) and os.path.dirname(file) == os.path.dirname(sys.executable))
        or f"{os.sep}stageflow_brokers{os.sep}" in file
    )


def _shorten(file: str) -> str:
    """Return the path relative to the working directory, if it is below that."""
    try:
        below = os.path.relpath(file)
    except (OSError, ValueError):  # the working directory was removed
        return file
    return file if below.startswith(os.pardir) else below


_PACKAGE = os.path.dirname(__file__) + os.sep
_STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep


class WorkflowDefinitionError(StageFlowError):
    """The workflow cannot run as it is defined.

    The message names the workflow or the stage, and the fix; behind it stands the line of the program that made the
    mistake, as in `... (orders.py, line 12)`.

    Args:
        message: What is wrong, where in the definition, and the fix.

    Attributes:
        message: The message without the place.
        place: The line of the program, as `orders.py, line 12`. None if no code of the user was running, as in a
            command.

    Example:
        >>> from stageflow_actors import Workflow, WorkflowDefinitionError
        >>> try:
        ...     Workflow("my orders")
        ... except WorkflowDefinitionError as error:
        ...     print("malformed" in str(error))
        True
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.place = find_place()

    def __str__(self) -> str:
        is_named = self.place is None or os.path.basename(self.place) in self.message
        return self.message if is_named else f"{self.message} ({self.place})"


class InvalidContext(StageFlowError):
    """A context, result or payload has a wrong type or cannot be serialised.

    Contexts have to be the same after encoding and decoding; this error reports the field that is not. It is also
    raised for the exceptions of a method `validate` of the context.

    Args:
        message: What is wrong, and where.
        stage: Id of the stage that returned the value. Default: None, for a context that was submitted.
        field: Path of the field, as `items[2].price`. Default: None.

    Example:
        >>> from stageflow_actors import InvalidContext, Workflow
        >>> from stageflow_actors.testing import run
        >>> try:
        ...     run(Workflow("orders").add_stage(print), {"lock": object()})
        ... except InvalidContext as error:
        ...     print(error.field, error.stage)
        lock None
    """

    def __init__(self, message: str, *, stage: str | None = None, field: str | None = None) -> None:
        super().__init__(message)
        self.stage = stage
        self.field = field


class InstanceNotFound(StageFlowError):
    """No live or finished instance has this id.

    A finished instance is deleted after `Config.history_retention`.

    Args:
        instance_id: The id.
        message: Another text than the default.
        data_dir: The data directory that was searched, for the default text.
    """

    def __init__(self, instance_id: str, message: str | None = None, *, data_dir: str | Path | None = None) -> None:
        place = "here" if data_dir is None else f"in {data_dir}"
        super().__init__(
            message
            or f"no instance {instance_id!r} is known {place}: check the id and the data directory "
            "(a finished instance is forgotten after `history_retention`)"
        )
        self.instance_id = instance_id


class InstanceConflict(StageFlowError):
    """The id is in use by an instance that was started with another input.

    A submit with the same id and the same input returns the existing instance.

    Args:
        instance_id: The id.
        message: Another text than the default.
    """

    def __init__(self, instance_id: str, message: str | None = None) -> None:
        super().__init__(
            message
            or f"instance {instance_id!r} exists already and was started with another input: "
            "use another instance_id, or the same input to get the existing instance"
        )
        self.instance_id = instance_id


class InstanceParked(StageFlowError):
    """The instance waits as a dead letter.

    `Instance.retry` or `stageflow dlq requeue` resumes it at the failed stage.

    Args:
        instance_id: The id of the instance.
        queue: The dead-letter queue. Default: not known.
        reason: The failure that parked the instance. Default: not known.

    Example:
        >>> from stageflow_actors import InstanceParked
        >>> error = InstanceParked("order-1", "dlq.stageflow.orders.stage1", "ValueError: no address")
        >>> error.queue, str(error).startswith("instance 'order-1' is parked in dlq.stageflow.orders.stage1")
        ('dlq.stageflow.orders.stage1', True)
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
    """The attributes of `WorkflowResult` that `WorkflowFailed.result` has; see there."""

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
    """The instance ended with another status than completed.

    `WorkflowResult.raise_for_status` raises it.

    Args:
        result: The `WorkflowResult`.

    Attributes:
        failed_stage: Id of the stage that failed the instance, or None.

    Example:
        >>> from stageflow_actors import Workflow, WorkflowFailed
        >>> from stageflow_actors.testing import run
        >>> result = run(Workflow("orders").add_stage(lambda order: 1 / 0, id="divide"), {})
        >>> try:
        ...     result.raise_for_status()
        ... except WorkflowFailed as error:
        ...     print(error.failed_stage, error.result.error)
        divide ZeroDivisionError: division by zero
    """

    def __init__(self, result: InstanceResult) -> None:
        at = f" at stage {result.failed_stage!r}" if result.failed_stage else ""
        why = f": {result.error}" if result.error else ""
        super().__init__(f"instance {result.instance_id!r} of {result.workflow_id!r} ended {result.status}{at}{why}")
        self.result = result
        self.failed_stage: str | None = result.failed_stage


class StageError(StageFlowError):
    """Raised by a handler to fail its stage.

    Args:
        message: Why the stage failed.
        retryable: True to retry as the policy of the stage allows; False for a final failure, unless `retry_on` of the
            policy names `StageError`. Default: False.

    Example:
        >>> from stageflow_actors import Retry, StageError, Workflow
        >>> from stageflow_actors.testing import run
        >>> def pay(order):
        ...     raise StageError("the bank is busy", retryable=order["busy"])
        >>> flow = Workflow("orders", retry=Retry.fixed(max_attempts=3, delay=1)).add_stage(pay)
        >>> run(flow, {"busy": True}).stages[0].attempts, run(flow, {"busy": False}).stages[0].attempts
        (3, 1)
    """

    def __init__(self, message: str = "", retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class StageTimeout(StageFlowError):
    """An attempt exceeded the timeout of its stage and was stopped.

    Args:
        stage_id: The id of the stage; without `seconds` the whole message, as another process sent it.
        seconds: The timeout. Default: None.

    Example:
        >>> from stageflow_actors import Retry, StageTimeout
        >>> print(StageTimeout("pay", 30))
        stage 'pay' ran longer than its timeout of 30 s
        >>> Retry.fixed(max_attempts=2, delay=5, retry_on=StageTimeout).next_delay(1, StageTimeout("pay", 30))
        5.0
    """

    def __init__(self, stage_id: str, seconds: float | None = None) -> None:
        if seconds is None:
            super().__init__(stage_id)
        else:
            super().__init__(f"stage {stage_id!r} ran longer than its timeout of {seconds:g} s")
        self.stage_id: str | None = None if seconds is None else stage_id
        self.seconds = seconds


class WorkerDied(StageFlowError):
    """The worker process died during an attempt: a crash, a signal, out of memory.

    Args:
        stage_id: The id of the stage; without `reason` the whole message, as another process sent it.
        reason: Why it died. Default: None.
        exit_code: Exit code as in `subprocess`: negative for the signal that ended the process. Default: not known.
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
    """The broker does not answer: it is not running, or it starts or stops."""


class QueueFull(StageFlowError):
    """A new instance was refused because a queue or the disk is full.

    Nothing was enqueued; submit again later.

    Args:
        message: Which limit was reached.
        queue: The full queue. Default: None, for a full disk.
        limit: Number of messages that the queue holds. Default: None.
    """

    def __init__(self, message: str, *, queue: str | None = None, limit: int | None = None) -> None:
        super().__init__(message)
        self.queue = queue
        self.limit = limit


class PayloadTooLarge(StageFlowError):
    """A message exceeds the size limit; nothing was enqueued.

    Args:
        message: Which message.
        size: Its size in bytes. Default: not known.
        limit: The limit in bytes, `Config.max_message_bytes`. Default: not known.
    """

    def __init__(self, message: str, *, size: int | None = None, limit: int | None = None) -> None:
        super().__init__(message)
        self.size = size
        self.limit = limit


class JournalCorrupt(StageFlowError):
    """The journal on disk is damaged before its end.

    `stageflow journal repair` keeps the intact part.

    Args:
        message: What is damaged.
        file: Path of the file. Default: not known.
        offset: Offset of the damage in bytes. Default: not known.
    """

    def __init__(self, message: str, *, file: str | None = None, offset: int | None = None) -> None:
        super().__init__(message)
        self.file = file
        self.offset = offset


class JournalLocked(StageFlowError):
    """Another program uses the data directory.

    `Runtime.connect` attaches to the cluster of that program.

    Args:
        message: Which directory, and the fix.
        data_dir: Path of the directory. Default: not known.
        pid: Process id of its owner. Default: not known.
    """

    def __init__(self, message: str, *, data_dir: str | None = None, pid: int | None = None) -> None:
        super().__init__(message)
        self.data_dir = data_dir
        self.pid = pid
