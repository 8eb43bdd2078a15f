"""A hub to connect to, and a peer that records everything it receives. For tests; the harness must never sleep."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from stageflow_brokers.api import FLAG_START, FLAG_WATCH, Broker, BrokerAdmin, DeliveryItem, Listener, Target

__all__ = ["TIMEOUT_SECONDS", "Answers", "Hub", "Peer", "Received"]

TIMEOUT_SECONDS = 20.0
"""Seconds after which an expected event counts as missing."""

T = TypeVar("T")


class Hub(Protocol):
    """A running broker, empty at first."""

    def connect(self, listener: Listener, *, role: str = "client", name: str = "") -> Broker:
        """Open a connection."""


class Answers:
    """Performs operations of a `BrokerAdmin` and waits for each answer: `peer.ask.stats("q")`."""

    def __init__(self, admin: BrokerAdmin, timeout: float = TIMEOUT_SECONDS) -> None:
        self._admin = admin
        self._timeout = timeout

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        send = getattr(self._admin, operation)

        def ask(*args: Any) -> Any:
            return send(*args).result(self._timeout)

        return ask


class Received:
    """One delivery: its queue, item and body."""

    def __init__(self, queue: str, item: DeliveryItem, body: bytes) -> None:
        self.queue = queue
        self.item = item
        self.body = body

    @property
    def lease(self) -> tuple[int, int]:
        """(id, lease)"""
        return self.item.id, self.item.lease


class Peer(Listener):
    """A connection that records what it receives. It holds each delivery until `drop`, `ack` or `move`."""

    def __init__(self, hub: Hub, *, role: str = "client", name: str = "") -> None:
        self._received = threading.Condition()
        self.deliveries: list[Received] = []
        self.pushes: list[tuple[str, str, bytes]] = []
        self.notices: list[tuple[str, Any]] = []
        self.stale: list[int] = []
        self.lost: list[int] = []
        self.closed: list[str] = []
        self.epochs: list[int] = []
        self.held: dict[int, Received] = {}
        self.watched: list[str] = []
        self.broker: Broker = hub.connect(self, role=role, name=name)
        self.ask = Answers(self.broker.admin)

    # received

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        """Record and hold the deliveries."""
        with self._received:
            for item, body in zip(items, bodies, strict=True):
                received = Received(queue, item, body)
                self.deliveries.append(received)
                self.held[item.id] = received
            self._received.notify_all()

    def on_pushes(self, pushes: list[tuple[str, str, bytes]]) -> None:
        """Record the pushes."""
        self._record(self.pushes, pushes)

    def on_notice(self, word: str, detail: Any) -> None:
        """Record the notice."""
        self._record(self.notices, [(word, detail)])

    def on_stale(self, ids: list[int]) -> None:
        """Record the ids."""
        self._record(self.stale, ids)

    def on_lost(self, ids: list[int]) -> None:
        """Record the lost leases, and hold the messages no longer."""
        for id in ids:
            self.held.pop(id, None)
        self._record(self.lost, ids)

    def on_connected(self, broker_epoch: int) -> None:
        """Record the epoch."""
        self._record(self.epochs, [broker_epoch])

    def on_closed(self, reason: str) -> None:
        """Record the reason."""
        self._record(self.closed, [reason])

    def holding(self) -> list[tuple[int, int]]:
        """Return the leases that were delivered and not settled."""
        with self._received:
            return [received.lease for received in self.held.values()]

    def watching(self) -> list[str]:
        """Return the groups in `watched`, which a test sets."""
        return self.watched

    def _record(self, records: list[T], more: Sequence[T]) -> None:
        with self._received:
            records.extend(more)
            self._received.notify_all()

    # waiting

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait until a received frame makes `condition` true; `what` describes it for the failure."""
        with self._received:
            assert self._received.wait_for(condition, TIMEOUT_SECONDS), f"{what}: received {self!r}"

    def receive(self, count: int = 1) -> list[Received]:
        """Wait for `count` deliveries that no `receive` has returned before, and return them."""
        self.wait_until(lambda: len(self.deliveries) >= count, f"{count} deliveries")
        with self._received:
            taken, self.deliveries[:count] = self.deliveries[:count], []
        return taken

    def is_quiet(self) -> bool:
        """True if nothing was delivered before the answer to a ping, which any delivery would precede."""
        self.ask.ping()
        return not self.deliveries

    def query(self, name: str, *args: Any) -> Any:
        """Return the answer to a query frame that no method of `BrokerAdmin` would send."""
        connection: Any = self.broker
        return connection._query(name, *args).result(TIMEOUT_SECONDS)

    # sending

    def publish(self, queue: str, *bodies: bytes, **fields: Any) -> list[tuple[int, str, str]]:
        """Publish messages with these bodies and the same fields to a queue; return the refused ones."""
        return self.publish_items([(queue, body, fields) for body in bodies])

    def publish_items(self, items: Sequence[tuple[str, bytes, dict[str, Any]]]) -> list[tuple[int, str, str]]:
        """Publish one message per (queue, body, fields of the item); return the refused ones."""
        names = list(dict.fromkeys(queue for queue, _, _ in items))
        fields = [
            (
                names.index(queue),
                len(body),
                more.get("group", ""),
                more.get("epoch", 1 if more.get("group") else 0),
                more.get("flags", 0),
                more.get("priority", 0),
                more.get("delay", 0.0),
                more.get("ttl", 0.0),
                more.get("digest"),
                more.get("seen", 0),
            )
            for queue, body, more in items
        ]
        answer = self.broker.publish([Target(name, "new") for name in names], fields, [body for _, body, _ in items])
        return answer.result(TIMEOUT_SECONDS).refused

    def start(self, queue: str, group: str, body: bytes = b"start", *, watch: bool = False, **more: Any) -> Any:
        """Start a group with one message; return the refused ones."""
        flags = FLAG_START | (FLAG_WATCH if watch else 0) | more.pop("flags", 0)
        return self.publish(queue, body, group=group, flags=flags, **more)

    def move(self, received: Received, queue: str, body: bytes, *, label: str = "moved", flags: int = 0) -> None:
        """Settle a message, and publish a following one."""
        item = received.item
        self.drop(received)
        moves = [(item.id, item.lease, 0, len(body), item.group)]
        self.broker.settle([Target(queue, label, flags)], moves, [], [], [body])

    def ack(self, *messages: Received, flags: int = 0) -> None:
        """Acknowledge messages without a following one."""
        self.drop(*messages)
        acks = [(m.item.id, m.item.lease, flags, m.item.group) for m in messages]
        self.broker.settle([], [], acks, [], [])

    def drop(self, *messages: Received) -> None:
        """Hold the messages no longer."""
        with self._received:
            for received in messages:
                self.held.pop(received.item.id, None)

    def __repr__(self) -> str:
        got = [(received.queue, received.body) for received in self.deliveries]
        return f"deliveries {got}, pushes {self.pushes}, notices {self.notices}, stale {self.stale}, lost {self.lost}"
