"""A peer's side of the talk, without a transport: numbering, sending again, futures, the hello.

A frame stays here until the broker has said that it is durable. After a hello everything unconfirmed is sent again in
order under its old number; the broker takes each once. Nothing is sent, and nothing heard, between a hello and its
welcome.

Memory is bounded while the broker is away or slow: who publishes waits until enough of what was published before is
confirmed. Nobody else ever waits: what workers settle is bounded by what they were given, and the connection's own
thread, on which listeners and the callbacks of futures run, is the one that hears confirmations.
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
"""How much a connection publishes ahead of what is confirmed, unless it is told otherwise."""

ITEM_OVERHEAD_BYTES = 256
"""What an item takes beside its body, about."""

BLOCKED_CHECK_SECONDS = 0.5
"""Seconds between looks of who waits for room at whether it is worth waiting."""

MAX_WATCHED_PER_FRAME = 50_000
"""Groups named in one hello or query; each name may have as many characters as a name can."""

HEADER_MARGIN_BYTES = 64
"""Bytes that a header may grow by when it is sent again, to a broker of a larger epoch."""


def new_peer() -> int:
    """A name for a connection that nobody else has: 63 random bits, never 0."""
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
        self._frame = 0
        self._hello_number = 0
        self._unconfirmed: deque[UnconfirmedFrame] = deque()
        self._consuming: dict[str, int] = {}
        self._to_watch: list[str] = []
        self._welcomed = False
        self._ended = ""

    # what a subclass provides

    @abstractmethod
    def _transmit(self, op: bytes, header: bytes, blob: bytes) -> None:
        """Send a frame, or lay it ready for the thread that does. It must neither block nor call back."""

    @abstractmethod
    def send_hello(self) -> None:
        """Send `_hello()` before anything that follows, and nothing of what was laid ready before."""

    def is_own_thread(self) -> bool:
        """Whether this is the thread that calls `on_frame`, which must never wait for what it would hear."""
        return False

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
        if prefetch >= 0 and queue in self._consuming:
            self._consuming[queue] = prefetch
        self._send(wire.SETTLE, (targets, moves, acks, others, queue, prefetch), b"".join(bodies), None)

    def checkpoint(self, id: int, lease: int, name: str, value: bytes) -> Future[None]:
        """See `stageflow_brokers.api.Broker.checkpoint`."""
        future: Future[None] = Future()
        self._send(wire.CHECKPOINT, (id, lease, name), value, future)
        return future

    def release(self, leases: Sequence[tuple[int, int]], queue: str, prefetch: int) -> None:
        """See `stageflow_brokers.api.Broker.release`."""
        if prefetch >= 0 and queue in self._consuming:
            self._consuming[queue] = prefetch
        self._send(wire.RELEASE, (leases, queue, prefetch), b"", None)

    def consume(self, queue: str, prefetch: int) -> None:
        """See `stageflow_brokers.api.Broker.consume`."""
        self._consuming[queue] = prefetch
        self._query("consume", queue, prefetch)

    def _query(self, name: str, /, *args: Any) -> Future[Any]:
        """Send a query frame, by its name on the wire."""
        future: Future[Any] = Future()
        self._send(wire.QUERY, (name, args), b"", future)
        return future

    # sending

    def _wait_for_confirmations(self, on_wait: Callable[[], None] | None) -> None:
        """One frame more is let in whenever there is any room, be it larger than that: none waits for ever."""
        while True:
            with self._lock:
                if self._ended or self._unconfirmed_bytes < self._max_unconfirmed_bytes or self.is_own_thread():
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
            if len(header) > wire.MAX_HEADER - HEADER_MARGIN_BYTES:
                raise PayloadTooLarge(
                    f"{len(header)} bytes of names and numbers in one call, {wire.MAX_HEADER} are the most; send fewer "
                    "at once",
                    size=len(header),
                    limit=wire.MAX_HEADER,
                )
            self._frame = frame
            self._unconfirmed_bytes += weight
            if on_numbered is not None:
                on_numbered()
            self._unconfirmed.append(UnconfirmedFrame(frame, op, fields, blob, future, weight))
            if self._welcomed:
                self._transmit(op, header, blob)

    def _hello(self) -> tuple[bytes, bytes, bytes]:
        """The frame that opens the talk. What is held is read source first, so that nothing on its way is missed."""
        holding = list(self._listener.holding())
        with self._lock:
            # Read with the frames: whoever begins to watch what it publishes does so under this lock.
            watching = set(self._listener.watching())
            self._welcomed = False
            self._hello_number += 1
            first = self._unconfirmed[0].frame if self._unconfirmed else self._frame + 1
            for pending in self._unconfirmed:
                holding.extend(leases_in(pending))
                # What is still being published is not live yet, and not gone either: its own frame asks to be told.
                watching.difference_update(groups_in(pending))
            consume = list(self._consuming.items())
            watched = list(watching)
            # What there is no room for here is asked for behind all that is sent again.
            self._to_watch = watched[MAX_WATCHED_PER_FRAME:]
        watched = watched[:MAX_WATCHED_PER_FRAME]
        hello = (wire.PROTOCOL, self.role, self.name, os.getpid(), first, consume, holding, watched, self._hello_number)
        return wire.HELLO, wire.encode(hello), b""

    # hearing

    def on_frame(self, header: bytes, blob: bytes) -> None:
        """What the broker says, on the owning thread."""
        out = wire.decode_out(header)
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

    def _handle_welcome(self, out: wire.Out) -> bool:
        for word, detail in out.notices:
            if word == "welcome" and detail[0] == self._hello_number:
                self._welcome(out.broker_epoch, detail[1])
                for other, more in out.notices:
                    if other != "welcome":
                        self._handle_notice(other, more)
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
        for at in range(0, len(self._to_watch), MAX_WATCHED_PER_FRAME):
            self._query("watch", self._to_watch[at : at + MAX_WATCHED_PER_FRAME])
        self._to_watch = []
        self._listener.on_connected(epoch)

    def _handle_notices(self, out: wire.Out) -> bool:
        for word, detail in out.notices:
            if word in ("hello", "resend"):
                self.send_hello()
                return False
            if word != "welcome":
                self._handle_notice(word, detail)
        return True

    def _handle_notice(self, word: str, detail: Any) -> None:
        if word == "mark":
            # The broker counts what it has said, and cuts off who does not answer any more.
            with self._lock:
                self._transmit(wire.MARK_READ, wire.encode(detail), b"")
        else:
            self._listener.on_notice(word, detail)

    def _confirm(self, out: wire.Out) -> None:
        with self._lock:
            unconfirmed = self._unconfirmed
            if not unconfirmed or unconfirmed[0].frame > out.acked:
                return
            confirmed = []
            while unconfirmed and unconfirmed[0].frame <= out.acked:
                confirmed.append(unconfirmed.popleft())
            for pending in confirmed:
                self._unconfirmed_bytes -= pending.weight
            if self._blocked_publishers:
                self._confirmed.notify_all()
        results = dict(out.results) if out.results else {}
        for pending in confirmed:
            raw = results.get(pending.frame)
            answer = None if raw is None else msgspec.msgpack.decode(raw)
            if pending.future is not None:
                resolve(pending, answer)
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
            self._confirmed.notify_all()
        for pending in left:
            if pending.future is not None:
                pending.future.set_exception(BrokerUnavailable(reason))
        self._listener.on_closed(reason)
