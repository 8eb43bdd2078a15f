"""What the journal is told: record kinds and the absolute facts they state.

Frames that publish, settle or checkpoint are kept as they arrived. Whatever the broker concluded by itself (a death
counted, a message moved aside, a gather completed) is kept as the state that resulted, never as a conclusion
to be drawn again: records of the past may be gone with their segment when a later one is replayed. For the same reason
a frame names the group and epoch of all that it publishes; only a move takes its epoch from the message before, and
where that is not the first one, a MARK beside the frame says so.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Struct

from stageflow_brokers.core.gather import Gather
from stageflow_brokers.core.message import DeliveryState, Group, Message
from stageflow_brokers.types import QueueOptions

__all__ = [
    "COPY",
    "FACT",
    "FORGET",
    "GATHER",
    "GROUP",
    "GROUPS_CLOSED",
    "KEPT_CHECKPOINT",
    "KEPT_PUBLISH",
    "KEPT_SETTLE",
    "MARK",
    "NAMES",
    "OLDEST",
    "QUEUE",
    "SESSIONS",
    "STARTED",
    "GatherState",
    "GroupState",
    "MessageState",
    "QueueState",
    "Record",
    "gather_state",
    "group_state",
    "message_state",
]

Record = tuple[int, int, int, bytes, bytes]
"""(kind, first message id that it may create, peer, header, blob)"""

KEPT_PUBLISH, KEPT_SETTLE, KEPT_CHECKPOINT = 1, 2, 3
COPY, MARK, FORGET, GROUP, GROUPS_CLOSED, GATHER, QUEUE, FACT, SESSIONS, STARTED, OLDEST = range(4, 15)

NAMES = {
    KEPT_PUBLISH: "publish",
    KEPT_SETTLE: "settle",
    KEPT_CHECKPOINT: "checkpoint",
    COPY: "copy",
    MARK: "mark",
    FORGET: "forget",
    GROUP: "group",
    GROUPS_CLOSED: "left",
    GATHER: "gather",
    QUEUE: "queue",
    FACT: "fact",
    SESSIONS: "sessions",
    STARTED: "started",
    OLDEST: "oldest",
}


class MessageState(Struct, array_like=True):
    """All of a message but its body. In a COPY the body is the blob; a MARK says it of a message known already."""

    id: int
    queue: str
    group: str
    epoch: int
    label: str
    priority: int
    wall: float
    attempts: int = 0
    deaths: int = 0
    failure: bytes | None = None
    fresh: bool = False
    steps: dict[str, bytes] | None = None
    parts: list[tuple[str, int]] | None = None
    due_wall: float = 0.0
    delay: float = 0.0
    expires_wall: float = 0.0
    parked: bool = False
    parked_wall: float = 0.0
    evidence: bool = False
    reason: bytes | None = None
    last_death_peer: int = 0


class GroupState(Struct, array_like=True):
    """All of a group but its messages and gathers."""

    id: str
    epoch: int
    digest: bytes | None
    started: bool
    ended: str
    divert: tuple[str, str] | None
    cancelled: str | None = None
    released: tuple[str, ...] = ()


class GatherState(Struct, array_like=True):
    """All of a gather; `need` is None while nobody has opened it. `wait` bounds what is left of it after a restart."""

    group: str
    key: str
    need: int | None
    queue: str
    label: str
    epoch: int
    base: bytes
    due_wall: float
    arrivals: list[tuple[str, bytes]]
    seen: list[str]
    wait: float = 0.0
    priority: int = 0


class QueueState(Struct, array_like=True):
    """Options of a queue and whether it is paused."""

    options: QueueOptions
    paused: bool


encode = msgspec.msgpack.Encoder().encode
decode_message = msgspec.msgpack.Decoder(MessageState).decode
decode_group = msgspec.msgpack.Decoder(GroupState).decode
decode_gather = msgspec.msgpack.Decoder(GatherState).decode
decode_queue = msgspec.msgpack.Decoder(QueueState).decode
decode_forgotten = msgspec.msgpack.Decoder(tuple[int, list[int]]).decode
decode_names = msgspec.msgpack.Decoder(list[str]).decode
decode_fact = msgspec.msgpack.Decoder(tuple[str, str]).decode
decode_sessions = msgspec.msgpack.Decoder(list[tuple[int, int]]).decode
decode_epoch = msgspec.msgpack.Decoder(Annotated[int, msgspec.Meta(ge=0, lt=1 << 22)]).decode
decode_oldest = msgspec.msgpack.Decoder(Annotated[int, msgspec.Meta(ge=1)]).decode


def message_state(message: Message) -> MessageState:
    """The state of a message as a record states it."""
    delivery_state = message.delivery_state or DeliveryState()
    return MessageState(
        message.id,
        message.queue.name,
        "" if message.group is None else message.group.id,
        message.epoch,
        message.label,
        message.priority,
        message.location.wall,
        delivery_state.attempts,
        delivery_state.deaths,
        delivery_state.failure,
        delivery_state.fresh,
        delivery_state.steps,
        delivery_state.parts,
        delivery_state.due_wall,
        delivery_state.delay,
        delivery_state.expires_wall,
        delivery_state.parked,
        delivery_state.parked_wall,
        delivery_state.evidence,
        delivery_state.reason,
        delivery_state.last_death_peer,
    )


def group_state(group: Group) -> GroupState:
    """The state of a group as a record states it."""
    return GroupState(
        group.id,
        group.epoch,
        group.digest,
        group.started,
        group.end_label,
        group.divert_to,
        group.cancelled,
        group.released_prefixes,
    )


def gather_state(group: Group, gather: Gather) -> GatherState:
    """The state of a gather as a record states it."""
    return GatherState(
        group.id,
        gather.key,
        gather.need,
        gather.queue,
        gather.label,
        gather.epoch,
        gather.base,
        gather.due_wall,
        list(gather.arrivals.items()),
        sorted(gather.seen),
        gather.wait,
        gather.priority,
    )
