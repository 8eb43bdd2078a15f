"""The coordinator's decisions: what becomes of an instance whose stage failed or whose message was dead-lettered.

Pure: an event in, one step out. The coordinator itself only carries these out, in batches.
"""

from __future__ import annotations

from collections.abc import Mapping

from stageflow_actors.core.envelope import CompensationRecord, Envelope, Failure, StageRecord, decode_envelope
from stageflow_actors.core.plan import DEAD, FAILED, Naming, WorkflowPlan
from stageflow_actors.core.routing import Step, after_compensation, begin_compensation, give_up_stage
from stageflow_actors.core.status import StageStatus, WorkflowStatus

__all__ = ["Plans", "UnknownPlan", "decide"]

Plans = Mapping[tuple[str, int], WorkflowPlan]
"""Plans by workflow id and version."""


class UnknownPlan(Exception):
    """No plan is registered for the workflow and version of an event; the message says which."""


def decide(
    label: str, body: bytes, failure: Failure | None, attempts: int, plans: Plans, naming: Naming, now: float
) -> Step:
    """What follows an event. Raises `UnknownPlan` when the version it belongs to is not registered."""
    envelope = decode_envelope(body)
    plan = plans.get((envelope.workflow_id, envelope.version))
    if plan is None:
        raise UnknownPlan(f"version {envelope.version} of workflow {envelope.workflow_id!r} is not registered")
    if label == FAILED:
        return begin_compensation(plan, envelope, naming, now, WorkflowStatus.compensated)
    if label == DEAD:
        return _dead(plan, envelope, failure, attempts, naming, now)
    raise ValueError(f"the coordinator knows no event {label!r}")


def _dead(
    plan: WorkflowPlan, envelope: Envelope, failure: Failure | None, attempts: int, naming: Naming, now: float
) -> Step:
    error = "WorkerDied: the worker process died" if failure is None else failure.message
    if envelope.compensation is not None:
        record = CompensationRecord(envelope.compensation.plan[0], StageStatus.failed.value, error)
        return after_compensation(plan, envelope, record, naming, now)
    stage = plan.stage(envelope.stage_id)
    if stage is None:
        raise UnknownPlan(
            f"version {envelope.version} of workflow {envelope.workflow_id!r} has no stage {envelope.stage_id!r}"
        )
    lost = StageRecord(stage.id, StageStatus.failed.value, max(1, attempts), now, 0.0, error)
    step = give_up_stage(plan, stage, envelope, lost, naming, now)
    if step.label != FAILED:
        return step
    return begin_compensation(plan, envelope, naming, now, WorkflowStatus.compensated)
