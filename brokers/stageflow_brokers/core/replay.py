"""Rebuild the state of a broker from the records of its journal.

Each record sets state; a replay must not decide anything, because the records on which a decision was based may have
been deleted with their segment. A record about an unknown message is no error for the same reason: either that message
has ended, or a later COPY record holds all of it.
"""

from __future__ import annotations

from collections.abc import Callable

from stageflow_brokers.core import records, wire
from stageflow_brokers.core.message import DeliveryState, Group, Message, RecordLocation
from stageflow_brokers.core.queue import Queue
from stageflow_brokers.core.records import MessageState
from stageflow_brokers.core.state import BrokerState
from stageflow_brokers.core.wire import Buffer
from stageflow_brokers.errors import ProtocolError
from stageflow_brokers.types import (
    ACK,
    FLAG_CLOSE_GROUP,
    PUSH_ONLY,
    RETRY,
    TERMINAL,
    Arrival,
    GatherOpen,
    PublishItem,
    SettleItem,
    Target,
)

__all__ = ["Replay"]

OnSettled = Callable[[Message | None, str, str], None]
"""Called as (message, group, label) for each accepted settlement. The message is None if its record was deleted."""


class Replay:
    """Applies records to a state.

    Args:
        state: The state to fill, empty at first.
        on_settled: Called for each accepted settlement. Default: None.

    Attributes:
        oldest: Number of the segment from which on all segments must exist; 0 if no record states it.
    """

    def __init__(self, state: BrokerState, *, on_settled: OnSettled | None = None) -> None:
        self.state = state
        self.oldest = 0
        state.replaying = True
        self._on_settled = on_settled
        self._handlers: dict[int, Callable[[int, Buffer, Buffer, RecordLocation], None]] = {
            records.PUBLISH_FRAME: self._publish,
            records.SETTLE_FRAME: self._settle,
            records.CHECKPOINT_FRAME: self._checkpoint,
            records.COPY: self._copy,
            records.MARK: self._mark,
            records.FORGET: self._forget,
            records.GROUP: self._group,
            records.GROUPS_CLOSED: self._groups_closed,
            records.GATHER: self._gather,
            records.QUEUE: self._queue,
            records.FACT: self._fact,
            records.SESSIONS: self._sessions,
            records.STARTED: self._started,
            records.OLDEST: self._oldest,
        }

    def apply(
        self, kind: int, first_id: int, peer: int, header: Buffer, blob: Buffer, location: RecordLocation
    ) -> None:
        """Apply the next record of the journal.

        Raise `ProtocolError` or an error of msgspec if it is invalid.
        """
        state = self.state
        if state.next_id < first_id:
            if first_id >= wire.MAX_NUMBER:
                raise ProtocolError(f"message id {first_id} is out of range")
            state.next_id = first_id
        state.wall = location.wall
        handler = self._handlers.get(kind)
        if handler is None:
            raise ProtocolError(f"record kind {kind} is unknown to this release: open the journal with a newer one")
        handler(peer, header, blob, location)

    def finish(self, now: float, wall: float) -> None:
        """Rebuild lanes, delays and timers, and begin a new broker epoch.

        A wait is never longer than the delay, time to live or deadline that was requested, even if the clock was set
        back. Each queue is in the order of message ids. This differs from the order before the restart only for
        messages that were appended to their queue again.
        """
        state = self.state
        state.replaying = False
        state.now, state.wall = now, wall
        for queue in state.queues.values():
            queue.clear_messages()
        for message in sorted(state.messages.values(), key=lambda message: message.id):
            delivery_state = message.delivery_state
            if delivery_state is None:
                message.queue.push(message)
                continue
            if delivery_state.parked:
                message.queue.dead_letters[message.id] = message
                continue
            if delivery_state.due_wall > wall:
                delivery_state.due = now + min(delivery_state.due_wall - wall, delivery_state.delay)
            else:
                delivery_state.due = delivery_state.due_wall = 0.0
            if delivery_state.expires_wall:
                max_wait = delivery_state.expires_wall - message.location.wall
                delivery_state.expires = now + min(max(delivery_state.expires_wall - wall, 0.0), max_wait)
            state.enqueue(message)
        for (_, key), group in state.gathers.items():
            gather = state.gather(group, key, group.location)
            if gather.due_wall:
                gather.due = now + min(max(gather.due_wall - wall, 0.0), gather.wait)
                state.set_timer(gather.due, 0, group.id, key)
        for id in [group.id for group in state.groups.values() if group.is_idle]:
            state.close_group(id)
        state.closed_groups.clear()
        state.closed_sequence = state.closed_floor = 0
        state.epoch += 1
        state.next_lease = (state.epoch << 40) + 1
        for group in state.groups.values():
            if group.cancelled is not None:
                group.cancel_lease = state.next_lease

    # records of frames

    def _publish(self, peer: int, header: Buffer, blob: Buffer, location: RecordLocation) -> None:
        frame = wire.decode_publish(header, blob)
        self.state.remember_peer(peer, frame.frame)
        offset = 0
        for item in frame.items:
            self._item(item, frame.targets, blob, offset, location)
            offset += item.size
        if frame.opens or frame.arrivals:
            self._apply_gathers(frame.opens, frame.arrivals, frame.targets, blob, offset, location)

    def _item(
        self, item: PublishItem, targets: list[Target], blob: Buffer, offset: int, location: RecordLocation
    ) -> None:
        state = self.state
        target = targets[item.target]
        pushed = target.flags & PUSH_ONLY
        queue = None if pushed else state.queue(target.queue)
        body = None if state.paging else bytes(blob[offset : offset + item.size])
        group, _ = state.admit(item, queue, target.label, body, location, offset)
        if target.flags & TERMINAL and not pushed and group is not None:
            group.end_label = target.label

    def _settle(self, peer: int, header: Buffer, blob: Buffer, location: RecordLocation) -> None:
        frame = wire.decode_settle(header, blob)
        state = self.state
        state.remember_peer(peer, frame.frame)
        messages = state.messages
        offset = 0
        resolved: list[tuple[Queue | None, str, int]] = [
            (None if t.flags & PUSH_ONLY else state.queue(t.queue), t.label, t.flags) for t in frame.targets
        ]
        paging = state.paging
        on_settled = self._on_settled
        for id, _, target, size, group_id in frame.moves:
            message = messages.get(id)
            if on_settled is not None:
                self._report_settled(message, group_id)
            queue, label, flags = resolved[target]
            assert queue is not None
            epoch = wire.FIRST_EPOCH if group_id else 0
            if message is not None:
                epoch = message.epoch
                state.forget(message)
            group = state.group(group_id, epoch, location)
            if flags and group is not None:
                group.end_label = label
            body = None if paging else bytes(blob[offset : offset + size])
            state.put(queue, group, epoch, label, 0, body, size, location, offset)
            offset += size
        for id, _, flags, group_id in frame.acks:
            message = messages.get(id)
            self._report_settled(message, group_id)
            if message is not None:
                state.forget(message)
            if flags & FLAG_CLOSE_GROUP and group_id:
                state.close_group(group_id)
        for other in frame.others:
            offset = self._other(other, frame.targets, blob, offset, location)

    def _other(
        self, item: SettleItem, targets: list[Target], blob: Buffer, offset: int, location: RecordLocation
    ) -> int:
        state = self.state
        priority = None
        for id, _ in item.leases:
            message = state.messages.get(id)
            if priority is None and message is not None:
                priority = message.priority
            if item.outcome == ACK:
                self._report_settled(message, "")
                if message is not None:
                    state.forget(message)
            elif message is not None:
                state.fail(message, item.failure)
                if item.outcome == RETRY:
                    state.delay(message.ensure_delivery_state(), item.delay)
                else:
                    state.park(message, reason=item.failure, evidence=False)
        for publish in item.publishes:
            self._item(publish, targets, blob, offset, location)
            offset += publish.size
        if item.opens or item.arrivals:
            offset = self._apply_gathers(item.opens, item.arrivals, targets, blob, offset, location, priority or 0)
        if item.close_group:
            state.close_group(item.close_group)
        return offset

    def _report_settled(self, message: Message | None, group_id: str) -> None:
        if self._on_settled is not None:
            self._on_settled(message, group_id, "" if message is None else message.label)

    def _checkpoint(self, peer: int, header: Buffer, blob: Buffer, location: RecordLocation) -> None:
        frame = wire.decode_checkpoint(header)
        self.state.remember_peer(peer, frame.frame)
        message = self.state.messages.get(frame.id)
        if message is not None:
            self.state.add_step(message, frame.name, bytes(blob))

    def _apply_gathers(
        self,
        opens: list[GatherOpen],
        arrivals: list[Arrival],
        targets: list[Target],
        blob: Buffer,
        offset: int,
        location: RecordLocation,
        priority: int = 0,
    ) -> int:
        state = self.state
        for opening in opens:
            group = state.group(opening.group, opening.epoch, location)
            base = bytes(blob[offset : offset + opening.size])
            offset += opening.size
            if group is not None:
                target = targets[opening.target]
                state.open_gather(group, opening, target.queue, target.label, base, location, priority)
        for arrival in arrivals:
            group = state.group(arrival.group, arrival.epoch, location)
            if group is not None:
                state.add_arrival(
                    group, arrival.key, arrival.slot, bytes(blob[offset : offset + arrival.size]), location
                )
            offset += arrival.size
        return offset

    # records of state

    def _copy(self, peer: int, header: Buffer, blob: Buffer, location: RecordLocation) -> None:
        record = records.decode_message(header)
        state = self.state
        earlier = state.messages.get(record.id)
        if earlier is not None:
            state.forget(earlier)
        location.wall = record.wall
        # Evidence is not linked to its group: the group may be closed, and another one may have the same id.
        group = None if record.evidence else state.group(record.group, record.epoch, location)
        next_id, state.next_id = state.next_id, record.id
        queue = state.queue(record.queue)
        body = None if state.paging else bytes(blob)
        message = state.put(queue, group, record.epoch, record.label, record.priority, body, len(blob), location, 0)
        if record.evidence and record.group:
            message.group = Group(record.group, record.epoch, location)
        state.next_id = max(next_id, record.id + 1)
        self._restore(message, record)

    def _mark(self, peer: int, header: Buffer, blob: Buffer, location: RecordLocation) -> None:
        record = records.decode_message(header)
        message = self.state.messages.get(record.id)
        if message is None:
            return
        self._restore(message, record)
        message.queue = self.state.queue(record.queue)
        message.label, message.epoch = record.label, record.epoch
        if record.evidence and message.group is not None:
            message.group.unlink(message)

    def _restore(self, message: Message, record: MessageState) -> None:
        plain = MessageState(
            record.id, record.queue, record.group, record.epoch, record.label, record.priority, record.wall
        )
        self.state.set_steps(message, record.steps)
        if record == plain:
            message.delivery_state = None
            return
        earlier, delivery_state = message.ensure_delivery_state(), DeliveryState()
        delivery_state.steps, delivery_state.step_bytes = earlier.steps, earlier.step_bytes
        delivery_state.attempts, delivery_state.deaths = record.attempts, record.deaths
        delivery_state.failure, delivery_state.fresh = record.failure, record.fresh
        delivery_state.parts = record.parts
        delivery_state.due_wall, delivery_state.delay = record.due_wall, record.delay
        delivery_state.expires_wall = record.expires_wall
        delivery_state.parked, delivery_state.parked_wall = record.parked, record.parked_wall
        delivery_state.evidence, delivery_state.reason = record.evidence, record.reason
        delivery_state.last_death_peer = record.last_death_peer
        message.delivery_state = delivery_state

    def _forget(self, peer: int, header: Buffer, blob: Buffer, location: RecordLocation) -> None:
        frame, ids = records.decode_forget(header)
        if peer:
            self.state.remember_peer(peer, frame)
        for id in ids:
            message = self.state.messages.get(id)
            if peer:  # without a peer the message was purged or replaced by a restart, which is no settlement
                self._report_settled(message, "")
            if message is not None:
                self.state.forget(message)

    def _group(self, peer: int, header: Buffer, blob: Buffer, location: RecordLocation) -> None:
        record = records.decode_group(header)
        state = self.state
        group = state.group(record.id, record.epoch, location)
        if group is not None:
            group.epoch, group.digest, group.started = record.epoch, record.digest, record.started
            group.end_label, group.divert_to, group.cancelled = record.ended, record.divert, record.cancelled
            group.released_prefixes = record.released
            state.relocate_group(group, location)

    def _groups_closed(self, peer: int, header: Buffer, blob: Buffer, location: RecordLocation) -> None:
        for id in records.decode_closed_groups(header):
            self.state.close_group(id)

    def _gather(self, peer: int, header: Buffer, blob: Buffer, location: RecordLocation) -> None:
        record = records.decode_gather(header)
        state = self.state
        group = state.group(record.group, record.epoch, location)
        if group is None:
            return
        gather = state.gather(group, record.key, location)
        state.live_bytes -= gather.weight
        gather.need, gather.queue, gather.label = record.need, record.queue, record.label
        gather.epoch = record.epoch
        gather.restore(record.base, record.arrivals, record.seen)
        gather.due, gather.due_wall, gather.wait, gather.priority = 0.0, record.due_wall, record.wait, record.priority
        state.live_bytes += gather.weight
        state.relocate_gather(group, gather, location)

    def _queue(self, peer: int, header: Buffer, blob: Buffer, location: RecordLocation) -> None:
        record = records.decode_queue(header)
        self.state.declare(record.options).paused = record.paused

    def _fact(self, peer: int, header: Buffer, blob: Buffer, location: RecordLocation) -> None:
        name, value = records.decode_fact(header)
        self.state.set_fact(name, value)

    def _sessions(self, peer: int, header: Buffer, blob: Buffer, location: RecordLocation) -> None:
        for each, frame in records.decode_sessions(header):
            self.state.remember_peer(each, frame)

    def _oldest(self, peer: int, header: Buffer, blob: Buffer, location: RecordLocation) -> None:
        self.oldest = max(self.oldest, records.decode_oldest(header))

    def _started(self, peer: int, header: Buffer, blob: Buffer, location: RecordLocation) -> None:
        self.state.epoch = max(self.state.epoch, records.decode_epoch(header))
