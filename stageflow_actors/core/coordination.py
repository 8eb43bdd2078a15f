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
    decode_asked,
    end_rest,
    ended_items,
    is_carrier,
    join_branches,
    undo_items,
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
    Arrive,
    Moves,
    Open,
    after_compensation,
    begin_compensation,
    enter,
    give_up,
    leave,
    pass_through,
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
) -> Moves:
    """What follows an event. `cancelled` says why the instance has been.

    Of a gathered message that was dead-lettered `body` is the base, and `arrivals` are what had come to it.

    Raises `UnknownPlan` when the version it belongs to is not registered.

    A first delivery comes without its label (""): it is a failure if the envelope says so, else a beginning.
    """
    if label == UNANSWERED:
        error = "WorkerDied: the worker process died" if failure is None else failure.message
        return Moves(arrivals=[Arrive(decode_command(body).key, "reply", encode(Reply(NIL, error)))])
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
        return Moves([begin_compensation(plan, envelope, naming, now, WorkflowStatus.compensated)])
    if label == DEAD:
        return _dead(plan, envelope, failure, attempts, naming, now, arrivals)
    if label == BEGIN:
        moves = enter(plan, envelope.stage_id, envelope, naming, now, envelope.steps)
        if plan.timeout:
            limit = Open(TIMEOUT, 1, naming.coordinator, TIMEOUT, encode(plan.timeout), plan.timeout)
            moves.opens = [*moves.opens, limit]
        return moves
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
) -> Moves:
    """What follows a signal that needs no code of the user's, or its absence."""
    envelope = decode_envelope(base)
    plan = plans.get((envelope.workflow_id, envelope.version))
    if plan is None:
        raise UnknownPlan(f"version {envelope.version} of workflow {envelope.workflow_id!r} is not registered")
    if cancelled is not None:
        return _cancel(plan, envelope, cancelled, naming, now)
    return _resume(plan, envelope, arrivals[0][1] if arrivals else None, naming, now)


def _passed_through(plan: WorkflowPlan, envelope: Envelope, reason: str, naming: Naming, now: float) -> Moves | None:
    """What waited for a worker of its stage and was handed over: to its join, if it has one. None: nothing of the
    instance is left in work."""
    stage = plan.stage(envelope.stage_id)
    if stage is None:
        return None
    if stage.kind == MAP and is_carrier(envelope):
        return end_rest(stage, envelope, reason)
    return pass_through(stage, envelope, reason, naming, now) if stage.joins else None


def _cancel(plan: WorkflowPlan, envelope: Envelope, reason: str, naming: Naming, now: float) -> Moves:
    """Undo what completed; the end says `cancelled`, unless undoing fails."""
    envelope.error = reason
    return Moves([begin_compensation(plan, envelope, naming, now, WorkflowStatus.cancelled)])


def _resume(plan: WorkflowPlan, envelope: Envelope, payload: bytes | None, naming: Naming, now: float) -> Moves:
    stage = _known(plan, envelope)
    began = now if envelope.since is None else envelope.since
    took, envelope.since = max(0.0, now - began), None
    if stage.kind == SIGNAL:
        envelope.payload = NIL
    if stage.kind == SIGNAL and payload is None:
        text = f"StageTimeout: no signal {stage.signal!r} came within {stage.seconds:g} s"
        lost = StageRecord(stage.id, StageStatus.failed.value, 1, began, took, text)
        return _compensating(plan, give_up(plan, stage, envelope, lost, naming, now), envelope, naming, now)
    record = StageRecord(stage.id, StageStatus.completed.value, 1, began, took, None, Raw(payload) if payload else NIL)
    envelope.trail = append_record(envelope.trail, record)
    return leave(plan, stage, envelope, naming, now)


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
) -> Moves:
    error = "WorkerDied: the worker process died" if failure is None else failure.message
    if envelope.compensation is not None:
        record = CompensationRecord(envelope.compensation.plan[0], StageStatus.failed.value, error)
        return Moves([after_compensation(plan, envelope, record, naming, now)])
    stage = _known(plan, envelope)
    started = now if envelope.since is None else envelope.since
    if stage.kind == MAP and arrivals is None and is_carrier(envelope):
        return end_rest(stage, envelope, error)
    if arrivals is not None and stage.kind == PARALLEL:
        branch = join_branches(plan, envelope, arrivals).lost
        if branch is not None:
            envelope.error, envelope.failed_stage = branch.error, branch.stage_id
            return Moves([begin_compensation(plan, envelope, naming, now, WorkflowStatus.compensated)])
    elif arrivals is not None and stage.kind == MAP:
        undo = undo_items(stage, ended_items(arrivals), now) if stage.required else None
        if undo is not None:
            envelope.trail = append_record(envelope.trail, undo)
    elif arrivals is not None and stage.kind == STAGE:
        asked = decode_asked(envelope.payload)
        envelope.context, envelope.payload, envelope.steps = asked.before, asked.payload, asked.steps
        attempts, started = asked.attempt + attempts - 1, asked.started
    lost = StageRecord(stage.id, StageStatus.failed.value, max(1, attempts), started, max(0.0, now - started), error)
    return _compensating(plan, give_up(plan, stage, envelope, lost, naming, now), envelope, naming, now)


def _compensating(plan: WorkflowPlan, moves: Moves, envelope: Envelope, naming: Naming, now: float) -> Moves:
    """A failure that would be told to the coordinator is dealt with at once: it is the coordinator that asks."""
    if [step.label for step in moves.steps] != [FAILED]:
        return moves
    return Moves([begin_compensation(plan, envelope, naming, now, WorkflowStatus.compensated)])
