"""A message of the broker as a row: its instance, its state and the context it carries."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec

from stageflow_actors.core.codec import json_view
from stageflow_actors.core.description import failure_text
from stageflow_actors.core.envelope import Envelope, decode_envelope, decode_outcome
from stageflow_actors.core.failures import read_failure, traceback_of
from stageflow_actors.core.plan import COMPENSATE, FINISHED
from stageflow_actors.core.tracebacks.table import read_traceback

__all__ = ["envelope_of", "message_row"]


def message_row(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message, as `peek` of the broker describes it, in plain values."""
    label: str = message["label"]
    row: dict[str, Any] = {
        "id": message["id"],
        "queue": message["queue"],
        "instance": message["group"],
        "epoch": message["epoch"],
        "workflow": "",
        "stage": label.removeprefix(COMPENSATE),
        "compensation": label.startswith(COMPENSATE),
        "state": message["state"],
        "enqueued": message["enqueued"],
        "age": max(0.0, time.time() - message["enqueued"]),
        "attempts": message["attempts"],
        "deaths": message["deaths"],
        "size": message["size"],
        "reason": failure_text(message["reason"] or message["failure"]),
        "kind": _kind(message["reason"] or message["failure"]),
        "traceback": read_traceback(traceback_of(message["reason"] or message["failure"])),
        "parked": message["parked"],
        "evidence": message["evidence"],
        "context": None,
    }
    body: bytes = message["body"][: message["base"]]  # without the arrivals behind it
    try:
        read = decode_outcome(body) if label == FINISHED else decode_envelope(body)
        row["workflow"], row["context"] = read.workflow_id, json_view(read.context)
    except msgspec.MsgspecError:
        pass  # not a message of a workflow: the row shows the rest
    return row


def envelope_of(message: Mapping[str, Any]) -> Envelope | None:
    """Return the envelope of a stage's message; None for a message of another kind."""
    try:
        return decode_envelope(message["body"][: message["base"]])
    except msgspec.MsgspecError:
        return None


def _kind(failure: bytes | None) -> str | None:
    try:
        read = read_failure(failure)
    except msgspec.MsgspecError:
        return None
    return None if read is None else read.kind
