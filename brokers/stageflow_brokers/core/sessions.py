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
    """The state of one peer. Everything that is to be sent to it waits here for the commit.

    Attributes:
        heard: The last frame that arrived since the last hello.
        last_frame: The highest frame that was ever taken. Frames up to it are known, and are not taken twice.
        deferred: Frames whose consequences are still to come. Neither they nor later frames are confirmed before.
        parting: True if one last frame is sent to the peer before the session is forgotten.
        hello_number: The number of the last hello.
        said: How many bytes were sent to the peer.
        marked: How many of these bytes came before the last mark.
        read: How many of these bytes came before the last mark that the peer has answered; the rest may be unread.
        owed: How many bytes of answers and pushes this round adds.
        waiting: Frames that wait until the peer has read the answers to earlier ones.
        to_push: Ids of ended groups whose end is still to be pushed.
    """

    __slots__ = (
        "answers",
        "bodies",
        "connected",
        "consumers",
        "deferred",
        "deliveries",
        "heard",
        "hello_number",
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
        self.hello_number = -1
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
