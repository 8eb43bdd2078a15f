"""Routing: the messages and gathers that follow from the result of a stage.

Pure functions: an envelope and a result in, a `Transition` out. Workers, the coordinator and the in-process test runner
all call them, so that a workflow behaves the same everywhere. They must not read a clock: the caller passes `now`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec
from msgspec import Struct

from stageflow_actors.core.envelope import (
    NIL,
    UNCERTAIN,
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
from stageflow_actors.core.resume_state import completed_branch, pack_steps, steps_of_branch
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
    "finish_instance",
    "item_slot",
    "leave_stage",
    "missing_dependencies",
    "passes_payload",
    "repeat_compensation",
    "report_failure",
    "signal_key",
    "skip_cancelled",
    "uncertain_stages",
]


class Publish(Struct, frozen=True):
    """A message to publish. `terminal`: it ends the instance. `ttl` and `delay` are in seconds."""

    queue: str
    label: str
    body: bytes
    terminal: bool = False
    ttl: float = 0.0
    delay: float = 0.0


class OpenGather(Struct, frozen=True):
    """A gather to open: `base` is published to `queue` after `need` arrivals, or after `deadline` seconds if not 0."""

    key: str
    need: int
    queue: str
    label: str
    base: bytes
    deadline: float = 0.0


class GatherArrival(Struct, frozen=True):
    """An arrival at the gather `key`; each slot of a gather accepts one."""

    key: str
    slot: str
    body: bytes


class Transition(Struct):
    """All that follows from one message; it is sent in one settlement, so it happens completely or not at all."""

    publishes: list[Publish] = []
    opens: list[OpenGather] = []
    arrivals: list[GatherArrival] = []

    def largest(self) -> int:
        """Return the size of the largest body in bytes."""
        bodies = [one.body for one in self.publishes] + [one.base for one in self.opens]
        return max(map(len, bodies + [one.body for one in self.arrivals]), default=0)


CANCELLABLE_GATHER_PREFIXES = ("signal:", "reply:", ":timeout")
"""Prefixes of the gathers that a cancelled instance leaves at once. It still waits for its branches and items."""


def signal_key(name: str) -> str:
    """Return the key of the gather that receives the signals of that name. No stage id contains a colon."""
    return f"signal:{name}"


def enter_stage(
    plan: WorkflowPlan,
    stage_id: str,
    envelope: Envelope,
    naming: Naming,
    now: float,
    resume_state: dict[str, bytes] | None = None,
) -> Transition:
    """Return what starts a stage; for the empty id, what ends the instance.

    `resume_state` is the state of the stage before it failed, if the instance is retried.
    """
    stage = plan.stage(stage_id) if stage_id else None
    if stage is None:
        return Transition([finish_instance(plan, envelope, WorkflowStatus.completed, naming, now)])
    envelope.stage_id = stage.id
    envelope.attempts, envelope.failure, envelope.steps, envelope.since = 0, None, None, None
    if stage.kind == PARALLEL:
        envelope.since = now
        return _fork(plan, stage, envelope, resume_state or {})
    envelope.steps = resume_state
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


def _fork(plan: WorkflowPlan, stage: StagePlan, envelope: Envelope, resume_state: Mapping[str, bytes]) -> Transition:
    join = OpenGather(stage.id, len(stage.branches), stage.queue, stage.id, encode(envelope))
    envelope.since = None
    publishes = []
    arrivals = []
    for name in stage.branches:
        if (completed := completed_branch(resume_state, name)) is not None:
            arrivals.append(GatherArrival(stage.id, name, completed))
            continue
        branch = plan.stage(name)
        assert branch is not None, f"branch {name} of {stage.id} is not in its plan"
        envelope.stage_id, envelope.steps = name, steps_of_branch(resume_state, name)
        publishes.append(Publish(branch.queue, name, encode(envelope), ttl=branch.ttl))
    return Transition(publishes, [join], arrivals)


def skip_cancelled(
    stage: StagePlan, envelope: Envelope, reason: str, naming: Naming, now: float, *, uncertain: bool = False
) -> Transition:
    """Return what follows if an instance is cancelled before a stage runs: it goes to its join, or the coordinator.

    `uncertain`: an attempt has begun before, its effect is unknown, and the compensation is for such stages too.
    """
    if stage.kind == ITEM:
        end = ItemEnd(NIL, reason, envelope.context if uncertain else NIL, uncertain=uncertain)
        return Transition(arrivals=[GatherArrival(stage.joins, item_slot(envelope), encode(end))])
    if uncertain:
        failed = StageRecord(stage.id, StageStatus.failed.value, 1, now, 0.0, reason, undo=UNCERTAIN)
        envelope.trail = append_record(envelope.trail, failed)
    envelope.payload, envelope.steps = NIL, None
    if stage.joins and not uncertain:
        skipped = StageRecord(stage.id, StageStatus.skipped.value, 0, now, 0.0, reason)
        envelope.trail = append_record(envelope.trail, skipped)
    if stage.joins:
        return Transition(arrivals=[GatherArrival(stage.joins, stage.id, encode(envelope))])
    return Transition([Publish(naming.coordinator, CANCELLED, encode(envelope))])


def item_slot(envelope: Envelope) -> str:
    """Return the slot of the gather for the end of an item: the item's number, the payload of its envelope."""
    return str(msgspec.msgpack.decode(envelope.payload, type=int))


def passes_payload(plan: WorkflowPlan, stage: StagePlan) -> bool:
    """Return True if the next stage receives the payload that this stage passes on.

    False at the end of the workflow or of a parallel branch, and before a map or a signal. A delay passes it through.
    """
    following = None if stage.joins else plan.next_stage(stage)
    while following is not None and following.kind == DELAY:
        following = plan.next_stage(following)
    return following is not None and following.kind in (STAGE, BRANCH, PARALLEL)


def leave_stage(plan: WorkflowPlan, stage: StagePlan, envelope: Envelope, naming: Naming, now: float) -> Transition:
    """Return what follows a stage that has ended; `envelope` has the context and trail after it."""
    if stage.joins:
        return Transition(arrivals=[GatherArrival(stage.joins, stage.id, encode(envelope))])
    return enter_stage(plan, stage.following, envelope, naming, now)


def finish_instance(
    plan: WorkflowPlan,
    envelope: Envelope,
    status: WorkflowStatus,
    naming: Naming,
    now: float,
    compensations: list[CompensationRecord] | None = None,
) -> Publish:
    """Return the terminal message of an instance, with its outcome."""
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
        tracebacks=envelope.tracebacks,
    )
    if status == WorkflowStatus.failed:
        outcome.payload, outcome.steps, outcome.run = envelope.payload, envelope.steps, envelope.run
    elif status == WorkflowStatus.compensation_failed and envelope.compensation is not None:
        outcome.steps, outcome.run = pack_steps(envelope.compensation.steps), envelope.run
    if status != WorkflowStatus.completed:
        outcome.places = plan.layout.places
    return Publish(naming.finished, FINISHED, encode(outcome), terminal=True)


def report_failure(envelope: Envelope, stage_id: str, record: StageRecord, naming: Naming) -> Publish:
    """Return the event of a required stage that failed finally: the coordinator decides which stages to compensate."""
    envelope.trail = append_record(envelope.trail, record)
    envelope.error = record.error
    envelope.failed_stage = stage_id
    return Publish(naming.coordinator, FAILED, encode(envelope))


def fail_stage(
    plan: WorkflowPlan, stage: StagePlan, envelope: Envelope, record: StageRecord, naming: Naming, now: float
) -> Transition:
    """Return what follows a stage that failed finally.

    A branch or item arrives at its join, an optional stage goes on to the next stage, and a required stage reports to
    the coordinator.
    """
    if stage.kind == ITEM:
        uncertain = bytes(record.undo) == bytes(UNCERTAIN)
        end = ItemEnd(NIL, record.error, envelope.context if uncertain else NIL, uncertain=uncertain)
        return Transition(arrivals=[GatherArrival(stage.joins, item_slot(envelope), encode(end))])
    if stage.required and not stage.joins:
        return Transition([report_failure(envelope, stage.id, record, naming)])
    envelope.trail = append_record(envelope.trail, record)
    envelope.payload = NIL
    return leave_stage(plan, stage, envelope, naming, now)


def completed_stages(trail: bytes) -> list[str]:
    """Return the ids of the completed stages in order of completion, each once."""
    found: dict[str, None] = {}
    for record in decode_trail(trail):
        if record.status == StageStatus.completed:
            found[record.stage_id] = None
    return list(found)


def uncertain_stages(trail: bytes) -> list[str]:
    """Return the ids of the stages that failed with an effect to be undone, the last first."""
    last = {record.stage_id: record for record in decode_trail(trail)}
    found = [r.stage_id for r in last.values() if r.status == StageStatus.failed and bytes(r.undo) == bytes(UNCERTAIN)]
    return found[::-1]


def missing_dependencies(after: Collection[str], trail: bytes) -> list[str]:
    """Return the stages in `after` that have not completed."""
    done = set(completed_stages(trail))
    return [stage_id for stage_id in after if stage_id not in done]


def begin_compensation(
    plan: WorkflowPlan, envelope: Envelope, naming: Naming, now: float, final_status: WorkflowStatus
) -> Publish:
    """Plan the compensations, and return the first one; return the terminal message if there is none.

    Each completed stage with a compensation is undone, the last completed first; before them, stages that failed with
    their effect unknown, if their compensation is for these too. An optional stage that failed has not completed, so it
    is not undone.
    """
    compensated = {s.id for s in plan.stages if s.compensated}
    done = (stage_id.removesuffix(ITEM_SUFFIX) for stage_id in reversed(completed_stages(envelope.trail)))
    todo = [
        stage_id for stage_id in dict.fromkeys([*uncertain_stages(envelope.trail), *done]) if stage_id in compensated
    ]
    if not todo:
        status = WorkflowStatus.failed if final_status == WorkflowStatus.compensated else final_status
        return finish_instance(plan, envelope, status, naming, now)
    envelope.payload, envelope.steps = NIL, None
    envelope.compensation = CompensationTask(todo, [], final_status.value)
    return _compensate_next(plan, envelope)


def continue_compensation(
    plan: WorkflowPlan, envelope: Envelope, record: CompensationRecord, naming: Naming, now: float
) -> Publish:
    """Return what follows a compensation that completed or failed: the next one, or the terminal message.

    A failed compensation does not stop the others, but the final status is `compensation_failed`. `envelope.steps` are
    its completed steps, which are kept if it failed.
    """
    task = envelope.compensation
    assert task is not None, "a compensation message without its task"
    record.finished_at, record.rerun = now, task.rerun
    steps = {key: value for key, value in (task.steps or {}).items() if key != record.stage_id}
    if record.status == StageStatus.failed and envelope.steps:
        steps[record.stage_id] = envelope.steps
    task.steps = steps or None
    task.done.append(record)
    task.plan = task.plan[1:]
    if task.plan:
        return _compensate_next(plan, envelope)
    failed = any(done.status == StageStatus.failed for done in task.done)
    status = WorkflowStatus.compensation_failed if failed else WorkflowStatus(task.final_status)
    return finish_instance(plan, envelope, status, naming, now, task.done)


def repeat_compensation(
    plan: WorkflowPlan,
    envelope: Envelope,
    done: list[CompensationRecord],
    steps: Mapping[str, dict[str, bytes]] | None,
) -> Publish:
    """Return what runs the compensations that failed again, in their order; `done` are all that ran.

    `steps` are the completed steps of those that failed.
    """
    rerun = max((record.rerun for record in done), default=0) + 1
    failed = [record.stage_id for record in done if record.status == StageStatus.failed]
    kept = [record for record in done if record.status != StageStatus.failed]
    final = WorkflowStatus.cancelled if envelope.failed_stage is None else WorkflowStatus.compensated
    envelope.compensation = CompensationTask(failed, kept, final.value, dict(steps or {}) or None, rerun)
    return _compensate_next(plan, envelope)


def _compensate_next(plan: WorkflowPlan, envelope: Envelope) -> Publish:
    assert envelope.compensation is not None
    stage_id = envelope.compensation.plan[0]
    envelope.stage_id = stage_id
    envelope.steps = (envelope.compensation.steps or {}).get(stage_id)
    return Publish(plan.compensation.queue, COMPENSATE + stage_id, encode(envelope))
