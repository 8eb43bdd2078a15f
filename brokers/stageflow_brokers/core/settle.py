"""Apply settle frames: messages end and their successors begin.

The end and the successors are one record: with two records, a crash between them would lose the instance. Each lease of
a frame is checked separately: settlements of messages that the peer does not hold are refused, the others are applied.
A replay checks no leases, so the record of a frame that was applied in part is replaced by records of the resulting
state.
"""

from __future__ import annotations

from collections.abc import Mapping

from stageflow_brokers.core import records, wire
from stageflow_brokers.core.breaker import Breaker
from stageflow_brokers.core.gathers import GatherManager, ResolvedTargets
from stageflow_brokers.core.leases import Leases
from stageflow_brokers.core.limits import LimitChecker
from stageflow_brokers.core.message import PARKED, Group, Message, RecordLocation
from stageflow_brokers.core.outbox import REPORTED_BODY_BYTES, Outbox
from stageflow_brokers.core.publish import PublishHandler
from stageflow_brokers.core.record_writer import RecordWriter
from stageflow_brokers.core.sessions import Session
from stageflow_brokers.core.state import BrokerState
from stageflow_brokers.core.wire import FIRST_EPOCH, Checkpoint, SettleFrame
from stageflow_brokers.errors import Refused
from stageflow_brokers.types import (
    ACK,
    ATTEMPT_FAILED,
    ATTEMPT_SUCCEEDED,
    FLAG_CLOSE_GROUP,
    FLAG_START,
    RETRY,
    Ack,
    Arrival,
    GatherOpen,
    Move,
    PublishItem,
    SettleItem,
)

__all__ = ["SettleHandler"]


class SettleHandler:
    """Handles the settlements, releases and checkpoints of one machine."""

    def __init__(
        self,
        state: BrokerState,
        writer: RecordWriter,
        outbox: Outbox,
        leases: Leases,
        publish_handler: PublishHandler,
        gather_manager: GatherManager,
        limit_checker: LimitChecker,
    ) -> None:
        self.state = state
        self._writer = writer
        self._outbox = outbox
        self._leases = leases
        self._publish_handler = publish_handler
        self._gather_manager = gather_manager
        self._limit_checker = limit_checker

    def handle(self, session: Session, frame: SettleFrame, header: bytes, blob: bytes) -> None:
        """Apply a new frame."""
        if frame.queue and frame.prefetch >= 0 and frame.queue in session.consumers:
            self._leases.set_prefetch(session.consumers[frame.queue], frame.prefetch)
        if self._limit_checker.is_queue_limit_reached and not self._holds_any(session, frame):
            # A peer that holds none of these messages must not create queues by naming them as targets.
            stale = [id for id, _ in _frame_leases(frame)]
            self._leases.free_credit(session, stale)
            self._refuse(session, frame.frame, {"stale": stale})
            return
        if frame.others and self._fill_in_groups(session, frame.others):
            header = wire.encode(frame)
        targets = self._publish_handler.resolve(frame.targets)
        index = len(self._writer.records)
        first_id = self.state.next_id
        location = self._writer.record(records.SETTLE_FRAME, session.peer, header, blob)
        breakers = _affected_breakers(session, frame.moves) if self.state.has_breakers else None
        refused_moves = self._move(session, frame.moves, targets, blob, location) if frame.moves else []
        if breakers:
            stale_ids = {frame.moves[index][0] for index in refused_moves}
            for breaker, ids in breakers:
                if ids := ids - stale_ids:
                    breaker.record_success(ids)
        emptied: list[Group] = []
        refused_acks = self._acknowledge(session, frame.acks, emptied) if frame.acks else []
        refused_others: list[int] = []
        replayable = True
        if frame.others:
            offset = sum(move[3] for move in frame.moves)
            for position, other in enumerate(frame.others):
                held = [self._leases.get_held(session, id, lease) for id, lease in other.leases]
                messages = [message for message in held if message is not None]
                if len(messages) == len(held):
                    replayable &= self._settle(session, other, messages, targets, blob, offset, location, emptied)
                else:
                    refused_others.append(position)
                offset += _bodies_size(other)
        if len(self._writer.records) > index + 1 and _closes_group(frame):
            # A record added above may belong to a group that this frame closes.
            replayable = False
        changed = self._gather_manager.publish_complete()
        if refused_moves or refused_acks or refused_others or not replayable:
            self._replace_record(index, frame, set(refused_moves), set(refused_acks), set(refused_others), changed)
            stale = [frame.moves[i][0] for i in refused_moves] + [frame.acks[i][0] for i in refused_acks]
            stale += [id for i in refused_others for id, _ in frame.others[i].leases]
            if stale:
                self._leases.free_credit(session, stale)
                self._refuse(session, frame.frame, {"stale": stale})
        if self._publish_handler.stale_end_groups:
            self._publish_handler.record_stale_ends()
        if emptied:
            self.close_idle_groups(emptied)
        if self._outbox.subscribers:
            self._notify_subscribers(first_id, frame, set(refused_others), blob)

    def _holds_any(self, session: Session, frame: SettleFrame) -> bool:
        return any(self._leases.get_held(session, id, lease) is not None for id, lease in _frame_leases(frame))

    def _refuse(self, session: Session, frame: int, answer: Mapping[str, object]) -> None:
        session.keep_answer(frame, answer)
        self._outbox.add_result(session, frame, answer)

    def _notify_subscribers(self, first_id: int, frame: SettleFrame, refused_others: set[int], blob: bytes) -> None:
        """Notify subscribers of each message, opening and arrival of this frame."""
        notices: list[tuple[str, int, str, bytes]] = []
        for id in range(first_id, self.state.next_id):
            message = self.state.messages.get(id)
            if message is not None and message.group is not None:
                notices.append((message.group.id, message.epoch, message.label, self._writer.body(message)))
        offset = sum(move[3] for move in frame.moves)
        for position, other in enumerate(frame.others):
            offset += sum(publish.size for publish in other.publishes)
            gathered: list[GatherOpen | Arrival] = [*other.opens, *other.arrivals]
            for each in gathered:
                if position not in refused_others:
                    notices.append((each.group, each.epoch, each.key, blob[offset : offset + each.size]))
                offset += each.size
        if notices:
            self._outbox.notify_subscribers(notices)

    def handle_duplicate(self, session: Session, frame: SettleFrame) -> None:
        """Release the messages of a frame that was applied before a restart.

        The sender reported their leases after its reconnect, because it had no answer. A message that still
        exists was settled with a retry, so the sender must not keep it.
        """
        self.handle_release(session, _frame_leases(frame))

    def handle_release(self, session: Session, leases: list[tuple[int, int]]) -> None:
        """Put messages that were not begun at the head of their queue, in order.

        No attempt is counted.
        """
        held = []
        for id, lease in leases:
            message = self._leases.get_held(session, id, lease)
            if message is not None:
                held.append(message)
            else:
                self._leases.free_credit(session, (id,))
        self._leases.release(held)

    def handle_checkpoint(self, session: Session, frame: Checkpoint, header: bytes, blob: bytes) -> None:
        """Store the result of a step with its message."""
        message = self._leases.get_held(session, frame.id, frame.lease)
        if message is None:
            answer = {"refused": f"message {frame.id} is not held under lease {frame.lease}"}
            self._refuse(session, frame.frame, answer)
            return
        try:
            self._limit_checker.check_step(message, frame.name, blob)
        except Refused as error:
            self._refuse(session, frame.frame, {"refused": str(error)})
            return
        self.state.add_step(message, frame.name, blob)
        self._writer.record(records.CHECKPOINT_FRAME, session.peer, header, blob)

    def handle_duplicate_checkpoint(self, session: Session, frame: Checkpoint, blob: bytes) -> None:
        """Refuse a checkpoint that was sent again, unless its step is stored."""
        message = self._leases.get_held(session, frame.id, frame.lease)
        steps = None if message is None or message.delivery_state is None else message.delivery_state.steps
        if steps is None or steps.get(frame.name) != blob:
            answer = {"refused": f"message {frame.id} is not held under lease {frame.lease}"}
            self._outbox.add_result(session, frame.frame, answer)

    def close_idle_groups(self, groups: list[Group]) -> None:
        """Close those of these groups that have no messages and gathers left."""
        state = self.state
        idle = {group.id: None for group in groups if group.is_idle and state.groups.get(group.id) is group}
        for id in idle:
            state.close_group(id)
        if idle:
            self._writer.record_closed_groups(idle)

    def _fill_in_groups(self, session: Session, others: list[SettleItem]) -> bool:
        """Fill in the group and epoch of items that name none.

        They belong to the group of the settled message. The frame is recorded with them, because a replay may not have
        that message. Return True if anything was filled in.
        """
        filled_in = False
        for other in others:
            message = self._leases.get_held(session, *other.leases[0])
            if message is None:
                continue
            following: list[PublishItem | GatherOpen | Arrival]
            following = [*other.publishes, *other.opens, *other.arrivals]
            for each in following:
                if not each.group and (message.group is not None or each.epoch != message.epoch):
                    each.group = "" if message.group is None else message.group.id
                    each.epoch = message.epoch
                    filled_in = True
        return filled_in

    # kinds of settlements

    def _move(
        self, session: Session, moves: list[Move], targets: ResolvedTargets, blob: bytes, location: RecordLocation
    ) -> list[int]:
        """Turn settled messages into their successors; return the refused indices.

        This is the path of each successful stage, so the message object is reused and the code is written out for
        speed.
        """
        state = self.state
        messages = state.messages
        next_id = state.next_id
        changed_queues = state.changed_queues
        push = self._outbox.push_to_watchers
        offset = 0
        growth = 0
        stale: list[int] = []
        other_epoch: list[Message] = []
        diverted: list[tuple[Message, int]] = []
        for index, (id, lease, target, size, group_id) in enumerate(moves):
            message = messages.get(id)
            if message is None or message.lease != lease:
                stale.append(index)
                offset += size
                continue
            holder = message.holder
            group = message.group
            if holder is None or holder.session is not session or group_id != ("" if group is None else group.id):
                stale.append(index)
                offset += size
                continue
            del messages[id]
            del holder.held[id]
            old = holder.queue
            old.settled_count += 1
            changed_queues[old] = None
            queue, label, flags = targets[target]
            assert queue is not None
            body = blob[offset : offset + size]
            growth += size - message.size
            message.id = next_id
            message.queue = queue
            message.label = label
            message.priority = 0
            message.body = body
            message.size = size
            message.location = location
            message.body_offset = offset
            message.lease = 0
            message.holder = None
            if message.delivery_state is not None:
                state.step_bytes -= message.delivery_state.step_bytes
                message.delivery_state = None
            messages[next_id] = message
            next_id += 1
            offset += size
            if group is None:
                if message.epoch:
                    other_epoch.append(message)
            else:
                if group.other_messages is not None:
                    group.relink(id, message)
                if group.epoch != FIRST_EPOCH or message.epoch != FIRST_EPOCH:
                    if message.is_stale_epoch:
                        diverted.append((message, flags))
                        continue
                    if message.epoch != FIRST_EPOCH:
                        other_epoch.append(message)
                    if queue.breaker is not None and message.is_cancelled:
                        queue.push(message)
                        continue
                if flags:
                    group.end_label = label
                    if group.watchers is not None:
                        push(group, label, body)
            queue.ready.append(message)
        state.next_id = next_id
        state.live_bytes += growth
        for message in other_epoch:
            self._writer.record_message_state(message)
        for message, flags in diverted:
            self._leases.divert(message)
            if flags and message.group is not None:
                self._publish_handler.stale_end_groups.append(message.group)
        return stale

    def _acknowledge(self, session: Session, acks: list[Ack], emptied: list[Group]) -> list[int]:
        state = self.state
        held = self._leases.get_held
        refused: list[int] = []
        for index, (id, lease, flags, group_id) in enumerate(acks):
            message = held(session, id, lease)
            group = None if message is None else message.group
            if message is None or (flags & FLAG_CLOSE_GROUP and (group is None or group_id != group.id)):
                refused.append(index)
                continue
            message.queue.settled_count += 1
            if message.queue.breaker is not None:
                message.queue.breaker.record_success((id,))
            state.remove(message)
            if group is None:
                continue
            if flags & FLAG_CLOSE_GROUP:
                state.close_group(group_id)
            elif group.first_message is None:
                emptied.append(group)
        return refused

    def _settle(
        self,
        session: Session,
        item: SettleItem,
        messages: list[Message],
        targets: ResolvedTargets,
        blob: bytes,
        offset: int,
        location: RecordLocation,
        emptied: list[Group],
    ) -> bool:
        """Apply one settlement with an outcome.

        Return False if some of its items were dropped: a start of a group that exists, or an arrival without a group.
        """
        state = self.state
        all_accepted = True
        parked: list[Group] = []
        for message in messages:
            message.queue.settled_count += 1
            group = message.group
            if message.queue.breaker is not None:
                if item.attempt_result == ATTEMPT_FAILED:
                    self._leases.record_failure(message)
                elif item.attempt_result == ATTEMPT_SUCCEEDED:
                    message.queue.breaker.record_success((message.id,))
            if item.outcome == ACK:
                state.remove(message)
                if group is None:
                    continue
                if group.first_message is None:
                    emptied.append(group)
                elif group.first_message.state() == PARKED or group.first_message.is_expired(state.now):
                    parked.append(group)  # its other messages may all be parked
                continue
            is_cancel_unannounced = message.is_cancel_unannounced
            self._leases.end_lease(message)
            state.fail(message, item.failure)
            if is_cancel_unannounced:
                # Delivered again with the notice of the cancel. If it fails then too, the requested outcome is applied.
                self._leases.redeliver(message)
                self._writer.record_message_state(message)
            elif item.outcome == RETRY or message.is_stale_epoch:
                self._leases.redeliver(message, item.delay)
            else:
                state.park(message, reason=item.failure, evidence=False)
                self._outbox.report_dead_letter(message, self._writer.head(message, REPORTED_BODY_BYTES))
                if group is not None:
                    parked.append(group)
        for publish in item.publishes:
            if publish.flags & FLAG_START and publish.group in state.groups:
                all_accepted = False
            else:
                self._publish_handler.put(publish, targets, blob, offset, location, session)
            offset += publish.size
        if item.opens or item.arrivals:
            all_accepted &= self._gather_manager.apply(
                item.opens, item.arrivals, targets, blob, offset, location, messages[0].priority if messages else 0
            )
        if item.close_group:
            state.close_group(item.close_group)
        for group in parked:
            if group.is_halted(state.now):
                self._outbox.notify_watchers(group, "parked")
        return all_accepted

    def _replace_record(
        self,
        index: int,
        frame: SettleFrame,
        refused_moves: set[int],
        refused_acks: set[int],
        refused_others: set[int],
        changed: list[tuple[Group, str]],
    ) -> None:
        """Replace the record of a frame by records of the resulting state.

        Needed if a replay of the frame would lead to another state.
        """
        state, writer = self.state, self._writer
        _, first_id, peer, _, _ = writer.records[index]
        acks = [ack for i, ack in enumerate(frame.acks) if i not in refused_acks]
        others = [other for i, other in enumerate(frame.others) if i not in refused_others]
        ended = [move[0] for i, move in enumerate(frame.moves) if i not in refused_moves] + [ack[0] for ack in acks]
        ended += [id for other in others if other.outcome == ACK for id, _ in other.leases]
        writer.records[index] = (records.FORGET, first_id, peer, records.encode((frame.frame, ended)), b"")
        if closed := [ack[3] for ack in acks if ack[2] & FLAG_CLOSE_GROUP] + [
            other.close_group for other in others if other.close_group
        ]:
            writer.record_closed_groups(closed)
        groups: dict[str, Group] = {}
        for id in range(first_id, state.next_id):
            message = state.messages.get(id)
            if message is not None:
                writer.record_message(message)
                if message.group is not None:
                    groups[message.group.id] = message.group
        for other in others:
            for id, _ in other.leases:
                if other.outcome != ACK and id in state.messages:
                    writer.record_message_state(state.messages[id])
        groups.update((group.id, group) for group, _ in changed)
        for group in groups.values():
            if state.groups.get(group.id) is group:
                writer.record_group(group)
        for group, key in dict.fromkeys(changed):
            if state.groups.get(group.id) is group and group.gathers is not None:
                writer.record_gather(group, group.gathers[key])


def _frame_leases(frame: SettleFrame) -> list[tuple[int, int]]:
    """Return all (id, lease) pairs that a frame settles."""
    leases = [(move[0], move[1]) for move in frame.moves] + [(ack[0], ack[1]) for ack in frame.acks]
    return leases + [lease for other in frame.others for lease in other.leases]


def _closes_group(frame: SettleFrame) -> bool:
    """True if the frame closes a group."""
    return any(ack[2] & FLAG_CLOSE_GROUP for ack in frame.acks) or any(other.close_group for other in frame.others)


def _affected_breakers(session: Session, moves: list[Move]) -> list[tuple[Breaker, set[int]]]:
    """Return the breakers of the queues of these moves, each with the ids."""
    affected = []
    for consumer in session.consumers.values():
        breaker = consumer.queue.breaker
        if breaker is not None:
            affected.append((breaker, {move[0] for move in moves if move[0] in consumer.held}))
    return affected


def _bodies_size(item: SettleItem) -> int:
    return (
        sum(publish.size for publish in item.publishes)
        + sum(opening.size for opening in item.opens)
        + sum(arrival.size for arrival in item.arrivals)
    )
