"""Where an instance stands, read from what the broker says of its group of messages, or from how it ended.

The broker knows messages and labels only; what they mean for an instance is told here, once for the runtime and the
command line. Pure: groups are the broker's plain descriptions, and nothing here asks a broker anything.
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
from stageflow_actors.core.failures import read_failure
from stageflow_actors.core.plan import BEGIN, COMPENSATE, DEAD, FAILED, ITEM_SUFFIX, TIMEOUT
from stageflow_actors.core.result import CompensationResult, StageResult
from stageflow_actors.core.status import StageStatus, WorkflowStatus

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
"""A group, or a message of one, as the broker's `lookup`, `groups` and `inspect` describe it."""

_FIRST = re.compile(r"\.stage0(\.|$)")
"""Queues of a first stage, whatever their prefix."""


class InstanceDescription(Struct, frozen=True, kw_only=True):
    """All that is known of one instance. `started_at`, `finished_at`: seconds since the Unix epoch, 0 where unknown.

    `stage` is the stage it is at, or that failed it; `queue` where its message is, empty where there is none; `waiting`
    what it waits for: a signal, a reply, branches or items. `context` is msgpack, as the last transition left it.
    `progress` is (done, total, note).
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
    """What a stage in work last said of how far it is, as (done, total, note); the latest where several are in work."""
    said = [message["progress"] for message in group["messages"] if "progress" in message]
    if not said:
        return None
    done, total, note = msgspec.msgpack.decode(max(said)[1])
    return done, total, note


def version_of(group: GroupDescription) -> tuple[str, int] | None:
    """The workflow, and the version of it, whose instance this group is: its bodies say so, queues are shared."""
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
    """The status of the live instance whose group this is, as `lookup` or `groups` describes it."""
    messages: Sequence[GroupDescription] = group["messages"]
    if group["ended"]:
        for message in messages:
            body = message.get("body")
            if message["label"] == group["ended"] and body is not None:
                return WorkflowStatus(decode_outcome(body).status)
        return WorkflowStatus.running  # it has ended, and how is on its way into the history
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
    """All about the live instance whose group this is, as `inspect` describes it: with the bodies."""
    status = status_of(group)
    messages: Sequence[GroupDescription] = group["messages"]
    for message in messages:
        if group["ended"] and message["label"] == group["ended"] and "body" in message:
            return describe_finished(group["id"], group["epoch"], message["body"])
    gathers = [gather for gather in group["gathers"] if gather["need"] is not None and gather["key"] != TIMEOUT]
    waiting = [_wait(gather) for gather in gathers]
    chosen = _telling(messages)
    envelope = None if chosen is None else _envelope(chosen["body"][: chosen["base"]])
    whole = _gathered(gathers)
    if whole is not None and (envelope is None or envelope.stage_id.endswith(ITEM_SUFFIX)):
        envelope = whole  # an item has no context of its own, and neither has what is sent to an endpoint
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
    stages = trail_stages(envelope.trail, done)
    if status != WorkflowStatus.compensating:
        ahead = _ahead(messages, gathers)
        # A stage that is being tried once more, after a requeue, stands in the trail as failed.
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
        compensations=_compensations(done),
        waiting=waiting,
        progress=progress_of(group),
    )


def describe_finished(instance_id: str, epoch: int, outcome: bytes | Raw) -> InstanceDescription:
    """All about an instance that has ended, from its encoded `Outcome`."""
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
        stages=trail_stages(read.trail, read.compensations),
        compensations=_compensations(read.compensations),
    )


def trail_stages(trail: bytes, compensations: Iterable[CompensationRecord] = ()) -> list[StageResult]:
    """The stages in a trail, in the order they were first reached, those that were undone as `compensated`."""
    undone = {record.stage_id for record in compensations if record.status == StageStatus.completed}
    # A stage that failed, was parked and went through after a requeue is in the trail twice; the last counts.
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
        )
        for record in records.values()
    ]


def failure_text(failure: bytes | None) -> str | None:
    """What a failure that is attached to a message says, in one line."""
    try:
        read = read_failure(failure)
    except msgspec.MsgspecError:
        return "(an unreadable reason)"
    return None if read is None else " ".join(read.message.split()) or read.kind


def _untouched(message: GroupDescription) -> bool:
    return message["state"] in ("ready", "delayed") and not message["attempts"] and not message["deaths"]


def _telling(messages: Sequence[GroupDescription]) -> GroupDescription | None:
    """The message that says most about its instance: a parked one before one in work, before one that waits."""
    rank = {"dead": 0, "leased": 1, "delayed": 2, "ready": 3}
    with_body = [message for message in messages if message.get("body") is not None]
    return min(with_body, key=lambda message: (rank[message["state"]], message["id"]), default=None)


def _envelope(body: bytes) -> Envelope | None:
    try:
        return decode_envelope(body)
    except msgspec.MsgspecError:
        return None  # a message of a kind that this release does not know


def _wait(gather: GroupDescription) -> str:
    """What an open gather waits for, in words."""
    key: str = gather["key"]
    kind, _, name = key.partition(":")
    if name and kind == "signal":
        return f"signal {name}"
    if name and kind == "reply":
        return f"reply to {name.rpartition(':')[0]}"
    return f"{key} ({gather['arrived']} of {gather['need']})"


def _gathered(gathers: Iterable[GroupDescription]) -> Envelope | None:
    """The envelope that waits in the gather which was opened last."""
    for gather in sorted(gathers, key=lambda gather: float(gather.get("opened", 0.0)), reverse=True):
        envelope = _envelope(gather.get("base", b""))
        if envelope is not None:
            return envelope
    return None


_RANK = (StageStatus.failed, StageStatus.running, StageStatus.pending)


def _ahead(messages: Iterable[GroupDescription], gathers: Iterable[GroupDescription]) -> dict[str, StageResult]:
    """The stages that are not over, by id: those that wait for others, and those that have a message."""
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
        known = found.get(one.stage_id)
        # Of a map stage with many items in work, what says most.
        if known is None or _RANK.index(one.status) < _RANK.index(known.status):
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
    return StageResult(stage_id=stage_id, status=status, attempts=attempts, error=failure)


def _compensations(records: Iterable[CompensationRecord]) -> list[CompensationResult]:
    return [
        CompensationResult(
            stage_id=record.stage_id, status=StageStatus(record.status), error=record.error, duration=record.duration
        )
        for record in records
    ]
