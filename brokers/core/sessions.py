"""Sessions: what the broker knows of a peer, and the credit of each queue that the peer consumes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brokers.core.message import Message
    from brokers.core.queue import Queue

__all__ = ["Consumer", "Session"]


class Consumer:
    """One session on one queue: it may hold `prefetch` messages at once; `held` keeps them in order of delivery."""

    __slots__ = ("held", "prefetch", "queue", "session")

    def __init__(self, session: Session, queue: Queue, prefetch: int) -> None:
        self.session = session
        self.queue = queue
        self.prefetch = prefetch
        self.held: dict[int, Message] = {}


class Session:
    """One peer. `last_frame` is the highest frame taken from it; what it is to be told waits here for the commit."""

    __slots__ = (
        "bodies",
        "connected",
        "consumers",
        "deliveries",
        "last_frame",
        "name",
        "notices",
        "peer",
        "pid",
        "push_bodies",
        "pushes",
        "results",
        "role",
    )

    def __init__(self, peer: int) -> None:
        self.peer = peer
        self.role = ""
        self.name = ""
        self.pid = 0
        self.connected = False
        self.last_frame = 0
        self.consumers: dict[str, Consumer] = {}
        self.results: list[tuple[int, Any]] = []
        self.deliveries: list[tuple[str, list[tuple[Any, ...]]]] = []
        self.bodies: list[bytes] = []
        self.pushes: list[tuple[str, str, int]] = []
        self.push_bodies: list[bytes] = []
        self.notices: list[tuple[str, Any]] = []

    def forget_talk(self) -> None:
        """Drop what was to be said: the peer has gone."""
        for waiting in (self.results, self.deliveries, self.bodies, self.pushes, self.push_bodies, self.notices):
            waiting.clear()  # type: ignore[attr-defined]
