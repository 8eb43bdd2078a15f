"""A broker inside this process: the same machine and the same client, with a queue in place of the socket, and no file.

For tests, and for workflows whose loss with the process does not matter. It promises everything that the broker
process does, save surviving the process.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import Any

from stageflow_brokers.api import Listener
from stageflow_brokers.client.connection import MAX_UNCONFIRMED_BYTES, Connection
from stageflow_brokers.core.machine import Limits
from stageflow_brokers.engine.engine import Engine, Frame
from stageflow_brokers.errors import BrokerUnavailable

__all__ = ["MemoryBroker"]

logger = logging.getLogger(__name__)


class MemoryBroker:
    """The hub. `connect` gives connections; `close` ends them all. Its one thread calls all listeners."""

    def __init__(self, *, limits: Limits | None = None, supervised: bool = False, engine: Engine | None = None) -> None:
        self._engine = engine or Engine(journal_dir=None, limits=limits, supervised=supervised)
        self._inbox: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._clients: dict[int, _MemoryClient] = {}
        self._ended = ""
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="memory-broker", daemon=True)
        self._thread.start()

    def connect(
        self,
        listener: Listener,
        *,
        role: str = "client",
        name: str = "",
        peer: int = 0,
        max_unconfirmed_bytes: int = MAX_UNCONFIRMED_BYTES,
    ) -> Connection:
        """A new connection, which says hello by itself. Raises `BrokerUnavailable` when the broker has ended."""
        client = _MemoryClient(
            self, listener, peer=peer, role=role, name=name, max_unconfirmed_bytes=max_unconfirmed_bytes
        )
        with self._lock:
            if self._ended:
                raise BrokerUnavailable(self._ended)
            self._clients[client.peer] = client
        client.send_hello()
        return client

    def close(self) -> None:
        """End the broker and every connection."""
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(5)

    def put(self, frame: Frame) -> None:
        """One frame from a client."""
        self._inbox.put(frame)

    def drop(self, peer: int) -> None:
        """Forget a connection."""
        self._clients.pop(peer, None)

    def is_own_thread(self) -> bool:
        """Whether this is the broker's own thread, which must never wait for itself."""
        return threading.current_thread() is self._thread

    def _run(self) -> None:
        why = "the broker was closed"
        try:
            self._serve()
            self._engine.close()
        except Exception as error:
            why = f"the broker has failed: {error!r}"
            logger.exception("the broker in this process has failed")
        with self._lock:
            self._ended = why
            clients = list(self._clients.values())
        for client in clients:
            client.end(why)

    def _serve(self) -> None:
        engine = self._engine
        while True:
            frames: list[Frame] = []
            try:
                frame = self._inbox.get(timeout=max(0.0005, engine.next_timeout(0.5)))
                while frame is not None:
                    frames.append(frame)
                    frame = self._inbox.get_nowait()
                return
            except queue.Empty:
                pass
            for peer, header, blob in engine.round(frames):
                client = self._clients.get(peer)
                if client is None:
                    engine.machine.disconnect(peer)
                else:
                    self._say(client, header, blob)

    def _say(self, client: _MemoryClient, header: bytes, blob: bytes) -> None:
        try:
            client.on_frame(header, blob)
        except Exception:
            logger.exception("a listener has failed, so its connection %s ends", client.name or client.peer)
            self.drop(client.peer)
            self._engine.machine.disconnect(client.peer)
            client.end("its listener has failed")


class _MemoryClient(Connection):
    def __init__(self, hub: MemoryBroker, listener: Listener, **names: Any) -> None:
        super().__init__(listener, **names)
        self._hub = hub

    def _transmit(self, op: bytes, header: bytes, blob: bytes) -> None:
        self._hub.put((self.peer, op, header, blob))

    def send_hello(self) -> None:
        self._hub.put((self.peer, *self._hello()))

    def is_own_thread(self) -> bool:
        """Whether this is the broker's own thread."""
        return self._hub.is_own_thread()

    def close(self, timeout: float = 5.0) -> None:
        """Take leave. What was sent before is taken before, so there is nothing else to wait for."""
        try:
            bye = self._query("bye")
        except BrokerUnavailable:
            return
        if not self._hub.is_own_thread():
            try:
                bye.result(timeout)
            except (BrokerUnavailable, TimeoutError):
                pass
        self._hub.drop(self.peer)
        self.end("the connection was closed")
