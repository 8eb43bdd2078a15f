"""The format of frames between peers and broker: typed msgpack arrays.

A message on the wire has three parts: one byte for the operation, a header, and a blob with the bodies one after the
other. A header is decoded into one of the structs below, which checks every type; then the sizes are compared with the
blob. Bodies must never be decoded here. Every frame of a peer carries the broker epoch that the peer knows and a frame
number that rises by one, so that a frame that is sent again after a reconnect is recognised.

Trust: every peer is a process of the user who owns the broker (its socket is in a directory closed to all others, see
`stageflow_brokers.zeromq.access`), and the broker believes the role and the number that a peer states. Roles prevent
mistakes, not attacks: only a `supervisor` may report a worker dead or alive. The decoders defend against defects: no
frame, however wrong, may make the broker stop, lose a message or grow without bound, and no frame settles, releases or
checkpoints a message without the lease that its sender holds.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Raw, Struct

from stageflow_brokers.errors import BrokerError, ProtocolError, Refused
from stageflow_brokers.types import (
    ACK,
    ATTEMPT_SUCCEEDED,
    ATTEMPT_UNKNOWN,
    DEAD_LETTER,
    PUSH_ONLY,
    RETRY,
    Ack,
    Arrival,
    DeliveryItem,
    GatherOpen,
    LeaseList,
    Many,
    Move,
    Name,
    PublishItem,
    SettleItem,
    Target,
)

__all__ = [
    "CHECKPOINT",
    "FIRST_EPOCH",
    "HELLO",
    "MARK_READ",
    "MAX_FRAME",
    "MAX_HEADER",
    "PROTOCOL",
    "PUBLISH",
    "QUERY",
    "RELEASE",
    "SETTLE",
    "BrokerFrame",
    "Buffer",
    "Checkpoint",
    "Hello",
    "PublishFrame",
    "Query",
    "Release",
    "SettleFrame",
    "encode",
    "error_answer",
    "read_frame_number",
]

PROTOCOL = 1
"""Version of the protocol; peers with another one are refused."""

FIRST_EPOCH = 1
"""The epoch in which a group begins by default. A move of a message in a later epoch needs an additional record."""

MAX_FRAME = 256 << 20
"""Limit of bytes of one part of a frame. The transport disconnects a peer that sends more, so clients refuse to."""

MAX_HEADER = 64 << 20
"""Limit of bytes of a header."""

MAX_NUMBER = 1 << 62
"""Limit of numbers of frames, epochs and needs, so that counting on from them stays within 64 bits."""

HELLO, PUBLISH, SETTLE, CHECKPOINT, RELEASE, QUERY, MARK_READ = b"H", b"P", b"S", b"C", b"R", b"Q", b"A"
"""The operations of peers."""

Buffer = bytes | memoryview
"""Received bytes: from a socket, or from a batch of the journal."""

encode = msgspec.msgpack.Encoder().encode


class PublishFrame(Struct, array_like=True):
    """New messages that follow from no settlement.

    With `atomic`, all or none are accepted.
    """

    broker_epoch: int
    frame: int
    targets: Annotated[list[Target], Many]
    items: Annotated[list[PublishItem], Many]
    atomic: bool = False
    opens: Annotated[list[GatherOpen], Many] = []
    arrivals: Annotated[list[Arrival], Many] = []


class SettleFrame(Struct, array_like=True):
    """Settlements; the two common forms have lists of their own.

    `prefetch` is the new limit of messages of `queue` that the sender holds, -1 for no change.
    """

    broker_epoch: int
    frame: int
    targets: Annotated[list[Target], Many]
    moves: Annotated[list[Move], Many]
    acks: Annotated[list[Ack], Many] = []
    others: Annotated[list[SettleItem], Many] = []
    queue: Name = ""
    prefetch: int = -1


class Checkpoint(Struct, array_like=True, gc=False):
    """The result of a step of a leased message; the blob is its value."""

    broker_epoch: int
    frame: int
    id: int
    lease: int
    name: Name


class Release(Struct, array_like=True):
    """Release delivered messages that were not begun.

    They go to the head of their queue; no attempt is counted.
    """

    broker_epoch: int
    frame: int
    leases: LeaseList
    queue: Name = ""
    prefetch: int = -1


class Query(Struct, array_like=True):
    """An administrative operation by name; `args` is a msgpack array."""

    broker_epoch: int
    frame: int
    name: Name
    args: Raw


class Hello(Struct, array_like=True):
    """The first frame of a connection and of each reconnect.

    It states the identity of a peer and its leases.

    `next_frame` is the first frame that will follow, the oldest unconfirmed one. `number` rises with each hello, and
    the welcome repeats it. A peer ignores all frames between its hello and the welcome, so a message that was delivered
    to it and is not in `holding` never arrived.
    """

    protocol: int
    role: Name
    name: Name
    pid: int
    next_frame: int
    consume: Annotated[list[tuple[Name, int]], Many] = []
    holding: LeaseList = []
    watching: Annotated[list[Name], Many] = []
    number: int = 0


class BrokerFrame(Struct, array_like=True):
    """Everything that the broker sends to one peer after one commit.

    Attributes:
        broker_epoch: The epoch of the broker.
        acked: Every frame up to this number is durable; -1 for a peer without a session.
        results: (frame, value) for frames that have an answer.
        deliveries: (queue, items).
        pushes: (group, label, size of the body).
        notices: (word, detail).
    """

    broker_epoch: int
    acked: int
    results: list[tuple[int, Raw]]
    deliveries: list[tuple[str, list[DeliveryItem]]]
    pushes: list[tuple[str, str, int]]
    notices: list[tuple[str, Any]]


_publish = msgspec.msgpack.Decoder(PublishFrame).decode
_settle = msgspec.msgpack.Decoder(SettleFrame).decode
_checkpoint = msgspec.msgpack.Decoder(Checkpoint).decode
_release = msgspec.msgpack.Decoder(Release).decode
_query = msgspec.msgpack.Decoder(Query).decode
_hello = msgspec.msgpack.Decoder(Hello).decode
_broker_frame = msgspec.msgpack.Decoder(BrokerFrame).decode
_items = msgspec.msgpack.Decoder(list[Raw]).decode
_number = msgspec.msgpack.Decoder(int).decode

_MALFORMED = (msgspec.MsgspecError, RecursionError, ValueError)
"""The errors that a decoder may raise for arbitrary bytes."""


def decode_broker_frame(header: bytes) -> BrokerFrame:
    """Decode a frame of the broker, for a peer."""
    return _broker_frame(header)


def error_answer(error: BrokerError) -> dict[str, str]:
    """Return the answer to a frame that is refused whole.

    `error` names a class that peers of every release know, `kind`, if present, a subclass of it. A peer that does not
    know this subclass raises the class in `error`.
    """
    name = type(error).__name__
    if isinstance(error, Refused) and type(error) is not Refused:
        return {"error": Refused.__name__, "kind": name, "message": str(error)}
    return {"error": name, "message": str(error)}


def read_frame_number(header: bytes) -> tuple[int, int] | None:
    """Return (broker epoch, frame) of a malformed header, None if unreadable.

    With these the frame can be answered.
    """
    try:
        epoch, frame = (_number(raw) for raw in _items(header)[:2])
    except _MALFORMED:
        return None
    return epoch, frame


def decode_hello(header: bytes) -> Hello:
    """Decode a hello.

    Raise `ProtocolError` if it is malformed or of another protocol.
    """
    try:
        hello = _hello(header)
    except _MALFORMED as error:
        raise ProtocolError(f"hello: {error}") from None
    if hello.protocol != PROTOCOL:
        raise ProtocolError(
            f"the peer uses protocol {hello.protocol} and this broker {PROTOCOL}; run the same version on both sides"
        )
    if not 0 < hello.next_frame < MAX_NUMBER:
        raise ProtocolError(f"hello: {hello.next_frame} is not a frame number")
    for queue, prefetch in hello.consume:
        check_consume(queue, prefetch)
    return hello


def check_consume(queue: str, prefetch: int) -> None:
    """Raise `ProtocolError` unless the queue has a name and the prefetch is not negative."""
    if not queue or prefetch < 0:
        raise ProtocolError("consume needs a queue and a prefetch of at least 0")


def decode_publish(header: Buffer, blob: Buffer) -> PublishFrame:
    """Decode a publish.

    Raise `ProtocolError` if it is malformed or its sizes do not match the blob.
    """
    try:
        frame = _publish(header)
    except _MALFORMED as error:
        raise ProtocolError(f"publish: {error}") from None
    _check_targets(frame.targets)
    count = len(frame.targets)
    total = 0
    for item in frame.items:
        if item.size < 0 or not 0 <= item.target < count or not 0 <= item.epoch < MAX_NUMBER:
            raise ProtocolError("publish: an item has an invalid size, target or epoch")
        if not item.delay >= 0 or not item.ttl >= 0:
            raise ProtocolError("publish: an item has an invalid delay or ttl")
        total += item.size
    if frame.opens or frame.arrivals:
        total += _check_gathers(frame.opens, frame.arrivals, frame.targets)
        if not all(each.group for each in frame.opens) or not all(each.group for each in frame.arrivals):
            raise ProtocolError("publish: a gather or arrival has no group")
    if total != len(blob):
        raise ProtocolError(f"publish: the bodies have {len(blob)} bytes, but the header states {total}")
    return frame


def decode_settle(header: Buffer, blob: Buffer) -> SettleFrame:
    """Decode a settle.

    Raise `ProtocolError` if it is malformed or its sizes do not match the blob.
    """
    try:
        frame = _settle(header)
    except _MALFORMED as error:
        raise ProtocolError(f"settle: {error}") from None
    targets = frame.targets
    _check_targets(targets)
    count = len(targets)
    total = 0
    for move in frame.moves:
        size = move[3]
        if size < 0 or not 0 <= move[2] < count or targets[move[2]].flags & PUSH_ONLY:
            raise ProtocolError("settle: a move has an invalid size or target")
        total += size
    for other in frame.others:
        if other.outcome not in (ACK, RETRY, DEAD_LETTER) or not other.delay >= 0:
            raise ProtocolError("settle: an item has an invalid outcome or delay")
        if not ATTEMPT_UNKNOWN <= other.attempt_result <= ATTEMPT_SUCCEEDED:
            raise ProtocolError("settle: an item has an invalid attempt result")
        if not other.leases or len({id for id, _ in other.leases}) != len(other.leases):
            raise ProtocolError("settle: an item has no lease, or one lease twice")
        for item in other.publishes:
            if item.size < 0 or not 0 <= item.target < count or not 0 <= item.epoch < MAX_NUMBER:
                raise ProtocolError("settle: a publish has an invalid size, target or epoch")
            if not item.delay >= 0 or not item.ttl >= 0:
                raise ProtocolError("settle: a publish has an invalid delay or ttl")
            total += item.size
        total += _check_gathers(other.opens, other.arrivals, targets)
    if total != len(blob):
        raise ProtocolError(f"settle: the bodies have {len(blob)} bytes, but the header states {total}")
    return frame


def _check_targets(targets: list[Target]) -> None:
    for target in targets:
        if not target.queue and not target.flags & PUSH_ONLY:
            raise ProtocolError("a target has no queue")


def _check_gathers(opens: list[GatherOpen], arrivals: list[Arrival], targets: list[Target]) -> int:
    total = 0
    for gather in opens:
        if gather.size < 0 or not 0 <= gather.need < MAX_NUMBER or not gather.deadline >= 0:
            raise ProtocolError("a gather has an invalid size, need or deadline")
        if not 0 <= gather.epoch < MAX_NUMBER:
            raise ProtocolError("a gather has an invalid epoch")
        if not 0 <= gather.target < len(targets) or targets[gather.target].flags & PUSH_ONLY:
            raise ProtocolError("a gather has an invalid target")
        total += gather.size
    for arrival in arrivals:
        if arrival.size < 0 or not 0 <= arrival.epoch < MAX_NUMBER:
            raise ProtocolError("an arrival has an invalid size or epoch")
        total += arrival.size
    return total


def decode_checkpoint(header: Buffer) -> Checkpoint:
    """Decode a checkpoint. Raise `ProtocolError` if it is malformed."""
    try:
        return _checkpoint(header)
    except _MALFORMED as error:
        raise ProtocolError(f"checkpoint: {error}") from None


def decode_release(header: bytes) -> Release:
    """Decode a release. Raise `ProtocolError` if it is malformed."""
    try:
        return _release(header)
    except _MALFORMED as error:
        raise ProtocolError(f"release: {error}") from None


def decode_mark_read(header: bytes) -> int:
    """Decode the answer to a notice `mark`: its number.

    Raise `ProtocolError` if it is malformed.
    """
    try:
        return _number(header)
    except _MALFORMED as error:
        raise ProtocolError(f"mark read: {error}") from None


def decode_query(header: bytes) -> Query:
    """Decode a query. Raise `ProtocolError` if it is malformed."""
    try:
        return _query(header)
    except _MALFORMED as error:
        raise ProtocolError(f"query: {error}") from None
