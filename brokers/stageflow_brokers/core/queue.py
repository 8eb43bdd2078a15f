"""One queue: its ready messages in order, its dead letters, its consumers.

Messages of one priority are first in, first out. This module must not use a clock, the journal or sockets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from stageflow_brokers.core.breaker import Breaker
from stageflow_brokers.types import QueueOptions

if TYPE_CHECKING:
    from stageflow_brokers.core.message import Message
    from stageflow_brokers.core.sessions import Consumer, Session

__all__ = ["RELEASED", "Queue"]

CANCELLED_PRIORITY = 1 << 62
"""Priority of the lane for cancelled messages: consumers pass them through without work, so no breaker stops them."""


RELEASED = -1
"""The lease of a message that waits again after a release."""


class Queue:
    """The state of one queue.

    Each priority has a lane: `ready` for priority 0, `_other_lanes` for the others. To take a message out of the middle
    of a lane would be slow, so its entry stays and its holder is set.

    Attributes:
        owner: The session that declared the queue last.
        ready: The lane of priority 0.
        taken_entries: Number of lane entries whose message was taken: their holder is not None.
        has_priorities: True once a message of another priority than 0 was in the queue.
        mixed_until: Time until which consumers hold few messages, because a message of a higher priority had to wait
            for a recall.
        share_lease: Messages with earlier leases are recalled when the timer is due, if a consumer is idle then; 0
            without a timer.
        delayed_count: Number of delayed messages.
        dead_letters: The dead letters, by id.
        awaited_peers: Peers that may hold messages of this queue and have not reported them since the broker started.
            Until this set is empty, nothing is delivered.
        delivered_count: Number of deliveries since the broker started.
        settled_count: Number of settlements since the broker started.
        starts: What the supervisor has reported of consumers that are not ready: True if they cannot start, the reason
            or how far they are, and the time of the next attempt. None if a consumer is ready.
    """

    __slots__ = (
        "_other_lanes",
        "awaited_peers",
        "breaker",
        "consumers",
        "dead_letters",
        "delayed_count",
        "delivered_count",
        "has_priorities",
        "mixed_until",
        "name",
        "options",
        "owner",
        "paused",
        "ready",
        "settled_count",
        "share_lease",
        "starts",
        "taken_entries",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.options = QueueOptions(name)
        self.owner: Session | None = None
        self.breaker: Breaker | None = None
        self.ready: deque[Message] = deque()
        self._other_lanes: list[tuple[int, deque[Message]]] = []
        self.consumers: list[Consumer] = []
        self.delayed_count = 0
        self.dead_letters: dict[int, Message] = {}
        self.awaited_peers: set[int] = set()
        self.paused = False
        self.delivered_count = 0
        self.settled_count = 0
        self.starts: tuple[bool, str, float] | None = None
        self.taken_entries = 0
        self.has_priorities = False
        self.mixed_until = 0.0
        self.share_lease = 0

    def declare(self, options: QueueOptions) -> None:
        """Set the options. A breaker whose options do not change keeps its state."""
        before = self.options
        self.options = options
        if (options.breaker_failures, options.breaker_reset) != (before.breaker_failures, before.breaker_reset):
            failures = options.breaker_failures
            self.breaker = Breaker(failures, options.breaker_reset) if failures > 0 else None

    def push(self, message: Message) -> None:
        """Append a message to its lane."""
        if self.breaker is not None and message.is_cancelled:
            self._lane(CANCELLED_PRIORITY).append(message)
        elif message.priority == 0:
            self.ready.append(message)
        else:
            self._lane(message.priority).append(message)

    def push_front(self, message: Message) -> None:
        """Put a message at the head of its lane."""
        if self.breaker is not None and message.is_cancelled:
            self._lane(CANCELLED_PRIORITY).append(message)
        elif message.priority == 0:
            self.ready.appendleft(message)
        else:
            self._lane(message.priority).appendleft(message)

    def put_back(self, messages: list[Message]) -> None:
        """Put released messages at the head of their lanes, in the order in which they were published.

        Messages that were released before, by other consumers, and wait there keep their places in this order.
        """
        lanes: dict[int, list[Message]] = {}
        for message in messages:
            cancelled = self.breaker is not None and message.is_cancelled
            lanes.setdefault(CANCELLED_PRIORITY if cancelled else message.priority, []).append(message)
        for priority, returned in lanes.items():
            lane = self._lane(priority) if priority else self.ready
            if priority == CANCELLED_PRIORITY:
                lane.extend(returned)
                continue
            last = max(message.id for message in returned)
            while lane and lane[0].lease == RELEASED and lane[0].id < last and lane[0].holder is None:
                returned.append(lane.popleft())
            lane.extendleft(sorted(returned, key=lambda message: -message.id))

    def _lane(self, priority: int) -> deque[Message]:
        for known, lane in self._other_lanes:
            if known == priority:
                return lane
        new: deque[Message] = deque()
        self.has_priorities = True
        self._other_lanes.append((priority, new))
        self._other_lanes.sort(key=lambda pair: -pair[0])
        return new

    def has_cancelled_next(self) -> bool:
        """True if the next message is cancelled, so that no breaker stops it.

        Drops taken entries before it.
        """
        if not self._other_lanes or self._other_lanes[0][0] != CANCELLED_PRIORITY:
            return False
        lane = self._other_lanes[0][1]
        while lane and lane[0].holder is not None:
            lane.popleft()
            self.taken_entries -= 1
        return bool(lane)

    def next_lane(self) -> deque[Message]:
        """Return the lane of the next message. It is empty if no message is ready."""
        while self._other_lanes and not self._other_lanes[0][1]:
            del self._other_lanes[0]
        if self._other_lanes:
            for priority, lane in self._other_lanes:
                if lane and (priority > 0 or not self.ready):
                    return lane
        return self.ready

    def iterate_ready(self) -> Iterator[Message]:
        """Yield the ready messages in the order of delivery."""
        lanes = [lane for priority, lane in self._other_lanes if priority > 0]
        lanes.append(self.ready)
        lanes.extend(lane for priority, lane in self._other_lanes if priority < 0)
        for queued in lanes:
            for message in queued:
                if message.holder is None:
                    yield message

    @property
    def is_idle(self) -> bool:
        """True if the queue is empty, not paused, and used by no connected peer.

        It may be forgotten then.
        """
        if self.consumers or self.awaited_peers or self.paused or (self.owner is not None and self.owner.connected):
            return False
        return not self.delayed_count and not self.dead_letters and not self.ready_count

    @property
    def depth(self) -> int:
        """Number of entries in all lanes, taken entries included."""
        return len(self.ready) + (sum(len(lane) for _, lane in self._other_lanes) if self._other_lanes else 0)

    def page_out(self, keep: int) -> None:
        """Drop the bodies behind the first `keep` messages from memory.

        Bodies that are not on disk yet stay.
        """
        excess = self.depth - keep
        lanes = [lane for priority, lane in self._other_lanes if priority > 0]
        lanes.append(self.ready)
        lanes.extend(lane for priority, lane in self._other_lanes if priority < 0)
        for lane in reversed(lanes):
            if excess <= 0:
                return
            for message in islice(reversed(lane), excess):
                if message.body is None:
                    break  # the bodies before it in this lane were dropped earlier
                if message.holder is None and message.location.segment >= 0:
                    message.body = None
            excess -= len(lane)

    def clear_messages(self) -> None:
        """Remove all ready, delayed and dead messages; the caller puts the live ones back."""
        self.ready.clear()
        self._other_lanes.clear()
        self.dead_letters.clear()
        self.delayed_count = self.taken_entries = 0

    @property
    def ready_count(self) -> int:
        """Number of messages that are ready to be delivered."""
        count = len(self.ready) - self.taken_entries
        if self._other_lanes:
            count += sum(len(lane) for _, lane in self._other_lanes)
        return count
