"""`Feed`: events on their way to callbacks: a connection that listens, and a thread that calls.

The connection is one of its own, so that results do not wait behind events, and its thread only lays down what it
hears. A callback may be slow or raise: what there is no room for is dropped and counted, what it raises is logged.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from stageflow_actors.events import Event
from stageflow_actors.runtime.client.event_decoder import FormOf, Teller
from stageflow_actors.runtime.messaging.connect import connect
from stageflow_brokers.api import Broker, Listener

__all__ = ["Callback", "Feed"]

logger = logging.getLogger("stageflow_actors.client.event_stream")

ROOM_BYTES = 64 << 20
"""How much may wait for slow callbacks."""
LAST_EVENTS_SECONDS = 5.0
"""How long the callbacks may take for what has been heard when everything ends."""
EACH = 512
"""Bytes that a message takes beside its body, about."""

Callback = Callable[[Event], None]
Told = tuple[str, int, str, bytes]


class Feed(Listener):
    """Subscribed to the broker at `address` until it is closed. `callbacks` may change meanwhile."""

    def __init__(self, address: str, name: str, callbacks: list[Callback], form_of: FormOf) -> None:
        self._callbacks = callbacks
        self._teller = Teller(time.time(), form_of)
        self._waiting: deque[list[Told]] = deque()
        self._size = 0
        self._dropped = 0
        self._closed = False
        self._news = threading.Condition()
        self._broker: Broker | None = None
        self._broker = connect(address, self, role="client", name=name)
        self.subscribed: Future[Any] = self._broker.admin.subscribe(True)
        self._thread = threading.Thread(target=self._call, name="stageflow-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no more. What has been heard is still told, and waited for, unless that takes too long."""
        if self._broker is not None:
            self._broker.close(timeout=1.0)
        with self._news:
            self._closed = True
            self._news.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(LAST_EVENTS_SECONDS)

    def on_connected(self, broker_epoch: int) -> None:
        """A subscription does not outlive its broker."""
        if self._broker is not None:
            self._broker.admin.subscribe(True)

    def on_notice(self, word: str, detail: Any) -> None:
        """On the connection's thread."""
        if word != "settled":
            return
        size = sum(len(body) + EACH for _, _, _, body in detail)
        with self._news:
            if self._size + size > ROOM_BYTES and self._waiting:
                self._dropped += len(detail)
                return
            self._waiting.append(detail)
            self._size += size
            self._news.notify()

    def _call(self) -> None:
        while True:
            with self._news:
                while not self._waiting:
                    if self._closed:
                        return
                    self._news.wait()
                batch = self._waiting.popleft()
                self._size -= sum(len(body) + EACH for _, _, _, body in batch)
                dropped, self._dropped = self._dropped, 0
            if dropped:
                logger.warning("%d settlements were not told: callbacks of on_event are too slow for them", dropped)
            for told in batch:
                self._tell(told)

    def _tell(self, told: Told) -> None:
        try:
            events = self._teller.events(*told)
        except Exception:
            logger.exception("what happened to instance %s cannot be told", told[0])
            return
        for event in events:
            for callback in list(self._callbacks):
                try:
                    callback(event)
                except Exception:
                    logger.exception("a callback of on_event has failed with %s", type(event).__name__)
