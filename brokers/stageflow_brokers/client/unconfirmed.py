"""Frames that a peer has sent and that are not confirmed yet: what they name, and how their answers are told.

Nothing here sends, or knows of a connection.
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
    """One frame that is not confirmed yet."""

    __slots__ = ("blob", "fields", "frame", "future", "op", "weight")

    def __init__(
        self,
        frame: int,
        op: bytes,
        fields: tuple[Any, ...],
        blob: bytes,
        future: Future[Any] | None,
        weight: int,
    ) -> None:
        self.frame = frame
        self.op = op
        self.fields = fields
        self.blob = blob
        self.future = future
        self.weight = weight


def resolve(pending: UnconfirmedFrame, answer: Any) -> None:
    """Give the future of a frame its answer, or the error that it says."""
    future = pending.future
    assert future is not None
    if isinstance(answer, dict):
        if "refused" in answer and len(answer) == 1:
            future.set_exception(Refused(answer["refused"]))
            return
        if "error" in answer and "message" in answer:
            known = _ERRORS.get(answer["error"], BrokerError)
            future.set_exception(_ERRORS.get(answer.get("kind", ""), known)(answer["message"]))
            return
    if pending.op != wire.PUBLISH:
        future.set_result(answer)
    elif answer is None:
        future.set_result(PublishAnswer())
    else:
        sequence = (answer["epoch"] << 40) + answer["left_seq"]
        future.set_result(PublishAnswer(sequence, [tuple(item) for item in answer["items"]]))


def leases_in(pending: UnconfirmedFrame) -> list[tuple[int, int]]:
    """What a frame settles or returns, and its sender holds until that is confirmed."""
    if pending.op == wire.SETTLE:
        _, moves, acks, others, _, _ = pending.fields
        found = [(move[0], move[1]) for move in moves] + [(ack[0], ack[1]) for ack in acks]
        for other in others:
            found.extend(other.leases)
        return found
    if pending.op == wire.RELEASE:
        return [(lease[0], lease[1]) for lease in pending.fields[0]]
    return []


def groups_in(pending: UnconfirmedFrame) -> list[str]:
    """The groups that a frame publishes into."""
    if pending.op != wire.PUBLISH:
        return []
    items = pending.fields[1]
    return [item.group if isinstance(item, PublishItem) else "".join(item[2:3]) for item in items]
