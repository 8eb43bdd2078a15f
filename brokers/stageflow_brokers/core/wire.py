"""The grammar of frames: what peers and broker say to each other, as typed msgpack arrays.

A message on the wire is three parts: one byte that names the operation, a header, and a blob that holds the bodies
one behind the other. Headers are decoded into the structs below, which checks every type; sizes are checked
against the blob here. Bodies are never looked into. Every frame of a peer carries the broker epoch that
the peer believes in and a frame number that rises by one, so that a frame sent again after a reconnect is recognised.

Trust: every peer is a process of the user who owns the broker (the directory of its socket is closed to all others,
see `stageflow_brokers.zeromq.access`), and the broker believes the role and the number that a peer states. A role is
no right: only a `supervisor` may report a worker dead or alive, so that no other peer does so by mistake.
What is defended against is error, not the user himself: no frame, however wrong, makes the broker end, forget or grow
without bound, and none settles, returns or marks a message but by the lease that its sender itself holds.
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
    Leases,
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
    "Buffer",
    "Checkpoint",
    "Hello",
    "Out",
    "PublishFrame",
    "Query",
    "Release",
    "SettleFrame",
    "encode",
    "numbered",
    "refusal",
]

PROTOCOL = 1

FIRST_EPOCH = 1
"""The epoch in which a group begins, unless its publisher says otherwise: the one that costs least to keep."""

MAX_FRAME = 256 << 20
"""Most bytes of one part of a frame. A peer that sends more is cut off by the transport, so its client refuses to."""

MAX_HEADER = 64 << 20
"""Most bytes of a header."""

MAX_NUMBER = 1 << 62
"""Numbers of frames, epochs and needs lie below this, so that counting on from them never leaves 64 bits."""

HELLO, PUBLISH, SETTLE, CHECKPOINT, RELEASE, QUERY, MARK_READ = b"H", b"P", b"S", b"C", b"R", b"Q", b"A"

Buffer = bytes | memoryview
"""Bytes as they came: from a socket, or out of a batch of the journal."""

encode = msgspec.msgpack.Encoder().encode


class PublishFrame(Struct, array_like=True):
    """New messages from outside. `atomic`: all of them or none."""

    broker_epoch: int
    frame: int
    targets: Annotated[list[Target], Many]
    items: Annotated[list[PublishItem], Many]
    atomic: bool = False
    opens: Annotated[list[GatherOpen], Many] = []
    arrivals: Annotated[list[Arrival], Many] = []


class SettleFrame(Struct, array_like=True):
    """Settlements, the common shapes apart. `prefetch`: how many messages the sender wants to hold (-1: as before)."""

    broker_epoch: int
    frame: int
    targets: Annotated[list[Target], Many]
    moves: Annotated[list[Move], Many]
    acks: Annotated[list[Ack], Many] = []
    others: Annotated[list[SettleItem], Many] = []
    queue: Name = ""
    prefetch: int = -1


class Checkpoint(Struct, array_like=True, gc=False):
    """A step of a message in work has completed; its value is the blob."""

    broker_epoch: int
    frame: int
    id: int
    lease: int
    name: Name


class Release(Struct, array_like=True):
    """Messages that were delivered and not begun: back to the head of their queue, uncharged."""

    broker_epoch: int
    frame: int
    leases: Leases
    queue: Name = ""
    prefetch: int = -1


class Query(Struct, array_like=True):
    """Everything that is not hot, by name; `args` is a msgpack array."""

    broker_epoch: int
    frame: int
    name: Name
    args: Raw


class Hello(Struct, array_like=True):
    """The first frame of a connection, and again after a broker restart: who I am and what I hold.

    `next_frame` is the first frame that will follow: the oldest one unconfirmed. `number` comes back in the welcome.
    Whatever the broker says between a hello and its welcome is lost on the peer, and the broker knows it: a message
    that it has delivered and that is not in `holding` never arrived.
    """

    protocol: int
    role: Name
    name: Name
    pid: int
    next_frame: int
    consume: Annotated[list[tuple[Name, int]], Many] = []
    holding: Leases = []
    watching: Annotated[list[Name], Many] = []
    number: int = 0


class Out(Struct, array_like=True):
    """Everything the broker tells one peer after one commit.

    `acked`: every frame up to this number is durable. `results`: (frame, value) for frames that have an answer.
    `deliveries`: (queue, items). `pushes`: (group, label, size). `notices`: (word, detail).
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
_out = msgspec.msgpack.Decoder(Out).decode
_items = msgspec.msgpack.Decoder(list[Raw]).decode
_number = msgspec.msgpack.Decoder(int).decode

_MALFORMED = (msgspec.MsgspecError, RecursionError, ValueError)
"""What a decoder may raise on bytes from anywhere."""


def decode_out(header: bytes) -> Out:
    """The broker's side of the talk, read by a peer."""
    return _out(header)


def refusal(error: BrokerError) -> dict[str, str]:
    """Return the answer to a frame that is refused whole.

    `error` names a class that peers of every release know; `kind`, where it is there, a narrower one. A peer that does
    not know that kind reads the refusal.
    """
    name = type(error).__name__
    if isinstance(error, Refused) and type(error) is not Refused:
        return {"error": Refused.__name__, "kind": name, "message": str(error)}
    return {"error": name, "message": str(error)}


def numbered(header: bytes) -> tuple[int, int] | None:
    """(broker epoch, frame) of a header that is wrong in other ways, so that its frame can be answered; or None."""
    try:
        epoch, frame = (_number(raw) for raw in _items(header)[:2])
    except _MALFORMED:
        return None
    return epoch, frame


def decode_hello(header: bytes) -> Hello:
    """Raises `ProtocolError` for anything that is not a hello of this protocol."""
    try:
        hello = _hello(header)
    except _MALFORMED as error:
        raise ProtocolError(f"hello: {error}") from None
    if hello.protocol != PROTOCOL:
        raise ProtocolError(
            f"the peer speaks protocol {hello.protocol}, this broker {PROTOCOL}; run the same version on both sides"
        )
    if not 0 < hello.next_frame < MAX_NUMBER:
        raise ProtocolError(f"hello: {hello.next_frame} is no number of a frame")
    for queue, prefetch in hello.consume:
        check_consume(queue, prefetch)
    return hello


def check_consume(queue: str, prefetch: int) -> None:
    """Raises `ProtocolError` unless these are a queue and a credit."""
    if not queue or prefetch < 0:
        raise ProtocolError("consume: needs a queue and a prefetch of 0 or more")


def decode_publish(header: Buffer, blob: Buffer) -> PublishFrame:
    """Raises `ProtocolError` unless types fit and the sizes add up to the blob."""
    try:
        frame = _publish(header)
    except _MALFORMED as error:
        raise ProtocolError(f"publish: {error}") from None
    _check_targets(frame.targets)
    count = len(frame.targets)
    total = 0
    for item in frame.items:
        if item.size < 0 or not 0 <= item.target < count or not 0 <= item.epoch < MAX_NUMBER:
            raise ProtocolError("publish: an item with an impossible size, target or epoch")
        if not item.delay >= 0 or not item.ttl >= 0:
            raise ProtocolError("publish: an item with an impossible delay or ttl")
        total += item.size
    if frame.opens or frame.arrivals:
        total += _check_gathers(frame.opens, frame.arrivals, frame.targets)
        if not all(each.group for each in frame.opens) or not all(each.group for each in frame.arrivals):
            raise ProtocolError("publish: a gather belongs to a group, and here one is not named")
    if total != len(blob):
        raise ProtocolError(f"publish: the bodies are {len(blob)} bytes, the header says {total}")
    return frame


def decode_settle(header: Buffer, blob: Buffer) -> SettleFrame:
    """Raises `ProtocolError` unless types fit and the sizes add up to the blob."""
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
            raise ProtocolError("settle: a move with an impossible size or target")
        total += size
    for other in frame.others:
        if other.outcome not in (ACK, RETRY, DEAD_LETTER) or not other.delay >= 0:
            raise ProtocolError("settle: an item with an impossible outcome or delay")
        if not ATTEMPT_UNKNOWN <= other.attempt_result <= ATTEMPT_SUCCEEDED:
            raise ProtocolError("settle: an item with an impossible attempt result")
        if not other.leases or len({id for id, _ in other.leases}) != len(other.leases):
            raise ProtocolError("settle: an item without a lease, or with one twice")
        for item in other.publishes:
            if item.size < 0 or not 0 <= item.target < count or not 0 <= item.epoch < MAX_NUMBER:
                raise ProtocolError("settle: a publish with an impossible size, target or epoch")
            if not item.delay >= 0 or not item.ttl >= 0:
                raise ProtocolError("settle: a publish with an impossible delay or ttl")
            total += item.size
        total += _check_gathers(other.opens, other.arrivals, targets)
    if total != len(blob):
        raise ProtocolError(f"settle: the bodies are {len(blob)} bytes, the header says {total}")
    return frame


def _check_targets(targets: list[Target]) -> None:
    for target in targets:
        if not target.queue and not target.flags & PUSH_ONLY:
            raise ProtocolError("a target without a queue")


def _check_gathers(opens: list[GatherOpen], arrivals: list[Arrival], targets: list[Target]) -> int:
    total = 0
    for gather in opens:
        if gather.size < 0 or not 0 <= gather.need < MAX_NUMBER or not gather.deadline >= 0:
            raise ProtocolError("a gather with an impossible size, need or deadline")
        if not 0 <= gather.epoch < MAX_NUMBER:
            raise ProtocolError("a gather with an impossible epoch")
        if not 0 <= gather.target < len(targets) or targets[gather.target].flags & PUSH_ONLY:
            raise ProtocolError("a gather with an impossible target")
        total += gather.size
    for arrival in arrivals:
        if arrival.size < 0 or not 0 <= arrival.epoch < MAX_NUMBER:
            raise ProtocolError("an arrival with an impossible size or epoch")
        total += arrival.size
    return total


def decode_checkpoint(header: Buffer) -> Checkpoint:
    """Raises `ProtocolError` for a wrong shape."""
    try:
        return _checkpoint(header)
    except _MALFORMED as error:
        raise ProtocolError(f"checkpoint: {error}") from None


def decode_release(header: bytes) -> Release:
    """Raises `ProtocolError` for a wrong shape."""
    try:
        return _release(header)
    except _MALFORMED as error:
        raise ProtocolError(f"release: {error}") from None


def decode_mark_read(header: bytes) -> int:
    """What a `mark` said, in answer to it. Raises `ProtocolError` for a wrong shape."""
    try:
        return _number(header)
    except _MALFORMED as error:
        raise ProtocolError(f"mark read: {error}") from None


def decode_query(header: bytes) -> Query:
    """Raises `ProtocolError` for a wrong shape."""
    try:
        return _query(header)
    except _MALFORMED as error:
        raise ProtocolError(f"query: {error}") from None
