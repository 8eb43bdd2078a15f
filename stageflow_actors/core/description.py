"""`InstanceDescription`: the state of an instance, from the broker's description of its group, or from its outcome.

The broker has only messages, gathers and labels; this module interprets them, once for the runtime and the command
line. Pure functions: the caller passes the broker's answer. They must not query a broker.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Raw, Struct

from stageflow_actors.core.codec import decode_value
from stageflow_actors.core.envelope import (
    EMPTY_TRAIL,
    NIL,
    CompensationRecord,
    Envelope,
    Outcome,
    decode_envelope,
    decode_outcome,
    decode_trail,
    head_of,
)
from stageflow_actors.core.failures import read_failure, traceback_of
from stageflow_actors.core.plan import BEGIN, COMPENSATE, DEAD, FAILED, ITEM_SUFFIX, TIMEOUT
from stageflow_actors.core.result import CompensationResult, StageResult, compensation_results
from stageflow_actors.core.status import StageStatus, WorkflowStatus
from stageflow_actors.core.tracebacks.table import read_traceback, read_tracebacks

__all__ = [
    "InstanceDescription",
    "describe_finished",
    "describe_live",
    "failure_text",
    "progress_of",
    "status_of",
    "trail_stages",
    "version_of",
]

GroupDescription = Mapping[str, Any]
"""A group, a message or a gather as the broker's queries `lookup`, `groups` and `inspect` return it."""

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


def describe_live(group: GroupDescription) -> InstanceDescription:
    """Return the state of a live instance; `inspect` returned its group, with message bodies."""
    status = status_of(group)
    messages: Sequence[GroupDescription] = group["messages"]
    for message in messages:
        if group["ended"] and message["label"] == group["ended"] and "body" in message:
            return describe_finished(group["id"], group["epoch"], message["body"])
    gathers = [gather for gather in group["gathers"] if gather["need"] is not None and gather["key"] != TIMEOUT]
    waiting = [_wait(gather) for gather in gathers]
    chosen = _most_relevant(messages)
    envelope = None if chosen is None else _envelope(chosen["body"][: chosen["base"]])
    waiting_envelope = _waiting_envelope(gathers)
    if waiting_envelope is not None and (envelope is None or envelope.stage_id.endswith(ITEM_SUFFIX)):
        envelope = waiting_envelope  # the messages of items and of requests contain no context
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
    stages = trail_stages(envelope.trail, done, envelope.tracebacks)
    if status != WorkflowStatus.compensating:
        ahead = _ahead(messages, gathers)
        # A stage that runs again after a requeue is in the trail as failed.
        stages = [stage for stage in stages if stage.stage_id not in ahead] + list(ahead.values())
    return InstanceDescription(
        instance_id=group["id"],
        epoch=group["epoch"],
        status=status,
        workflow_id=envelope.workflow_id,
        version=envelope.version,
        started_at=envelope.started_at,
        stage=envelope.stage_id,
        error=failure or envelope.error,
        failed_stage=envelope.stage_id if status == WorkflowStatus.parked else envelope.failed_stage,
        queue=queue,
        context=envelope.context,
        stages=stages,
        compensations=compensation_results(done, read_tracebacks(envelope.tracebacks)),
        waiting=waiting,
        progress=progress_of(group),
    )


def describe_finished(instance_id: str, epoch: int, outcome: bytes | Raw) -> InstanceDescription:
    """Return the state of an ended instance, from its encoded `Outcome`."""
    read: Outcome = decode_outcome(outcome)
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
        stages=trail_stages(read.trail, read.compensations, read.tracebacks),
        compensations=compensation_results(read.compensations, read_tracebacks(read.tracebacks)),
    )


def trail_stages(
    trail: bytes, compensations: Iterable[CompensationRecord] = (), tracebacks: bytes | None = None
) -> list[StageResult]:
    """Return the stages in a trail in order of first appearance; undone stages have the status `compensated`.

    `tracebacks` is the table of the instance.
    """
    texts = read_tracebacks(tracebacks)
    undone = {record.stage_id for record in compensations if record.status == StageStatus.completed}
    # A stage that failed, was parked and completed after a requeue is in the trail twice: use the last record.
    records = {record.stage_id: record for record in decode_trail(trail or EMPTY_TRAIL)}
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
        for record in records.values()
    ]


def failure_text(failure: bytes | None) -> str | None:
    """Return the text of a failure attached to a message in one line, or None."""
    try:
        read = read_failure(failure)
    except msgspec.MsgspecError:
        return "(an unreadable failure)"
    return None if read is None else " ".join(read.message.split()) or read.kind


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


def _waiting_envelope(gathers: Iterable[GroupDescription]) -> Envelope | None:
    """Return the envelope that waits in the gather opened last, or None."""
    for gather in sorted(gathers, key=lambda gather: float(gather.get("opened", 0.0)), reverse=True):
        envelope = _envelope(gather.get("base", b""))
        if envelope is not None:
            return envelope
    return None


_RANK = (StageStatus.failed, StageStatus.running, StageStatus.pending)


def _ahead(messages: Iterable[GroupDescription], gathers: Iterable[GroupDescription]) -> dict[str, StageResult]:
    """Return the stages that have not ended, by id: those of gathers and those of messages."""
    found: dict[str, StageResult] = {}
    for gather in gathers:
        head = head_of(gather.get("base", b""))
        if head is not None:
            found[head[2]] = StageResult(
                stage_id=head[2], status=StageStatus.running, attempts=1, started_at=gather.get("opened", 0.0)
            )
    for message in messages:
        head = head_of(message.get("body") or b"")
        if head is None:
            continue
        one = _stage_ahead(message, head[2].removesuffix(ITEM_SUFFIX))
        other = found.get(one.stage_id)
        # A map stage has many items: a failed one has precedence, then a running one.
        if other is None or _RANK.index(one.status) < _RANK.index(other.status):
            found[one.stage_id] = one
    return found


def _stage_ahead(message: GroupDescription, stage_id: str) -> StageResult:
    failure = failure_text(message["reason"] or message["failure"])
    if message["state"] == "dead":
        status = StageStatus.failed
    elif _untouched(message):
        status = StageStatus.pending
    else:
        status = StageStatus.running
    attempts = message["attempts"] + (message["state"] == "leased")
    trace = read_traceback(traceback_of(message["reason"] or message["failure"]))
    return StageResult(stage_id=stage_id, status=status, attempts=attempts, error=failure, traceback=trace)
