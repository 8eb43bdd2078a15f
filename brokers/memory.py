"""A broker inside this process: the same machine and the same client, with a queue in place of the socket, and no file.

For tests, and for workflows whose loss with the process does not matter. It promises everything that the broker
process does, save surviving the process.
"""

from __future__ import annotations

import queue
import threading
from typing import Any

from brokers.api import Listener
from brokers.client import PeerClient
from brokers.core.machine import Limits
from brokers.engine import Engine, Frame

__all__ = ["MemoryBroker"]


class MemoryBroker:
    """The hub. `connect` gives connections; `close` ends them all."""

    def __init__(self, *, limits: Limits | None = None, supervised: bool = False, engine: Engine | None = None) -> None:
        self._engine = engine or Engine(journal_dir=None, limits=limits, supervised=supervised)
        self._inbox: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._clients: dict[int, _MemoryClient] = {}
        self._thread = threading.Thread(target=self._run, name="memory-broker", daemon=True)
        self._thread.start()

    def connect(self, listener: Listener, *, role: str = "client", name: str = "", peer: int = 0) -> PeerClient:
        """A new connection, which says hello by itself."""
        client = _MemoryClient(self, listener, peer=peer, role=role, name=name)
        self._clients[client.peer] = client
        client._say_hello()
        return client

    def close(self) -> None:
        """End the broker and every connection."""
        self._inbox.put(None)
        self._thread.join(5)
        for client in list(self._clients.values()):
            client._fail_all("the broker was closed")

    def put(self, frame: Frame) -> None:
        """One frame from a client."""
        self._inbox.put(frame)

    def drop(self, peer: int) -> None:
        """Forget a connection."""
        self._clients.pop(peer, None)

    def _run(self) -> None:
        while True:
            frames: list[Frame] = []
            try:
                first = self._inbox.get(timeout=max(0.0005, self._engine.patience(0.5)))
                while first is not None:
                    frames.append(first)
                    first = self._inbox.get_nowait()
                break
            except queue.Empty:
                pass
            for peer, header, blob in self._engine.round(frames):
                client = self._clients.get(peer)
                if client is None:
                    self._engine.machine.disconnect(peer)
                else:
                    client.said(header, blob)
        self._engine.close()


class _MemoryClient(PeerClient):
    def __init__(self, hub: MemoryBroker, listener: Listener, **names: Any) -> None:
        super().__init__(listener, **names)
        self._hub = hub

    def _wake(self) -> None:
        while self._outgoing:
            try:
                op, header, blob = self._outgoing.popleft()
            except IndexError:
                return
            self._hub.put((self.peer, op, header, blob))

    def _say_hello(self) -> None:
        op, header, blob = self._hello()
        self._hub.put((self.peer, op, header, blob))

    def close(self, timeout: float = 5.0) -> None:
        """Take leave at once: there is nothing on the way that a wait would save."""
        if not self._closed:
            bye = self.query("bye")
            try:
                bye.result(timeout)
            finally:
                self._hub.drop(self.peer)
                self._fail_all("the connection was closed")
