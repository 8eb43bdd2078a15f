"""A broker inside this process: the same machine and client protocol, with a queue instead of a socket and no journal.

For tests, and for workflows that may be lost with the process. It gives every guarantee of the broker process except
that messages survive the process.
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
    """A broker in memory. `connect` opens connections, `close` ends them all. One thread calls all listeners.

    Args:
        limits: Limits of the machine. Default: those of `Limits`.
        supervised: True if nothing is delivered before a supervisor has reported the workers.
        engine: The engine to run. Default: a new one without a journal.
    """

    def __init__(self, *, limits: Limits | None = None, supervised: bool = False, engine: Engine | None = None) -> None:
        self._engine = engine or Engine(journal_dir=None, limits=limits, supervised=supervised)
        self._inbox: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._clients: dict[int, _MemoryConnection] = {}
        self._end_reason = ""
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
        """Open a connection and send its hello. Raises `BrokerUnavailable` if the broker has ended.

        Args:
            listener: Receives deliveries, pushes and notices, on the thread of the broker.
            role: "client", "worker" or "supervisor".
            name: Name of the peer, for reports. Default: none.
            peer: Number of the peer. Default: a new random one.
            max_unconfirmed_bytes: `publish` blocks while as many published bytes are not confirmed.
        """
        client = _MemoryConnection(
            self, listener, peer=peer, role=role, name=name, max_unconfirmed_bytes=max_unconfirmed_bytes
        )
        with self._lock:
            if self._end_reason:
                raise BrokerUnavailable(self._end_reason)
            self._clients[client.peer] = client
        client.send_hello()
        return client

    def close(self) -> None:
        """End the broker and every connection."""
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(5)

    def enqueue(self, frame: Frame) -> None:
        """Queue a frame from a client."""
        self._inbox.put(frame)

    def remove(self, peer: int) -> None:
        """Remove a connection."""
        self._clients.pop(peer, None)

    def is_own_thread(self) -> bool:
        """True if this is the thread of the broker, which must never wait for itself."""
        return threading.current_thread() is self._thread

    def _run(self) -> None:
        reason = "the broker was closed"
        try:
            self._serve()
            self._engine.close()
        except Exception as error:
            reason = f"the broker has failed: {error!r}"
            logger.exception("the in-memory broker has failed")
        with self._lock:
            self._end_reason = reason
            clients = list(self._clients.values())
        for client in clients:
            client.end(reason)

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
                    self._deliver(client, header, blob)

    def _deliver(self, client: _MemoryConnection, header: bytes, blob: bytes) -> None:
        try:
            client.on_frame(header, blob)
        except Exception:
            logger.exception(
                "the listener of connection %s has failed; the connection ends", client.name or client.peer
            )
            self.remove(client.peer)
            self._engine.machine.disconnect(client.peer)
            client.end("its listener has failed")


class _MemoryConnection(Connection):
    def __init__(self, hub: MemoryBroker, listener: Listener, **names: Any) -> None:
        super().__init__(listener, **names)
        self._hub = hub

    def _transmit(self, op: bytes, header: bytes, blob: bytes) -> None:
        self._hub.enqueue((self.peer, op, header, blob))

    def send_hello(self) -> None:
        self._hub.enqueue((self.peer, *self._hello()))

    def is_own_thread(self) -> bool:
        """True if this is the thread of the broker."""
        return self._hub.is_own_thread()

    def close(self, timeout: float = 5.0) -> None:
        """Announce the end to the broker and end the connection. The broker handles all earlier frames first."""
        try:
            bye = self._query("bye")
        except BrokerUnavailable:
            return
        if not self._hub.is_own_thread():
            try:
                bye.result(timeout)
            except (BrokerUnavailable, TimeoutError):
                pass
        self._hub.remove(self.peer)
        self.end("the connection was closed")
