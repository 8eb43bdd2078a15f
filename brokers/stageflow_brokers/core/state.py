"""The state of a broker, and the primitive changes of it.

The live broker and the replay of its journal change the state only by these primitives. The same calls must make the
same state, so a primitive decides nothing, reads no clock and draws no random number: the time is set by the caller
(`now` on the monotonic clock, `wall` since the Unix epoch, both in seconds), and ids are counted.

`messages`, `groups` and `gathers` are ordered by the location of their records, the oldest segment first. Compaction
depends on it: it reads them from the front and stops at the first record in a later segment.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterator

from stageflow_brokers.core.gather import Gather
from stageflow_brokers.core.message import DeliveryState, Group, Message, RecordLocation
from stageflow_brokers.core.queue import Queue
from stageflow_brokers.core.sessions import Consumer, Session
from stageflow_brokers.types import FLAG_START, GatherOpen, PublishItem, QueueOptions

__all__ = ["BREAKER_TIMER", "DETACHED", "SHARE_TIMER", "BrokerState"]

BREAKER_TIMER = -1
"""Message id of a timer that is for the breaker of a queue; the name of the queue is its key."""

SHARE_TIMER = -2
"""Message id of a timer that is for the messages that wait with busy consumers of a queue; its name is the key."""

DETACHED = Consumer(Session(0), Queue(""), 0)
"""Holder of a message object that was replaced or removed while its entry stays in a lane."""

MAX_REMEMBERED_CLOSED_GROUPS = 50_000
"""Ids of closed groups that are remembered. A start of one of them is answered with the advice to read the history."""

MAX_REMEMBERED_PEERS = 10_000
"""Disconnected peers whose last frame number is remembered, so that a frame that is sent again is not applied twice."""

MAX_RESIDENT_BODIES = 10_000
"""Messages of one queue whose bodies are in memory; other bodies are read from the journal when they are delivered."""

MAX_RESIDENT_BODY_BYTES = 64 << 20
"""Bytes of bodies from which on fewer than `MAX_RESIDENT_BODIES` messages per queue keep theirs in memory."""

LONG_DELAY_SECONDS = 1.0
"""A message that is delayed for this time or longer does not keep its body in memory."""


class BrokerState:
    """The complete state of one broker.

    Its attributes are public to the other modules of the core.

    Args:
        paging: True if bodies can be read from the journal, so that they need not stay in memory.

    Attributes:
        now: Time of the round on the monotonic clock, in seconds.
        wall: Time of the round since the Unix epoch, in seconds.
        epoch: Number of starts of this broker on its journal.
        replaying: True while the journal is read; messages are in no lane then.
        gathers: The group of each gather, by (group id, key).
        has_breakers: True if some queue has a breaker.
        changed_queues: Queues in which something may have become deliverable in this round.
        pause_changes: Queues that were paused or resumed in this round, with True if they are paused now.
        last_frames: Number of the last frame of each disconnected peer.
        live_bytes: Bytes of all bodies, those of gathers included.
        step_bytes: Bytes of all steps and their names.
        fact_bytes: Bytes of all facts and their names.
        page_out_candidates: Messages that were delayed or parked in this round. Their bodies are not needed soon, and
            are dropped from memory as soon as they are on disk.
        closed_groups: Ids of closed groups, with the number of each closing, the oldest first.
        closed_sequence: Number of groups closed since the broker started.
        closed_floor: Number of the last closing that is not remembered any more.
    """

    def __init__(self, *, paging: bool = False) -> None:
        self.now = 0.0
        self.wall = 0.0
        self.epoch = 0
        self.next_id = 1
        self.next_lease = 1
        self.paging = paging
        self.replaying = False
        self.messages: dict[int, Message] = {}
        self.groups: dict[str, Group] = {}
        self.gathers: dict[tuple[str, str], Group] = {}
        self.queues: dict[str, Queue] = {}
        self.has_breakers = False
        self.changed_queues: dict[Queue, None] = {}  # not a set: the order must be the same for the same calls
        self.pause_changes: dict[str, bool] = {}
        self.sessions: dict[int, Session] = {}
        self.last_frames: dict[int, int] = {}
        self.facts: dict[str, str] = {}
        self.live_bytes = 0
        self.step_bytes = 0
        self.fact_bytes = 0
        self.page_out_candidates: list[Message] = []
        # An OrderedDict, because entries are removed at the front: a dict would step over all entries removed before.
        self.closed_groups: OrderedDict[str, int] = OrderedDict()
        self.closed_sequence = 0
        self.closed_floor = 0
        self._timers: list[tuple[float, int, str, str]] = []
        self._next_idle_check = -math.inf

    @property
    def max_resident_bodies(self) -> int:
        """Number of messages per queue whose bodies stay in memory.

        It is smaller while bodies are large.
        """
        if self.live_bytes <= MAX_RESIDENT_BODY_BYTES:
            return MAX_RESIDENT_BODIES
        return max(64, min(MAX_RESIDENT_BODIES, MAX_RESIDENT_BODY_BYTES * len(self.messages) // self.live_bytes))

    # queues, groups, peers

    def queue(self, name: str) -> Queue:
        """Return the queue of that name; create it on first use."""
        queue = self.queues.get(name)
        if queue is None:
            queue = self.queues[name] = Queue(name)
        return queue

    def forget_idle_queues(self) -> None:
        """Remove idle queues, at most once a second.

        The interval exists because all queues are inspected. An idle queue is created again when it is named.
        """
        if self.now < self._next_idle_check:
            return
        self._next_idle_check = self.now + 1.0
        changed_queues = self.changed_queues
        self.queues = {name: q for name, q in self.queues.items() if q in changed_queues or not q.is_idle}

    def declare(self, options: QueueOptions) -> Queue:
        """Set the options of a queue; create it on first use."""
        queue = self.queue(options.name)
        queue.declare(options)
        self.has_breakers = any(each.breaker is not None for each in self.queues.values())
        return queue

    def group(self, id: str, epoch: int, location: RecordLocation) -> Group | None:
        """Return the group of that id, None for the empty id.

        Create it on first use.
        """
        if not id:
            return None
        group = self.groups.get(id)
        if group is None:
            group = self.groups[id] = Group(id, epoch, location)
        return group

    def remember_peer(self, peer: int, frame: int) -> None:
        """Remember the number of the last frame of a peer.

        After a reconnect the peer may send frames up to this one again.
        """
        earlier = self.last_frames.pop(peer, 0)
        self.last_frames[peer] = frame if frame > earlier else earlier
        if len(self.last_frames) > MAX_REMEMBERED_PEERS:
            del self.last_frames[next(iter(self.last_frames))]

    # messages

    def put(
        self,
        queue: Queue,
        group: Group | None,
        epoch: int,
        label: str,
        priority: int,
        body: bytes | None,
        size: int,
        location: RecordLocation,
        at: int,
    ) -> Message:
        """Create a message under the next id. It is in no lane yet."""
        message = Message(self.next_id, queue, group, epoch, label, priority, body, size, location, at)
        self.next_id += 1
        self.messages[message.id] = message
        if group is not None:
            group.link(message)
        self.live_bytes += size
        return message

    def admit(
        self, item: PublishItem, queue: Queue | None, label: str, body: bytes | None, location: RecordLocation, at: int
    ) -> tuple[Group | None, Message | None]:
        """Apply a published item; return its group and its message.

        The message is in no lane yet. Without a queue there is no message, and no group is created.
        """
        if queue is None:
            return self.groups.get(item.group), None
        group = self.group(item.group, item.epoch, location)
        if item.flags & FLAG_START and group is not None:
            group.started = True
            group.digest = item.digest
            group.epoch = max(group.epoch, item.epoch)
        message = self.put(queue, group, item.epoch, label, item.priority, body, item.size, location, at)
        if item.delay or item.ttl:
            delivery_state = message.ensure_delivery_state()
            self.delay(delivery_state, item.delay)
            if item.ttl:
                delivery_state.expires = self.now + item.delay + item.ttl
                delivery_state.expires_wall = self.wall + item.delay + item.ttl
        return group, message

    def enqueue(self, message: Message, *, front: bool = False) -> None:
        """Append a message to its lane, or set its timer if it is delayed.

        With `front` it is put at the head of its lane.
        """
        queue = message.queue
        delivery_state = message.delivery_state
        if delivery_state is not None and delivery_state.due:
            queue.delayed_count += 1
            self.set_timer(delivery_state.due, message.id, "", "")
            if delivery_state.delay >= LONG_DELAY_SECONDS:
                self.page_out_candidates.append(message)
        elif front:
            queue.push_front(message)
        else:
            queue.push(message)

    def forget(self, message: Message) -> None:
        """Remove a message that is in no lane, as in a replay."""
        del self.messages[message.id]
        self.live_bytes -= message.size
        if message.delivery_state is not None:
            self.step_bytes -= message.delivery_state.step_bytes
        if message.group is not None:
            message.group.unlink(message)

    def remove(self, message: Message) -> None:
        """Remove a message wherever it is.

        If it is leased, a settlement by its holder is refused.
        """
        self.forget(message)
        if not self.replaying:
            self.detach(message)

    def detach(self, message: Message) -> None:
        """Remove a message from its holder, lane, delay or dead letters.

        An entry in a lane stays, so the object must not be used again.
        """
        holder = message.holder
        queue = message.queue
        if holder is not None:
            if holder is not DETACHED:
                del holder.held[message.id]
                self.changed_queues[holder.queue] = None
        elif message.delivery_state is not None and message.delivery_state.parked:
            del queue.dead_letters[message.id]
        elif message.delivery_state is not None and message.delivery_state.due:
            queue.delayed_count -= 1
        else:
            queue.taken_entries += 1
        message.holder = DETACHED

    def replace(self, message: Message) -> Message:
        """Detach a message and return it as a new object.

        The entry of the old object may stay in a lane.
        """
        self.detach(message)
        fresh = Message(
            message.id,
            message.queue,
            message.group,
            message.epoch,
            message.label,
            message.priority,
            message.body,
            message.size,
            message.location,
            message.body_offset,
        )
        fresh.delivery_state = message.delivery_state
        self.messages[fresh.id] = fresh
        group = message.group
        if group is not None:
            group.unlink(message)
            group.link(fresh)
        return fresh

    def relocate(self, message: Message, location: RecordLocation) -> None:
        """Set the location of a message to that of a new record.

        The body is at the beginning of the blob of that record.
        """
        message.location, message.body_offset = location, 0
        self.messages[message.id] = self.messages.pop(message.id)

    def set_steps(self, message: Message, steps: dict[str, bytes] | None) -> None:
        """Replace the steps of a message."""
        delivery_state = message.ensure_delivery_state()
        self.step_bytes -= delivery_state.step_bytes
        delivery_state.steps = steps
        delivery_state.step_bytes = sum(map(len, steps)) + sum(map(len, steps.values())) if steps else 0
        self.step_bytes += delivery_state.step_bytes

    def add_step(self, message: Message, name: str, value: bytes) -> None:
        """Add a step to a message.

        Records and frames of this round refer to the dict of earlier steps, so it is replaced and not changed.
        """
        delivery_state = message.ensure_delivery_state()
        steps = delivery_state.steps or {}
        growth = len(value) - len(steps[name]) if name in steps else len(name) + len(value)
        delivery_state.steps = {**steps, name: value}
        delivery_state.step_bytes += growth
        self.step_bytes += growth

    def set_fact(self, name: str, value: str) -> None:
        """Set a fact."""
        before = self.facts.get(name)
        self.fact_bytes += len(value) - len(before) if before is not None else len(name) + len(value)
        self.facts[name] = value

    def fail(self, message: Message, failure: bytes | None) -> None:
        """Count a failed attempt.

        The message does not expire any more, because its work has begun.
        """
        delivery_state = message.ensure_delivery_state()
        delivery_state.attempts += 1
        delivery_state.failure, delivery_state.fresh = failure, False
        delivery_state.expires = delivery_state.expires_wall = 0.0

    def park(self, message: Message, *, reason: bytes | None, evidence: bool) -> None:
        """Make a message a dead letter of its queue.

        It must be detached, or its lease must end with this. With `evidence` it cannot be requeued, and does not keep
        its group alive.
        """
        delivery_state = message.ensure_delivery_state()
        delivery_state.parked = True
        delivery_state.parked_wall = self.wall
        delivery_state.evidence = evidence
        delivery_state.reason = reason
        delivery_state.due = delivery_state.due_wall = delivery_state.delay = 0.0
        message.holder, message.lease = None, 0
        message.queue.dead_letters[message.id] = message
        self.page_out_candidates.append(message)
        if evidence and message.group is not None:
            message.group.unlink(message)

    def delay(self, delivery_state: DeliveryState, seconds: float) -> None:
        """Let the message become ready `seconds` from now; 0 ends a delay."""
        delivery_state.delay = seconds
        delivery_state.due = self.now + seconds if seconds > 0 else 0.0
        delivery_state.due_wall = self.wall + seconds if seconds > 0 else 0.0

    def close_group(self, id: str) -> None:
        """Remove a group that has ended, with its messages and gathers.

        Dead letters that are evidence stay.
        """
        group = self.groups.pop(id, None)
        self.closed_sequence += 1
        closed = self.closed_groups
        closed.pop(id, None)
        closed[id] = self.closed_sequence
        if len(closed) > MAX_REMEMBERED_CLOSED_GROUPS:
            _, self.closed_floor = closed.popitem(last=False)
        if group is None:
            return
        if group.gathers is not None:
            for key, gather in group.gathers.items():
                del self.gathers[id, key]
                self.live_bytes -= gather.weight
            group.gathers = None
        if group.first_message is not None or group.other_messages:
            for message in group.messages():
                holder = message.holder
                if holder is not None and holder is not DETACHED:
                    holder.removed_ids.add(message.id)
                self.remove(message)

    # gathers

    def gather(self, group: Group, key: str, location: RecordLocation) -> Gather:
        """Return the gather of that key; create it on first use."""
        if group.gathers is None:
            group.gathers = {}
        gather = group.gathers.get(key)
        if gather is None:
            gather = group.gathers[key] = Gather(key, location)
            self.gathers[group.id, key] = group
        return gather

    def open_gather(
        self,
        group: Group,
        opening: GatherOpen,
        queue: str,
        label: str,
        base: bytes,
        location: RecordLocation,
        priority: int,
    ) -> None:
        """Open a gather: it waits for its arrivals from now on."""
        gather = self.gather(group, opening.key, location)
        self.live_bytes += len(base) - len(gather.base)
        gather.open(need=opening.need, queue=queue, label=label, epoch=opening.epoch, base=base, priority=priority)
        if opening.deadline:
            gather.wait = opening.deadline
            gather.due = self.now + opening.deadline
            gather.due_wall = self.wall + opening.deadline

    def add_arrival(self, group: Group, key: str, slot: str, body: bytes, location: RecordLocation) -> None:
        """Add an arrival to a gather. A duplicate changes nothing."""
        gather = self.gather(group, key, location)
        before = gather.weight
        gather.arrive(slot, body)
        self.live_bytes += gather.weight - before

    def relocate_gather(self, group: Group, gather: Gather, location: RecordLocation) -> None:
        """Set the location of the record of a gather."""
        gather.location = location
        self.gathers[group.id, gather.key] = self.gathers.pop((group.id, gather.key))

    def relocate_group(self, group: Group, location: RecordLocation) -> None:
        """Set the location of the record of a group."""
        group.location = location
        self.groups[group.id] = self.groups.pop(group.id)

    # timers

    def set_timer(self, due: float, id: int, group: str, key: str) -> None:
        """Set a timer for a message, a gather or a queue.

        They are named by the id, by group and key, or by `BREAKER_TIMER` or `SHARE_TIMER` and the queue's name as key.

        Timers are not removed. The code that handles a due one must check that it is still valid.
        """
        heapq.heappush(self._timers, (due, id, group, key))

    def next_timer(self) -> float | None:
        """Return the time of the next timer, None without one."""
        return self._timers[0][0] if self._timers else None

    def timers(self) -> set[tuple[float, int, str, str]]:
        """Return all timers as (due, id, group, key).

        Some may not be valid any more.
        """
        return set(self._timers)

    def due_timers(self) -> Iterator[tuple[float, int, str, str]]:
        """Remove the timers that are due and yield them."""
        while self._timers and self._timers[0][0] <= self.now:
            yield heapq.heappop(self._timers)
