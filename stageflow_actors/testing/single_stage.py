"""`stage_context`: a `StageContext` for the unit test of one handler, with its steps in memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from msgspec import Raw

from stageflow_actors.core.codec import encode_value
from stageflow_actors.core.envelope import EMPTY_TRAIL, NIL, Envelope, StageRecord, append_record
from stageflow_actors.core.failures import failure_of, write_failure
from stageflow_actors.core.status import StageStatus
from stageflow_actors.definition.duration import Duration, optional_seconds
from stageflow_actors.runtime.worker.stage_context import StageContext

__all__ = ["stage_context"]


def stage_context(
    *,
    workflow_id: str = "workflow",
    instance_id: str = "instance",
    stage_id: str = "stage",
    attempt: int = 1,
    timeout: Duration | None = None,
    deadline: float | None = None,
    idempotency_key: str | None = None,
    results: Mapping[str, Any] | None = None,
    payload: Any = None,
    previous_failure: BaseException | None = None,
    error: str | None = None,
    item: int | None = None,
    steps: Mapping[str, Any] | None = None,
    cancelled: bool = False,
) -> StageContext:
    """Return a `StageContext` to call a handler with, in a unit test.

    Its steps run once per context and are kept in memory; progress reports are ignored.

    Args:
        workflow_id: The id of the workflow. Default: `workflow`.
        instance_id: The id of the instance. Default: `instance`.
        stage_id: The id of the stage. Default: `stage`.
        attempt: The number of the attempt, from 1. Default: 1.
        timeout: Seconds (or a `timedelta`) from now to `ctx.deadline`. Default: no deadline.
        deadline: `ctx.deadline` itself, in seconds of `time.monotonic()`. Default: that of `timeout`.
        idempotency_key: Default: made of the ids, as in production.
        results: The results of earlier stages by stage id. Default: none.
        payload: The reply that the previous stage's request brought. Default: None.
        previous_failure: The exception of the attempt before. Default: None.
        error: For a compensation: what failed the workflow. Default: None.
        item: The number of the item of a map stage, from 0. Default: None.
        steps: The results of steps that an earlier attempt has completed, by name. Default: none.
        cancelled: True if the instance has been cancelled. Default: False.

    Returns:
        The context.

    Raises:
        InvalidContext: If a result, a step or the payload cannot be encoded.
        WorkflowDefinitionError: If `timeout` is no duration.

    Example:
        >>> from stageflow_actors.testing import stage_context
        >>> def charge(order, ctx):
        ...     return ctx.step("charge", lambda: f"{ctx.results['price']} from {order['customer']}")
        >>> ctx = stage_context(results={"price": 450})
        >>> charge({"customer": "Ida"}, ctx)
        '450 from Ida'
        >>> ctx.is_step_completed("charge")
        True
    """
    trail = EMPTY_TRAIL
    for name, value in (results or {}).items():
        data = Raw(encode_value(value, what=f"the result of stage {name!r}"))
        trail = append_record(trail, StageRecord(name, StageStatus.completed.value, 1, 0.0, 0.0, None, data))
    given = NIL if payload is None else Raw(encode_value(payload, what="the payload"))
    made = _TestContext._create(
        envelope=Envelope(workflow_id, 1, stage_id, NIL, trail, time.time(), given),
        instance_id=instance_id,
        epoch=1,
        stage_id=stage_id,
        attempt=attempt,
        timeout=optional_seconds(timeout, "timeout"),
        failure=None if previous_failure is None else write_failure(failure_of(previous_failure)),
        steps={name: encode_value(value, what=f"the result of step {name!r}") for name, value in (steps or {}).items()},
        store=_MemoryStore(),
        error=error,
        item=None if item is None else str(item),
        slot=_CancelFlag(cancelled),
    )
    if deadline is not None:
        made.deadline = deadline
    made._key = idempotency_key
    return made


class _TestContext(StageContext):
    """A `StageContext` whose idempotency key may be given."""

    __slots__ = ("_key",)

    _key: str | None

    @property
    def idempotency_key(self) -> str:
        return self._key or super().idempotency_key


class _MemoryStore:
    """A step store that keeps nothing: the context itself remembers its steps."""

    def keep(self, name: str, value: bytes) -> None:
        """See `StepStore.keep`."""

    def report(self, progress: bytes) -> None:
        """See `StepStore.report`."""


class _CancelFlag:
    def __init__(self, cancelled: bool) -> None:
        self._cancelled = cancelled

    def is_cancelled(self) -> bool:
        """Return True if the instance has been cancelled."""
        return self._cancelled
