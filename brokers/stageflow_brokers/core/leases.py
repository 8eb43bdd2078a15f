"""Leases: credit, delivery, release, and adoption after a restart.

A lease is the epoch of the broker and a sequence number; only the current lease of a message is valid. Deliveries
happen after the commit and must not be recorded: after a restart each peer reports the messages that it holds, and all
others are ready again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from stageflow_brokers.core.breaker import CLOSED, OPEN, Breaker
from stageflow_brokers.core.message import READY, DeliveryState, Message
from stageflow_brokers.core.outbox import Outbox
from stageflow_brokers.core.queue import RELEASED, Queue
from stageflow_brokers.core.recalls import Recalls
from stageflow_brokers.core.record_writer import RecordWriter
from stageflow_brokers.core.sessions import NO_PRIORITY, Consumer, Session
from stageflow_brokers.core.state import BREAKER_TIMER, BrokerState
from stageflow_brokers.types import DeliveryExtra

__all__ = ["Leases"]

MAX_DELIVERY_BYTES = 4 << 20
"""Bytes of one delivery, which ends with the body that reaches them, and about those that wait with a consumer."""

MAX_HELD = 1 << 62
"""No limit of the messages that a consumer holds, beside its credit."""

EXPIRED = b"expired"
"""Failure of a message that waited longer than its time to live, and of a gather that passed its deadline."""


class Leases:
    """The leases and deliveries of one machine.

    Attributes:
        recalls: Asks consumers to release what they have not begun.
        workers_known: True once the supervisor has reported which consumers may hold messages.
        delivery_suspended: True while only the supervisor receives messages.
        stale_epoch_messages: Messages of earlier epochs that a worker may still hold from before the broker's restart.
    """

    def __init__(
        self, state: BrokerState, writer: RecordWriter, outbox: Outbox, *, workers_known: bool, max_prefetch: int
    ) -> None:
        self.state = state
        self._writer = writer
        self._outbox = outbox
        self.recalls = Recalls(state, outbox)
        self._max_prefetch = max_prefetch
        self.workers_known = workers_known
        self.delivery_suspended = False
        self.stale_epoch_messages: list[Message] = []

    def get_held(self, session: Session, id: int, lease: int) -> Message | None:
        """Return the message if this session holds it under this lease, otherwise None."""
        message = self.state.messages.get(id)
        if message is None or message.lease != lease:
            return None
        holder = message.holder
        if holder is None or holder.session is not session:
            return None
        return message

    def end_lease(self, message: Message) -> None:
        """End the lease of a message, and give its credit back to the holder."""
        holder = message.holder
        if holder is not None:
            del holder.held[message.id]
            self.state.changed_queues[holder.queue] = None
        message.holder, message.lease = None, 0

    def free_credit(self, session: Session, ids: Iterable[int]) -> None:
        """Free the credit of deleted messages that the peer has settled or released."""
        for consumer in session.consumers.values():
            if consumer.removed_ids and not consumer.removed_ids.isdisjoint(ids):
                consumer.removed_ids.difference_update(ids)
                self.state.changed_queues[consumer.queue] = None

    def release(self, messages: list[Message]) -> None:
        """End the leases and put the messages at the head of their queues, in order. No attempt is counted.

        They must not be in a lane.
        """
        returned: dict[Queue, list[Message]] = {}
        for message in messages:
            self.end_lease(message)
            if message.is_stale_epoch:
                self.divert(message)
            else:
                message.lease = RELEASED
                returned.setdefault(message.queue, []).append(message)
        for queue, each in returned.items():
            queue.put_back(each)
            self.state.changed_queues[queue] = None

    def redeliver(self, message: Message, seconds: float = 0.0) -> None:
        """Make a message ready again after a delay, or at once at the head of its queue.

        The message must not be in a lane and must have no holder.
        """
        state = self.state
        state.delay(message.ensure_delivery_state(), seconds)
        if message.is_stale_epoch:
            self.divert(message)
        else:
            state.enqueue(message, front=not seconds)
            state.changed_queues[message.queue] = None

    def record_failure(self, message: Message) -> None:
        """Record a failed attempt in the breaker of the queue.

        If this opens the breaker, consumers are asked to release the messages that they have not begun.
        """
        queue, now = message.queue, self.state.now
        breaker = queue.breaker
        if breaker is None or not breaker.record_failure(message.id, now):
            return
        self.state.set_timer(breaker.open_until, BREAKER_TIMER, "", queue.name)
        self.recalls.recall_all(queue)

    def wake_queue(self, name: str) -> None:
        """Look at a queue again, because the time of its open breaker is over."""
        self.state.changed_queues[self.state.queue(name)] = None

    def divert(self, message: Message) -> None:
        """Move a message of an earlier epoch to the queue that the group diverts to.

        It must not be in a lane.
        """
        group = message.group
        assert group is not None
        assert group.divert_to is not None
        self.move(message, *group.divert_to)

    def move(self, message: Message, name: str, label: str) -> None:
        """Move a message to another queue under another label.

        It keeps its attempts, failure and steps. Delay, dead letter and expiry end. The message must not be in a lane.
        """
        message.queue = self.state.queue(name)
        message.label = label
        message.lease = 0
        delivery_state = message.delivery_state
        if delivery_state is not None:
            delivery_state.due = delivery_state.due_wall = delivery_state.delay = 0.0
            delivery_state.parked, delivery_state.parked_wall, delivery_state.reason = False, 0.0, None
            delivery_state.expires = delivery_state.expires_wall = 0.0
        self._writer.record_message(message)
        self.state.enqueue(message)
        self.state.changed_queues[message.queue] = None

    # consumers

    def consume(self, session: Session, name: str, prefetch: int) -> None:
        """Let `session` consume a queue: it works on at most `prefetch` messages at once."""
        consumer = session.consumers.get(name)
        if consumer is None:
            queue = self.state.queue(name)
            consumer = session.consumers[name] = Consumer(session, queue, prefetch)
            queue.consumers.append(consumer)
        consumer.concurrency = prefetch or 1
        consumer.recalled_lease = 0
        self.set_prefetch(consumer, prefetch)

    def set_prefetch(self, consumer: Consumer, prefetch: int) -> None:
        """Set the number of messages that a consumer holds at most, in work or waiting."""
        consumer.prefetch = min(prefetch, self._max_prefetch)
        self.state.changed_queues[consumer.queue] = None

    def reconcile(self, session: Session, holding: list[tuple[int, int]]) -> list[int]:
        """Compare the leases of a peer with those that it reports after its hello.

        A delivered message that it does not name never reached it, and is released. Return the ids of reported messages
        that are not leased to it; it must drop them.
        """
        named = set(holding)
        for consumer in session.consumers.values():
            consumer.removed_ids.clear()
            self.release([m for m in consumer.held.values() if (m.id, m.lease) not in named])
        return [id for id, lease in holding if not self._restore_lease(session, id, lease)]

    def _restore_lease(self, session: Session, id: int, lease: int) -> bool:
        """Restore a lease from before the broker's restart.

        Return False if it is not valid any more.
        """
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
            # Two peers report a lease from before the restart: only the later lease is valid.
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
        self, session: Session, *, responsible: Sequence[int] = (), charge: Callable[[Message], None] | None = None
    ) -> None:
        """End a session: put its messages at the head of their queues, in order. No attempt is counted.

        If `charge` is given, it is called with each of the `responsible` messages, which it must redeliver or park.
        """
        for consumer in session.consumers.values():
            consumer.queue.consumers.remove(consumer)
            charged = [] if charge is None else [m for m in consumer.held.values() if m.id in responsible]
            self.release([message for message in consumer.held.values() if message not in charged])
            if charge is not None:
                for message in reversed(charged):  # each goes to the head of the queue, so the first one comes last
                    self.end_lease(message)
                    charge(message)
        session.consumers.clear()
        session.connected = False
        self.state.sessions.pop(session.peer, None)

    def stop_awaiting(self, peer: int) -> None:
        """Stop waiting for a peer, because it has reported its leases or is dead."""
        for queue in self.state.queues.values():
            if peer in queue.awaited_peers:
                queue.awaited_peers.discard(peer)
                self.state.changed_queues[queue] = None

    def divert_stale_epochs(self) -> None:
        """Divert messages of earlier epochs that no worker reports after a restart.

        They were in work when their epoch was raised. Each waits until all peers that might hold it have reported
        their leases.
        """
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
        """Deliver ready messages of the changed queues to consumers that have credit."""
        changed_queues = self.state.changed_queues
        if not changed_queues:
            return
        paging, max_resident_bodies = self.state.paging, self.state.max_resident_bodies
        for queue in changed_queues:
            if self.workers_known and queue.consumers and not queue.paused and not queue.awaited_peers:
                if queue.breaker is None:
                    self._deliver_queue(queue)
                else:
                    self._deliver_guarded(queue, queue.breaker)
            if paging and queue.depth > max_resident_bodies:
                queue.page_out(max_resident_bodies)
        changed_queues.clear()

    def _free_consumers(self, queue: Queue) -> list[Consumer]:
        free = [c for c in queue.consumers if c.credit > 0 and c.session.connected]
        if self.delivery_suspended:
            free = [c for c in free if c.session.role == "supervisor"]
        return free

    def _deliver_guarded(self, queue: Queue, breaker: Breaker) -> None:
        """Deliver like `_deliver_queue`, within the limits of the breaker."""
        free = self._free_consumers(queue)
        while free and queue.has_cancelled_next():
            self._deliver_to(queue, free[0], 1)
            if free[0].credit <= 0:
                free.pop(0)
        breaker.advance(self.state.now)
        if breaker.state == OPEN:
            return
        if breaker.state == CLOSED:
            self._deliver_shares(queue, free, breaker.max_held)
            return
        probe = self.state.messages.get(breaker.probe)
        if free and (probe is None or probe.holder is None or probe.queue is not queue):
            consumer = min(free, key=lambda each: len(each.held))
            held = len(consumer.held)
            self._deliver_to(queue, consumer, 1)
            if len(consumer.held) > held:
                breaker.probe = next(reversed(consumer.held))

    def _deliver_queue(self, queue: Queue) -> None:
        self._deliver_shares(queue, self._free_consumers(queue))
        if len(queue.consumers) > 1:
            queue.consumers.append(queue.consumers.pop(0))

    def _deliver_shares(self, queue: Queue, free: list[Consumer], max_held: int = MAX_HELD) -> None:
        """Deliver equal shares of the ready messages to consumers with credit, of at most `max_held` for each."""
        recalls = self.recalls
        while lane := queue.next_lane():
            if queue.has_priorities:
                free = recalls.select_for_priority(queue, free, lane[0].priority)
            if not free:
                return
            share = -(-max(1, queue.ready_count) // len(free))
            consumer = free.pop(0)
            credit = recalls.limit_mixed(queue, consumer) if queue.has_priorities else consumer.credit
            credit = min(share, credit, max_held - len(consumer.held))
            if credit > 0:
                self._deliver_to(queue, consumer, credit)
        if free and len(queue.consumers) > 1 and any(consumer.is_idle for consumer in free):
            recalls.watch_share(queue)

    def _deliver_to(self, queue: Queue, consumer: Consumer, count: int) -> None:
        session = consumer.session
        held = consumer.held
        now = self.state.now
        lease = self.state.next_lease
        items: list[tuple[Any, ...]] = []
        bodies = session.bodies
        bytes_left = MAX_DELIVERY_BYTES
        if (waiting := len(held) - consumer.concurrency) >= 0 and (lane := queue.next_lane()):
            bytes_left -= lane[0].size * waiting
        priority = NO_PRIORITY
        while count > 0 and bytes_left > 0 and (lane := queue.next_lane()):
            message = lane.popleft()
            if message.holder is not None:
                queue.taken_entries -= 1
                continue
            message.lease = lease
            message.holder = consumer
            held[message.id] = message
            priority = message.priority
            body = message.body
            if body is None:
                body = message.body = self._writer.body(message)
            bodies.append(body)
            bytes_left -= message.size
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
                    else _delivery_extra(message, now),
                )
            )
            lease += 1
            count -= 1
        self.state.next_lease = lease
        if items:
            queue.delivered_count += len(items)
            # The last one has the lowest priority of this delivery.
            others = len(held) > len(items)
            consumer.lowest_priority = min(priority, consumer.lowest_priority) if others else priority
            session.deliveries.append((queue.name, items))
            self._outbox.dirty[session] = None


def _delivery_extra(message: Message, now: float) -> DeliveryExtra:
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
