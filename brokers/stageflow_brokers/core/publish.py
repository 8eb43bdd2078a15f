"""Accept or refuse the items of publish frames, and apply the accepted.

A refused item must not reach the journal: the frame is recorded without it, because a replay checks nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stageflow_brokers.core import records, wire
from stageflow_brokers.core.gathers import GatherManager, ResolvedTargets
from stageflow_brokers.core.leases import Leases
from stageflow_brokers.core.limits import LimitChecker
from stageflow_brokers.core.message import Group, Message, RecordLocation
from stageflow_brokers.core.outbox import Outbox
from stageflow_brokers.core.record_writer import RecordWriter
from stageflow_brokers.core.sessions import Session
from stageflow_brokers.core.state import BrokerState
from stageflow_brokers.core.wire import PublishFrame
from stageflow_brokers.errors import PayloadTooLarge, QueueFull, Refused, StorageFull
from stageflow_brokers.types import FLAG_CHECK, FLAG_START, FLAG_WATCH, PUSH_ONLY, TERMINAL, PublishItem, Target

__all__ = ["PublishHandler"]

EXISTS, CONFLICT, LOOK_AGAIN, GONE = "exists", "conflict", "look-again", "gone"
"""Reasons why an item is refused, as `PublishAnswer.refused` describes them."""

Watch = Callable[[Session, list[str]], Any]


class PublishHandler:
    """Handles the publish frames of one machine.

    Attributes:
        refusal_reason: Why starts are refused at present; empty if they are accepted.
        stale_end_groups: Groups for which the frame in hand published an end of an earlier epoch.
    """

    def __init__(
        self,
        state: BrokerState,
        writer: RecordWriter,
        outbox: Outbox,
        leases: Leases,
        gather_manager: GatherManager,
        *,
        limit_checker: LimitChecker,
        watch: Watch,
    ) -> None:
        self.state = state
        self.refusal_reason = ""
        self.stale_end_groups: list[Group] = []
        self._writer = writer
        self._outbox = outbox
        self._leases = leases
        self._gather_manager = gather_manager
        self._limit_checker = limit_checker
        self._watch = watch

    def handle(self, session: Session, frame: PublishFrame, header: bytes, blob: bytes) -> None:
        """Apply a new frame."""
        try:
            refused = self._check_items(session, frame)
        except (QueueFull, PayloadTooLarge, Refused) as error:
            self._answer(session, frame, wire.error_answer(error))
            return
        if refused:
            self._answer(session, frame, self._refusals(refused))
            if frame.atomic and any(reason != EXISTS for _, reason, _ in refused):
                return
            frame, blob = _without_items(frame, blob, {index for index, _, _ in refused})
            header = wire.encode(frame)
        if not frame.items and not frame.opens and not frame.arrivals:
            return
        location = self._writer.record(records.PUBLISH_FRAME, session.peer, header, blob)
        offset = 0
        targets = self.resolve(frame.targets)
        for item in frame.items:
            self.put(item, targets, blob, offset, location, session)
            offset += item.size
        if frame.opens or frame.arrivals:
            self._gather_manager.apply(frame.opens, frame.arrivals, targets, blob, offset, location)
            self._gather_manager.publish_complete()
        if self.stale_end_groups:
            self.record_stale_ends()

    def record_stale_ends(self) -> None:
        """Record the groups for which an end of an earlier epoch was published.

        A replay does not compare epochs, so it takes such a group for ended; the record after the frame corrects it.
        """
        groups, self.stale_end_groups = self.stale_end_groups, []
        for group in dict.fromkeys(groups):
            if self.state.groups.get(group.id) is group:
                self._writer.record_group(group)

    def handle_duplicate(self, session: Session, frame: PublishFrame) -> None:
        """Answer a frame that is known, but whose answer was lost.

        Its starts are answered by the present state of their groups.
        """
        if self._refuse_size(session, frame):
            return
        refused = []
        for index, item in enumerate(frame.items):
            if item.flags & FLAG_START:
                group = self.state.groups.get(item.group)
                if group is None:
                    refused.append((index, LOOK_AGAIN, item.group))
                elif group.digest != item.digest:
                    refused.append((index, CONFLICT, item.group))
                elif item.flags & FLAG_WATCH:
                    self._watch(session, [item.group])
        if refused:
            self._outbox.add_result(session, frame.frame, self._refusals(refused) | {"again": True})

    def watch_groups(self, session: Session, frame: PublishFrame) -> None:
        """Watch the groups of a duplicate frame whose answer is still known.

        A notice of their end may have been lost with the connection.
        """
        refused = {index: reason for index, reason, _ in session.answers[frame.frame].get("items", ())}
        if frame.atomic and any(reason != EXISTS for reason in refused.values()):
            return
        for index, item in enumerate(frame.items):
            if item.flags & FLAG_START and item.flags & FLAG_WATCH and refused.get(index, EXISTS) == EXISTS:
                self._watch(session, [item.group])

    def _refuse_size(self, session: Session, frame: PublishFrame) -> bool:
        try:
            self._check_sizes(frame)
        except PayloadTooLarge as error:
            self._outbox.add_result(session, frame.frame, wire.error_answer(error))
            return True
        return False

    def _answer(self, session: Session, frame: PublishFrame, answer: dict[str, Any]) -> None:
        session.keep_answer(frame.frame, answer)
        self._outbox.add_result(session, frame.frame, answer)

    def _refusals(self, refused: list[tuple[int, str, str]]) -> dict[str, Any]:
        return {"left_seq": self.state.closed_sequence, "epoch": self.state.epoch, "items": refused}

    # checks

    def _check_sizes(self, frame: PublishFrame) -> None:
        limit = self._limit_checker.limits.max_message_bytes
        for part in (frame.items, frame.opens, frame.arrivals):
            for item in part:
                if item.size > limit:
                    raise PayloadTooLarge(f"a message of {item.size} bytes is over max_message_bytes={limit}")

    def _check_items(self, session: Session, frame: PublishFrame) -> list[tuple[int, str, str]]:
        """Return the items to refuse, as (index, reason, group).

        Raise an error if the whole frame must be refused.
        """
        self._check_sizes(frame)
        self._limit_checker.check_queues([target.queue for target in frame.targets if not target.flags & PUSH_ONLY])
        if frame.arrivals:
            self._limit_checker.check_arrivals(frame.arrivals)
        refused: list[tuple[int, str, str]] = []
        groups = self.state.groups
        incoming: dict[int, int] = {}
        fresh: dict[str, bytes | None] = {}
        for index, item in enumerate(frame.items):
            name = item.group
            if not item.flags & FLAG_START:
                continue
            if self.refusal_reason:
                raise StorageFull(self.refusal_reason)
            group = groups.get(name)
            if group is not None or name in fresh:
                digest = fresh[name] if group is None else group.digest
                if digest != item.digest:
                    refused.append((index, CONFLICT, name))
                else:
                    refused.append((index, EXISTS, name))
                    if item.flags & FLAG_WATCH and group is not None:
                        self._watch(session, [name])
            elif item.flags & FLAG_CHECK and self._may_have_ended(item):
                refused.append((index, LOOK_AGAIN, name))
            else:
                fresh[name] = item.digest
                incoming[item.target] = incoming.get(item.target, 0) + 1
        for target, count in incoming.items():
            self._check_queue_length(frame.targets[target].queue, count)
        if frame.arrivals:
            refused.extend(self._late_arrivals(frame, {index for index, _, _ in refused}))
        return refused

    def _check_queue_length(self, name: str, count: int) -> None:
        queue = self.state.queues.get(name)
        if queue is None or not queue.options.max_length:
            return
        limit = queue.options.max_length
        waiting = queue.ready_count + queue.delayed_count
        if waiting + count > limit:
            raise QueueFull(f"{waiting} messages wait in queue {name}, and max_queue_length is {limit}")

    def _may_have_ended(self, item: PublishItem) -> bool:
        state = self.state
        epoch, sequence = divmod(item.history_sequence, 1 << 40)
        if epoch != state.epoch:
            return True
        return sequence < state.closed_floor or state.closed_groups.get(item.group, 0) > sequence

    def _late_arrivals(self, frame: PublishFrame, dropped: set[int]) -> list[tuple[int, str, str]]:
        groups = self.state.groups
        created = {
            item.group
            for index, item in enumerate(frame.items)
            if index not in dropped and not frame.targets[item.target].flags & PUSH_ONLY
        }
        created.update(opening.group for opening in frame.opens)
        first = len(frame.items)
        return [
            (first + index, GONE, arrival.group)
            for index, arrival in enumerate(frame.arrivals)
            if arrival.group not in groups and arrival.group not in created
        ]

    # changes of state

    def resolve(self, targets: list[Target]) -> ResolvedTargets:
        """Return the queues of a frame's targets, and mark them as changed."""
        queue = self.state.queue
        changed_queues = self.state.changed_queues
        resolved: ResolvedTargets = []
        for target in targets:
            found = None if target.flags & PUSH_ONLY else queue(target.queue)
            if found is not None:
                changed_queues[found] = None
            resolved.append((found, target.label, target.flags))
        return resolved

    def put(
        self,
        item: PublishItem,
        targets: ResolvedTargets,
        blob: bytes,
        offset: int,
        location: RecordLocation,
        session: Session,
    ) -> Message | None:
        """Create the message of an item, or push it to the group's watchers.

        Return the message, None if the item is only pushed.
        """
        queue, label, flags = targets[item.target]
        body = blob[offset : offset + item.size]
        group, message = self.state.admit(item, queue, label, body, location, offset)
        if group is None:
            if message is not None:
                self.state.enqueue(message)
            return message
        if item.flags & FLAG_START and item.flags & FLAG_WATCH:
            group.watchers = [session]
        if message is None:
            self._outbox.push_to_watchers(group, label, body)
            return None
        if message.is_stale_epoch:
            self._leases.divert(message)
            if flags & TERMINAL:
                self.stale_end_groups.append(group)
            return message
        if flags & TERMINAL:
            group.end_label = label
            self._outbox.push_to_watchers(group, label, body)
        if message.delivery_state is not None and message.delivery_state.due and message.is_cancelled:
            self.state.delay(message.delivery_state, 0.0)
            self._writer.record_message_state(message)
        self.state.enqueue(message)
        return message


def _without_items(frame: PublishFrame, blob: bytes, dropped: set[int]) -> tuple[PublishFrame, bytes]:
    """Return the frame and its bodies without the dropped items and arrivals.

    Arrivals are numbered after the items.
    """
    bodies: list[bytes] = []
    offset = 0
    parts: list[list[Any]] = []
    index = 0
    for part, counted in ((frame.items, True), (frame.opens, False), (frame.arrivals, True)):
        remaining = []
        for item in part:
            if not (counted and index in dropped):
                remaining.append(item)
                bodies.append(blob[offset : offset + item.size])
            index += counted
            offset += item.size
        parts.append(remaining)
    items, opens, arrivals = parts
    reduced = PublishFrame(frame.broker_epoch, frame.frame, frame.targets, items, frame.atomic, opens, arrivals)
    return reduced, b"".join(bodies)
