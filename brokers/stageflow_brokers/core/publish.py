"""Publishing: which new messages are taken, which are refused and why, and what those taken make of the state.

What is refused leaves no trace in the journal: the frame is kept without it.
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

Watch = Callable[[Session, list[str]], Any]


class PublishHandler:
    """What comes into one machine from outside. `refusing` says why starts are refused at present, if they are."""

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
        """A frame that is new."""
        try:
            refused = self._check_items(session, frame)
        except (QueueFull, PayloadTooLarge, Refused) as error:
            self._answer(session, frame, wire.error_answer(error))
            return
        if refused:
            self._answer(session, frame, self._refusals(refused))
            if frame.atomic and any(why != EXISTS for _, why, _ in refused):
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
        """A replay takes for ended whatever has an end published, for it does not know of epochs: behind a frame in
        which an end came too late, how the group stands is recorded."""
        groups, self.stale_end_groups = self.stale_end_groups, []
        for group in dict.fromkeys(groups):
            if self.state.groups.get(group.id) is group:
                self._writer.record_group(group)

    def handle_duplicate(self, session: Session, frame: PublishFrame) -> None:
        """A frame that was taken, or refused, before its answer was lost: say of its starts what is true now."""
        if self._refuse_size(session, frame):
            return
        again = []
        for index, item in enumerate(frame.items):
            if item.flags & FLAG_START:
                group = self.state.groups.get(item.group)
                if group is None:
                    again.append((index, LOOK_AGAIN, item.group))
                elif group.digest != item.digest:
                    again.append((index, CONFLICT, item.group))
                elif item.flags & FLAG_WATCH:
                    self._watch(session, [item.group])
        if again:
            self._outbox.add_result(session, frame.frame, self._refusals(again) | {"again": True})

    def watch_groups(self, session: Session, frame: PublishFrame) -> None:
        """A frame whose answer is still known: how its starts ended may have been said in the talk that was lost."""
        refused = {index: why for index, why, _ in session.answers[frame.frame].get("items", ())}
        if frame.atomic and any(why != EXISTS for why in refused.values()):
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

    # judging

    def _check_sizes(self, frame: PublishFrame) -> None:
        limit = self._limit_checker.limits.max_message_bytes
        for part in (frame.items, frame.opens, frame.arrivals):
            for item in part:
                if item.size > limit:
                    raise PayloadTooLarge(f"a message of {item.size} bytes is over max_message_bytes={limit}")

    def _check_items(self, session: Session, frame: PublishFrame) -> list[tuple[int, str, str]]:
        """Which items are not to be taken, as (index, why, group). Raises what refuses the whole frame."""
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
        most = queue.options.max_length
        waiting = queue.ready_count + queue.delayed_count
        if waiting + count > most:
            raise QueueFull(f"queue {name} has {waiting} messages waiting, its max_queue_length is {most}")

    def _may_have_ended(self, item: PublishItem) -> bool:
        state = self.state
        epoch, seen = divmod(item.history_sequence, 1 << 40)
        if epoch != state.epoch:
            return True
        return seen < state.closed_floor or state.closed_groups.get(item.group, 0) > seen

    def _late_arrivals(self, frame: PublishFrame, dropped: set[int]) -> list[tuple[int, str, str]]:
        groups = self.state.groups
        made = {
            item.group
            for index, item in enumerate(frame.items)
            if index not in dropped and not frame.targets[item.target].flags & PUSH_ONLY
        }
        made.update(opening.group for opening in frame.opens)
        first = len(frame.items)
        return [
            (first + index, GONE, arrival.group)
            for index, arrival in enumerate(frame.arrivals)
            if arrival.group not in groups and arrival.group not in made
        ]

    # taking

    def resolve(self, targets: list[Target]) -> ResolvedTargets:
        """The queues of a frame's targets; something will happen in each of them."""
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
        """One new message, to where it belongs."""
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
    """The frame and its bodies without some of its items and, numbered behind them, arrivals."""
    bodies: list[bytes] = []
    offset = 0
    kept: list[list[Any]] = []
    index = 0
    for part, counted in ((frame.items, True), (frame.opens, False), (frame.arrivals, True)):
        left = []
        for item in part:
            if not (counted and index in dropped):
                left.append(item)
                bodies.append(blob[offset : offset + item.size])
            index += counted
            offset += item.size
        kept.append(left)
    items, opens, arrivals = kept
    left_over = PublishFrame(frame.broker_epoch, frame.frame, frame.targets, items, frame.atomic, opens, arrivals)
    return left_over, b"".join(bodies)
