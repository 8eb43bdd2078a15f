"""From records back to state: a fold over the journal.

Replay draws no conclusions. A record about a message that is not known speaks of one whose own record went with a
segment: it had ended by then, or a COPY further on states it whole.
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
    AGAIN,
    DONE,
    LEAVE,
    PUSH_ONLY,
    TERMINAL,
    Arrival,
    GatherOpen,
    PublishItem,
    SettleItem,
    Target,
)

__all__ = ["Replay"]

OnSettled = Callable[[Message | None, str, str], None]
"""(message, group, label) of each settlement that was accepted; the message is None if its own record is gone."""


class Replay:
    """Feeds records into a store. `finish` makes it ready for a new broker epoch.

    `oldest`: the segments from this one on must be there; 0 where nothing is said of it.
    """

    def __init__(self, store: BrokerState, *, on_settled: OnSettled | None = None) -> None:
        self.store = store
        self.oldest = 0
        store.replaying = True
        self._on_settled = on_settled
        self._kinds: dict[int, Callable[[int, Buffer, Buffer, RecordLocation], None]] = {
            records.KEPT_PUBLISH: self._publish,
            records.KEPT_SETTLE: self._settle,
            records.KEPT_CHECKPOINT: self._checkpoint,
            records.COPY: self._copy,
            records.MARK: self._mark,
            records.FORGET: self._forget,
            records.GROUP: self._group,
            records.LEFT: self._left,
            records.GATHER: self._gather,
            records.QUEUE: self._queue,
            records.FACT: self._fact,
            records.SESSIONS: self._sessions,
            records.STARTED: self._started,
            records.OLDEST: self._oldest,
        }

    def apply(self, kind: int, first_id: int, peer: int, header: Buffer, blob: Buffer, place: RecordLocation) -> None:
        """One record, in the order of the journal. Raises `ProtocolError` and msgspec's errors for one that makes no
        sense."""
        store = self.store
        if store.next_id < first_id:
            if first_id >= wire.MAX_NUMBER:
                raise ProtocolError(f"messages are numbered from {first_id} on")
            store.next_id = first_id
        store.wall = place.wall
        method = self._kinds.get(kind)
        if method is None:
            raise ProtocolError(f"a record of kind {kind}, of which this release knows nothing")
        method(peer, header, blob, place)

    def finish(self, now: float, wall: float) -> None:
        """All has been read: lanes, delays and timers are made anew, clocks clamped to what was asked for.

        A queue is in the order in which its messages were made. That differs from the order of before only for those
        that had been put back at its end.
        """
        store = self.store
        store.replaying = False
        store.now, store.wall = now, wall
        for queue in store.queues.values():
            queue.empty()
        for message in sorted(store.messages.values(), key=lambda message: message.id):
            extra = message.extra
            if extra is None:
                message.queue.push(message)
                continue
            if extra.parked:
                message.queue.dead[message.id] = message
                continue
            if extra.due_wall > wall:
                extra.due = now + min(extra.due_wall - wall, extra.delay)
            else:
                extra.due = extra.due_wall = 0.0
            if extra.expires_wall:
                most = extra.expires_wall - message.place.wall
                extra.expires = now + min(max(extra.expires_wall - wall, 0.0), most)
            store.enqueue(message)
        for (_, key), group in store.gathers.items():
            gather = store.gather(group, key, group.place)
            if gather.due_wall:
                gather.due = now + min(max(gather.due_wall - wall, 0.0), gather.wait)
                store.timer(gather.due, 0, group.id, key)
        for id in [group.id for group in store.groups.values() if group.idle]:
            store.leave(id)
        store.left.clear()
        store.left_seq = store.left_floor = 0
        store.epoch += 1
        store.next_lease = (store.epoch << 40) + 1
        for group in store.groups.values():
            if group.cancelled is not None:
                group.warned = store.next_lease

    # frames

    def _publish(self, peer: int, header: Buffer, blob: Buffer, place: RecordLocation) -> None:
        frame = wire.decode_publish(header, blob)
        self.store.remember_peer(peer, frame.frame)
        at = 0
        for item in frame.items:
            self._item(item, frame.targets, blob, at, place)
            at += item.size
        if frame.opens or frame.arrivals:
            self._gathering(frame.opens, frame.arrivals, frame.targets, blob, at, place)

    def _item(self, item: PublishItem, targets: list[Target], blob: Buffer, at: int, place: RecordLocation) -> None:
        store = self.store
        target = targets[item.target]
        pushed = target.flags & PUSH_ONLY
        queue = None if pushed else store.queue(target.queue)
        body = None if store.paging else bytes(blob[at : at + item.size])
        group, _ = store.admit(item, queue, target.label, body, place, at)
        if target.flags & TERMINAL and not pushed and group is not None:
            group.ended = target.label

    def _settle(self, peer: int, header: Buffer, blob: Buffer, place: RecordLocation) -> None:
        frame = wire.decode_settle(header, blob)
        store = self.store
        store.remember_peer(peer, frame.frame)
        messages = store.messages
        at = 0
        resolved: list[tuple[Queue | None, str, int]] = [
            (None if t.flags & PUSH_ONLY else store.queue(t.queue), t.label, t.flags) for t in frame.targets
        ]
        paging = store.paging
        on_settled = self._on_settled
        for id, _, target, size, group_id in frame.moves:
            message = messages.get(id)
            if on_settled is not None:
                self._settled(message, group_id)
            queue, label, flags = resolved[target]
            assert queue is not None
            epoch = wire.FIRST_EPOCH if group_id else 0
            if message is not None:
                epoch = message.epoch
                store.forget(message)
            group = store.group(group_id, epoch, place)
            if flags and group is not None:
                group.ended = label
            body = None if paging else bytes(blob[at : at + size])
            store.put(queue, group, epoch, label, 0, body, size, place, at)
            at += size
        for id, _, flags, group_id in frame.acks:
            message = messages.get(id)
            self._settled(message, group_id)
            if message is not None:
                store.forget(message)
            if flags & LEAVE and group_id:
                store.leave(group_id)
        for other in frame.others:
            at = self._other(other, frame.targets, blob, at, place)

    def _other(self, item: SettleItem, targets: list[Target], blob: Buffer, at: int, place: RecordLocation) -> int:
        store = self.store
        priority = None
        for id, _ in item.leases:
            message = store.messages.get(id)
            if priority is None and message is not None:
                priority = message.priority
            if item.outcome == DONE:
                self._settled(message, "")
                if message is not None:
                    store.forget(message)
            elif message is not None:
                store.fail(message, item.failure)
                if item.outcome == AGAIN:
                    store.delay(message.details(), item.delay)
                else:
                    store.park(message, reason=item.failure, evidence=False)
        for publish in item.publishes:
            self._item(publish, targets, blob, at, place)
            at += publish.size
        if item.opens or item.arrivals:
            at = self._gathering(item.opens, item.arrivals, targets, blob, at, place, priority or 0)
        if item.leave:
            store.leave(item.leave)
        return at

    def _settled(self, message: Message | None, group_id: str) -> None:
        if self._on_settled is not None:
            self._on_settled(message, group_id, "" if message is None else message.label)

    def _checkpoint(self, peer: int, header: Buffer, blob: Buffer, place: RecordLocation) -> None:
        frame = wire.decode_checkpoint(header)
        self.store.remember_peer(peer, frame.frame)
        message = self.store.messages.get(frame.id)
        if message is not None:
            self.store.keep_step(message, frame.name, bytes(blob))

    def _gathering(
        self,
        opens: list[GatherOpen],
        arrivals: list[Arrival],
        targets: list[Target],
        blob: Buffer,
        at: int,
        place: RecordLocation,
        priority: int = 0,
    ) -> int:
        store = self.store
        for opening in opens:
            group = store.group(opening.group, opening.epoch, place)
            base = bytes(blob[at : at + opening.size])
            at += opening.size
            if group is not None:
                target = targets[opening.target]
                store.open(group, opening, target.queue, target.label, base, place, priority)
        for arrival in arrivals:
            group = store.group(arrival.group, arrival.epoch, place)
            if group is not None:
                store.arrive(group, arrival.key, arrival.slot, bytes(blob[at : at + arrival.size]), place)
            at += arrival.size
        return at

    # facts

    def _copy(self, peer: int, header: Buffer, blob: Buffer, place: RecordLocation) -> None:
        state = records.decode_message(header)
        store = self.store
        known = store.messages.get(state.id)
        if known is not None:
            store.forget(known)
        place.wall = state.wall
        # Evidence belongs to its group in name only: the group may have left, and one of the same name have begun.
        group = None if state.evidence else store.group(state.group, state.epoch, place)
        kept, store.next_id = store.next_id, state.id
        queue = store.queue(state.queue)
        body = None if store.paging else bytes(blob)
        message = store.put(queue, group, state.epoch, state.label, state.priority, body, len(blob), place, 0)
        if state.evidence and state.group:
            message.group = Group(state.group, state.epoch, place)
        store.next_id = max(kept, state.id + 1)
        self._restore(message, state)

    def _mark(self, peer: int, header: Buffer, blob: Buffer, place: RecordLocation) -> None:
        state = records.decode_message(header)
        message = self.store.messages.get(state.id)
        if message is None:
            return
        self._restore(message, state)
        message.queue = self.store.queue(state.queue)
        message.label, message.epoch = state.label, state.epoch
        if state.evidence and message.group is not None:
            message.group.unlink(message)

    def _restore(self, message: Message, state: MessageState) -> None:
        plain = MessageState(state.id, state.queue, state.group, state.epoch, state.label, state.priority, state.wall)
        self.store.keep_steps(message, state.steps)
        if state == plain:
            message.extra = None
            return
        known, extra = message.details(), DeliveryState()
        extra.steps, extra.step_bytes = known.steps, known.step_bytes
        extra.attempts, extra.deaths = state.attempts, state.deaths
        extra.failure, extra.fresh = state.failure, state.fresh
        extra.parts = state.parts
        extra.due_wall, extra.delay = state.due_wall, state.delay
        extra.expires_wall = state.expires_wall
        extra.parked, extra.parked_wall = state.parked, state.parked_wall
        extra.evidence, extra.reason = state.evidence, state.reason
        extra.killed = state.killed
        message.extra = extra

    def _forget(self, peer: int, header: Buffer, blob: Buffer, place: RecordLocation) -> None:
        frame, ids = records.decode_forgotten(header)
        if peer:
            self.store.remember_peer(peer, frame)
        for id in ids:
            message = self.store.messages.get(id)
            if peer:  # nobody in particular: somebody purged it, which is no settlement
                self._settled(message, "")
            if message is not None:
                self.store.forget(message)

    def _group(self, peer: int, header: Buffer, blob: Buffer, place: RecordLocation) -> None:
        state = records.decode_group(header)
        store = self.store
        group = store.group(state.id, state.epoch, place)
        if group is not None:
            group.epoch, group.digest, group.started = state.epoch, state.digest, state.started
            group.ended, group.divert, group.cancelled = state.ended, state.divert, state.cancelled
            group.released = state.released
            store.relocate_group(group, place)

    def _left(self, peer: int, header: Buffer, blob: Buffer, place: RecordLocation) -> None:
        for id in records.decode_names(header):
            self.store.leave(id)

    def _gather(self, peer: int, header: Buffer, blob: Buffer, place: RecordLocation) -> None:
        state = records.decode_gather(header)
        store = self.store
        group = store.group(state.group, state.epoch, place)
        if group is None:
            return
        gather = store.gather(group, state.key, place)
        store.live_bytes -= gather.weight
        gather.need, gather.queue, gather.label = state.need, state.queue, state.label
        gather.epoch = state.epoch
        gather.restore(state.base, state.arrivals, state.seen)
        gather.due, gather.due_wall, gather.wait, gather.priority = 0.0, state.due_wall, state.wait, state.priority
        store.live_bytes += gather.weight
        store.relocate_gather(group, gather, place)

    def _queue(self, peer: int, header: Buffer, blob: Buffer, place: RecordLocation) -> None:
        state = records.decode_queue(header)
        self.store.declare(state.options).paused = state.paused

    def _fact(self, peer: int, header: Buffer, blob: Buffer, place: RecordLocation) -> None:
        name, value = records.decode_fact(header)
        self.store.keep_fact(name, value)

    def _sessions(self, peer: int, header: Buffer, blob: Buffer, place: RecordLocation) -> None:
        for known, frame in records.decode_sessions(header):
            self.store.remember_peer(known, frame)

    def _oldest(self, peer: int, header: Buffer, blob: Buffer, place: RecordLocation) -> None:
        self.oldest = max(self.oldest, records.decode_oldest(header))

    def _started(self, peer: int, header: Buffer, blob: Buffer, place: RecordLocation) -> None:
        self.store.epoch = max(self.store.epoch, records.decode_epoch(header))
