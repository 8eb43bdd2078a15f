"""The state of a broker: messages, groups, queues, gathers, facts; and the primitive changes that keep it whole.

No primitive decides anything. Time is handed in (`now` monotonic, `wall` since the Unix epoch, both in seconds),
and ids are counted, so that the same calls make the same state: the live broker and the replay of its journal use
these and no others.

`messages`, `groups` and `gathers` are in the order of their places: whatever lies in the oldest segment is in front.
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

__all__ = ["BREAKER_TIMER", "GONE", "BrokerState"]

BREAKER_TIMER = -1
"""In the place of a message's id: the timer is that of a queue, whose name is the key."""

GONE = Consumer(Session(0), Queue(""), 0)
"""Holder of a message object that has been replaced or removed while it still lies in a lane."""

MAX_CLOSED_GROUPS_KEPT = 50_000
"""How many ids that left are remembered, so that a submit can be told to look into the history again."""

FRAMES_KEPT = 10_000
"""How many absent peers are remembered by their last frame, so that nothing they send again is taken twice."""

DEEP = 10_000
"""How many messages of a queue have their bodies in memory; those of the others are read when their turn comes."""

DEEP_BYTES = 64 << 20
"""Of large ones so many have them as take about this many bytes."""

LONG = 1.0
"""Seconds of a delay from which on the body is not kept in memory meanwhile."""


class BrokerState:
    """Everything the broker knows. Public attributes: this is the inside of one machine.

    `replaying`: the journal is being read, and nothing is in a lane yet. `paging`: bodies can be read back from it.
    `guarded`: there is a queue with a breaker. `live_bytes` are those of all bodies, `step_bytes` those of all steps,
    `fact_bytes` those of all facts. `waiting`: what has begun to wait in this round, and whose body nobody wants soon.
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
        self.guarded = False
        self.changed_queues: dict[Queue, None] = {}  # in order: the same calls make the same state
        self.sessions: dict[int, Session] = {}
        self.last_frames: dict[int, int] = {}
        self.facts: dict[str, str] = {}
        self.live_bytes = 0
        self.step_bytes = 0
        self.fact_bytes = 0
        self.waiting: list[Message] = []
        # An OrderedDict, for it is emptied at its front: a dict steps over all that was taken there before.
        self.closed_groups: OrderedDict[str, int] = OrderedDict()
        self.closed_sequence = 0
        self.closed_floor = 0
        self._timers: list[tuple[float, int, str, str]] = []
        self._forget_again = -math.inf

    @property
    def deep(self) -> int:
        """How many messages of a queue have their bodies in memory, by the size that messages have at present."""
        if self.live_bytes <= DEEP_BYTES:
            return DEEP
        return max(64, min(DEEP, DEEP_BYTES * len(self.messages) // self.live_bytes))

    # queues, groups, peers

    def queue(self, name: str) -> Queue:
        """The queue of that name, made on first use."""
        queue = self.queues.get(name)
        if queue is None:
            queue = self.queues[name] = Queue(name)
        return queue

    def forget_idle_queues(self) -> None:
        """Forget the queues that nobody would miss: each is made again when somebody names it. Not every time: it goes
        over all of them."""
        if self.now < self._forget_again:
            return
        self._forget_again = self.now + 1.0
        changed_queues = self.changed_queues
        self.queues = {name: q for name, q in self.queues.items() if q in changed_queues or not q.is_idle}

    def declare(self, options: QueueOptions) -> Queue:
        """How the queue of that name treats its messages from now on."""
        queue = self.queue(options.name)
        queue.declare(options)
        self.guarded = any(known.breaker is not None for known in self.queues.values())
        return queue

    def group(self, id: str, epoch: int, location: RecordLocation) -> Group | None:
        """The group of that id, made on first use; None for the empty id."""
        if not id:
            return None
        group = self.groups.get(id)
        if group is None:
            group = self.groups[id] = Group(id, epoch, location)
        return group

    def remember_peer(self, peer: int, frame: int) -> None:
        """An absent peer may come back and send frames again up to this one."""
        known = self.last_frames.pop(peer, 0)
        self.last_frames[peer] = frame if frame > known else known
        if len(self.last_frames) > FRAMES_KEPT:
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
        """A new message under the next id, in no lane yet."""
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
        """What a published item makes of its group, and its message, in no lane yet (None without a queue)."""
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
        """Into the lane of its queue, or among the delayed if it has a time to wait for."""
        queue = message.queue
        delivery_state = message.delivery_state
        if delivery_state is not None and delivery_state.due:
            queue.delayed_count += 1
            self.timer(delivery_state.due, message.id, "", "")
            if delivery_state.delay >= LONG:
                self.waiting.append(message)
        elif front:
            queue.push_front(message)
        else:
            queue.push(message)

    def forget(self, message: Message) -> None:
        """It is no more, and is in no lane."""
        del self.messages[message.id]
        self.live_bytes -= message.size
        if message.delivery_state is not None:
            self.step_bytes -= message.delivery_state.step_bytes
        if message.group is not None:
            message.group.unlink(message)

    def remove(self, message: Message) -> None:
        """It is no more, wherever it was. Whoever holds it finds its lease refused."""
        self.forget(message)
        if not self.replaying:
            self.detach(message)

    def detach(self, message: Message) -> None:
        """Take it out of lane, lease, delay or death, leaving the object itself unusable in the lane."""
        holder = message.holder
        queue = message.queue
        if holder is not None:
            if holder is not GONE:
                del holder.held[message.id]
                self.changed_queues[holder.queue] = None
        elif message.delivery_state is not None and message.delivery_state.parked:
            del queue.dead_letters[message.id]
        elif message.delivery_state is not None and message.delivery_state.due:
            queue.delayed_count -= 1
        else:
            queue.taken_entries += 1
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
        """Its record lies at `location` from now on, with the body at the beginning of the blob."""
        message.location, message.body_offset = location, 0
        self.messages[message.id] = self.messages.pop(message.id)

    def set_steps(self, message: Message, steps: dict[str, bytes] | None) -> None:
        """These are the steps of the message from now on."""
        delivery_state = message.ensure_delivery_state()
        self.step_bytes -= delivery_state.step_bytes
        delivery_state.steps = steps
        delivery_state.step_bytes = sum(map(len, steps)) + sum(map(len, steps.values())) if steps else 0
        self.step_bytes += delivery_state.step_bytes

    def add_step(self, message: Message, name: str, value: bytes) -> None:
        """One more step of the message. What was said of it before refers to the others, so that they are not changed
        in place."""
        delivery_state = message.ensure_delivery_state()
        known = delivery_state.steps or {}
        grown = len(value) - len(known[name]) if name in known else len(name) + len(value)
        delivery_state.steps = {**known, name: value}
        delivery_state.step_bytes += grown
        self.step_bytes += grown

    def set_fact(self, name: str, value: str) -> None:
        """A fact as it is from now on."""
        known = self.facts.get(name)
        self.fact_bytes += len(value) - len(known) if known is not None else len(name) + len(value)
        self.facts[name] = value

    def fail(self, message: Message, failure: bytes | None) -> None:
        """An attempt has been made in vain. It does not expire any more: it has begun."""
        delivery_state = message.ensure_delivery_state()
        delivery_state.attempts += 1
        delivery_state.failure, delivery_state.fresh = failure, False
        delivery_state.expires = delivery_state.expires_wall = 0.0

    def park(self, message: Message, *, reason: bytes | None, evidence: bool) -> None:
        """A dead letter of its queue. It must have been detached, or be held by a consumer that lets go of it now."""
        delivery_state = message.ensure_delivery_state()
        delivery_state.parked = True
        delivery_state.parked_wall = self.wall
        delivery_state.evidence = evidence
        delivery_state.reason = reason
        delivery_state.due = delivery_state.due_wall = delivery_state.delay = 0.0
        message.holder, message.lease = None, 0
        message.queue.dead_letters[message.id] = message
        self.waiting.append(message)
        if evidence and message.group is not None:
            message.group.unlink(message)

    def delay(self, delivery_state: DeliveryState, seconds: float) -> None:
        """Not before `seconds` from now."""
        delivery_state.delay = seconds
        delivery_state.due = self.now + seconds if seconds > 0 else 0.0
        delivery_state.due_wall = self.wall + seconds if seconds > 0 else 0.0

    def close_group(self, id: str) -> None:
        """The group has ended: forget it, and all it left behind save evidence."""
        group = self.groups.pop(id, None)
        self.closed_sequence += 1
        closed = self.closed_groups
        closed.pop(id, None)
        closed[id] = self.closed_sequence
        if len(closed) > MAX_CLOSED_GROUPS_KEPT:
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
                if holder is not None and holder is not GONE:
                    holder.removed_ids.add(message.id)
                self.remove(message)

    # gathers

    def gather(self, group: Group, key: str, location: RecordLocation) -> Gather:
        """The gather of that key, made on first use."""
        if group.gathers is None:
            group.gathers = {}
        gather = group.gathers.get(key)
        if gather is None:
            gather = group.gathers[key] = Gather(key, location)
            self.gathers[group.id, key] = group
        return gather

    def open(
        self,
        group: Group,
        opening: GatherOpen,
        queue: str,
        label: str,
        base: bytes,
        location: RecordLocation,
        priority: int,
    ) -> None:
        """A gather begins to wait."""
        gather = self.gather(group, opening.key, location)
        self.live_bytes += len(base) - len(gather.base)
        gather.open(need=opening.need, queue=queue, label=label, epoch=opening.epoch, base=base, priority=priority)
        if opening.deadline:
            gather.wait = opening.deadline
            gather.due = self.now + opening.deadline
            gather.due_wall = self.wall + opening.deadline

    def arrive(self, group: Group, key: str, slot: str, body: bytes, location: RecordLocation) -> None:
        """Something arrives at a gather, for the first time or once more."""
        gather = self.gather(group, key, location)
        before = gather.weight
        gather.arrive(slot, body)
        self.live_bytes += gather.weight - before

    def relocate_gather(self, group: Group, gather: Gather, location: RecordLocation) -> None:
        """Its record lies at `location` from now on."""
        gather.location = location
        self.gathers[group.id, gather.key] = self.gathers.pop((group.id, gather.key))

    def relocate_group(self, group: Group, location: RecordLocation) -> None:
        """Its record lies at `location` from now on."""
        group.location = location
        self.groups[group.id] = self.groups.pop(group.id)

    # timers

    def timer(self, due: float, id: int, group: str, key: str) -> None:
        """Remember to look at a message (id) or a gather (group, key) at `due`; stale entries are harmless."""
        heapq.heappush(self._timers, (due, id, group, key))

    def next_timer(self) -> float | None:
        """When the next timer is due, or None."""
        return self._timers[0][0] if self._timers else None

    def alarms(self) -> set[tuple[float, int, str, str]]:
        """All timers as (due, id, group, key), stale ones among them."""
        return set(self._timers)

    def due_timers(self) -> Iterator[tuple[float, int, str, str]]:
        """Timers that are due now, taken out."""
        while self._timers and self._timers[0][0] <= self.now:
            yield heapq.heappop(self._timers)
