"""From records back to state: a fold over the journal.

Replay draws no conclusions. A record about a message that is not known speaks of one whose own record went with a
segment: it had ended by then, or a COPY further on states it whole.
"""

from __future__ import annotations

from collections.abc import Callable

from brokers.core import records, wire
from brokers.core.message import Extra, Message, Place
from brokers.core.queue import Queue
from brokers.core.records import MessageState
from brokers.core.sessions import Session
from brokers.core.store import Store

__all__ = ["Replay"]


class Replay:
    """Feeds records into a store. `finish` makes it ready for a new broker epoch."""

    def __init__(self, store: Store, *, on_settled: Callable[[Message | None, str, str], None] | None = None) -> None:
        self.store = store
        self._on_settled = on_settled
        self._kinds: dict[int, Callable[[int, bytes, bytes, Place], None]] = {
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
        }

    def apply(self, kind: int, first_id: int, peer: int, header: bytes, blob: bytes, place: Place) -> None:
        """One record, in the order of the journal."""
        store = self.store
        store.next_id = max(store.next_id, first_id)
        store.wall = place.wall
        self._kinds[kind](peer, header, blob, place)

    def finish(self, now: float, wall: float) -> None:
        """All has been read: lanes, delays and timers are made anew, clocks clamped to what was asked for."""
        store = self.store
        store.now, store.wall = now, wall
        for queue in store.queues.values():
            # What was removed on the way here counted itself out of lanes in which it had never been.
            queue.skip = queue.delayed = 0
        for message in sorted(store.messages.values(), key=lambda m: m.id):
            extra = message.extra
            if extra is not None and extra.parked:
                since = extra.parked_wall
                store.park(message, reason=extra.reason, evidence=extra.evidence)
                extra.parked_wall = since
                continue
            if extra is not None:
                if extra.due_wall:
                    extra.due = now + min(max(extra.due_wall - wall, 0.0), extra.delay)
                if extra.expires_wall:
                    extra.expires = now + max(extra.expires_wall - wall, 0.0)
            store.enqueue(message)
        for group, gather in store.all_gathers():
            if gather.due_wall:
                gather.due = now + max(gather.due_wall - wall, 0.0)
                store.timer(gather.due, 0, group.id, gather.key)
        for id in [g.id for g in store.groups.values() if not g.messages() and not g.gathers]:
            del store.groups[id]
        store.epoch += 1
        store.next_lease = (store.epoch << 40) + 1
        store.left.clear()

    def _frame(self, peer: int, frame: int) -> None:
        if peer:
            session = self.store.sessions.get(peer)
            if session is None:
                session = self.store.sessions[peer] = Session(peer)
            session.last_frame = max(session.last_frame, frame)

    # frames

    def _publish(self, peer: int, header: bytes, blob: bytes, place: Place) -> None:
        frame = wire.decode_publish(header, blob)
        self._frame(peer, frame.frame)
        at = 0
        for item in frame.items:
            self._item(item, frame.targets, blob, at, place, None)
            at += item.size
        self._gathering(frame.opens, frame.arrivals, frame.targets, blob, at, place, None)

    def _item(
        self,
        item: wire.PublishItem,
        targets: list[wire.Target],
        blob: bytes,
        at: int,
        place: Place,
        parent: Message | None,
    ) -> None:
        store = self.store
        target = targets[item.target]
        if item.group or parent is None:
            group = store.group(item.group, item.epoch, place)
            epoch = item.epoch
        else:
            group, epoch = parent.group, parent.epoch
        if item.flags & wire.START and group is not None:
            group.started, group.digest, group.place = True, item.digest, place
            group.epoch = max(group.epoch, item.epoch)
        if target.flags & wire.PUSH_ONLY:
            return
        if target.flags & wire.TERMINAL and group is not None:
            group.ended = target.label
        body = bytes(blob[at : at + item.size])
        queue = store.queue(target.queue)
        message = store.put(queue, group, epoch, target.label, item.priority, body, place, at)
        if item.delay or item.ttl:
            store.delay(message.details(), item.delay)
            if item.ttl:
                message.details().expires_wall = place.wall + item.delay + item.ttl

    def _settle(self, peer: int, header: bytes, blob: bytes, place: Place) -> None:
        frame = wire.decode_settle(header, blob)
        self._frame(peer, frame.frame)
        store = self.store
        messages = store.messages
        at = 0
        resolved: list[tuple[Queue, str, int]] = [(store.queue(t.queue), t.label, t.flags) for t in frame.targets]
        for id, _, target, size, group_id in frame.moves:
            message = messages.get(id)
            self._settled(message, group_id)
            queue, label, flags = resolved[target]
            epoch = 0
            if message is not None:
                epoch = message.epoch
                store.remove(message)
            group = store.group(group_id, epoch, place)
            if flags & wire.TERMINAL and group is not None:
                group.ended = label
            store.put(queue, group, epoch, label, 0, bytes(blob[at : at + size]), place, at)
            at += size
        for id, _, flags, group_id in frame.acks:
            message = messages.get(id)
            self._settled(message, group_id)
            if message is not None:
                store.remove(message)
            if flags & wire.LEAVE:
                store.leave(group_id)
        for other in frame.others:
            at = self._other(other, frame.targets, blob, at, place)

    def _other(self, item: wire.SettleItem, targets: list[wire.Target], blob: bytes, at: int, place: Place) -> int:
        store = self.store
        parent: Message | None = None
        for id, _ in item.leases:
            message = store.messages.get(id)
            parent = parent or message
            if item.outcome == wire.DONE:
                self._settled(message, "")
                if message is not None:
                    store.remove(message)
            elif message is not None:
                extra = message.details()
                extra.attempts += 1
                extra.failure, extra.fresh = item.failure, False
                extra.parked = item.outcome == wire.DEAD
                extra.parked_wall = place.wall
                extra.reason = item.failure
                store.delay(extra, item.delay)
        for publish in item.publishes:
            self._item(publish, targets, blob, at, place, parent)
            at += publish.size
        at = self._gathering(item.opens, item.arrivals, targets, blob, at, place, parent)
        if item.leave:
            store.leave(item.leave)
        return at

    def _settled(self, message: Message | None, group_id: str) -> None:
        if self._on_settled is not None:
            self._on_settled(message, group_id, "" if message is None else message.label)

    def _checkpoint(self, peer: int, header: bytes, blob: bytes, place: Place) -> None:
        frame = wire.decode_checkpoint(header)
        self._frame(peer, frame.frame)
        message = self.store.messages.get(frame.id)
        if message is not None:
            extra = message.details()
            extra.steps = {**(extra.steps or {}), frame.name: bytes(blob)}

    def _gathering(
        self,
        opens: list[wire.GatherOpen],
        arrivals: list[wire.Arrival],
        targets: list[wire.Target],
        blob: bytes,
        at: int,
        place: Place,
        parent: Message | None,
    ) -> int:
        store = self.store
        for opening in opens:
            group = store.group(opening.group, opening.epoch, place) if opening.group else parent and parent.group
            base = bytes(blob[at : at + opening.size])
            at += opening.size
            if group is None:
                continue
            target = targets[opening.target]
            gather = store.gather(group, opening.key, place)
            epoch = opening.epoch if opening.group or parent is None else parent.epoch
            gather.open(need=opening.need, queue=target.queue, label=target.label, epoch=epoch, base=base)
            gather.due_wall = place.wall + opening.deadline if opening.deadline else 0.0
        for arrival in arrivals:
            group = store.group(arrival.group, arrival.epoch, place) if arrival.group else parent and parent.group
            if group is not None:
                store.gather(group, arrival.key, place).arrive(arrival.slot, bytes(blob[at : at + arrival.size]))
            at += arrival.size
        return at

    # facts

    def _copy(self, peer: int, header: bytes, blob: bytes, place: Place) -> None:
        state = records.decode_message(header)
        store = self.store
        known = store.messages.get(state.id)
        if known is not None:
            store.remove(known)
        group = store.group(state.group, state.epoch, place)
        kept = store.next_id
        store.next_id = state.id
        place.wall = state.wall
        message = store.put(
            store.queue(state.queue), group, state.epoch, state.label, state.priority, bytes(blob), place, 0
        )
        store.next_id = max(kept, state.id + 1)
        self._restore(message, state)

    def _mark(self, peer: int, header: bytes, blob: bytes, place: Place) -> None:
        state = records.decode_message(header)
        message = self.store.messages.get(state.id)
        if message is not None:
            self._restore(message, state)

    def _restore(self, message: Message, state: MessageState) -> None:
        extra = Extra()
        extra.attempts, extra.deaths = state.attempts, state.deaths
        extra.failure, extra.fresh = state.failure, state.fresh
        extra.steps, extra.parts = state.steps, state.parts
        extra.due_wall, extra.delay = state.due_wall, state.delay
        extra.expires_wall = state.expires_wall
        extra.parked, extra.parked_wall = state.parked, state.parked_wall
        extra.evidence, extra.reason = state.evidence, state.reason
        message.extra = extra
        message.queue = self.store.queue(state.queue)
        message.label, message.epoch = state.label, state.epoch

    def _forget(self, peer: int, header: bytes, blob: bytes, place: Place) -> None:
        frame, ids = records.decode_forgotten(header)
        self._frame(peer, frame)
        for id in ids:
            message = self.store.messages.get(id)
            if peer:  # nobody in particular: somebody purged it, which is no settlement
                self._settled(message, "")
            if message is not None:
                self.store.remove(message)

    def _group(self, peer: int, header: bytes, blob: bytes, place: Place) -> None:
        state = records.decode_group(header)
        group = self.store.group(state.id, state.epoch, place)
        if group is not None:
            group.epoch, group.digest, group.started = state.epoch, state.digest, state.started
            group.ended, group.divert, group.place = state.ended, state.divert, place

    def _left(self, peer: int, header: bytes, blob: bytes, place: Place) -> None:
        for id in records.decode_names(header):
            self.store.leave(id)

    def _gather(self, peer: int, header: bytes, blob: bytes, place: Place) -> None:
        state = records.decode_gather(header)
        group = self.store.group(state.group, state.epoch, place)
        if group is None:
            return
        gather = self.store.gather(group, state.key, place)
        gather.place = place
        gather.need, gather.queue, gather.label = state.need, state.queue, state.label
        gather.epoch, gather.base, gather.due_wall = state.epoch, state.base, state.due_wall
        gather.arrivals, gather.seen = dict(state.arrivals), set(state.seen)

    def _queue(self, peer: int, header: bytes, blob: bytes, place: Place) -> None:
        state = records.decode_queue(header)
        queue = self.store.queue(state.options.name)
        queue.options, queue.paused = state.options, state.paused

    def _fact(self, peer: int, header: bytes, blob: bytes, place: Place) -> None:
        name, value = records.decode_fact(header)
        self.store.facts[name] = value

    def _sessions(self, peer: int, header: bytes, blob: bytes, place: Place) -> None:
        for known, frame in records.decode_sessions(header):
            self._frame(known, frame)

    def _started(self, peer: int, header: bytes, blob: bytes, place: Place) -> None:
        self.store.epoch = max(self.store.epoch, records.decode_epoch(header))
