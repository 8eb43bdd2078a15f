"""`EventStream`: a connection that receives events, and a thread that calls callbacks with them.

The stream has a connection of its own, so that results do not wait behind events; the connection's thread only queues
what it receives. A callback may be slow or raise: events without room in the queue are dropped and counted, exceptions
are logged.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from stageflow_actors.events import Event
from stageflow_actors.runtime.client.event_decoder import CodecLookup, EventDecoder
from stageflow_actors.runtime.messaging.connect import connect
from stageflow_brokers.api import Broker, Listener
from stageflow_brokers.signals import blocked_signals

__all__ = ["EventCallback", "EventStream", "EventSubscriptions"]

logger = logging.getLogger("stageflow_actors.client.event_stream")

MAX_QUEUED_BYTES = 64 << 20
"""Most bytes of settlements that wait for slow callbacks."""
CLOSE_TIMEOUT_SECONDS = 5.0
"""Longest time that closing a stream waits for callbacks to handle the queued events."""
SETTLEMENT_OVERHEAD_BYTES = 512
"""Approximate size of a queued settlement without its body."""

EventCallback = Callable[[Event], None]
Settlement = tuple[str, int, str, bytes]
"""(instance id, epoch, label, body), as the broker reports it."""


class EventStream(Listener):
    """A subscription to the broker at `address`, until it is closed. `callbacks` may change during that time."""

    def __init__(self, address: str, name: str, callbacks: list[EventCallback], codec_of: CodecLookup) -> None:
        self._callbacks = callbacks
        self._decoder = EventDecoder(time.time(), codec_of)
        self._queued: deque[list[Settlement]] = deque()
        self._queued_bytes = 0
        self._dropped = 0
        self._closed = False
        self._changed = threading.Condition()
        self._broker: Broker | None = None
        self._broker = connect(address, self, role="client", name=name)
        self.subscribed: Future[Any] = self._broker.admin.subscribe(True)
        self._thread = threading.Thread(target=self._run, name="stageflow-events", daemon=True)
        with blocked_signals():
            self._thread.start()

    def close(self) -> None:
        """Stop receiving; wait a limited time for the callbacks to handle the queued events."""
        if self._broker is not None:
            self._broker.close(timeout=1.0)
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_TIMEOUT_SECONDS)

    def on_connected(self, broker_epoch: int) -> None:
        """Subscribe again: a subscription ends with its broker."""
        if self._broker is not None:
            self._broker.admin.subscribe(True)

    def on_notice(self, word: str, detail: Any) -> None:
        """Queue the settlements that the broker reports; called on the connection's thread."""
        if word != "settled":
            return
        size = _size_of(detail)
        with self._changed:
            if self._queued_bytes + size > MAX_QUEUED_BYTES and self._queued:
                self._dropped += len(detail)
                return
            self._queued.append(detail)
            self._queued_bytes += size
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queued:
                    if self._closed:
                        return
                    self._changed.wait()
                batch = self._queued.popleft()
                self._queued_bytes -= _size_of(batch)
                dropped, self._dropped = self._dropped, 0
            if dropped:
                logger.warning("%d settlements were dropped: callbacks of on_event are too slow for them", dropped)
            for settlement in batch:
                self._report(settlement)

    def _report(self, settlement: Settlement) -> None:
        try:
            events = self._decoder.events(*settlement)
        except Exception:
            logger.exception("a settlement of instance %s cannot be decoded to events", settlement[0])
            return
        for event in events:
            for callback in list(self._callbacks):
                try:
                    callback(event)
                except Exception:
                    logger.exception("a callback of on_event has failed with %s", type(event).__name__)


class EventSubscriptions:
    """The callbacks of one client, and the stream that serves them; no callbacks, no stream."""

    def __init__(self, codec_of: CodecLookup) -> None:
        self.callbacks: list[EventCallback] = []
        self.stream: EventStream | None = None
        self._codec_of = codec_of
        self._lock = threading.Lock()

    def open(self, address: str) -> Future[Any] | None:
        """Open the stream if callbacks need it; the future resolves when the broker sends events.

        Returns None if there is nothing to open.
        """
        with self._lock:
            if not self.callbacks or self.stream is not None:
                return None
            self.stream = self._stream_of(address)
            return self.stream.subscribed

    def reopen(self, address: str) -> None:
        """Move an open stream to a broker at another address."""
        if self.stream is not None:
            self.stream.close()
            self.stream = self._stream_of(address)

    def close(self) -> None:
        """Close the stream. Idempotent."""
        with self._lock:
            stream, self.stream = self.stream, None
        if stream is not None:
            stream.close()

    def _stream_of(self, address: str) -> EventStream:
        return EventStream(address, f"events {os.getpid()}", self.callbacks, self._codec_of)


def _size_of(batch: list[Settlement]) -> int:
    return sum(len(body) + SETTLEMENT_OVERHEAD_BYTES for _, _, _, body in batch)
