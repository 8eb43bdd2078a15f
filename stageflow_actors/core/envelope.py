"""What travels: the envelope of a stage, and the outcome of an instance.

Both are msgpack arrays, so that a field can be added at the end. Context and stage results stay raw bytes
until somebody needs them: a worker decodes the context of its own stage and nothing else, the coordinator and
the history decode neither. This module never looks inside a context.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw, Struct

__all__ = [
    "EMPTY_TRAIL",
    "NIL",
    "Command",
    "CompensationRecord",
    "CompensationTask",
    "Envelope",
    "Failure",
    "ItemEnd",
    "Outcome",
    "Reply",
    "StageRecord",
    "append_record",
    "decode_command",
    "decode_envelope",
    "decode_item_end",
    "decode_outcome",
    "decode_reply",
    "decode_trail",
    "encode",
    "head_of",
    "raw",
]

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode

NIL = Raw(b"\xc0")
"""The msgpack nil: a stage that returned nothing, a context that is None."""


EMPTY_TRAIL = b"\xdd\x00\x00\x00\x00"
"""A msgpack array of length nought, its length in four bytes so that appending rewrites it in place."""


class StageRecord(Struct, array_like=True, gc=False):
    """One finished stage in the trail of an instance.

    `status` is a `StageStatus` value, `started_at` seconds since the Unix epoch, `duration` seconds,
    `data` what the handler returned, as msgpack; `undo` what its compensation needs beyond that: of a map stage
    [number, item, result] of each item that was handled well, in their order.
    """

    stage_id: str
    status: str
    attempts: int = 1
    started_at: float = 0.0
    duration: float = 0.0
    error: str | None = None
    data: Raw = NIL
    undo: Raw = NIL


class CompensationRecord(Struct, array_like=True, gc=False):
    """One compensation that ran: `status` is `completed` or `failed`, `finished_at` seconds since the Unix epoch."""

    stage_id: str
    status: str
    error: str | None = None
    duration: float = 0.0
    finished_at: float = 0.0


class Failure(Struct, array_like=True, gc=False):
    """Why a stage attempt failed. `kind`: `exception`, `timeout`, `died`, `expired`, `refused`, `cancelled` or
    `undecided_failure` (a policy was asked about it, and did not answer)."""

    kind: str
    message: str
    error_type: str = ""
    retryable: bool | None = None


class CompensationTask(Struct, array_like=True):
    """What is left to compensate, next first; `done` is what ran already, in the order run."""

    plan: list[str]
    done: list[CompensationRecord]
    final_status: str


class ItemEnd(Struct, array_like=True, gc=False):
    """How one item of a map stage ended: its result, or why there is none; the item where it may have to be undone, or
    done once more, with the steps of it that were completed."""

    result: Raw = NIL
    error: str | None = None
    item: Raw = NIL
    steps: dict[str, bytes] | None = None


class Command(Struct, array_like=True):
    """A request on its way to an endpoint. The reply arrives at the gather `key`."""

    key: str
    command: Raw
    workflow_id: str
    stage_id: str
    run: int = 0


class Reply(Struct, array_like=True):
    """What an endpoint answered: a value, or why there is none."""

    value: Raw = NIL
    error: str | None = None


class Envelope(Struct, array_like=True):
    """Everything a stage needs to run. `trail` is a msgpack array of `StageRecord`.

    `payload` is nil where no request was answered; `Raw | None` would take nil and nothing else when it is decoded.
    `attempts` counts those made under earlier messages: a request that failed is tried again under a new one, which has
    the `failure` and the `steps` of the one before. -1: it is to be parked.
    `digest` is that of the input where a user chose the instance's id, for the comparison with a later submit.
    `run` is the epoch in which this run of the instance began, where it goes on in another one, after a retry; else 0.
    `since`, in seconds since the Unix epoch, is when what waits now began to: a delay, a signal, a parallel or a map
    stage.
    """

    workflow_id: str
    version: int
    stage_id: str
    context: Raw
    trail: bytes
    started_at: float
    payload: Raw = NIL
    error: str | None = None
    failed_stage: str | None = None
    compensation: CompensationTask | None = None
    digest: bytes | None = None
    attempts: int = 0
    failure: bytes | None = None
    steps: dict[str, bytes] | None = None
    run: int = 0
    since: float | None = None


class Outcome(Struct, array_like=True):
    """How an instance ended; this is what a waiting client is sent and what the history keeps.

    Of one that failed with nothing compensated `payload`, `steps` and `run` are as its failed stage had them, so that
    it can be retried.
    """

    workflow_id: str
    version: int
    status: str
    context: Raw
    trail: bytes
    started_at: float
    finished_at: float
    error: str | None = None
    failed_stage: str | None = None
    compensations: list[CompensationRecord] = []
    digest: bytes | None = None
    payload: Raw = NIL
    steps: dict[str, bytes] | None = None
    run: int = 0


_trail_decoder = msgspec.msgpack.Decoder(list[StageRecord])
_envelope_decoder = msgspec.msgpack.Decoder(Envelope)
_outcome_decoder = msgspec.msgpack.Decoder(Outcome)
decode_envelope = _envelope_decoder.decode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
decode_item_end = msgspec.msgpack.Decoder(ItemEnd).decode
decode_outcome = _outcome_decoder.decode


def append_record(trail: bytes, record: StageRecord) -> bytes:
    """The trail with one more record at its end; the records before are copied, not decoded."""
    count = int.from_bytes(trail[1:5], "big") + 1
    return b"\xdd" + count.to_bytes(4, "big") + trail[5:] + encode(record)


def decode_trail(trail: bytes) -> list[StageRecord]:
    """The records of a trail in the order they were appended. Raises `msgspec.DecodeError` for damage."""
    return _trail_decoder.decode(trail)


def head_of(body: bytes) -> tuple[str, int, str] | None:
    """Workflow id, version and the third field of an envelope (its stage) or an outcome (its status), whatever follows.

    A gathered body goes on behind its envelope, which no decoder takes. None for a body of another kind.
    """
    try:
        if 0x96 <= body[0] <= 0x9F:  # an array of six to fifteen fields: anything shorter is something else
            at = 1
        elif body[0] == 0xDC:  # or of more
            at = 3
        else:
            return None
        workflow_id, at = _text(body, at)
        version, at = _number(body, at)
        return workflow_id, version, _text(body, at)[0]
    except (IndexError, ValueError):
        return None


def _text(body: bytes, at: int) -> tuple[str, int]:
    kind = body[at]
    if 0xA0 <= kind <= 0xBF:
        start, size = at + 1, kind & 0x1F
    elif kind in (0xD9, 0xDA):
        start = at + 1 + (1 << (kind - 0xD9))
        size = int.from_bytes(body[at + 1 : start], "big")
    else:
        raise ValueError("not a string")
    if start + size > len(body):
        raise ValueError("cut short")
    return body[start : start + size].decode(), start + size


def _number(body: bytes, at: int) -> tuple[int, int]:
    kind = body[at]
    if kind <= 0x7F:
        return kind, at + 1
    if not 0xCC <= kind <= 0xCF:
        raise ValueError("not a number")
    end = at + 1 + (1 << (kind - 0xCC))
    return int.from_bytes(body[at + 1 : end], "big"), end


def raw(value: Any) -> Raw:
    """`value` as msgpack that can be embedded unread."""
    return Raw(encode(value))
