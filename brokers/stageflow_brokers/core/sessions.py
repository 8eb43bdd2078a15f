"""Sessions: what the broker knows of a peer, and the credit of each queue that the peer consumes."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stageflow_brokers.core.message import Message
    from stageflow_brokers.core.queue import Queue

__all__ = ["Consumer", "Session"]

ANSWERS_KEPT = 256
"""How many answers that cannot be found out again are kept for a peer that asks twice."""


class Consumer:
    """One session on one queue: it may hold `prefetch` messages at once; `held` keeps them in order of delivery.

    `gone` are messages whose group has ended meanwhile: whoever works on one has no room for another all the same.
    """

    __slots__ = ("gone", "held", "prefetch", "queue", "session")

    def __init__(self, session: Session, queue: Queue, prefetch: int) -> None:
        self.session = session
        self.queue = queue
        self.prefetch = prefetch
        self.held: dict[int, Message] = {}
        self.gone: set[int] = set()

    @property
    def room(self) -> int:
        """How many messages it may be given now."""
        return self.prefetch - len(self.held) - len(self.gone)


class Session:
    """One peer. What it is to be told waits here for the commit.

    `heard` is the last frame that came in since its last hello, `last_frame` the highest one that was ever taken: those
    up to it are known and are not taken twice. `deferred` are frames whose consequences are still to come: neither
    they nor what follows is confirmed before. `parting`: it is told one last thing, then forgotten. `talk` is the
    number of its last hello. `said` counts the bytes that it was told, `marked` those up to the last mark, `read` those
    up to the last mark that it has answered: the rest may lie unread. `owed` counts the bytes of what it has asked for
    and is to be told in this round; `waiting` are frames that wait until it has read what it asked for before.
    """

    __slots__ = (
        "answers",
        "bodies",
        "connected",
        "consumers",
        "deferred",
        "deliveries",
        "heard",
        "last_frame",
        "marked",
        "name",
        "notices",
        "owed",
        "parting",
        "peer",
        "pid",
        "push_bodies",
        "pushes",
        "read",
        "results",
        "role",
        "said",
        "talk",
        "to_push",
        "waiting",
        "waiting_bytes",
    )

    def __init__(self, peer: int) -> None:
        self.peer = peer
        self.role = ""
        self.name = ""
        self.pid = 0
        self.connected = False
        self.parting = False
        self.talk = -1
        self.heard = 0
        self.last_frame = 0
        self.said = self.marked = self.read = 0
        self.deferred: list[int] = []
        self.answers: dict[int, Any] = {}
        self.consumers: dict[str, Consumer] = {}
        self.results: list[tuple[int, Any]] = []
        self.deliveries: list[tuple[str, list[tuple[Any, ...]]]] = []
        self.bodies: list[bytes] = []
        self.pushes: list[tuple[str, str, int]] = []
        self.push_bodies: list[bytes] = []
        self.notices: list[tuple[str, Any]] = []
        self.owed = 0
        self.waiting: deque[tuple[bytes, bytes, bytes]] = deque()
        self.waiting_bytes = 0
        self.to_push: dict[str, None] = {}

    @property
    def unread(self) -> int:
        """Bytes that it may not have read yet, with those that it is to be told now."""
        return self.said - self.read + self.owed

    def wait(self, op: bytes, header: bytes, blob: bytes) -> None:
        """Put a frame aside that cannot be answered yet."""
        self.waiting.append((op, header, blob))
        self.waiting_bytes += len(header) + len(blob)

    def go_on(self) -> tuple[bytes, bytes, bytes]:
        """The frame that has waited longest."""
        op, header, blob = self.waiting.popleft()
        self.waiting_bytes -= len(header) + len(blob)
        return op, header, blob

    def wait_no_more(self) -> None:
        """What waits is not answered any more: it will be asked again, or nobody is there."""
        self.waiting.clear()
        self.waiting_bytes = 0
        self.to_push.clear()

    @property
    def holds(self) -> bool:
        """Whether it has messages in work."""
        return any(consumer.held for consumer in self.consumers.values())

    def remember(self, frame: int, answer: Any) -> None:
        """Keep an answer that asking again would not give."""
        self.answers[frame] = answer
        if len(self.answers) > ANSWERS_KEPT:
            del self.answers[next(iter(self.answers))]

    def confirm(self, mark: int) -> None:
        """It has read all up to this mark."""
        if self.read < mark <= self.marked:
            self.read = mark

    def forget_talk(self) -> None:
        """Nothing of what was to be said remains."""
        self.owed = 0
        if self.results:
            self.results = []
        if self.deliveries:
            self.deliveries, self.bodies = [], []
        if self.pushes:
            self.pushes, self.push_bodies = [], []
        if self.notices:
            self.notices = []
