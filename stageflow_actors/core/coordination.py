"""The coordinator's decisions: what follows when a stage failed, a message is a dead letter, or a wait is over.

Pure functions: an event in, a `Transition` out. The coordinator executes transitions in batches, and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Raw

from stageflow_actors.core.envelope import (
    NIL,
    UNCERTAIN,
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
from stageflow_actors.core.failures import UNCERTAIN_MARK, is_uncertain
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
from stageflow_actors.core.tracebacks.table import compensation_place, with_traceback

__all__ = ["Plans", "UnknownPlan", "decide", "decide_gathered"]

Plans = Mapping[tuple[str, int], WorkflowPlan]
"""Plans by workflow id and version."""


class UnknownPlan(Exception):
    """No plan is registered for the workflow and version of an event, or the plan lacks its stage."""


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
    """Return what follows an event. `cancelled` is the reason if the instance is cancelled.

    If the message of a gather is a dead letter, `body` is its base and `arrivals` are the arrivals of the gather. The
    broker omits the label of a first delivery (""): it is `FAILED` if the envelope has a failed stage, else `BEGIN`.

    Raises `UnknownPlan` if the workflow version of the event is not registered.
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
        if label == CANCELLED:
            skipped = _skip_waiting(plan, envelope, cancelled, failure, naming, now)
            if skipped is not None:
                return skipped
        # The cancellation interrupts running stages: a stage that fails then is not the reason for the end.
        envelope.failed_stage = None
        return _cancel(plan, envelope, cancelled, naming, now)
    if label == FAILED:
        return Transition([begin_compensation(plan, envelope, naming, now, WorkflowStatus.compensated)])
    if label == DEAD:
        return _handle_dead_letter(plan, envelope, failure, attempts, naming, now, arrivals)
    if label == BEGIN:
        transition = enter_stage(plan, envelope.stage_id, envelope, naming, now, envelope.steps)
        if plan.timeout:
            limit = OpenGather(TIMEOUT, 1, naming.coordinator, TIMEOUT, encode(plan.timeout), plan.timeout)
            transition.opens = [*transition.opens, limit]
        return transition
    if label == RESUME:
        return _resume(plan, envelope, None, naming, now)
    raise ValueError(f"unknown event {label!r}")


def decide_gathered(
    base: bytes,
    arrivals: list[tuple[str, bytes]],
    plans: Plans,
    naming: Naming,
    now: float,
    cancelled: str | None = None,
) -> Transition:
    """Return what follows a signal that needs no user code, or its timeout if there is no arrival."""
    envelope = decode_envelope(base)
    plan = plans.get((envelope.workflow_id, envelope.version))
    if plan is None:
        raise UnknownPlan(f"version {envelope.version} of workflow {envelope.workflow_id!r} is not registered")
    if cancelled is not None:
        return _cancel(plan, envelope, cancelled, naming, now)
    return _resume(plan, envelope, arrivals[0][1] if arrivals else None, naming, now)


def _skip_waiting(
    plan: WorkflowPlan, envelope: Envelope, reason: str, failure: Failure | None, naming: Naming, now: float
) -> Transition | None:
    """Return what follows a message that no worker was running when the instance was cancelled.

    A branch or item arrives at its join. None: no other part of the instance is running. `failure` is that of its last
    attempt.
    """
    stage = plan.stage(envelope.stage_id)
    if stage is None:
        return None
    uncertain = _is_uncertain(stage, envelope, failure)
    if uncertain and not stage.joins:
        skip_cancelled(stage, envelope, reason, naming, now, uncertain=True)
    if stage.kind == MAP and is_carrier(envelope):
        return fail_unpublished_items(stage, envelope, reason)
    return skip_cancelled(stage, envelope, reason, naming, now, uncertain=uncertain) if stage.joins else None


def _is_uncertain(stage: StagePlan, envelope: Envelope, failure: Failure | None) -> bool:
    return stage.when_uncertain and (is_uncertain(failure) or UNCERTAIN_MARK in (envelope.steps or ()))


def _cancel(plan: WorkflowPlan, envelope: Envelope, reason: str, naming: Naming, now: float) -> Transition:
    """Compensate the completed stages; the final status is `cancelled` unless a compensation fails."""
    envelope.error = reason
    return Transition([begin_compensation(plan, envelope, naming, now, WorkflowStatus.cancelled)])


def _resume(plan: WorkflowPlan, envelope: Envelope, payload: bytes | None, naming: Naming, now: float) -> Transition:
    stage = _stage_of(plan, envelope)
    began = now if envelope.since is None else envelope.since
    duration, envelope.since = max(0.0, now - began), None
    if stage.kind == SIGNAL:
        envelope.payload = NIL
    if stage.kind == SIGNAL and payload is None:
        text = f"StageTimeout: no signal {stage.signal!r} came within {stage.seconds:g} s"
        failed = StageRecord(stage.id, StageStatus.failed.value, 1, began, duration, text)
        return _compensate_at_once(plan, fail_stage(plan, stage, envelope, failed, naming, now), envelope, naming, now)
    data = Raw(payload) if payload else NIL
    record = StageRecord(stage.id, StageStatus.completed.value, 1, began, duration, None, data)
    envelope.trail = append_record(envelope.trail, record)
    return leave_stage(plan, stage, envelope, naming, now)


def _stage_of(plan: WorkflowPlan, envelope: Envelope) -> StagePlan:
    stage = plan.stage(envelope.stage_id)
    if stage is None:
        raise UnknownPlan(
            f"version {envelope.version} of workflow {envelope.workflow_id!r} has no stage {envelope.stage_id!r}"
        )
    return stage


def _handle_dead_letter(
    plan: WorkflowPlan,
    envelope: Envelope,
    failure: Failure | None,
    attempts: int,
    naming: Naming,
    now: float,
    arrivals: Arrivals | None,
) -> Transition:
    error = "WorkerDied: the worker process died" if failure is None else failure.message
    trace = None if failure is None else failure.traceback
    if envelope.compensation is not None:
        place = compensation_place(envelope.compensation.plan[0])
        envelope.tracebacks = with_traceback(envelope.tracebacks, place, trace)
        record = CompensationRecord(envelope.compensation.plan[0], StageStatus.failed.value, error)
        return Transition([continue_compensation(plan, envelope, record, naming, now)])
    stage = _stage_of(plan, envelope)
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
        request = decode_request(envelope.payload)
        envelope.context, envelope.payload, envelope.steps = request.before, request.payload, request.steps
        attempts, started = request.attempt + attempts - 1, request.started
    envelope.tracebacks = with_traceback(envelope.tracebacks, stage.id, trace)
    failed = StageRecord(stage.id, StageStatus.failed.value, max(1, attempts), started, max(0.0, now - started), error)
    if _is_uncertain(stage, envelope, failure or Failure("died", error)):
        failed.undo = UNCERTAIN
    return _compensate_at_once(plan, fail_stage(plan, stage, envelope, failed, naming, now), envelope, naming, now)


def _compensate_at_once(
    plan: WorkflowPlan, transition: Transition, envelope: Envelope, naming: Naming, now: float
) -> Transition:
    """Replace the failure event by the compensation: the caller is the coordinator, which would receive the event."""
    if [one.label for one in transition.publishes] != [FAILED]:
        return transition
    return Transition([begin_compensation(plan, envelope, naming, now, WorkflowStatus.compensated)])
