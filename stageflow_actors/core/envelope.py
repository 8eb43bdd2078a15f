"""The bodies of messages: `Envelope` of a stage, `Outcome` of an instance, and their parts.

They are msgpack arrays, so a release may add fields at the end; the order of fields must not change. Contexts and
results stay raw bytes until they are needed: a worker decodes only the context of its own stage, and the coordinator
and the history decode none. This module must not decode a context.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw, Struct

__all__ = [
    "EMPTY_TRAIL",
    "NIL",
    "UNCERTAIN",
    "Command",
    "CompensationRecord",
    "CompensationTask",
    "Envelope",
    "Failure",
    "ItemEnd",
    "Layout",
    "Outcome",
    "Reply",
    "StagePlace",
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
"""The msgpack nil: the result of a stage that returned None, or a missing context."""

EMPTY_TRAIL = b"\xdd\x00\x00\x00\x00"
"""An empty msgpack array with a length of four bytes, so that appending a record only replaces these bytes."""


UNCERTAIN = Raw(b"\xc3")
"""The `undo` of a failed stage that is compensated although it has not completed (`Compensation.when_uncertain`)."""


class StageRecord(Struct, array_like=True, gc=False):
    """One ended stage in the trail of an instance.

    `status` is a `StageStatus` value; `started_at` is in seconds since the Unix epoch, `duration` in seconds; `data` is
    the handler's result as msgpack. `undo` holds more data for the compensation: for a map stage [number, item, result]
    of each completed item, in order; for a failed stage `UNCERTAIN` if its effect is unknown and it is to be undone.
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
    """One compensation: `status` is `completed` or `failed`, `finished_at` is in seconds since the Unix epoch.

    `rerun` is the number of the retry that ran it; 0 for the first run.
    """

    stage_id: str
    status: str
    error: str | None = None
    duration: float = 0.0
    finished_at: float = 0.0
    rerun: int = 0


class Failure(Struct, array_like=True, gc=False):
    """Why an attempt of a stage failed.

    `kind` is `exception`, `timeout`, `died`, `expired`, `refused`, `cancelled` or `undecided`: the retry policy was
    called for it and did not return. `traceback` is that of the exception, as `pack_traceback` returns it.
    """

    kind: str
    message: str
    error_type: str = ""
    retryable: bool | None = None
    traceback: bytes | None = None


class CompensationTask(Struct, array_like=True):
    """The compensations of an instance: `plan` has the remaining stage ids, the next first; `done` those that ran.

    `steps` are the completed steps of compensations that failed, by stage id; a retry continues from them. `rerun` is
    the number of the retry.
    """

    plan: list[str]
    done: list[CompensationRecord]
    final_status: str
    steps: dict[str, dict[str, bytes]] | None = None
    rerun: int = 0


class ItemEnd(Struct, array_like=True, gc=False):
    """The end of one item of a map stage: its result or error.

    `item` is set if the item may be compensated or run again; `steps` are its completed steps. `traceback` is that of
    the error, as in `Failure`; the items of a map stage send only a few. `uncertain`: its effect is unknown, and it is
    to be undone with the completed items.
    """

    result: Raw = NIL
    error: str | None = None
    item: Raw = NIL
    steps: dict[str, bytes] | None = None
    traceback: bytes | None = None
    uncertain: bool = False


class Command(Struct, array_like=True):
    """A request to an endpoint. The reply arrives at the gather `key`."""

    key: str
    command: Raw
    workflow_id: str
    stage_id: str
    run: int = 0


class Reply(Struct, array_like=True):
    """The reply of an endpoint: a value, or an error with its traceback, as in `Failure`.

    `undecodable`: the code of the endpoint could not decode the command, which is the `value`, to be sent again.
    """

    value: Raw = NIL
    error: str | None = None
    traceback: bytes | None = None
    undecodable: bool = False


class Envelope(Struct, array_like=True):
    """The input of a stage. `trail` is a msgpack array of `StageRecord`.

    `payload` is nil if there is none; its type is not `Raw | None`, because msgspec then decodes only nil.
    `attempts` counts the attempts of earlier messages: a failed request is retried in a new message, which has the
    `failure` and the `steps` of the earlier one. -1 means: park the message.
    `digest` is that of the input if the user chose the instance id; a later submit with this id is compared with it.
    `run` is the epoch in which this run of the instance started, if a retry continues it in a later epoch; else 0.
    `since` is the time, in seconds since the Unix epoch, at which a delay, signal, parallel or map stage began to wait.
    `tracebacks` are those of failed attempts (`core.tracebacks.table`); they do not count in the size of a message.
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
    tracebacks: bytes | None = None


class StagePlace(Struct, array_like=True, gc=False, frozen=True):
    """One stage of a definition.

    `inside` is the id of the parallel stage or of the branch that contains it, or empty; `arm` is the key of the arm
    of a branch, None for a branch of a parallel stage.
    """

    stage_id: str
    inside: str = ""
    arm: str | None = None


class Layout(Struct, array_like=True, frozen=True):
    """The stages of one version of a workflow, in order of definition."""

    workflow_id: str
    version: int
    places: list[StagePlace]


class Outcome(Struct, array_like=True):
    """How an instance ended. Waiting clients receive it, and the history stores it.

    If the instance failed without a compensation, `payload`, `steps` and `run` are those of the failed stage, so that
    the instance can be retried. If compensations failed, `steps` are theirs (`pack_steps` in `resume_state`).
    `tracebacks` are those of the envelope. `places` are the stages of the workflow, so that a result lists those that
    were not reached when the version is not known any more; None if the instance completed.
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
    tracebacks: bytes | None = None
    places: list[StagePlace] | None = None


_trail_decoder = msgspec.msgpack.Decoder(list[StageRecord])
_envelope_decoder = msgspec.msgpack.Decoder(Envelope)
_outcome_decoder = msgspec.msgpack.Decoder(Outcome)
decode_envelope = _envelope_decoder.decode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
decode_item_end = msgspec.msgpack.Decoder(ItemEnd).decode
decode_outcome = _outcome_decoder.decode


def append_record(trail: bytes, record: StageRecord) -> bytes:
    """Return the trail with one more record at its end. The other records are copied, not decoded."""
    count = int.from_bytes(trail[1:5], "big") + 1
    return b"\xdd" + count.to_bytes(4, "big") + trail[5:] + encode(record)


def decode_trail(trail: bytes) -> list[StageRecord]:
    """Return the records of a trail in the order of appending. Raises `msgspec.DecodeError` for damaged data."""
    return _trail_decoder.decode(trail)


def head_of(body: bytes) -> tuple[str, int, str] | None:
    """Return workflow id, version and third field (stage or status) of an envelope or outcome; None for other bodies.

    Data may follow the envelope, as in the body of a completed gather, which a msgspec decoder rejects.
    """
    try:
        if 0x96 <= body[0] <= 0x9F:  # an array of 6 to 15 fields; a shorter one is another kind of body
            at = 1
        elif body[0] == 0xDC:  # an array of 16 fields or more
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
    """Return `value` as msgpack that can be embedded without decoding."""
    return Raw(encode(value))
