"""`InstanceDescription`: the state of an instance, from the broker's description of its group, or from its outcome.

The broker has only messages, gathers and labels; this module interprets them, once for the runtime and the command
line. Pure functions: the caller passes the broker's answer. They must not query a broker.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Raw, Struct

from stageflow_actors.core.codec import decode_value
from stageflow_actors.core.envelope import (
    EMPTY_TRAIL,
    NIL,
    CompensationRecord,
    Envelope,
    Layout,
    Outcome,
    StageRecord,
    decode_envelope,
    decode_outcome,
    decode_trail,
    head_of,
)
from stageflow_actors.core.failures import read_failure, traceback_of
from stageflow_actors.core.plan import BEGIN, COMPENSATE, DEAD, FAILED, ITEM_SUFFIX, TIMEOUT
from stageflow_actors.core.result import (
    CompensationResult,
    StageResult,
    all_stages,
    compensation_results,
    latest_records,
)
from stageflow_actors.core.status import StageStatus, WorkflowStatus
from stageflow_actors.core.tracebacks.table import merge_tracebacks, read_tracebacks, with_traceback

__all__ = [
    "InstanceDescription",
    "LayoutLookup",
    "describe_finished",
    "describe_live",
    "failure_text",
    "live_records",
    "progress_of",
    "status_of",
    "trail_stages",
    "version_of",
]

GroupDescription = Mapping[str, Any]
"""A group, a message or a gather as the broker's queries `lookup`, `groups` and `inspect` return it."""

LayoutLookup = Callable[[str, int], Layout | None]
"""Returns the stages of a workflow, by id and version; None if unknown."""


def _unknown(workflow_id: str, version: int) -> None:
    return None


_FIRST = re.compile(r"\.stage0(\.|$)")
"""Matches queues of a first stage with any prefix."""


class InstanceDescription(Struct, frozen=True, kw_only=True):
    """The state of one instance. `started_at` and `finished_at` are in seconds since the Unix epoch, 0 if unknown.

    `stage` is the current stage, or the stage that failed the instance; `queue` is the queue of its message, or empty;
    `waiting` lists the signals, replies, branches or items that it waits for. `context` is the msgpack of the last
    transition. `progress` is (done, total, note).
    """

    instance_id: str
    epoch: int
    status: WorkflowStatus
    workflow_id: str = ""
    version: int = 0
    started_at: float = 0.0
    finished_at: float = 0.0
    stage: str | None = None
    error: str | None = None
    failed_stage: str | None = None
    queue: str = ""
    context: Raw = NIL
    stages: list[StageResult] = []
    compensations: list[CompensationResult] = []
    waiting: list[str] = []
    progress: tuple[float, float, str] | None = None


def progress_of(group: GroupDescription) -> tuple[float, float, str] | None:
    """Return the latest progress that a stage in work reported, as (done, total, note), or None."""
    reports = [message["progress"] for message in group["messages"] if "progress" in message]
    if not reports:
        return None
    done, total, note = msgspec.msgpack.decode(max(reports)[1])
    return done, total, note


def version_of(group: GroupDescription) -> tuple[str, int] | None:
    """Return workflow id and version of a group, or None. Message bodies have them; versions share their queues."""
    for body in group["heads"]:
        head = head_of(body)
        if head is not None:
            return head[0], head[1]
    return None


def _is_at_first_stage(group: GroupDescription, queue: str) -> bool:
    """Return True if a queue is one of the first stage, or of a branch or item of it.

    The ids of workflows and stages may hold `.stage0` too, so the number is read behind the workflow's own id.
    """
    if not _FIRST.search(queue):
        return False
    version = version_of(group)
    if version is None:
        return True
    _, _, place = queue.partition(f"{version[0]}.stage")
    return not place or place.partition(".")[0] == "0"


def status_of(group: GroupDescription) -> WorkflowStatus:
    """Return the status of a live instance; `lookup` or `groups` returned its group."""
    messages: Sequence[GroupDescription] = group["messages"]
    if group["ended"]:
        for message in messages:
            body = message.get("body")
            if message["label"] == group["ended"] and body is not None:
                return WorkflowStatus(decode_outcome(body).status)
        return WorkflowStatus.running  # it has ended; its outcome is being written to the history
    if any(message["state"] == "dead" and not message["evidence"] for message in messages):
        return WorkflowStatus.parked
    if any(message["label"].startswith(COMPENSATE) or message["label"] in (FAILED, DEAD) for message in messages):
        return WorkflowStatus.compensating
    if not messages:
        return WorkflowStatus.waiting if group["gathers"] else WorkflowStatus.running
    if all(_untouched(message) for message in messages):
        if all(message["label"] == BEGIN or _is_at_first_stage(group, message["queue"]) for message in messages):
            return WorkflowStatus.pending
        if all(message["state"] == "delayed" for message in messages):
            return WorkflowStatus.waiting
    return WorkflowStatus.running


def describe_live(group: GroupDescription, layout_of: LayoutLookup = _unknown) -> InstanceDescription:
    """Return the state of a live instance; `inspect` returned its group, with message bodies."""
    status = status_of(group)
    messages: Sequence[GroupDescription] = group["messages"]
    for message in messages:
        if group["ended"] and message["label"] == group["ended"] and "body" in message:
            return describe_finished(group["id"], group["epoch"], message["body"], layout_of)
    gathers = _open_gathers(group)
    waiting = [_wait(gather) for gather in gathers]
    chosen = _most_relevant(messages)
    envelope = _current_envelope(chosen, gathers)
    failure = None if chosen is None else failure_text(chosen["reason"] or chosen["failure"])
    queue = "" if chosen is None else chosen["queue"]
    if envelope is None:
        return InstanceDescription(
            instance_id=group["id"],
            epoch=group["epoch"],
            status=status,
            queue=queue,
            stage=None if chosen is None else chosen["label"],
            error=failure,
            waiting=waiting,
        )
    done = envelope.compensation.done if envelope.compensation is not None else []
    records, tracebacks = decode_trail(envelope.trail), envelope.tracebacks
    if status != WorkflowStatus.compensating:
        records, tracebacks = _reached(envelope, messages, gathers)
    stages = _stage_results(records, done, tracebacks)
    layout = layout_of(envelope.workflow_id, envelope.version)
    failed_stage = envelope.stage_id if status == WorkflowStatus.parked else envelope.failed_stage
    return InstanceDescription(
        instance_id=group["id"],
        epoch=group["epoch"],
        status=status,
        workflow_id=envelope.workflow_id,
        version=envelope.version,
        started_at=envelope.started_at,
        stage=envelope.stage_id,
        error=failure or envelope.error,
        failed_stage=failed_stage,
        queue=queue,
        context=envelope.context,
        stages=all_stages(stages, () if layout is None else layout.places, status, failed_stage),
        compensations=compensation_results(done, read_tracebacks(envelope.tracebacks)),
        waiting=waiting,
        progress=progress_of(group),
    )


def describe_finished(
    instance_id: str, epoch: int, outcome: bytes | Raw, layout_of: LayoutLookup = _unknown
) -> InstanceDescription:
    """Return the state of an ended instance, from its encoded `Outcome`."""
    read: Outcome = decode_outcome(outcome)
    places = read.places
    if places is None:
        layout = layout_of(read.workflow_id, read.version)
        places = [] if layout is None else layout.places
    return InstanceDescription(
        instance_id=instance_id,
        epoch=epoch,
        status=WorkflowStatus(read.status),
        workflow_id=read.workflow_id,
        version=read.version,
        started_at=read.started_at,
        finished_at=read.finished_at,
        stage=read.failed_stage,
        error=read.error,
        failed_stage=read.failed_stage,
        context=read.context,
        stages=all_stages(
            trail_stages(read.trail, read.compensations, read.tracebacks), places, read.status, read.failed_stage
        ),
        compensations=compensation_results(read.compensations, read_tracebacks(read.tracebacks)),
    )


def trail_stages(
    trail: bytes, compensations: Iterable[CompensationRecord] = (), tracebacks: bytes | None = None
) -> list[StageResult]:
    """Return the stages in a trail in order of first appearance; undone stages have the status `compensated`.

    `tracebacks` is the table of the instance.
    """
    return _stage_results(decode_trail(trail or EMPTY_TRAIL), compensations, tracebacks)


def live_records(group: GroupDescription) -> tuple[list[StageRecord], bytes | None]:
    """Return the records of the stages that a live instance has reached, ended or not, and the table of tracebacks.

    `inspect` returned its group.
    """
    messages, gathers = group["messages"], _open_gathers(group)
    envelope = _current_envelope(_most_relevant(messages), gathers)
    return ([], None) if envelope is None else _reached(envelope, messages, gathers)


def _reached(
    envelope: Envelope, messages: Iterable[GroupDescription], gathers: Sequence[GroupDescription]
) -> tuple[list[StageRecord], bytes | None]:
    ended, tracebacks = decode_trail(envelope.trail), envelope.tracebacks
    for branch in _arrived_branches(gathers):
        ended += [one for one in decode_trail(branch.trail) if one.stage_id == branch.stage_id][-1:]
        tracebacks = merge_tracebacks(tracebacks, branch.tracebacks)
    ahead = _ahead(messages, gathers)
    for stage_id, (_, packed) in ahead.items():
        if packed is not None:
            tracebacks = with_traceback(tracebacks, stage_id, packed)
    # A stage that runs again after a requeue is in the trail as failed.
    records = [record for record in ended if record.stage_id not in ahead]
    return records + [record for record, _ in ahead.values()], tracebacks


def _arrived_branches(gathers: Iterable[GroupDescription]) -> list[Envelope]:
    """Return the envelopes of the branches that have arrived at the joins of their parallel stages."""
    parts = [part for gather in gathers if ":" not in gather["key"] for part in gather.get("parts", ())]
    return [branch for branch in map(_envelope, parts) if branch is not None]  # an item has no envelope


def _stage_results(
    records: Iterable[StageRecord], compensations: Iterable[CompensationRecord], tracebacks: bytes | None
) -> list[StageResult]:
    texts = read_tracebacks(tracebacks)
    undone = {record.stage_id for record in compensations if record.status == StageStatus.completed}
    return [
        StageResult(
            stage_id=record.stage_id,
            status=StageStatus.compensated
            if record.stage_id in undone and record.status == StageStatus.completed
            else StageStatus(record.status),
            attempts=record.attempts,
            started_at=record.started_at,
            duration=record.duration,
            error=record.error,
            data=decode_value(record.data),
            traceback=texts.get(record.stage_id),
        )
        for record in latest_records(records)
    ]


def failure_text(failure: bytes | None) -> str | None:
    """Return the text of a failure attached to a message in one line, or None."""
    message = _failure_message(failure)
    return None if message is None else " ".join(message.split())


def _failure_message(failure: bytes | None) -> str | None:
    try:
        read = read_failure(failure)
    except msgspec.MsgspecError:
        return "(an unreadable failure)"
    return None if read is None else read.message.strip() or read.kind


def _untouched(message: GroupDescription) -> bool:
    return message["state"] in ("ready", "delayed") and not message["attempts"] and not message["deaths"]


def _most_relevant(messages: Sequence[GroupDescription]) -> GroupDescription | None:
    """Return the message that best shows the state: a parked one, else one in work, else a waiting one."""
    rank = {"dead": 0, "leased": 1, "delayed": 2, "ready": 3}
    with_body = [message for message in messages if message.get("body") is not None]
    return min(with_body, key=lambda message: (rank[message["state"]], message["id"]), default=None)


def _envelope(body: bytes) -> Envelope | None:
    try:
        return decode_envelope(body)
    except msgspec.MsgspecError:
        return None  # a later release sent it


def _wait(gather: GroupDescription) -> str:
    """Return the subject that an open gather waits for, as `signal approval` or `checks (1 of 3)`."""
    key: str = gather["key"]
    kind, _, name = key.partition(":")
    if name and kind == "signal":
        return f"signal {name}"
    if name and kind == "reply":
        return f"reply to {name.rpartition(':')[0]}"
    return f"{key} ({gather['arrived']} of {gather['need']})"


def _open_gathers(group: GroupDescription) -> list[GroupDescription]:
    return [gather for gather in group["gathers"] if gather["need"] is not None and gather["key"] != TIMEOUT]


def _current_envelope(chosen: GroupDescription | None, gathers: Iterable[GroupDescription]) -> Envelope | None:
    """Return the envelope of the most relevant message, or the waiting one: items and requests have no context."""
    envelope = None if chosen is None else _envelope(chosen["body"][: chosen["base"]])
    waiting = _waiting_envelope(gathers)
    if waiting is not None and (envelope is None or envelope.stage_id.endswith(ITEM_SUFFIX)):
        return waiting
    return envelope


def _waiting_envelope(gathers: Iterable[GroupDescription]) -> Envelope | None:
    """Return the envelope that waits in the gather opened last, or None."""
    for gather in sorted(gathers, key=lambda gather: float(gather.get("opened", 0.0)), reverse=True):
        envelope = _envelope(gather.get("base", b""))
        if envelope is not None:
            return envelope
    return None


_RANK = (StageStatus.failed.value, StageStatus.running.value, StageStatus.pending.value)


def _ahead(
    messages: Iterable[GroupDescription], gathers: Iterable[GroupDescription]
) -> dict[str, tuple[StageRecord, bytes | None]]:
    """Return the stages that have not ended with their packed tracebacks, by id: those of gathers and of messages."""
    found: dict[str, tuple[StageRecord, bytes | None]] = {}
    for gather in gathers:
        head = head_of(gather.get("base", b""))
        if head is not None:
            found[head[2]] = StageRecord(head[2], StageStatus.running.value, 1, gather.get("opened", 0.0)), None
    for message in messages:
        head = head_of(message.get("body") or b"")
        if head is None:
            continue
        stage_id = head[2].removesuffix(ITEM_SUFFIX)
        one, other = _stage_ahead(message, stage_id), found.get(stage_id)
        # A map stage has many items: a failed one has precedence, then a running one.
        if other is None or _RANK.index(one[0].status) < _RANK.index(other[0].status):
            found[stage_id] = one
    return found


def _stage_ahead(message: GroupDescription, stage_id: str) -> tuple[StageRecord, bytes | None]:
    failure = _failure_message(message["reason"] or message["failure"])
    if message["state"] == "dead":
        status = StageStatus.failed
    elif _untouched(message):
        status = StageStatus.pending
    else:
        status = StageStatus.running
    attempts = message["attempts"] + (message["state"] == "leased")
    if message["state"] == "dead":
        attempts = max(attempts, message["deaths"])  # the last death is no attempt that another one follows
    packed = traceback_of(message["reason"] or message["failure"])
    return StageRecord(stage_id, status.value, attempts, error=failure), packed
