"""Sessions: the state of each peer, and its credit on each queue.

Values without decisions: this module must not accept or refuse a frame, and must not change messages or queues.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stageflow_brokers.core.message import Message
    from stageflow_brokers.core.queue import Queue

__all__ = ["NO_PRIORITY", "Consumer", "Session"]

NO_PRIORITY = 1 << 62
"""Above each priority: the lowest of no messages."""

ANSWERS_KEPT = 256
"""Answers that cannot be computed again, kept per peer for frames that are sent again."""


class Consumer:
    """One session that consumes one queue.

    Attributes:
        prefetch: How many messages it may hold at once.
        held: The messages that it holds, by id, in order of delivery.
        removed_ids: Messages that it received and that were deleted since, because their group ended. The peer still
            works on them, so they use credit until it settles or releases them.
        concurrency: How many messages it works on at once: the prefetch with which it began to consume. Any more that
            it holds have not begun.
        lowest_priority: The lowest priority among the messages that it may hold and has not begun.
        recalled_lease: It was asked to release the messages with earlier leases.
    """

    __slots__ = (
        "concurrency",
        "held",
        "lowest_priority",
        "prefetch",
        "queue",
        "recalled_lease",
        "removed_ids",
        "session",
    )

    def __init__(self, session: Session, queue: Queue, prefetch: int) -> None:
        self.session = session
        self.queue = queue
        self.prefetch = prefetch
        self.concurrency = prefetch
        self.lowest_priority = NO_PRIORITY
        self.recalled_lease = 0
        self.held: dict[int, Message] = {}
        self.removed_ids: set[int] = set()

    @property
    def credit(self) -> int:
        """How many more messages may be delivered now."""
        return self.prefetch - len(self.held) - len(self.removed_ids)

    @property
    def is_idle(self) -> bool:
        """True if it works on nothing and could receive a message."""
        return not self.held and self.credit > 0 and self.session.connected


class Session:
    """One peer: its connection, its consumers, and what waits to be sent to it.

    Attributes:
        peer: The number that the peer chose; it survives reconnects.
        is_leaving: True from the peer's goodbye until the last frame to it is sent.
        hello_number: The number of its last hello.
        received_frame: The last frame that arrived since that hello.
        highest_frame: The highest frame that was ever accepted. Frames up to it are duplicates.
        deferred_frames: Frames whose consequences are still to come. Neither they nor later ones are confirmed before.
        answers: Answers that cannot be computed again, by frame.
        consumers: The queues that the peer consumes, by name.
        sent_bytes: Bytes that were sent to the peer.
        marked_bytes: Those of them that were sent before the last mark.
        read_bytes: Those of them that were sent before the last mark that the peer has answered.
        owed_bytes: Bytes of the answers and pushes that this round adds.
        waiting_frames: Frames that wait until the peer has read the answers to earlier ones; `waiting_bytes` is their
            size.
        unpushed_ends: Ids of watched groups that have ended, and whose end is still to be pushed.
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
        """Bytes that the peer may not have read yet, including those that this round adds."""
        return self.sent_bytes - self.read_bytes + self.owed_bytes

    def put_aside(self, op: bytes, header: bytes, blob: bytes) -> None:
        """Keep a frame until the peer has read enough to be answered."""
        self.waiting_frames.append((op, header, blob))
        self.waiting_bytes += len(header) + len(blob)

    def pop_waiting_frame(self) -> tuple[bytes, bytes, bytes]:
        """Remove and return the oldest waiting frame."""
        op, header, blob = self.waiting_frames.popleft()
        self.waiting_bytes -= len(header) + len(blob)
        return op, header, blob

    def drop_waiting_frames(self) -> None:
        """Drop waiting frames and pushes; a peer repeats them after its hello."""
        self.waiting_frames.clear()
        self.waiting_bytes = 0
        self.unpushed_ends.clear()

    @property
    def has_leases(self) -> bool:
        """True if the peer holds leased messages."""
        return any(consumer.held for consumer in self.consumers.values())

    def keep_answer(self, frame: int, answer: Any) -> None:
        """Keep an answer that cannot be computed again if the frame is sent again."""
        self.answers[frame] = answer
        if len(self.answers) > ANSWERS_KEPT:
            del self.answers[next(iter(self.answers))]

    def confirm_read(self, mark: int) -> None:
        """Note that the peer has read everything up to this mark.

        A number that is no sent mark is ignored.
        """
        if self.read_bytes < mark <= self.marked_bytes:
            self.read_bytes = mark

    def clear_outgoing(self) -> None:
        """Drop everything that waits to be sent."""
        self.owed_bytes = 0
        if self.results:
            self.results = []
        if self.deliveries:
            self.deliveries, self.bodies = [], []
        if self.pushes:
            self.pushes, self.push_bodies = [], []
        if self.notices:
            self.notices = []
