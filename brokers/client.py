"""A peer's side of the talk, without a transport: numbering, sending again, futures, the hello.

A frame stays here until the broker has said that it is durable. After a hello everything unconfirmed is sent again in
order under its old number; the broker takes each once. Nothing is sent, and nothing heard, between a hello and its
welcome.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec

from brokers.api import Listener, PublishAnswer
from brokers.core import wire
from brokers.core.wire import Ack, Arrival, GatherOpen, Move, PublishItem, SettleItem, Target
from brokers.errors import BrokerError, BrokerUnavailable, PayloadTooLarge, ProtocolError, QueueFull, Refused

__all__ = ["PeerClient", "new_peer"]

_ERRORS: dict[str, type[BrokerError]] = {
    kind.__name__: kind for kind in (QueueFull, PayloadTooLarge, ProtocolError, Refused)
}


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
    """The transport-free half of a connection.

    A subclass moves frames: `_transmit` is called with the lock held, so that frames leave in the order of their
    numbers; what comes in goes to `said`, always from the same thread; `end` is the end.
    """

    def __init__(self, listener: Listener, *, peer: int = 0, role: str = "client", name: str = "") -> None:
        self.peer = peer or new_peer()
        self.role = role
        self.name = name
        self.broker_epoch = 0
        self._listener = listener
        self._lock = threading.Lock()
        self._frame = 0
        self._talk = 0
        self._unconfirmed: deque[_Pending] = deque()
        self._consuming: dict[str, int] = {}
        self._welcomed = False
        self._ended = ""

    # what a subclass provides

    @abstractmethod
    def _transmit(self, op: bytes, header: bytes, blob: bytes) -> None:
        """Send a frame, or lay it ready for the thread that does. It must neither block nor call back."""

    @abstractmethod
    def say_hello(self) -> None:
        """Send `_hello()` before anything that follows, and nothing of what was laid ready before."""

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
        taken: Callable[[], None] | None = None,
    ) -> Future[PublishAnswer]:
        """See `brokers.api.Broker.publish`."""
        future: Future[PublishAnswer] = Future()
        self._send(wire.PUBLISH, (targets, items, atomic, opens, arrivals), b"".join(bodies), future, taken)
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
        if prefetch >= 0 and queue in self._consuming:
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

    def _send(
        self,
        op: bytes,
        fields: tuple[Any, ...],
        blob: bytes,
        future: Future[Any] | None,
        taken: Callable[[], None] | None = None,
    ) -> None:
        if len(blob) > wire.MAX_FRAME:
            raise PayloadTooLarge(
                f"{len(blob)} bytes of bodies in one call, {wire.MAX_FRAME} are the most; send fewer at once",
                size=len(blob),
                limit=wire.MAX_FRAME,
            )
        if future is not None:
            future.set_running_or_notify_cancel()  # what is on its way cannot be cancelled
        with self._lock:
            if self._ended:
                raise BrokerUnavailable(f"{self._ended}; open another connection")
            frame = self._frame + 1
            # Encoded first: what cannot be encoded must not take a number.
            header = wire.encode((self.broker_epoch, frame, *fields))
            self._frame = frame
            if taken is not None:
                taken()
            self._unconfirmed.append(_Pending(frame, op, fields, blob, future))
            if self._welcomed:
                self._transmit(op, header, blob)

    def _hello(self) -> tuple[bytes, bytes, bytes]:
        """The frame that opens the talk. What is held is read source first, so that nothing on its way is missed."""
        holding = list(self._listener.holding())
        with self._lock:
            # Read with the frames: whoever begins to watch what it publishes does so under this lock.
            watching = set(self._listener.watching())
            self._welcomed = False
            self._talk += 1
            first = self._unconfirmed[0].frame if self._unconfirmed else self._frame + 1
            for pending in self._unconfirmed:
                holding.extend(_leases_in(pending))
                # What is still being published is not live yet, and not gone either: its own frame asks to be told.
                watching.difference_update(_groups_in(pending))
            consume = list(self._consuming.items())
        hello = (wire.PROTOCOL, self.role, self.name, os.getpid(), first, consume, holding, list(watching), self._talk)
        return wire.HELLO, wire.encode(hello), b""

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
        for word, detail in out.notices:
            if word == "welcome" and detail[0] == self._talk:
                self._welcome(out.broker_epoch, detail[1])
                for other, more in out.notices:
                    if other != "welcome":
                        self._listener.on_notice(other, more)
                # The answers to what was sent before come again, when it is sent again.
                out.acked = -1
                return True
            # `hello` answers what was sent before ours, which is on its way: another one would only be told the same.
            if word == "refused":
                self._listener.on_notice("refused", detail)
                self.end(f"the broker refuses this connection: {detail}")
                return False
        return False

    def _welcome(self, epoch: int, lost: list[int]) -> None:
        if lost:
            self._listener.on_lost(lost)
        with self._lock:
            self.broker_epoch = epoch
            self._welcomed = True
            for pending in self._unconfirmed:
                header = wire.encode((epoch, pending.frame, *pending.fields))
                self._transmit(pending.op, header, pending.blob)
        self._listener.on_connected(epoch)

    def _heard_notices(self, out: wire.Out) -> bool:
        for word, detail in out.notices:
            if word in ("hello", "resend"):
                self.say_hello()
                return False
            if word != "welcome":
                self._listener.on_notice(word, detail)
        return True

    def _confirm(self, out: wire.Out) -> None:
        with self._lock:
            unconfirmed = self._unconfirmed
            if not unconfirmed or unconfirmed[0].frame > out.acked:
                return
            confirmed = []
            while unconfirmed and unconfirmed[0].frame <= out.acked:
                confirmed.append(unconfirmed.popleft())
        results = dict(out.results) if out.results else {}
        for pending in confirmed:
            raw = results.get(pending.frame)
            answer = None if raw is None else msgspec.msgpack.decode(raw)
            if pending.future is not None:
                _resolve(pending, answer)
            elif isinstance(answer, dict) and answer.get("stale"):
                self._listener.on_stale(answer["stale"])

    def end(self, reason: str) -> None:
        """Nothing more will be said or heard: whoever waits is told why."""
        with self._lock:
            if self._ended:
                return
            self._ended = reason
            left = list(self._unconfirmed)
            self._unconfirmed.clear()
        for pending in left:
            if pending.future is not None:
                pending.future.set_exception(BrokerUnavailable(reason))
        self._listener.on_closed(reason)


def _resolve(pending: _Pending, answer: Any) -> None:
    future = pending.future
    assert future is not None
    if isinstance(answer, dict):
        if "refused" in answer and len(answer) == 1:
            future.set_exception(Refused(answer["refused"]))
            return
        if "error" in answer and "message" in answer:
            future.set_exception(_ERRORS.get(answer["error"], BrokerError)(answer["message"]))
            return
    if pending.op != wire.PUBLISH:
        future.set_result(answer)
    elif answer is None:
        future.set_result(PublishAnswer())
    else:
        seen = (answer["epoch"] << 40) + answer["left_seq"]
        future.set_result(PublishAnswer(seen, [tuple(item) for item in answer["items"]]))


def _leases_in(pending: _Pending) -> list[tuple[int, int]]:
    if pending.op == wire.SETTLE:
        _, moves, acks, others, _, _ = pending.fields
        found = [(move[0], move[1]) for move in moves] + [(ack[0], ack[1]) for ack in acks]
        for other in others:
            found.extend(other.leases)
        return found
    if pending.op == wire.RELEASE:
        return [(lease[0], lease[1]) for lease in pending.fields[0]]
    return []


def _groups_in(pending: _Pending) -> list[str]:
    if pending.op != wire.PUBLISH:
        return []
    items = pending.fields[1]
    return [item.group if isinstance(item, PublishItem) else "".join(item[2:3]) for item in items]
