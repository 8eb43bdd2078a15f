"""The coordinator's decisions: what becomes of an instance whose stage failed or whose message was dead-lettered.

Pure: an event in, what follows out. The coordinator itself only carries these out, in batches.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Raw

from stageflow_actors.core.envelope import (
    NIL,
    CompensationRecord,
    Envelope,
    Failure,
    Reply,
    StageRecord,
    append_record,
    decode_command,
    decode_envelope,
    encode,
)
from stageflow_actors.core.gather_results import (
    Arrivals,
    completed_items_record,
    decode_item_ends,
    decode_request,
    fail_unpublished_items,
    is_carrier,
    join_branches,
)
from stageflow_actors.core.plan import (
    BEGIN,
    CANCELLED,
    DEAD,
    FAILED,
    MAP,
    PARALLEL,
    RESUME,
    SIGNAL,
    STAGE,
    TIMEOUT,
    UNANSWERED,
    Naming,
    StagePlan,
    WorkflowPlan,
)
from stageflow_actors.core.routing import (
    GatherArrival,
    OpenGather,
    Transition,
    begin_compensation,
    continue_compensation,
    enter_stage,
    fail_stage,
    leave_stage,
    skip_cancelled,
)
from stageflow_actors.core.status import StageStatus, WorkflowStatus

__all__ = ["Plans", "UnknownPlan", "decide", "decide_gathered"]

Plans = Mapping[tuple[str, int], WorkflowPlan]
"""Plans by workflow id and version."""


class UnknownPlan(Exception):
    """No plan is registered for the workflow and version of an event; the message says which."""


def decide(
    label: str,
    body: bytes,
    failure: Failure | None,
    attempts: int,
    plans: Plans,
    naming: Naming,
    now: float,
    cancelled: str | None = None,
    arrivals: Arrivals | None = None,
) -> Transition:
    """What follows an event. `cancelled` says why the instance has been.

    Of a gathered message that was dead-lettered `body` is the base, and `arrivals` are what had come to it.

    Raises `UnknownPlan` when the version it belongs to is not registered.

    A first delivery comes without its label (""): it is a failure if the envelope says so, else a beginning.
    """
    if label == UNANSWERED:
        error = "WorkerDied: the worker process died" if failure is None else failure.message
        return Transition(arrivals=[GatherArrival(decode_command(body).key, "reply", encode(Reply(NIL, error)))])
    envelope = decode_envelope(body)
    plan = plans.get((envelope.workflow_id, envelope.version))
    if plan is None:
        raise UnknownPlan(f"version {envelope.version} of workflow {envelope.workflow_id!r} is not registered")
    if not label:
        label = BEGIN if envelope.failed_stage is None else FAILED
    if cancelled is not None and label in (BEGIN, RESUME, CANCELLED, FAILED):
        if label == CANCELLED and (passed := _passed_through(plan, envelope, cancelled, naming, now)) is not None:
            return passed
        # A stage that fails once its instance has been cancelled was told to end: that is not why the instance ends.
        envelope.failed_stage = None
        return _cancel(plan, envelope, cancelled, naming, now)
    if label == FAILED:
        return Transition([begin_compensation(plan, envelope, naming, now, WorkflowStatus.compensated)])
    if label == DEAD:
        return _dead(plan, envelope, failure, attempts, naming, now, arrivals)
    if label == BEGIN:
        transition = enter_stage(plan, envelope.stage_id, envelope, naming, now, envelope.steps)
        if plan.timeout:
            limit = OpenGather(TIMEOUT, 1, naming.coordinator, TIMEOUT, encode(plan.timeout), plan.timeout)
            transition.opens = [*transition.opens, limit]
        return transition
    if label == RESUME:
        return _resume(plan, envelope, None, naming, now)
    raise ValueError(f"the coordinator knows no event {label!r}")


def decide_gathered(
    base: bytes,
    arrivals: list[tuple[str, bytes]],
    plans: Plans,
    naming: Naming,
    now: float,
    cancelled: str | None = None,
) -> Transition:
    """What follows a signal that needs no code of the user's, or its absence."""
    envelope = decode_envelope(base)
    plan = plans.get((envelope.workflow_id, envelope.version))
    if plan is None:
        raise UnknownPlan(f"version {envelope.version} of workflow {envelope.workflow_id!r} is not registered")
    if cancelled is not None:
        return _cancel(plan, envelope, cancelled, naming, now)
    return _resume(plan, envelope, arrivals[0][1] if arrivals else None, naming, now)


def _passed_through(
    plan: WorkflowPlan, envelope: Envelope, reason: str, naming: Naming, now: float
) -> Transition | None:
    """What waited for a worker of its stage and was handed over: to its join, if it has one. None: nothing of the
    instance is left in work."""
    stage = plan.stage(envelope.stage_id)
    if stage is None:
        return None
    if stage.kind == MAP and is_carrier(envelope):
        return fail_unpublished_items(stage, envelope, reason)
    return skip_cancelled(stage, envelope, reason, naming, now) if stage.joins else None


def _cancel(plan: WorkflowPlan, envelope: Envelope, reason: str, naming: Naming, now: float) -> Transition:
    """Undo what completed; the end says `cancelled`, unless undoing fails."""
    envelope.error = reason
    return Transition([begin_compensation(plan, envelope, naming, now, WorkflowStatus.cancelled)])


def _resume(plan: WorkflowPlan, envelope: Envelope, payload: bytes | None, naming: Naming, now: float) -> Transition:
    stage = _known(plan, envelope)
    began = now if envelope.since is None else envelope.since
    took, envelope.since = max(0.0, now - began), None
    if stage.kind == SIGNAL:
        envelope.payload = NIL
    if stage.kind == SIGNAL and payload is None:
        text = f"StageTimeout: no signal {stage.signal!r} came within {stage.seconds:g} s"
        lost = StageRecord(stage.id, StageStatus.failed.value, 1, began, took, text)
        return _compensating(plan, fail_stage(plan, stage, envelope, lost, naming, now), envelope, naming, now)
    record = StageRecord(stage.id, StageStatus.completed.value, 1, began, took, None, Raw(payload) if payload else NIL)
    envelope.trail = append_record(envelope.trail, record)
    return leave_stage(plan, stage, envelope, naming, now)


def _known(plan: WorkflowPlan, envelope: Envelope) -> StagePlan:
    stage = plan.stage(envelope.stage_id)
    if stage is None:
        raise UnknownPlan(
            f"version {envelope.version} of workflow {envelope.workflow_id!r} has no stage {envelope.stage_id!r}"
        )
    return stage


def _dead(
    plan: WorkflowPlan,
    envelope: Envelope,
    failure: Failure | None,
    attempts: int,
    naming: Naming,
    now: float,
    arrivals: Arrivals | None,
) -> Transition:
    error = "WorkerDied: the worker process died" if failure is None else failure.message
    if envelope.compensation is not None:
        record = CompensationRecord(envelope.compensation.plan[0], StageStatus.failed.value, error)
        return Transition([continue_compensation(plan, envelope, record, naming, now)])
    stage = _known(plan, envelope)
    started = now if envelope.since is None else envelope.since
    if stage.kind == MAP and arrivals is None and is_carrier(envelope):
        return fail_unpublished_items(stage, envelope, error)
    if arrivals is not None and stage.kind == PARALLEL:
        branch = join_branches(plan, envelope, arrivals).failure
        if branch is not None:
            envelope.error, envelope.failed_stage = branch.error, branch.stage_id
            return Transition([begin_compensation(plan, envelope, naming, now, WorkflowStatus.compensated)])
    elif arrivals is not None and stage.kind == MAP:
        undo = completed_items_record(stage, decode_item_ends(arrivals), now) if stage.required else None
        if undo is not None:
            envelope.trail = append_record(envelope.trail, undo)
    elif arrivals is not None and stage.kind == STAGE:
        asked = decode_request(envelope.payload)
        envelope.context, envelope.payload, envelope.steps = asked.before, asked.payload, asked.steps
        attempts, started = asked.attempt + attempts - 1, asked.started
    lost = StageRecord(stage.id, StageStatus.failed.value, max(1, attempts), started, max(0.0, now - started), error)
    return _compensating(plan, fail_stage(plan, stage, envelope, lost, naming, now), envelope, naming, now)


def _compensating(
    plan: WorkflowPlan, transition: Transition, envelope: Envelope, naming: Naming, now: float
) -> Transition:
    """A failure that would be told to the coordinator is dealt with at once: it is the coordinator that asks."""
    if [step.label for step in transition.publishes] != [FAILED]:
        return transition
    return Transition([begin_compensation(plan, envelope, naming, now, WorkflowStatus.compensated)])
