"""What follows: from an envelope and what became of its stage to the next body and where it goes.

Pure functions over values. A stage actor, the coordinator, a compensation actor and the in-process test runner all ask
here, so that a workflow means the same everywhere.
"""

from __future__ import annotations

from collections.abc import Collection

from msgspec import Struct

from stageflow_actors.core.envelope import (
    CompensationRecord,
    CompensationTask,
    Envelope,
    Outcome,
    StageRecord,
    append_record,
    decode_trail,
    encode,
)
from stageflow_actors.core.plan import COMPENSATE, FAILED, FINISHED, Naming, StagePlan, WorkflowPlan
from stageflow_actors.core.status import StageStatus, WorkflowStatus

__all__ = [
    "Step",
    "after_compensation",
    "after_stage",
    "begin_compensation",
    "completed_stages",
    "fail_stage",
    "finish",
    "give_up_stage",
    "unmet",
]


class Step(Struct, frozen=True):
    """One message to be published: `terminal` when it ends the instance."""

    queue: str
    label: str
    body: bytes
    terminal: bool = False
    ttl: float = 0.0


def after_stage(plan: WorkflowPlan, stage: StagePlan, envelope: Envelope, naming: Naming, now: float) -> Step:
    """The stage is over and the instance goes on: `envelope` holds the context and trail as they are now."""
    following = plan.stages[stage.index + 1] if stage.index + 1 < len(plan.stages) else None
    if following is None:
        return finish(envelope, WorkflowStatus.completed, naming, now)
    envelope.stage_id = following.id
    return Step(following.queue, following.id, encode(envelope), ttl=following.ttl)


def finish(
    envelope: Envelope,
    status: WorkflowStatus,
    naming: Naming,
    now: float,
    compensations: list[CompensationRecord] | None = None,
) -> Step:
    """The instance has ended."""
    outcome = Outcome(
        envelope.workflow_id,
        envelope.version,
        status.value,
        envelope.context,
        envelope.trail,
        envelope.started_at,
        now,
        envelope.error,
        envelope.failed_stage,
        compensations or [],
        envelope.digest,
    )
    return Step(naming.finished, FINISHED, encode(outcome), terminal=True)


def fail_stage(envelope: Envelope, stage_id: str, record: StageRecord, naming: Naming) -> Step:
    """A required stage has failed for good: the coordinator decides what is to be undone."""
    envelope.trail = append_record(envelope.trail, record)
    envelope.error = record.error
    envelope.failed_stage = stage_id
    return Step(naming.coordinator, FAILED, encode(envelope))


def give_up_stage(
    plan: WorkflowPlan, stage: StagePlan, envelope: Envelope, record: StageRecord, naming: Naming, now: float
) -> Step:
    """A stage has failed for good: on without it if it is optional, to the coordinator if not."""
    if stage.required:
        return fail_stage(envelope, stage.id, record, naming)
    envelope.trail = append_record(envelope.trail, record)
    return after_stage(plan, stage, envelope, naming, now)


def completed_stages(trail: bytes) -> list[str]:
    """The stages that completed, in order of completion, once each."""
    found: dict[str, None] = {}
    for record in decode_trail(trail):
        if record.status == StageStatus.completed:
            found[record.stage_id] = None
    return list(found)


def unmet(after: Collection[str], trail: bytes) -> list[str]:
    """Which of `after` have not completed."""
    done = set(completed_stages(trail))
    return [stage_id for stage_id in after if stage_id not in done]


def begin_compensation(
    plan: WorkflowPlan, envelope: Envelope, naming: Naming, now: float, final_status: WorkflowStatus
) -> Step:
    """Plan what is to be undone: the completed stages that have a compensation, last completed first.

    Optional stages that failed never completed, so they are not in the plan; optional ones that completed are.
    """
    undone = [s.id for s in plan.stages if s.compensated]
    todo = [stage_id for stage_id in reversed(completed_stages(envelope.trail)) if stage_id in undone]
    if not todo:
        status = WorkflowStatus.failed if final_status == WorkflowStatus.compensated else final_status
        return finish(envelope, status, naming, now)
    envelope.compensation = CompensationTask(todo, [], final_status.value)
    return _compensate_next(plan, envelope)


def after_compensation(
    plan: WorkflowPlan, envelope: Envelope, record: CompensationRecord, naming: Naming, now: float
) -> Step:
    """One compensation is over, well or not: the next one, or the end that says truthfully how it went."""
    task = envelope.compensation
    assert task is not None, "a compensation message without its task"
    task.done.append(record)
    task.plan = task.plan[1:]
    if task.plan:
        return _compensate_next(plan, envelope)
    failed = any(done.status == StageStatus.failed for done in task.done)
    status = WorkflowStatus.compensation_failed if failed else WorkflowStatus(task.final_status)
    return finish(envelope, status, naming, now, task.done)


def _compensate_next(plan: WorkflowPlan, envelope: Envelope) -> Step:
    assert envelope.compensation is not None
    stage_id = envelope.compensation.plan[0]
    envelope.stage_id = stage_id
    return Step(plan.compensation.queue, COMPENSATE + stage_id, encode(envelope))
