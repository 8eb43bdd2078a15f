"""Who holds what: credit, delivery, return, adoption after a restart, and what becomes of the messages of the dead.

A lease names the epoch of the broker and a sequence number; only the current one counts. Delivery happens after the
commit, and is not recorded: after a crash whoever holds a message says so, and everything else is ready again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from stageflow_brokers.core.breaker import CLOSED, OPEN, Breaker
from stageflow_brokers.core.message import READY, DeliveryState, Message
from stageflow_brokers.core.outbox import Outbox
from stageflow_brokers.core.queue import Queue
from stageflow_brokers.core.record_writer import RecordWriter
from stageflow_brokers.core.sessions import Consumer, Session
from stageflow_brokers.core.state import BREAKER_TIMER, BrokerState
from stageflow_brokers.types import DeliveryExtra

__all__ = ["Leases"]

MAX_DELIVERY_BYTES = 4 << 20
"""A delivery to one consumer ends with the body that reaches this many bytes, whatever its credit."""

EXPIRED = b"expired"
"""The failure of a message that waited longer than its time to live, or of a gather that passed its deadline."""


class Leases:
    """The leases and deliveries of one machine.

    `workers_known` is True once the supervisor has reported which consumers may hold messages. While
    `delivery_suspended` is True, only the supervisor receives messages.
    """

    def __init__(
        self, state: BrokerState, writer: RecordWriter, outbox: Outbox, *, workers_known: bool, max_prefetch: int
    ) -> None:
        self.state = state
        self._writer = writer
        self._outbox = outbox
        self._max_prefetch = max_prefetch
        self.workers_known = workers_known
        self.delivery_suspended = False
        self.stale_epoch_messages: list[Message] = []

    def get_held(self, session: Session, id: int, lease: int) -> Message | None:
        """The message, if this session holds it under this lease."""
        message = self.state.messages.get(id)
        if message is None or message.lease != lease:
            return None
        holder = message.holder
        if holder is None or holder.session is not session:
            return None
        return message

    def end_lease(self, message: Message) -> None:
        """Its holder has settled it and has room for another."""
        holder = message.holder
        if holder is not None:
            del holder.held[message.id]
            self.state.touched[holder.queue] = None
        message.holder, message.lease = None, 0

    def free_credit(self, session: Session, ids: Iterable[int]) -> None:
        """The peer has settled or returned these, which were not its own any more: there is room for others."""
        for consumer in session.consumers.values():
            if consumer.removed_ids and not consumer.removed_ids.isdisjoint(ids):
                consumer.removed_ids.difference_update(ids)
                self.state.touched[consumer.queue] = None

    def release(self, message: Message) -> None:
        """It was not begun, or nobody knows: to the head of its queue, uncharged. It must be in no lane."""
        self.end_lease(message)
        if message.is_stale_epoch:
            self.divert(message)
        else:
            message.queue.push_front(message)
            self.state.touched[message.queue] = None

    def redeliver(self, message: Message, seconds: float = 0.0) -> None:
        """Deliver once more, after a delay or at once at the head. It must be in no lane, and nobody's."""
        state = self.state
        state.delay(message.ensure_delivery_state(), seconds)
        if message.is_stale_epoch:
            self.divert(message)
        else:
            state.enqueue(message, front=not seconds)
            state.touched[message.queue] = None

    def record_failure(self, message: Message) -> None:
        """An attempt at it has failed, in the queue it is in: too many in a row, and that queue waits."""
        queue, now = message.queue, self.state.now
        breaker = queue.breaker
        if breaker is None or not breaker.record_failure(message.id, now):
            return
        self.state.timer(breaker.open_until, BREAKER_TIMER, "", queue.name)
        for consumer in queue.consumers:
            if len(consumer.held) > 1:
                self._outbox.add_notice(consumer.session, "recall", None)

    def wake_queue(self, name: str) -> None:
        """The time of an open breaker is over."""
        self.state.touched[self.state.queue(name)] = None

    def divert(self, message: Message) -> None:
        """A message of an epoch that is over goes to whoever raised the epoch. It must be in no lane."""
        group = message.group
        assert group is not None
        assert group.divert_to is not None
        self.move(message, *group.divert_to)

    def move(self, message: Message, name: str, label: str) -> None:
        """To another queue, under another label, with all that has happened to it. It must be in no lane."""
        message.queue = self.state.queue(name)
        message.label = label
        delivery_state = message.delivery_state
        if delivery_state is not None:
            delivery_state.due = delivery_state.due_wall = delivery_state.delay = 0.0
            delivery_state.parked, delivery_state.parked_wall, delivery_state.reason = False, 0.0, None
            delivery_state.expires = delivery_state.expires_wall = 0.0
        self._writer.copy(message)
        self.state.enqueue(message)
        self.state.touched[message.queue] = None

    # consumers

    def consume(self, session: Session, name: str, prefetch: int) -> None:
        """`session` takes messages of a queue, `prefetch` at once."""
        consumer = session.consumers.get(name)
        if consumer is None:
            queue = self.state.queue(name)
            consumer = session.consumers[name] = Consumer(session, queue, prefetch)
            queue.consumers.append(consumer)
        consumer.prefetch = min(prefetch, self._max_prefetch)
        self.state.touched[consumer.queue] = None

    def reconcile(self, session: Session, holding: list[tuple[int, int]]) -> list[int]:
        """What a peer says that it holds: what it was given and does not name never reached it. The ids that it must
        drop are returned."""
        named = set(holding)
        for consumer in session.consumers.values():
            consumer.removed_ids.clear()
            for message in reversed([m for m in consumer.held.values() if (m.id, m.lease) not in named]):
                self.release(message)
        return [id for id, lease in holding if not self._adopt(session, id, lease)]

    def _adopt(self, session: Session, id: int, lease: int) -> bool:
        """Give a worker that outlived a broker the lease it had; False when the message is not its own any more."""
        message = self.state.messages.get(id)
        if message is None:
            return False
        holder = message.holder
        if holder is not None and holder.session is session and message.lease == lease:
            return True
        consumer = session.consumers.get(message.queue.name)
        if consumer is None or not 0 < lease < self.state.epoch << 40:
            return False
        if holder is not None:
            # Two claim it from before the restart: the later lease made the earlier one void.
            if message.lease >= lease:
                return False
            self.end_lease(message)
        elif message.state() != READY:
            return False
        else:
            message = self.state.replace(message)
        message.holder, message.lease = consumer, lease
        consumer.held[id] = message
        return True

    def release_all(
        self, session: Session, *, responsible: Sequence[int] = (), blame: Callable[[Message], None] | None = None
    ) -> None:
        """The session is over: what it held goes back to the head of its queue, in order, uncharged.

        `blame` is given the messages it was running, in place of putting them back.
        """
        for consumer in session.consumers.values():
            consumer.queue.consumers.remove(consumer)
            culprits = [] if blame is None else [m for m in consumer.held.values() if m.id in responsible]
            for message in reversed(list(consumer.held.values())):
                if message not in culprits:
                    self.release(message)
            if blame is not None:
                for culprit in reversed(culprits):  # each to the head of the queue: the first one last
                    self.end_lease(culprit)
                    blame(culprit)
        session.consumers.clear()
        session.connected = False
        self.state.sessions.pop(session.peer, None)

    def stop_awaiting(self, peer: int) -> None:
        """The peer has announced what it holds, or is dead: no queue waits for it any longer."""
        for queue in self.state.queues.values():
            if peer in queue.awaited_peers:
                queue.awaited_peers.discard(peer)
                self.state.touched[queue] = None

    def divert_stale_epochs(self) -> None:
        """Messages that were in work when their epoch was raised, and that nobody claims after a restart, go to
        whoever raised it, as soon as all who might have claimed them have spoken."""
        waiting = []
        for message in self.stale_epoch_messages:
            if self.state.messages.get(message.id) is not message or message.state() != READY:
                continue
            if message.queue.awaited_peers or not self.workers_known:
                waiting.append(message)
            elif message.is_stale_epoch:
                self.divert(self.state.replace(message))
        self.stale_epoch_messages = waiting

    # deliveries

    def deliver(self) -> None:
        """Give what is ready in the queues that were touched to those who have room for it."""
        touched = self.state.touched
        if not touched:
            return
        paging, deep = self.state.paging, self.state.deep
        for queue in touched:
            if self.workers_known and queue.consumers and not queue.paused and not queue.awaited_peers:
                if queue.breaker is None:
                    self._pump(queue)
                else:
                    self._pump_guarded(queue, queue.breaker)
            if paging and queue.depth > deep:
                queue.page_out(deep)
        touched.clear()

    def _free(self, queue: Queue) -> list[Consumer]:
        free = [c for c in queue.consumers if c.credit > 0 and c.session.connected]
        if self.delivery_suspended:
            free = [c for c in free if c.session.role == "supervisor"]
        return free

    def _pump_guarded(self, queue: Queue, breaker: Breaker) -> None:
        """As `_pump`, as far as the breaker lets it."""
        free = self._free(queue)
        while free and queue.has_cancelled_next():
            self._deliver(queue, free[0], 1)
            if free[0].credit <= 0:
                free.pop(0)
        breaker.advance(self.state.now)
        if breaker.state == OPEN:
            return
        if breaker.state == CLOSED:
            while free and queue.next_lane():
                share = -(-max(1, queue.ready_count) // len(free))
                consumer = free.pop(0)
                room = min(consumer.credit, breaker.max_held - len(consumer.held))
                if room > 0:
                    self._deliver(queue, consumer, min(share, room))
            return
        probe = self.state.messages.get(breaker.probe)
        if free and (probe is None or probe.holder is None or probe.queue is not queue):
            consumer = min(free, key=lambda each: len(each.held))
            held = len(consumer.held)
            self._deliver(queue, consumer, 1)
            if len(consumer.held) > held:
                breaker.probe = next(reversed(consumer.held))

    def _pump(self, queue: Queue) -> None:
        free = self._free(queue)
        while free and queue.next_lane():
            share = -(-max(1, queue.ready_count) // len(free))
            consumer = free.pop(0)
            self._deliver(queue, consumer, min(share, consumer.credit))
        if len(queue.consumers) > 1:
            queue.consumers.append(queue.consumers.pop(0))

    def _deliver(self, queue: Queue, consumer: Consumer, count: int) -> None:
        session = consumer.session
        held = consumer.held
        now = self.state.now
        lease = self.state.next_lease
        items: list[tuple[Any, ...]] = []
        bodies = session.bodies
        room = MAX_DELIVERY_BYTES
        while count > 0 and room > 0 and (lane := queue.next_lane()):
            message = lane.popleft()
            if message.holder is not None:
                queue.taken_entries -= 1
                continue
            message.lease = lease
            message.holder = consumer
            held[message.id] = message
            body = message.body
            if body is None:
                body = message.body = self._writer.body(message)
            bodies.append(body)
            room -= message.size
            group = message.group
            delivery_state = message.delivery_state
            items.append(
                (
                    message.id,
                    lease,
                    message.size,
                    "" if group is None else group.id,
                    message.epoch,
                    None
                    if delivery_state is None and not message.priority and (group is None or group.cancelled is None)
                    else _as_delivered(message, now),
                )
            )
            lease += 1
            count -= 1
        self.state.next_lease = lease
        if items:
            queue.delivered += len(items)
            session.deliveries.append((queue.name, items))
            self._outbox.dirty[session] = None


def _as_delivered(message: Message, now: float) -> DeliveryExtra:
    delivery_state = message.delivery_state or DeliveryState()
    failure, fresh = delivery_state.failure, delivery_state.fresh
    if delivery_state.expires and delivery_state.expires <= now and not fresh:
        failure, fresh = EXPIRED, True
    group = message.group
    cancelled = None if group is None or message.epoch >= group.epoch else group.cancelled
    return DeliveryExtra(
        delivery_state.attempts,
        delivery_state.deaths,
        failure,
        fresh,
        delivery_state.steps,
        delivery_state.parts,
        message.label,
        message.priority,
        cancelled,
        0 if group is None else group.epoch,
    )
