"""The broker port: what the runtime may ask of any broker, whatever carries the messages.

A `Broker` here is one peer's connection. Everything that changes state is asynchronous and numbered: it is sent again
by itself after a broker restart, is taken once, and its future resolves when it is durable. Batches are the unit:
`publish` and `settle` take many messages in one call, with their bodies beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from stageflow_brokers.admin import BrokerAdmin
from stageflow_brokers.errors import (
    BrokerError,
    BrokerUnavailable,
    JournalCorrupt,
    JournalLocked,
    PayloadTooLarge,
    ProtocolError,
    QueueFull,
    Refused,
    StorageFull,
)
from stageflow_brokers.types import (
    AGAIN,
    ATTEMPT_FAILED,
    ATTEMPT_WORKED,
    CHECK,
    DEAD,
    DONE,
    LEAVE,
    MOST_LISTED,
    PUSH_ONLY,
    START,
    TERMINAL,
    WATCH,
    Ack,
    Arrival,
    DeliveryExtra,
    DeliveryItem,
    GatherOpen,
    Move,
    PublishItem,
    QueueOptions,
    SettleItem,
    Target,
)

__all__ = [
    "AGAIN",
    "ATTEMPT_FAILED",
    "ATTEMPT_WORKED",
    "CHECK",
    "DEAD",
    "DONE",
    "LEAVE",
    "MOST_LISTED",
    "PUSH_ONLY",
    "START",
    "TERMINAL",
    "WATCH",
    "Ack",
    "Arrival",
    "Broker",
    "BrokerAdmin",
    "BrokerError",
    "BrokerUnavailable",
    "DeliveryExtra",
    "DeliveryItem",
    "GatherOpen",
    "JournalCorrupt",
    "JournalLocked",
    "Listener",
    "Move",
    "PayloadTooLarge",
    "ProtocolError",
    "PublishAnswer",
    "PublishItem",
    "QueueFull",
    "QueueOptions",
    "Refused",
    "SettleItem",
    "StorageFull",
    "Target",
]


class PublishAnswer:
    """What a publish was answered. `refused` is (index, why, group) for items not taken; all others are durable.

    Why is `exists` (the same input under this id is live), `conflict` (another input is), `look-again` (the id may have
    left the broker since `seen`: consult the history, then send again with this `seen`), or `gone` (an arrival for a
    group that is not live; arrivals are numbered behind the items).
    """

    __slots__ = ("refused", "seen")

    def __init__(self, seen: int = 0, refused: Sequence[tuple[int, str, str]] = ()) -> None:
        self.seen = seen
        self.refused = list(refused)


class Listener:
    """What a connection tells its owner, from its own thread. Override what is of interest; none may block."""

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        """Messages to work on."""

    def on_pushes(self, pushes: list[tuple[str, str, bytes]]) -> None:
        """How watched groups ended, as (group, label, body)."""

    def on_notice(self, word: str, detail: Any) -> None:
        """`gone` and `parked` (a watched group), `settled` (to those who have subscribed: what follows from
        settlements, as (group, epoch, label or key, body)), `told` (to the supervisor: a word passed on), `cancel` (to
        the supervisor), `recall` (return what has not begun), `retire` (likewise, and end when done with what has),
        `malformed` (a frame made no sense and changed nothing), `refused` (the broker will not talk to this peer)."""

    def on_lost(self, ids: list[int]) -> None:
        """After a broker restart: these messages are not held any more; drop them."""

    def on_connected(self, broker_epoch: int) -> None:
        """A broker has said welcome: the first time, or after a restart."""

    def on_stale(self, ids: list[int]) -> None:
        """Settlements that were refused, because another holds these messages now."""

    def on_closed(self, reason: str) -> None:
        """The connection has ended and will not come back: it was closed, or its thread failed."""

    def holding(self) -> list[tuple[int, int]]:
        """(id, lease) of every message delivered and not yet settled."""
        return []

    def watching(self) -> list[str]:
        """Groups whose end is still of interest."""
        return []


class Broker(Protocol):
    """One connection to a broker. Thread-safe."""

    peer: int
    """Who this connection is to the broker."""

    admin: BrokerAdmin
    """The operations that are not hot: `broker.admin.stats("").result()`."""

    def publish(
        self,
        targets: Sequence[Target],
        items: Sequence[PublishItem | tuple[Any, ...]],
        bodies: Sequence[bytes],
        *,
        atomic: bool = False,
        opens: Sequence[GatherOpen] = (),
        arrivals: Sequence[Arrival] = (),
        taken: Callable[[], None] | None = None,
        waiting: Callable[[], None] | None = None,
    ) -> Future[PublishAnswer]:
        """New messages; resolves when they are durable. Fails with `QueueFull`, `PayloadTooLarge`, `Refused`.

        Waits, before anything is sent, while too much of what was published on this connection is unconfirmed: so a
        program that publishes faster than its broker keeps is slowed down. `waiting` is called every half second then
        and may raise to give up. Within a listener or the callback of a future of this connection nobody waits.

        `taken` is called in the same instant in which the frame is: who begins there to watch the groups that the
        frame starts is never told that they are gone, whenever the connection is made anew. It must not block.
        """

    def settle(
        self,
        targets: Sequence[Target],
        moves: Sequence[Move],
        acks: Sequence[Ack],
        others: Sequence[SettleItem],
        bodies: Sequence[bytes],
        *,
        queue: str = "",
        prefetch: int = -1,
    ) -> None:
        """Acknowledge messages and publish what follows, one transition each; bodies in the order moves, others."""

    def checkpoint(self, id: int, lease: int, name: str, value: bytes) -> Future[None]:
        """Keep the result of a step with the message; resolves when it is durable. Fails with `Refused`."""

    def release(self, leases: Sequence[tuple[int, int]], queue: str, prefetch: int) -> None:
        """Return messages that were not begun."""

    def consume(self, queue: str, prefetch: int) -> None:
        """Take messages of `queue`, at most `prefetch` at once, from now on and after each reconnect."""

    def close(self, timeout: float = 5.0) -> None:
        """Send what is waiting, take leave, and end."""


OpenConnection = Callable[[Listener], Broker]
