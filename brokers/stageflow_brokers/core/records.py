"""The records of the journal: their kinds and the state that they hold.

Frames that publish, settle or checkpoint are recorded as they arrived. A replay may lack older records, because their
segment was deleted. So a decision of the broker (a death is counted, a message is diverted, a gather is complete) is
recorded as its result, and a frame names the group and epoch of everything that it publishes. The one exception is a
move: its message keeps the epoch of the settled one, and a MARK record follows the frame if that is not the first
epoch.

The numbers of the kinds and the order of the fields are the format on disk: neither may change.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Struct

from stageflow_brokers.core.gather import Gather
from stageflow_brokers.core.message import DeliveryState, Group, Message
from stageflow_brokers.types import QueueOptions

__all__ = [
    "CHECKPOINT_FRAME",
    "COPY",
    "FACT",
    "FORGET",
    "GATHER",
    "GROUP",
    "GROUPS_CLOSED",
    "MARK",
    "NAMES",
    "OLDEST",
    "PUBLISH_FRAME",
    "QUEUE",
    "SESSIONS",
    "SETTLE_FRAME",
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
"""(kind, first message id that the record may create, peer, header, blob)"""

PUBLISH_FRAME, SETTLE_FRAME, CHECKPOINT_FRAME = 1, 2, 3
COPY, MARK, FORGET, GROUP, GROUPS_CLOSED, GATHER, QUEUE, FACT, SESSIONS, STARTED, OLDEST = range(4, 15)

NAMES = {
    PUBLISH_FRAME: "publish",
    SETTLE_FRAME: "settle",
    CHECKPOINT_FRAME: "checkpoint",
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
    """The state of a message without its body.

    A COPY record has the body as its blob; a MARK record changes a message that an earlier record holds.
    """

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
    """The state of a group without its messages and gathers."""

    id: str
    epoch: int
    digest: bytes | None
    started: bool
    ended: str
    divert: tuple[str, str] | None
    cancelled: str | None = None
    released: tuple[str, ...] = ()


class GatherState(Struct, array_like=True):
    """The state of a gather with its bodies.

    `need` is None while it is not open. `wait` is the deadline in seconds from the opening; after a restart the
    remaining wait is never longer, even if the clock was set back.
    """

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
    """The options of a queue, and whether it is paused."""

    options: QueueOptions
    paused: bool


encode = msgspec.msgpack.Encoder().encode
decode_message = msgspec.msgpack.Decoder(MessageState).decode
decode_group = msgspec.msgpack.Decoder(GroupState).decode
decode_gather = msgspec.msgpack.Decoder(GatherState).decode
decode_queue = msgspec.msgpack.Decoder(QueueState).decode
decode_forget = msgspec.msgpack.Decoder(tuple[int, list[int]]).decode
decode_closed_groups = msgspec.msgpack.Decoder(list[str]).decode
decode_fact = msgspec.msgpack.Decoder(tuple[str, str]).decode
decode_sessions = msgspec.msgpack.Decoder(list[tuple[int, int]]).decode
decode_epoch = msgspec.msgpack.Decoder(Annotated[int, msgspec.Meta(ge=0, lt=1 << 22)]).decode
decode_oldest = msgspec.msgpack.Decoder(Annotated[int, msgspec.Meta(ge=1)]).decode


def message_state(message: Message) -> MessageState:
    """Return the state of a message for a record."""
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
    """Return the state of a group for a record."""
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
    """Return the state of a gather for a record."""
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
