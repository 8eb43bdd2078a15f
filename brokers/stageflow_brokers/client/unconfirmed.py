"""Unconfirmed frames: the leases and groups they name, and the resolution of their futures.

This module must neither send a frame nor depend on a connection.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from stageflow_brokers.api import PublishAnswer
from stageflow_brokers.core import wire
from stageflow_brokers.errors import BrokerError, PayloadTooLarge, ProtocolError, QueueFull, Refused, StorageFull
from stageflow_brokers.types import PublishItem

__all__ = ["UnconfirmedFrame", "groups_in", "leases_in", "resolve"]

_ERRORS: dict[str, type[BrokerError]] = {
    kind.__name__: kind for kind in (QueueFull, PayloadTooLarge, ProtocolError, Refused, StorageFull)
}


class UnconfirmedFrame:
    """A frame that the broker has not confirmed yet. `number` identifies it; `weight` is its share of the limit."""

    __slots__ = ("blob", "fields", "future", "number", "op", "weight")

    def __init__(
        self,
        number: int,
        op: bytes,
        fields: tuple[Any, ...],
        blob: bytes,
        future: Future[Any] | None,
        weight: int,
    ) -> None:
        self.number = number
        self.op = op
        self.fields = fields
        self.blob = blob
        self.future = future
        self.weight = weight


def resolve(frame: UnconfirmedFrame, answer: Any) -> None:
    """Set the result of the future of a frame from the broker's answer, or its error."""
    future = frame.future
    assert future is not None
    if isinstance(answer, dict):
        if "refused" in answer and len(answer) == 1:
            future.set_exception(Refused(answer["refused"]))
            return
        if "error" in answer and "message" in answer:
            kind = _ERRORS.get(answer["error"], BrokerError)
            future.set_exception(_ERRORS.get(answer.get("kind", ""), kind)(answer["message"]))
            return
    if frame.op != wire.PUBLISH:
        future.set_result(answer)
    elif answer is None:
        future.set_result(PublishAnswer())
    else:
        sequence = (answer["epoch"] << 40) + answer["left_seq"]
        future.set_result(PublishAnswer(sequence, [tuple(item) for item in answer["items"]]))


def leases_in(frame: UnconfirmedFrame) -> list[tuple[int, int]]:
    """Return the leases that a frame settles or releases. Its sender holds them until the frame is confirmed."""
    if frame.op == wire.SETTLE:
        _, moves, acks, others, _, _ = frame.fields
        found = [(move[0], move[1]) for move in moves] + [(ack[0], ack[1]) for ack in acks]
        for other in others:
            found.extend(other.leases)
        return found
    if frame.op == wire.RELEASE:
        return [(lease[0], lease[1]) for lease in frame.fields[0]]
    return []


def groups_in(frame: UnconfirmedFrame) -> list[str]:
    """Return the groups that a frame publishes into."""
    if frame.op != wire.PUBLISH:
        return []
    items = frame.fields[1]
    return [item.group if isinstance(item, PublishItem) else "".join(item[2:3]) for item in items]
