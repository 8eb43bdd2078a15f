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

    __slots__ = ("held", "prefetch", "queue", "removed_ids", "session")

    def __init__(self, session: Session, queue: Queue, prefetch: int) -> None:
        self.session = session
        self.queue = queue
        self.prefetch = prefetch
        self.held: dict[int, Message] = {}
        self.removed_ids: set[int] = set()

    @property
    def credit(self) -> int:
        """How many messages it may be given now."""
        return self.prefetch - len(self.held) - len(self.removed_ids)


class Session:
    """The state of one peer. Everything that is to be sent to it waits here for the commit.

    Attributes:
        heard: The last frame that arrived since the last hello.
        last_frame: The highest frame that was ever taken. Frames up to it are known, and are not taken twice.
        deferred: Frames whose consequences are still to come. Neither they nor later frames are confirmed before.
        parting: True if one last frame is sent to the peer before the session is forgotten.
        hello_number: The number of the last hello.
        sent_bytes: How many bytes were sent to the peer.
        marked: How many of these bytes came before the last mark.
        read: How many of these bytes came before the last mark that the peer has answered; the rest may be unread.
        owed_bytes: How many bytes of answers and pushes this round adds.
        waiting: Frames that wait until the peer has read the answers to earlier ones.
        to_push: Ids of ended groups whose end is still to be pushed.
    """

    __slots__ = (
        "answers",
        "bodies",
        "connected",
        "consumers",
        "deferred_frames",
        "deliveries",
        "hello_number",
        "highest_frame",
        "is_leaving",
        "marked_bytes",
        "name",
        "notices",
        "owed_bytes",
        "peer",
        "pid",
        "push_bodies",
        "pushes",
        "read_bytes",
        "received_frame",
        "results",
        "role",
        "sent_bytes",
        "unpushed_ends",
        "waiting_bytes",
        "waiting_frames",
    )

    def __init__(self, peer: int) -> None:
        self.peer = peer
        self.role = ""
        self.name = ""
        self.pid = 0
        self.connected = False
        self.is_leaving = False
        self.hello_number = -1
        self.received_frame = 0
        self.highest_frame = 0
        self.sent_bytes = self.marked_bytes = self.read_bytes = 0
        self.deferred_frames: list[int] = []
        self.answers: dict[int, Any] = {}
        self.consumers: dict[str, Consumer] = {}
        self.results: list[tuple[int, Any]] = []
        self.deliveries: list[tuple[str, list[tuple[Any, ...]]]] = []
        self.bodies: list[bytes] = []
        self.pushes: list[tuple[str, str, int]] = []
        self.push_bodies: list[bytes] = []
        self.notices: list[tuple[str, Any]] = []
        self.owed_bytes = 0
        self.waiting_frames: deque[tuple[bytes, bytes, bytes]] = deque()
        self.waiting_bytes = 0
        self.unpushed_ends: dict[str, None] = {}

    @property
    def unread_bytes(self) -> int:
        """Bytes that it may not have read yet, with those that it is to be told now."""
        return self.sent_bytes - self.read_bytes + self.owed_bytes

    def put_aside(self, op: bytes, header: bytes, blob: bytes) -> None:
        """Put a frame aside that cannot be answered yet."""
        self.waiting_frames.append((op, header, blob))
        self.waiting_bytes += len(header) + len(blob)

    def next_waiting_frame(self) -> tuple[bytes, bytes, bytes]:
        """The frame that has waited longest."""
        op, header, blob = self.waiting_frames.popleft()
        self.waiting_bytes -= len(header) + len(blob)
        return op, header, blob

    def drop_waiting_frames(self) -> None:
        """What waits is not answered any more: it will be asked again, or nobody is there."""
        self.waiting_frames.clear()
        self.waiting_bytes = 0
        self.unpushed_ends.clear()

    @property
    def has_leases(self) -> bool:
        """Whether it has messages in work."""
        return any(consumer.held for consumer in self.consumers.values())

    def keep_answer(self, frame: int, answer: Any) -> None:
        """Keep an answer that asking again would not give."""
        self.answers[frame] = answer
        if len(self.answers) > ANSWERS_KEPT:
            del self.answers[next(iter(self.answers))]

    def confirm_read(self, mark: int) -> None:
        """It has read all up to this mark."""
        if self.read_bytes < mark <= self.marked_bytes:
            self.read_bytes = mark

    def clear_outgoing(self) -> None:
        """Nothing of what was to be sent_bytes remains."""
        self.owed_bytes = 0
        if self.results:
            self.results = []
        if self.deliveries:
            self.deliveries, self.bodies = [], []
        if self.pushes:
            self.pushes, self.push_bodies = [], []
        if self.notices:
            self.notices = []
