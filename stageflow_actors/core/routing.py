"""What follows: from an envelope and what became of its stage to the next body and where it goes.

Pure functions over values. A stage actor, the coordinator, a compensation actor and the in-process test runner all ask
here, so that a workflow means the same everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec
from msgspec import Struct

from stageflow_actors.core.envelope import (
    NIL,
    CompensationRecord,
    CompensationTask,
    Envelope,
    ItemEnd,
    Outcome,
    StageRecord,
    append_record,
    decode_trail,
    encode,
)
from stageflow_actors.core.plan import (
    BRANCH,
    CANCELLED,
    COMPENSATE,
    DELAY,
    FAILED,
    FINISHED,
    ITEM,
    ITEM_SUFFIX,
    PARALLEL,
    RESUME,
    SIGNAL,
    STAGE,
    Naming,
    StagePlan,
    WorkflowPlan,
)
from stageflow_actors.core.resume_state import completed_branch, steps_of_branch
from stageflow_actors.core.status import StageStatus, WorkflowStatus

__all__ = [
    "CANCELLABLE_GATHER_PREFIXES",
    "GatherArrival",
    "OpenGather",
    "Publish",
    "Transition",
    "begin_compensation",
    "completed_stages",
    "continue_compensation",
    "enter_stage",
    "fail_stage",
    "finish",
    "item_slot",
    "leave_stage",
    "missing_dependencies",
    "passes_payload",
    "report_failure",
    "signal_key",
    "skip_cancelled",
]


class Publish(Struct, frozen=True):
    """One message to be published: `terminal` when it ends the instance. `ttl` and `delay` in seconds."""

    queue: str
    label: str
    body: bytes
    terminal: bool = False
    ttl: float = 0.0
    delay: float = 0.0


class OpenGather(Struct, frozen=True):
    """A gather to be opened: after `need` arrivals, or `deadline` seconds (0: never), `base` goes to the queue."""

    key: str
    need: int
    queue: str
    label: str
    base: bytes
    deadline: float = 0.0


class GatherArrival(Struct, frozen=True):
    """An arrival at a gather."""

    key: str
    slot: str
    body: bytes


class Transition(Struct):
    """What follows from one message, all of it in one settlement."""

    publishes: list[Publish] = []
    opens: list[OpenGather] = []
    arrivals: list[GatherArrival] = []

    def largest(self) -> int:
        """The size of the largest body, in bytes."""
        bodies = [step.body for step in self.publishes] + [one.base for one in self.opens]
        return max(map(len, bodies + [one.body for one in self.arrivals]), default=0)


CANCELLABLE_GATHER_PREFIXES = ("signal:", "reply:", ":timeout")
"""How the keys of gathers begin that a cancelled instance does not wait for. It does wait for branches and items."""


def signal_key(name: str) -> str:
    """The gather at which signals of that name arrive; no stage id holds a colon."""
    return f"signal:{name}"


def enter_stage(
    plan: WorkflowPlan,
    stage_id: str,
    envelope: Envelope,
    naming: Naming,
    now: float,
    kept: dict[str, bytes] | None = None,
) -> Transition:
    """What begins a place of the workflow; the end, for the empty id. `kept`: how far it came before it failed."""
    stage = plan.stage(stage_id) if stage_id else None
    if stage is None:
        return Transition([finish(envelope, WorkflowStatus.completed, naming, now)])
    envelope.stage_id = stage.id
    envelope.attempts, envelope.failure, envelope.steps, envelope.since = 0, None, None, None
    if stage.kind == PARALLEL:
        envelope.since = now
        return _fork(plan, stage, envelope, kept or {})
    envelope.steps = kept
    if stage.kind == DELAY and not stage.seconds:
        done = StageRecord(stage.id, StageStatus.completed.value, 1, now)
        envelope.trail = append_record(envelope.trail, done)
        return leave_stage(plan, stage, envelope, naming, now)
    if stage.kind == DELAY:
        envelope.since = now
        return Transition([Publish(stage.queue, RESUME, encode(envelope), delay=stage.seconds)])
    if stage.kind == SIGNAL:
        envelope.since = now
        label = stage.id if stage.queue != naming.coordinator else RESUME
        waiting = OpenGather(signal_key(stage.signal), 1, stage.queue, label, encode(envelope), stage.seconds)
        return Transition(opens=[waiting])
    return Transition([Publish(stage.queue, stage.id, encode(envelope), ttl=stage.ttl)])


def _fork(plan: WorkflowPlan, stage: StagePlan, envelope: Envelope, kept: Mapping[str, bytes]) -> Transition:
    join = OpenGather(stage.id, len(stage.branches), stage.queue, stage.id, encode(envelope))
    envelope.since = None
    steps = []
    arrivals = []
    for name in stage.branches:
        if (ended := completed_branch(kept, name)) is not None:
            arrivals.append(GatherArrival(stage.id, name, ended))
            continue
        branch = plan.stage(name)
        assert branch is not None, f"branch {name} of {stage.id} is not in its plan"
        envelope.stage_id, envelope.steps = name, steps_of_branch(kept, name)
        steps.append(Publish(branch.queue, name, encode(envelope), ttl=branch.ttl))
    return Transition(steps, [join], arrivals)


def skip_cancelled(stage: StagePlan, envelope: Envelope, reason: str, naming: Naming, now: float) -> Transition:
    """The instance was cancelled before this place was worked: to its join, or to the coordinator."""
    if stage.kind == ITEM:
        return Transition(arrivals=[GatherArrival(stage.joins, item_slot(envelope), encode(ItemEnd(NIL, reason)))])
    envelope.payload, envelope.steps = NIL, None
    if stage.joins:
        skipped = StageRecord(stage.id, StageStatus.skipped.value, 0, now, 0.0, reason)
        envelope.trail = append_record(envelope.trail, skipped)
        return Transition(arrivals=[GatherArrival(stage.joins, stage.id, encode(envelope))])
    return Transition([Publish(naming.coordinator, CANCELLED, encode(envelope))])


def item_slot(envelope: Envelope) -> str:
    """Where the end of an item arrives: its number, which the payload of its envelope is."""
    return str(msgspec.msgpack.decode(envelope.payload, type=int))


def passes_payload(plan: WorkflowPlan, stage: StagePlan) -> bool:
    """Whether a stage comes next that is given what this one hands on: not at the end, of the workflow or of a parallel
    branch, and not before a map or a signal. A delay has no handler, and passes it on."""
    place = None if stage.joins else plan.next_stage(stage)
    while place is not None and place.kind == DELAY:
        place = plan.next_stage(place)
    return place is not None and place.kind in (STAGE, BRANCH, PARALLEL)


def leave_stage(plan: WorkflowPlan, stage: StagePlan, envelope: Envelope, naming: Naming, now: float) -> Transition:
    """The stage is over and the instance goes on: `envelope` holds the context and trail as they are now."""
    if stage.joins:
        return Transition(arrivals=[GatherArrival(stage.joins, stage.id, encode(envelope))])
    return enter_stage(plan, stage.following, envelope, naming, now)


def finish(
    envelope: Envelope,
    status: WorkflowStatus,
    naming: Naming,
    now: float,
    compensations: list[CompensationRecord] | None = None,
) -> Publish:
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
    if status == WorkflowStatus.failed:
        outcome.payload, outcome.steps, outcome.run = envelope.payload, envelope.steps, envelope.run
    return Publish(naming.finished, FINISHED, encode(outcome), terminal=True)


def report_failure(envelope: Envelope, stage_id: str, record: StageRecord, naming: Naming) -> Publish:
    """A required stage has failed for good: the coordinator decides what is to be undone."""
    envelope.trail = append_record(envelope.trail, record)
    envelope.error = record.error
    envelope.failed_stage = stage_id
    return Publish(naming.coordinator, FAILED, encode(envelope))


def fail_stage(
    plan: WorkflowPlan, stage: StagePlan, envelope: Envelope, record: StageRecord, naming: Naming, now: float
) -> Transition:
    """A stage has failed for good: to its join if it has one, on if it is optional, else to the coordinator."""
    if stage.kind == ITEM:
        return Transition(
            arrivals=[GatherArrival(stage.joins, item_slot(envelope), encode(ItemEnd(NIL, record.error)))]
        )
    if stage.required and not stage.joins:
        return Transition([report_failure(envelope, stage.id, record, naming)])
    envelope.trail = append_record(envelope.trail, record)
    envelope.payload = NIL
    return leave_stage(plan, stage, envelope, naming, now)


def completed_stages(trail: bytes) -> list[str]:
    """The stages that completed, in order of completion, once each."""
    found: dict[str, None] = {}
    for record in decode_trail(trail):
        if record.status == StageStatus.completed:
            found[record.stage_id] = None
    return list(found)


def missing_dependencies(after: Collection[str], trail: bytes) -> list[str]:
    """Which of `after` have not completed."""
    done = set(completed_stages(trail))
    return [stage_id for stage_id in after if stage_id not in done]


def begin_compensation(
    plan: WorkflowPlan, envelope: Envelope, naming: Naming, now: float, final_status: WorkflowStatus
) -> Publish:
    """Plan what is to be undone: the completed stages that have a compensation, last completed first.

    Optional stages that failed never completed, so they are not in the plan; optional ones that completed are.
    """
    undone = {s.id for s in plan.stages if s.compensated}
    done = (stage_id.removesuffix(ITEM_SUFFIX) for stage_id in reversed(completed_stages(envelope.trail)))
    todo = [stage_id for stage_id in dict.fromkeys(done) if stage_id in undone]
    if not todo:
        status = WorkflowStatus.failed if final_status == WorkflowStatus.compensated else final_status
        return finish(envelope, status, naming, now)
    envelope.payload, envelope.steps = NIL, None
    envelope.compensation = CompensationTask(todo, [], final_status.value)
    return _compensate_next(plan, envelope)


def continue_compensation(
    plan: WorkflowPlan, envelope: Envelope, record: CompensationRecord, naming: Naming, now: float
) -> Publish:
    """One compensation is over, well or not: the next one, or the end that says truthfully how it went."""
    task = envelope.compensation
    assert task is not None, "a compensation message without its task"
    record.finished_at = now
    task.done.append(record)
    task.plan = task.plan[1:]
    if task.plan:
        return _compensate_next(plan, envelope)
    failed = any(done.status == StageStatus.failed for done in task.done)
    status = WorkflowStatus.compensation_failed if failed else WorkflowStatus(task.final_status)
    return finish(envelope, status, naming, now, task.done)


def _compensate_next(plan: WorkflowPlan, envelope: Envelope) -> Publish:
    assert envelope.compensation is not None
    stage_id = envelope.compensation.plan[0]
    envelope.stage_id = stage_id
    return Publish(plan.compensation.queue, COMPENSATE + stage_id, encode(envelope))
