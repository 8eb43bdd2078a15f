"""A peer's side of the talk, without a transport: numbering, sending again, futures, the hello.

A frame stays here until the broker has said that it is durable. After a broker restart everything unconfirmed is sent
again in order under its old number; the broker takes each once. Nothing is sent before the welcome.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import msgspec

from brokers.api import Listener, PublishAnswer
from brokers.core import wire
from brokers.core.wire import Ack, Arrival, GatherOpen, Move, PublishItem, SettleItem, Target
from brokers.errors import BrokerError, BrokerUnavailable, PayloadTooLarge, QueueFull, Refused

__all__ = ["PeerClient", "new_peer"]

_ERRORS: dict[str, type[BrokerError]] = {"QueueFull": QueueFull, "PayloadTooLarge": PayloadTooLarge, "Refused": Refused}


def new_peer() -> int:
    """A name for a connection that nobody else has: 63 random bits, never 0."""
    return int.from_bytes(os.urandom(8), "big") >> 1 | 1


class _Pending:
    """One frame that is not confirmed yet."""

    __slots__ = ("blob", "fields", "frame", "future", "op")

    def __init__(self, frame: int, op: bytes, fields: tuple[Any, ...], blob: bytes, future: Future[Any] | None) -> None:
        self.frame = frame
        self.op = op
        self.fields = fields
        self.blob = blob
        self.future = future


class PeerClient(ABC):
    """The transport-free half of a connection. A subclass moves frames: it calls `said`, and is called by `_wake`."""

    def __init__(self, listener: Listener, *, peer: int = 0, role: str = "client", name: str = "") -> None:
        self.peer = peer or new_peer()
        self.role = role
        self.name = name
        self.broker_epoch = 0
        self._listener = listener
        self._lock = threading.Lock()
        self._frame = 0
        self._unconfirmed: deque[_Pending] = deque()
        self._outgoing: deque[tuple[bytes, bytes, bytes]] = deque()
        self._consuming: dict[str, int] = {}
        self._welcomed = False
        self._closed = False

    # what a subclass provides

    @abstractmethod
    def _wake(self) -> None:
        """There is something in `_outgoing`: have the owning thread send it."""

    @abstractmethod
    def close(self, timeout: float = 5.0) -> None:
        """Send what is waiting, take leave, and end."""

    # the port

    def publish(
        self,
        targets: Sequence[Target],
        items: Sequence[PublishItem | tuple[Any, ...]],
        bodies: Sequence[bytes],
        *,
        atomic: bool = False,
        opens: Sequence[GatherOpen] = (),
        arrivals: Sequence[Arrival] = (),
    ) -> Future[PublishAnswer]:
        """See `brokers.api.Broker.publish`."""
        future: Future[PublishAnswer] = Future()
        fields = (targets, items, atomic, opens, arrivals)
        self._send(wire.PUBLISH, fields, b"".join(bodies), future)
        return future

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
        """See `brokers.api.Broker.settle`."""
        if prefetch >= 0 and queue in self._consuming:
            self._consuming[queue] = prefetch
        self._send(wire.SETTLE, (targets, moves, acks, others, queue, prefetch), b"".join(bodies), None)

    def checkpoint(self, id: int, lease: int, name: str, value: bytes) -> Future[None]:
        """See `brokers.api.Broker.checkpoint`."""
        future: Future[None] = Future()
        self._send(wire.CHECKPOINT, (id, lease, name), value, future)
        return future

    def release(self, leases: Sequence[tuple[int, int]], queue: str, prefetch: int) -> None:
        """See `brokers.api.Broker.release`."""
        if queue in self._consuming:
            self._consuming[queue] = prefetch
        self._send(wire.RELEASE, (leases, queue, prefetch), b"", None)

    def consume(self, queue: str, prefetch: int) -> None:
        """See `brokers.api.Broker.consume`."""
        self._consuming[queue] = prefetch
        self.query("consume", queue, prefetch)

    def query(self, name: str, *args: Any) -> Future[Any]:
        """See `brokers.api.Broker.query`."""
        future: Future[Any] = Future()
        self._send(wire.QUERY, (name, args), b"", future)
        return future

    # sending

    def _send(self, op: bytes, fields: tuple[Any, ...], blob: bytes, future: Future[Any] | None) -> None:
        with self._lock:
            if self._closed:
                raise BrokerUnavailable("this connection has been closed; open another one")
            self._frame += 1
            pending = _Pending(self._frame, op, fields, blob, future)
            self._unconfirmed.append(pending)
            if not self._welcomed:
                return
            header = wire.encode((self.broker_epoch, pending.frame, *fields))
            self._outgoing.append((op, header, blob))
        self._wake()

    def _hello(self) -> tuple[bytes, bytes, bytes]:
        """The frame that opens the talk. What is held is read source first, so that nothing on its way is missed."""
        holding = list(self._listener.holding())
        # What is still being published is not live yet, and not gone either: its own frame asks to be told.
        watching = self._listener.watching()
        with self._lock:
            self._welcomed = False
            self._outgoing.clear()
            first = self._unconfirmed[0].frame if self._unconfirmed else self._frame + 1
            starting: set[str] = set()
            for pending in self._unconfirmed:
                holding.extend(_leases_in(pending))
                starting.update(_groups_in(pending))
            consume = list(self._consuming.items())
        header = wire.encode(
            (
                wire.PROTOCOL,
                self.role,
                self.name,
                os.getpid(),
                first,
                consume,
                holding,
                [group for group in watching if group not in starting],
            )
        )
        return wire.HELLO, header, b""

    # hearing

    def said(self, header: bytes, blob: bytes) -> None:
        """What the broker says, on the owning thread."""
        out = wire.decode_out(header)
        if not self._welcomed or out.broker_epoch != self.broker_epoch:
            if not self._heard_welcome(out):
                return
        elif out.notices and not self._heard_notices(out):
            return
        self._confirm(out)
        at = 0
        for queue, items in out.deliveries:
            bodies = []
            for item in items:
                end = at + item.size
                bodies.append(blob[at:end])
                at = end
            self._listener.on_deliveries(queue, items, bodies)
        if out.pushes:
            pushes = []
            for group, label, size in out.pushes:
                pushes.append((group, label, blob[at : at + size]))
                at += size
            self._listener.on_pushes(pushes)

    def _heard_welcome(self, out: wire.Out) -> bool:
        lost: list[int] | None = None
        for word, detail in out.notices:
            if word == "welcome":
                lost = detail
        if lost is None:
            if any(word == "hello" for word, _ in out.notices):
                self._say_hello()
            return False
        self.broker_epoch = out.broker_epoch
        if lost:
            self._listener.on_lost(lost)
        with self._lock:
            self._welcomed = True
            for pending in self._unconfirmed:
                frame = wire.encode((self.broker_epoch, pending.frame, *pending.fields))
                self._outgoing.append((pending.op, frame, pending.blob))
        self._wake()
        self._listener.on_connected(out.broker_epoch)
        for word, detail in out.notices:
            if word != "welcome":
                self._listener.on_notice(word, detail)
        # Frames that the broker took before are sent again all the same: that is how their answers come.
        out.acked = -1
        return True

    def _heard_notices(self, out: wire.Out) -> bool:
        for word, detail in out.notices:
            if word in ("hello", "resend"):
                self._say_hello()
                return False
            if word != "welcome":
                self._listener.on_notice(word, detail)
        return True

    @abstractmethod
    def _say_hello(self) -> None:
        """Send `_hello()` before anything else."""

    def _confirm(self, out: wire.Out) -> None:
        unconfirmed = self._unconfirmed
        results = dict(out.results) if out.results else None
        while unconfirmed and unconfirmed[0].frame <= out.acked:
            with self._lock:
                pending = unconfirmed.popleft()
            raw = None if results is None else results.get(pending.frame)
            if pending.future is None:
                if raw is not None:
                    answer = msgspec.msgpack.decode(raw)
                    if isinstance(answer, dict) and answer.get("stale"):
                        self._listener.on_stale(answer["stale"])
            elif not pending.future.cancelled():
                _resolve(pending, None if raw is None else msgspec.msgpack.decode(raw), self.broker_epoch)

    def _fail_all(self, reason: str) -> None:
        """Nothing more will be confirmed."""
        with self._lock:
            self._closed = True
            left = list(self._unconfirmed)
            self._unconfirmed.clear()
        for pending in left:
            if pending.future is not None and not pending.future.done():
                pending.future.set_exception(BrokerUnavailable(reason))


def _resolve(pending: _Pending, answer: Any, epoch: int) -> None:
    future = pending.future
    assert future is not None
    if isinstance(answer, dict):
        if "refused" in answer and len(answer) == 1:
            future.set_exception(Refused(answer["refused"]))
            return
        if "error" in answer and "message" in answer:
            future.set_exception(_ERRORS.get(answer["error"], BrokerError)(answer["message"]))
            return
    if pending.op == wire.PUBLISH:
        if answer is None:
            future.set_result(PublishAnswer())
        else:
            seen = (answer["epoch"] << 40) + answer["left_seq"]
            future.set_result(PublishAnswer(seen, [tuple(item) for item in answer["items"]]))
        return
    future.set_result(answer)


def _groups_in(pending: _Pending) -> list[str]:
    if pending.op != wire.PUBLISH:
        return []
    return [item.group if isinstance(item, PublishItem) else item[2] for item in pending.fields[1]]


def _leases_in(pending: _Pending) -> list[tuple[int, int]]:
    if pending.op == wire.SETTLE:
        _, moves, acks, others, _, _ = pending.fields
        found = [(move[0], move[1]) for move in moves] + [(ack[0], ack[1]) for ack in acks]
        for other in others:
            found.extend(other.leases)
        return found
    if pending.op == wire.RELEASE:
        return list(pending.fields[0])
    return []
