"""A peer's side of the protocol, without a transport: numbers frames, resends them, resolves futures, sends the hello.

A frame is kept until the broker confirms that it is durable. After a hello all unconfirmed frames are sent again in
order with their old numbers; the broker accepts each once. Between a hello and its welcome no other frame is sent, and
frames that arrive are ignored.

Memory is bounded while the broker is away or slow: `publish` blocks until enough of the earlier frames are confirmed.
No other call may block: settlements are bounded by the messages delivered, and the connection's own thread, which runs
listeners and callbacks of futures, is the thread that receives the confirmations.
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

from stageflow_brokers.admin import BrokerAdmin
from stageflow_brokers.api import Listener, PublishAnswer
from stageflow_brokers.client.query_admin import QueryAdmin
from stageflow_brokers.client.unconfirmed import UnconfirmedFrame, groups_in, leases_in, resolve
from stageflow_brokers.core import wire
from stageflow_brokers.errors import BrokerUnavailable, PayloadTooLarge
from stageflow_brokers.types import Ack, Arrival, GatherOpen, Move, PublishItem, SettleItem, Target

__all__ = ["Connection", "new_peer"]

MAX_UNCONFIRMED_BYTES = 64 << 20
"""Default of the bytes that a connection publishes ahead of the confirmations."""

ITEM_OVERHEAD_BYTES = 256
"""Estimate of the bytes of an item without its body."""

BLOCKED_CHECK_SECONDS = 0.5
"""Seconds after which a blocked `publish` checks whether the connection still exists."""

MAX_WATCHED_PER_FRAME = 50_000
"""The most groups named in one hello or query, even if each name has the greatest length."""

HEADER_MARGIN_BYTES = 64
"""Bytes that a header may grow by when it is sent again to a broker with a larger epoch."""


def new_peer() -> int:
    """Return a unique number for a connection: 63 random bits, never 0."""
    return int.from_bytes(os.urandom(8), "big") >> 1 | 1


class Connection(ABC):
    """A connection without its transport, which a subclass provides.

    The subclass passes each frame that arrives to `on_frame`, always from the same thread, and calls `end` once when
    the connection ends. `_transmit` is called with the lock held, so that frames leave in the order of their numbers.

    Args:
        listener: Receives deliveries, pushes and notices.
        peer: Number of the peer. Default: a new random one.
        role: "client", "worker" or "supervisor".
        name: Name of the peer, for reports. Default: none.
        max_unconfirmed_bytes: `publish` blocks while as many published bytes are not confirmed. Default: 64 MiB.
    """

    def __init__(
        self,
        listener: Listener,
        *,
        peer: int = 0,
        role: str = "client",
        name: str = "",
        max_unconfirmed_bytes: int = MAX_UNCONFIRMED_BYTES,
    ) -> None:
        self.peer = peer or new_peer()
        self.role = role
        self.name = name
        self.admin: BrokerAdmin = QueryAdmin(self._query)
        self.broker_epoch = 0
        self._listener = listener
        self._lock = threading.Lock()
        self._confirmed = threading.Condition(self._lock)
        self._max_unconfirmed_bytes = max_unconfirmed_bytes
        self._unconfirmed_bytes = 0
        self._blocked_publishers = 0
        self._last_number = 0
        self._hello_number = 0
        self._unconfirmed: deque[UnconfirmedFrame] = deque()
        self._consuming: dict[str, int] = {}
        self._to_watch: list[str] = []
        self._welcomed = False
        self._end_reason = ""

    # provided by a subclass

    @abstractmethod
    def _transmit(self, op: bytes, header: bytes, blob: bytes) -> None:
        """Send a frame, or queue it for the thread that sends. It must neither block nor call back."""

    @abstractmethod
    def send_hello(self) -> None:
        """Send `_hello()` before all later frames, and discard the frames that are queued."""

    def is_own_thread(self) -> bool:
        """True if this is the thread that calls `on_frame`, which must never wait for a frame."""
        return False

    @abstractmethod
    def close(self, timeout: float = 5.0) -> None:
        """Send the queued frames, announce the end to the broker, and end the connection."""

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
        on_numbered: Callable[[], None] | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> Future[PublishAnswer]:
        """See `stageflow_brokers.api.Broker.publish`."""
        future: Future[PublishAnswer] = Future()
        blob = b"".join(bodies)
        weight = len(blob) + ITEM_OVERHEAD_BYTES * (1 + len(items) + len(opens) + len(arrivals))
        if self._unconfirmed_bytes >= self._max_unconfirmed_bytes:
            self._wait_for_confirmations(on_wait)
        self._send(wire.PUBLISH, (targets, items, atomic, opens, arrivals), blob, future, on_numbered, weight)
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
        """See `stageflow_brokers.api.Broker.settle`."""
        self._note_prefetch(queue, prefetch)
        self._send(wire.SETTLE, (targets, moves, acks, others, queue, prefetch), b"".join(bodies), None)

    def checkpoint(self, id: int, lease: int, name: str, value: bytes) -> Future[None]:
        """See `stageflow_brokers.api.Broker.checkpoint`."""
        future: Future[None] = Future()
        self._send(wire.CHECKPOINT, (id, lease, name), value, future)
        return future

    def release(self, leases: Sequence[tuple[int, int]], queue: str, prefetch: int) -> Future[None]:
        """See `stageflow_brokers.api.Broker.release`."""
        self._note_prefetch(queue, prefetch)
        future: Future[None] = Future()
        self._send(wire.RELEASE, (leases, queue, prefetch), b"", future)
        return future

    def consume(self, queue: str, prefetch: int) -> None:
        """See `stageflow_brokers.api.Broker.consume`."""
        self._consuming[queue] = prefetch
        self._query("consume", queue, prefetch)

    def _note_prefetch(self, queue: str, prefetch: int) -> None:
        """A hello announces how many messages are worked on at once, so that no more than these are delivered first."""
        if 0 <= prefetch < self._consuming.get(queue, 0):
            self._consuming[queue] = prefetch

    def _query(self, name: str, /, *args: Any) -> Future[Any]:
        """Send a query frame, by its name on the wire."""
        future: Future[Any] = Future()
        self._send(wire.QUERY, (name, args), b"", future)
        return future

    # sending

    def _wait_for_confirmations(self, on_wait: Callable[[], None] | None) -> None:
        """Wait until the unconfirmed bytes are below the limit.

        One more frame is then accepted, however large it is, so that no caller waits forever.
        """
        while True:
            with self._lock:
                if self._end_reason or self._unconfirmed_bytes < self._max_unconfirmed_bytes or self.is_own_thread():
                    return
                self._blocked_publishers += 1
                try:
                    self._confirmed.wait(BLOCKED_CHECK_SECONDS)
                finally:
                    self._blocked_publishers -= 1
            if on_wait is not None:
                on_wait()

    def _send(
        self,
        op: bytes,
        fields: tuple[Any, ...],
        blob: bytes,
        future: Future[Any] | None,
        on_numbered: Callable[[], None] | None = None,
        weight: int = 0,
    ) -> None:
        if len(blob) > wire.MAX_FRAME:
            raise PayloadTooLarge(
                f"{len(blob)} bytes of bodies in one call exceed the limit of {wire.MAX_FRAME}; send fewer at once",
                size=len(blob),
                limit=wire.MAX_FRAME,
            )
        if future is not None:
            future.set_running_or_notify_cancel()  # a frame that is sent cannot be cancelled
        with self._lock:
            if self._end_reason:
                raise BrokerUnavailable(f"{self._end_reason}; open another connection")
            number = self._last_number + 1
            # Encode first: a frame that cannot be encoded must not use a number.
            header = wire.encode((self.broker_epoch, number, *fields))
            if len(header) > wire.MAX_HEADER - HEADER_MARGIN_BYTES:
                raise PayloadTooLarge(
                    f"{len(header)} bytes of names and numbers in one call exceed the limit of {wire.MAX_HEADER}; send "
                    "fewer at once",
                    size=len(header),
                    limit=wire.MAX_HEADER,
                )
            self._last_number = number
            self._unconfirmed_bytes += weight
            if on_numbered is not None:
                on_numbered()
            self._unconfirmed.append(UnconfirmedFrame(number, op, fields, blob, future, weight))
            if self._welcomed:
                self._transmit(op, header, blob)

    def _hello(self) -> tuple[bytes, bytes, bytes]:
        """Return the hello frame. The listener's leases are read first, so that no settlement in between is missed."""
        holding = list(self._listener.holding())
        with self._lock:
            # Read under the lock, as are the frames: a publisher adds its watches under this lock.
            watching = set(self._listener.watching())
            self._welcomed = False
            self._hello_number += 1
            first = self._unconfirmed[0].number if self._unconfirmed else self._last_number + 1
            for frame in self._unconfirmed:
                holding.extend(leases_in(frame))
                # A group of an unconfirmed frame is not live yet, and has not ended either: its frame sets the watch.
                watching.difference_update(groups_in(frame))
            consume = list(self._consuming.items())
            watched = list(watching)
            # The groups that do not fit are watched by queries after the frames that are sent again.
            self._to_watch = watched[MAX_WATCHED_PER_FRAME:]
        watched = watched[:MAX_WATCHED_PER_FRAME]
        hello = (wire.PROTOCOL, self.role, self.name, os.getpid(), first, consume, holding, watched, self._hello_number)
        return wire.HELLO, wire.encode(hello), b""

    # receiving

    def on_frame(self, header: bytes, blob: bytes) -> None:
        """Handle a frame from the broker, on the connection's own thread."""
        out = wire.decode_broker_frame(header)
        if not self._welcomed or out.broker_epoch != self.broker_epoch:
            if not self._handle_welcome(out):
                return
        elif out.notices and not self._handle_notices(out):
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

    def _handle_welcome(self, out: wire.BrokerFrame) -> bool:
        for word, detail in out.notices:
            if word == "welcome" and detail[0] == self._hello_number:
                self._welcome(out.broker_epoch, detail[1])
                for other, more in out.notices:
                    if other != "welcome":
                        self._handle_notice(other, more)
                return True
            # A `hello` notice answers frames sent before our hello, so it needs no second hello.
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
            for frame in self._unconfirmed:
                header = wire.encode((epoch, frame.number, *frame.fields))
                self._transmit(frame.op, header, frame.blob)
        for at in range(0, len(self._to_watch), MAX_WATCHED_PER_FRAME):
            self._query("watch", self._to_watch[at : at + MAX_WATCHED_PER_FRAME])
        self._to_watch = []
        self._listener.on_connected(epoch)

    def _handle_notices(self, out: wire.BrokerFrame) -> bool:
        for word, detail in out.notices:
            if word in ("hello", "resend"):
                self.send_hello()
                return False
            if word != "welcome":
                self._handle_notice(word, detail)
        return True

    def _handle_notice(self, word: str, detail: Any) -> None:
        if word == "mark":
            # The broker counts the bytes it has sent, and disconnects a peer that does not answer its marks.
            with self._lock:
                self._transmit(wire.MARK_READ, wire.encode(detail), b"")
        else:
            self._listener.on_notice(word, detail)

    def _confirm(self, out: wire.BrokerFrame) -> None:
        with self._lock:
            unconfirmed = self._unconfirmed
            if not unconfirmed or unconfirmed[0].number > out.acked:
                return
            confirmed = []
            while unconfirmed and unconfirmed[0].number <= out.acked:
                confirmed.append(unconfirmed.popleft())
            for frame in confirmed:
                self._unconfirmed_bytes -= frame.weight
            if self._blocked_publishers:
                self._confirmed.notify_all()
        results = dict(out.results) if out.results else {}
        for frame in confirmed:
            raw = results.get(frame.number)
            answer = None if raw is None else msgspec.msgpack.decode(raw)
            if frame.future is not None:
                resolve(frame, answer)
            elif isinstance(answer, dict) and answer.get("stale"):
                self._listener.on_stale(answer["stale"])

    def end(self, reason: str) -> None:
        """End the connection: futures get `BrokerUnavailable` with the reason, and the listener is notified."""
        with self._lock:
            if self._end_reason:
                return
            self._end_reason = reason
            remaining = list(self._unconfirmed)
            self._unconfirmed.clear()
            self._confirmed.notify_all()
        for frame in remaining:
            if frame.future is not None:
                frame.future.set_exception(BrokerUnavailable(reason))
        self._listener.on_closed(reason)
