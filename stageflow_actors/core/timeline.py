"""The timeline of an instance: its stages, compensations and present state, with times.

The functions are pure. They read the last message of an instance that ended, or the broker's description of a live
one. The timeline has only what messages still contain: the events since the last restart, and of failed attempts
the last one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from stageflow_actors.core.codec import decode_value
from stageflow_actors.core.description import failure_text
from stageflow_actors.core.envelope import (
    CompensationRecord,
    Envelope,
    StageRecord,
    decode_envelope,
    decode_outcome,
    decode_trail,
    head_of,
)
from stageflow_actors.core.plan import COMPENSATE, ITEM_SUFFIX, TIMEOUT

__all__ = ["TimelineEntry", "timeline_of_group", "timeline_of_outcome"]

_STATES = {"ready": "queued", "leased": "running", "delayed": "delayed", "dead": "parked"}


class TimelineEntry(Struct, frozen=True, kw_only=True):
    """One line of `Instance.history`.

    Attributes:
        at: Time in seconds since the Unix epoch; for a stage or compensation the time when it ended.
        what: `submitted`; for a stage `completed`, `failed` or `skipped`; `compensated` or `compensation failed`; for
            the present state `queued`, `running`, `delayed` (before a retry), `waiting` (for a signal, a reply, a
            delay, branches or items) or `parked`; `ended: ` and the status at the end.
        stage_id: The id of the stage, or empty.
        attempt: Number of the attempt, from 1; 0 where it does not apply.
        duration: Seconds that the stage or compensation took.
        error: The error, as `ValueError: no address`, or None.
        data: The value that the handler returned, or None.

    Example:
        >>> from stageflow_actors import TimelineEntry
        >>> history = [
        ...     TimelineEntry(at=1800000000.0, what="submitted"),
        ...     TimelineEntry(at=1800000002.0, what="completed", stage_id="pay", attempt=1, duration=1.5),
        ... ]
        >>> [f"{entry.what} {entry.stage_id}".strip() for entry in history]
        ['submitted', 'completed pay']
    """

    at: float
    what: str
    stage_id: str = ""
    attempt: int = 0
    duration: float = 0.0
    error: str | None = None
    data: Any = None


def timeline_of_outcome(outcome: bytes) -> list[TimelineEntry]:
    """Return the timeline of an instance that has ended, from its encoded `Outcome`."""
    read = decode_outcome(outcome)
    entries = [TimelineEntry(at=read.started_at, what="submitted")]
    entries += [_of_stage(record) for record in decode_trail(read.trail) if _is_shown(record)]
    entries += [_of_compensation(record, read.finished_at) for record in read.compensations]
    entries = sorted(entries, key=lambda entry: entry.at)
    end = TimelineEntry(
        at=read.finished_at, what=f"ended: {read.status}", stage_id=read.failed_stage or "", error=read.error
    )
    return [*entries, end]


def timeline_of_group(group: Mapping[str, Any]) -> list[TimelineEntry]:
    """Return the timeline so far of a live instance, from its group as the broker's `inspect` describes it."""
    for message in group["messages"]:
        if group["ended"] and message["label"] == group["ended"] and "body" in message:
            return timeline_of_outcome(message["body"])
    # An answer has a size limit: the description of a very large instance lacks some bodies.
    bodies = [message["body"] for message in group["messages"] if "body" in message]
    for gather in group["gathers"]:
        if gather["need"] is not None:
            bodies += [gather["base"], *gather["parts"]]
    envelopes = [envelope for body in bodies if (envelope := _envelope(body)) is not None]
    records: dict[tuple[str, float], StageRecord] = {}
    undone: dict[str, CompensationRecord] = {}
    for envelope in envelopes:
        records.update(((r.stage_id, r.started_at), r) for r in decode_trail(envelope.trail) if _is_shown(r))
        if envelope.compensation is not None:
            undone.update((record.stage_id, record) for record in envelope.compensation.done)
    began = min((envelope.started_at for envelope in envelopes), default=0.0)
    entries = [TimelineEntry(at=began, what="submitted")] if began else []
    entries += [_of_stage(record) for record in records.values()]
    entries += [_of_compensation(record, began) for record in undone.values()]
    return sorted([*entries, *_present(group)], key=lambda entry: entry.at)


def _present(group: Mapping[str, Any]) -> Iterable[TimelineEntry]:
    for message in group["messages"]:
        label: str = message["label"]
        state = _STATES[message["state"]]
        yield TimelineEntry(
            at=message["parked"] or message["enqueued"],
            what=f"{state} to be undone" if label.startswith(COMPENSATE) and state != "parked" else state,
            stage_id=_stage_of(message),
            attempt=message["attempts"] + (state != "parked"),
            error=failure_text(message["reason"] or message["failure"]),
        )
    for gather in group["gathers"]:
        if gather["need"] is not None and gather["key"] != TIMEOUT:
            yield TimelineEntry(at=gather["opened"], what="waiting", stage_id=gather["key"])


def _stage_of(message: Mapping[str, Any]) -> str:
    label: str = message["label"]
    # An event's label does not name the stage; its body does.
    head = head_of(message.get("body") or b"") if label.startswith(":") else None
    return label.removeprefix(COMPENSATE) if head is None else head[2]


def _is_shown(record: StageRecord) -> bool:
    return not record.stage_id.endswith(ITEM_SUFFIX)  # records of items are for the compensation only


def _of_stage(record: StageRecord) -> TimelineEntry:
    return TimelineEntry(
        at=record.started_at + record.duration,
        what=record.status,
        stage_id=record.stage_id,
        attempt=record.attempts,
        duration=record.duration,
        error=record.error,
        data=decode_value(record.data),
    )


def _of_compensation(record: CompensationRecord, otherwise: float) -> TimelineEntry:
    return TimelineEntry(
        at=record.finished_at or otherwise,  # records of older releases have no time
        what="compensated" if record.status == "completed" else "compensation failed",
        stage_id=record.stage_id,
        duration=record.duration,
        error=record.error,
    )


def _envelope(body: bytes) -> Envelope | None:
    if head_of(body) is None:
        return None
    try:
        return decode_envelope(body)
    except msgspec.MsgspecError:
        return None
