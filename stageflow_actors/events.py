"""Events for `Client.on_event`: stages that completed, instances that ended.

A callback receives each event at most once, those of one instance in order. Events that happen while no callback is
registered, or while the connection to the broker is down, are not delivered later. `Instance.result` and
`Instance.history` miss nothing.

Example:
    >>> from stageflow_actors.events import Event, StageCompleted
    >>> def on_event(event: Event) -> None:
    ...     if isinstance(event, StageCompleted) and event.duration > 10:
    ...         print(f"{event.stage_id} of {event.instance_id} took {event.duration:g} s")
    >>> event = StageCompleted(
    ...     workflow_id="orders", version=1, instance_id="A-1", epoch=1, stage_id="ship", attempt=1,
    ...     started_at=1800000000.0, finished_at=1800000012.5, duration=12.5,
    ... )
    >>> on_event(event)
    ship of A-1 took 12.5 s
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from stageflow_actors.core.result import WorkflowResult
from stageflow_actors.core.status import WorkflowStatus

__all__ = ["Event", "StageCompleted", "WorkflowCompensated", "WorkflowCompleted", "WorkflowFailed"]


class StageCompleted(Struct, frozen=True, kw_only=True):
    """A stage of an instance has completed.

    Attributes:
        workflow_id: The id of the workflow.
        version: The version of the workflow.
        instance_id: The id of the instance.
        epoch: Number of the run of the instance, from 1.
        stage_id: The id of the stage.
        attempt: Number of the attempt that completed, from 1.
        started_at: Start of that attempt, in seconds since the Unix epoch.
        finished_at: End of that attempt, in seconds since the Unix epoch.
        duration: Seconds that the attempt took.
        result: The value that the handler returned, or None.
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
    """An instance has completed.

    Attributes:
        workflow_id: The id of the workflow.
        version: The version of the workflow.
        instance_id: The id of the instance.
        epoch: Number of the run of the instance, from 1.
        status: The final status.
        started_at: Submit of the instance, in seconds since the Unix epoch.
        finished_at: End of the instance, in seconds since the Unix epoch.
        duration: Seconds from submit to end.
        result: The result, as `execute` would return it.
    """


class WorkflowFailed(_Ended, frozen=True, kw_only=True):
    """An instance has ended as failed, compensation_failed or cancelled.

    Attributes:
        workflow_id: The id of the workflow.
        version: The version of the workflow.
        instance_id: The id of the instance.
        epoch: Number of the run of the instance, from 1.
        status: The final status.
        started_at: Submit of the instance, in seconds since the Unix epoch.
        finished_at: End of the instance, in seconds since the Unix epoch.
        duration: Seconds from submit to end.
        result: The result, as `execute` would return it.
        error: The error, as `ValueError: no address`, or None.
        failed_stage: Id of the stage that failed the instance, or None.
    """

    error: str | None = None
    failed_stage: str | None = None


class WorkflowCompensated(_Ended, frozen=True, kw_only=True):
    """An instance has failed, and its completed stages are compensated.

    Attributes:
        workflow_id: The id of the workflow.
        version: The version of the workflow.
        instance_id: The id of the instance.
        epoch: Number of the run of the instance, from 1.
        status: The final status.
        started_at: Submit of the instance, in seconds since the Unix epoch.
        finished_at: End of the instance, in seconds since the Unix epoch.
        duration: Seconds from submit to end.
        result: The result, as `execute` would return it.
        error: The error, as `ValueError: no address`, or None.
        failed_stage: Id of the stage that failed the instance, or None.
    """

    error: str | None = None
    failed_stage: str | None = None


Event = StageCompleted | WorkflowCompleted | WorkflowFailed | WorkflowCompensated
"""The type of the argument of a callback."""
