"""What `on_event` tells of: stages that completed, instances that ended.

Events are told at most once, those of one instance in the order in which they happened; what happens while nobody
listens, or while the connection to the broker is down, is not told later. For what must not be missed there are
results (`Instance.result`) and the history (`Instance.history`).
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from stageflow_actors.core.result import WorkflowResult
from stageflow_actors.core.status import WorkflowStatus

__all__ = ["Event", "StageCompleted", "WorkflowCompensated", "WorkflowCompleted", "WorkflowFailed"]


class StageCompleted(Struct, frozen=True, kw_only=True):
    """A stage of an instance has completed.

    `epoch` counts the instance's runs from 1, `attempt` the stage's attempts. Times are seconds since the Unix epoch,
    `duration` is seconds, `result` what the handler returned.
    """

    workflow_id: str
    version: int
    instance_id: str
    epoch: int
    stage_id: str
    attempt: int
    started_at: float
    finished_at: float
    duration: float
    result: Any = None


class _Ended(Struct, frozen=True, kw_only=True):
    workflow_id: str
    version: int
    instance_id: str
    epoch: int
    status: WorkflowStatus
    started_at: float
    finished_at: float
    duration: float
    result: WorkflowResult[Any]


class WorkflowCompleted(_Ended, frozen=True, kw_only=True):
    """An instance has completed. `duration` is seconds from submit to end; `result` is what `execute` would return."""


class WorkflowFailed(_Ended, frozen=True, kw_only=True):
    """An instance has ended otherwise: `status` is failed, compensation_failed or cancelled.

    `error` is a string such as `ValueError: boom failed`, `failed_stage` the stage that failed it, where one did.
    """

    error: str | None = None
    failed_stage: str | None = None


class WorkflowCompensated(_Ended, frozen=True, kw_only=True):
    """An instance has failed and all that was to be undone has been: `error` and `failed_stage` say why."""

    error: str | None = None
    failed_stage: str | None = None


Event = StageCompleted | WorkflowCompleted | WorkflowFailed | WorkflowCompensated
"""What a callback is given."""
