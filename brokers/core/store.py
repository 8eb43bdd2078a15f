"""The state of a broker: messages, groups, queues, gathers, facts; and the primitive changes that keep it whole.

No primitive decides anything. Time is handed in (`now` monotonic, `wall` since the Unix epoch, both in seconds),
and ids are counted, so that the same calls make the same state.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator

from brokers.core.gather import Gather
from brokers.core.message import Extra, Group, Message, Place
from brokers.core.queue import Queue
from brokers.core.sessions import Consumer, Session

__all__ = ["GONE", "Store"]

GONE = Consumer(Session(0), Queue(""), 0)
"""Holder of a message object that has been replaced or removed while it still lies in a lane."""

LEFT_KEPT = 50_000
"""How many ids that left are remembered, so that a submit can be told to look into the history again."""

DEEP = 10_000
"""A queue longer than this keeps the bodies of new messages on disk only."""


class Store:
    """Everything the broker knows. Public attributes: this is the inside of one machine."""

    def __init__(self, *, paging: bool = False) -> None:
        self.now = 0.0
        self.wall = 0.0
        self.epoch = 0
        self.next_id = 1
        self.next_lease = 1
        self.paging = paging
        self.messages: dict[int, Message] = {}
        self.groups: dict[str, Group] = {}
        self.queues: dict[str, Queue] = {}
        self.sessions: dict[int, Session] = {}
        self.facts: dict[str, str] = {}
        self.live_bytes = 0
        self.left: OrderedDict[str, int] = OrderedDict()
        self.left_seq = 0
        self.left_floor = 0
        self._timers: list[tuple[float, int, str, str]] = []

    # queues and groups

    def queue(self, name: str) -> Queue:
        """The queue of that name, made on first use."""
        queue = self.queues.get(name)
        if queue is None:
            queue = self.queues[name] = Queue(name)
        return queue

    def group(self, id: str, epoch: int, place: Place) -> Group | None:
        """The group of that id, made on first use; None for the empty id."""
        if not id:
            return None
        group = self.groups.get(id)
        if group is None:
            group = self.groups[id] = Group(id, epoch, place)
        return group

    # messages

    def put(
        self,
        queue: Queue,
        group: Group | None,
        epoch: int,
        label: str,
        priority: int,
        body: bytes,
        place: Place,
        at: int,
    ) -> Message:
        """A new message under the next id, in no lane yet."""
        message = Message(self.next_id, queue, group, epoch, label, priority, body, place, at)
        self.next_id += 1
        self.messages[message.id] = message
        if group is not None:
            group.link(message)
        self.live_bytes += message.size
        return message

    def enqueue(self, message: Message, *, front: bool = False) -> None:
        """Into the lane of its queue, or among the delayed if it has a time to wait for."""
        queue = message.queue
        extra = message.extra
        if extra is not None and extra.due:
            queue.delayed += 1
            self.timer(extra.due, message.id, "", "")
        elif front:
            queue.push_front(message)
        else:
            queue.push(message)
            if self.paging and len(queue.ready) > DEEP and message.body is not None:
                message.body = None

    def remove(self, message: Message) -> None:
        """It is no more. Whoever holds it finds its lease refused."""
        self.messages.pop(message.id, None)
        self.live_bytes -= message.size
        if message.group is not None:
            message.group.unlink(message)
        self.detach(message)

    def detach(self, message: Message) -> None:
        """Take it out of lane, lease, delay or death, leaving the object itself unusable in the lane."""
        holder = message.holder
        queue = message.queue
        if holder is not None:
            if holder is not GONE:
                holder.held.pop(message.id, None)
        elif message.extra is not None and message.extra.parked:
            queue.dead.pop(message.id, None)
        elif message.extra is not None and message.extra.due:
            queue.delayed -= 1
        else:
            queue.skip += 1
        message.holder = GONE

    def replace(self, message: Message) -> Message:
        """The same message as a new object, detached: the old one may still lie in a lane."""
        self.detach(message)
        fresh = Message(
            message.id,
            message.queue,
            message.group,
            message.epoch,
            message.label,
            message.priority,
            b"",
            message.place,
            message.at,
        )
        fresh.body, fresh.size, fresh.extra = message.body, message.size, message.extra
        self.messages[fresh.id] = fresh
        group = message.group
        if group is not None:
            group.unlink(message)
            group.link(fresh)
        return fresh

    def park(self, message: Message, *, reason: bytes | None, evidence: bool) -> None:
        """A dead letter of its queue. It must have been detached, or be held by a consumer that lets go of it now."""
        extra = message.details()
        extra.parked = True
        extra.parked_wall = self.wall
        extra.evidence = evidence
        extra.reason = reason
        extra.due = extra.due_wall = extra.delay = 0.0
        message.holder = None
        message.queue.dead[message.id] = message
        if evidence and message.group is not None:
            message.group.unlink(message)

    def leave(self, id: str) -> None:
        """The group has ended: forget it, and all it left behind save evidence."""
        group = self.groups.pop(id, None)
        self.left_seq += 1
        self.left[id] = self.left_seq
        self.left.move_to_end(id)
        if len(self.left) > LEFT_KEPT:
            _, self.left_floor = self.left.popitem(last=False)
        if group is None or (group.one is None and group.more is None):
            return
        for message in group.messages():
            if not (message.extra is not None and message.extra.evidence):
                self.remove(message)

    def delay(self, extra: Extra, seconds: float) -> None:
        """Not before `seconds` from now."""
        extra.delay = seconds
        extra.due = self.now + seconds if seconds > 0 else 0.0
        extra.due_wall = self.wall + seconds if seconds > 0 else 0.0

    # gathers

    def gather(self, group: Group, key: str, place: Place) -> Gather:
        """The gather of that key, made on first use."""
        if group.gathers is None:
            group.gathers = {}
        gather = group.gathers.get(key)
        if gather is None:
            gather = group.gathers[key] = Gather(key, place)
        return gather

    def all_gathers(self) -> Iterator[tuple[Group, Gather]]:
        """Each gather with its group."""
        for group in self.groups.values():
            if group.gathers:
                for gather in group.gathers.values():
                    yield group, gather

    # timers

    def timer(self, due: float, id: int, group: str, key: str) -> None:
        """Remember to look at a message (id) or a gather (group, key) at `due`; stale entries are harmless."""
        heapq.heappush(self._timers, (due, id, group, key))

    def next_timer(self) -> float | None:
        """When the next timer is due, or None."""
        return self._timers[0][0] if self._timers else None

    def due_timers(self) -> Iterator[tuple[float, int, str, str]]:
        """Timers that are due now, taken out."""
        while self._timers and self._timers[0][0] <= self.now:
            yield heapq.heappop(self._timers)
