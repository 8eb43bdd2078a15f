"""One queue: what is ready in which order, who consumes it, and whether it is open.

Within one priority a queue is first in, first out. Nothing here knows of time, journal or sockets.
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

__all__ = ["Queue"]


CANCELLED_PRIORITY = 1 << 62
"""The priority of the lane that no breaker holds up: what is not to be worked on, only to be passed through."""


class Queue:
    """The state of one queue.

    A lane may hold messages that have been taken away from it meanwhile: their holder is not None, and `skip` is
    how many of them there are. `awaiting` are peers that may hold messages of this queue and have not announced yet.
    `owner` is who has declared it last.
    """

    __slots__ = (
        "_high",
        "awaited_peers",
        "breaker",
        "consumers",
        "dead_letters",
        "delayed",
        "delivered",
        "name",
        "options",
        "owner",
        "paused",
        "ready",
        "settled",
        "taken_entries",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.options = QueueOptions(name)
        self.owner: Session | None = None
        self.breaker: Breaker | None = None
        self.ready: deque[Message] = deque()
        self._high: list[tuple[int, deque[Message]]] = []
        self.consumers: list[Consumer] = []
        self.delayed = 0
        self.dead_letters: dict[int, Message] = {}
        self.awaited_peers: set[int] = set()
        self.paused = False
        self.delivered = 0
        self.settled = 0
        self.taken_entries = 0

    def declare(self, options: QueueOptions) -> None:
        """How it treats its messages from now on; a breaker that is declared as before stays as it is."""
        before = self.options
        self.options = options
        if (options.breaker_failures, options.breaker_reset) != (before.breaker_failures, before.breaker_reset):
            failures = options.breaker_failures
            self.breaker = Breaker(failures, options.breaker_reset) if failures > 0 else None

    def push(self, message: Message) -> None:
        """Behind all of the same priority."""
        if self.breaker is not None and message.is_cancelled:
            self._lane(CANCELLED_PRIORITY).append(message)
        elif message.priority == 0:
            self.ready.append(message)
        else:
            self._lane(message.priority).append(message)

    def push_front(self, message: Message) -> None:
        """Before all of the same priority."""
        if self.breaker is not None and message.is_cancelled:
            self._lane(CANCELLED_PRIORITY).append(message)
        elif message.priority == 0:
            self.ready.appendleft(message)
        else:
            self._lane(message.priority).appendleft(message)

    def _lane(self, priority: int) -> deque[Message]:
        for known, lane in self._high:
            if known == priority:
                return lane
        new: deque[Message] = deque()
        self._high.append((priority, new))
        self._high.sort(key=lambda pair: -pair[0])
        return new

    def has_cancelled_next(self) -> bool:
        """Whether the next message is one that no breaker holds up."""
        if not self._high or self._high[0][0] != CANCELLED_PRIORITY:
            return False
        lane = self._high[0][1]
        while lane and lane[0].holder is not None:
            lane.popleft()
            self.taken_entries -= 1
        return bool(lane)

    def next_lane(self) -> deque[Message]:
        """The lane that the next message comes from; it is empty when none is ready."""
        while self._high and not self._high[0][1]:
            del self._high[0]
        if self._high:
            for priority, lane in self._high:
                if lane and (priority > 0 or not self.ready):
                    return lane
        return self.ready

    def iterate_ready(self) -> Iterator[Message]:
        """What is ready, in the order of delivery."""
        lanes = [lane for priority, lane in self._high if priority > 0]
        lanes.append(self.ready)
        lanes.extend(lane for priority, lane in self._high if priority < 0)
        for queued in lanes:
            for message in queued:
                if message.holder is None:
                    yield message

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in it, and nobody wants anything of it."""
        owned = self.owner is not None and self.owner.connected
        used = (
            self.consumers or self.awaited_peers or self.paused or self.delayed or self.dead_letters or self.ready_count
        )
        return not owned and not used

    @property
    def depth(self) -> int:
        """How many messages are in its lanes, those taken away meanwhile included."""
        return len(self.ready) + (sum(len(lane) for _, lane in self._high) if self._high else 0)

    def page_out(self, keep: int) -> None:
        """Bodies behind the first `keep` messages leave memory; what is not on disk yet stays."""
        excess = self.depth - keep
        lanes = [lane for priority, lane in self._high if priority > 0]
        lanes.append(self.ready)
        lanes.extend(lane for priority, lane in self._high if priority < 0)
        for lane in reversed(lanes):
            if excess <= 0:
                return
            for message in islice(reversed(lane), excess):
                if message.body is None:
                    break  # those before it in this lane have left already
                if message.holder is None and message.location.segment >= 0:
                    message.body = None
            excess -= len(lane)

    def clear_messages(self) -> None:
        """Nothing is ready, delayed or dead here: what is will be put in again."""
        self.ready.clear()
        self._high.clear()
        self.dead_letters.clear()
        self.delayed = self.taken_entries = 0

    @property
    def ready_count(self) -> int:
        """How many messages are ready to be delivered."""
        count = len(self.ready) - self.taken_entries
        if self._high:
            count += sum(len(lane) for _, lane in self._high)
        return count
