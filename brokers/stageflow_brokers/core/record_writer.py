"""The ledger: what is to be written in this round, and where it lies once it has been.

Every change of state that must outlive the process passes here. Nothing is decided here, and nothing is read but bodies
that have left memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TypeVar

from stageflow_brokers.core import records
from stageflow_brokers.core.gather import Gather
from stageflow_brokers.core.message import DELAYED, PARKED, Group, Message, RecordLocation
from stageflow_brokers.core.queue import Queue
from stageflow_brokers.core.records import Record
from stageflow_brokers.core.state import BrokerState

__all__ = ["ReadBody", "RecordWriter"]

ReadBody = Callable[[int, int, int, int], bytes]
"""(segment, batch, offset, size) of a body that has been written, to be read back; at `batch` its batch begins."""

COPIED = 128
"""About how many bytes a copied state takes beside the body."""

_T = TypeVar("_T")


class RecordWriter:
    """Collects the records of one round after the other."""

    def __init__(self, state: BrokerState, read_body: ReadBody | None) -> None:
        self.state = state
        self.records: list[Record] = []
        self._read_body = read_body
        self._locations: list[RecordLocation] = []
        self._paged: list[Message] = []

    def take_records(self) -> list[Record]:
        """The records of this round, to be made durable before anything is dispatched."""
        taken = self.records
        self.records = []
        return taken

    def set_locations(self, segment: int, batch: int, offsets: Sequence[int]) -> None:
        """Where the blobs of the records just taken lie, and the batch of them all."""
        for location, offset in zip(self._locations, offsets, strict=True):
            location.segment = segment
            location.batch = batch
            location.offset = offset
        self._locations.clear()
        for message in self._paged:
            if message.holder is None:
                message.body = None
        self._paged.clear()
        waiting = self.state.waiting
        if waiting:
            if self.state.paging:
                for message in waiting:
                    if message.state() in (DELAYED, PARKED) and message.location.segment >= 0:
                        message.body = None
            waiting.clear()

    def record(self, kind: int, peer: int, header: bytes, blob: bytes = b"") -> RecordLocation:
        """One more record of this round; its place is known once it has been written."""
        state = self.state
        location = RecordLocation(state.wall)
        self.records.append((kind, state.next_id, peer, header, blob))
        self._locations.append(location)
        return location

    def body(self, message: Message) -> bytes:
        """The body, from memory or read back."""
        if message.body is not None:
            return message.body
        location = message.location
        if self._read_body is None or location.segment < 0:
            raise RuntimeError(f"message {message.id} has neither a body nor a location")
        return self._read_body(location.segment, location.batch, location.offset + message.body_offset, message.size)

    def head(self, message: Message, size: int) -> bytes:
        """How the body begins: its first `size` bytes, or all of it."""
        if message.body is not None:
            return message.body[:size]
        location = message.location
        if self._read_body is None or location.segment < 0:
            raise RuntimeError(f"message {message.id} has neither a body nor a location")
        return self._read_body(
            location.segment, location.batch, location.offset + message.body_offset, min(size, message.size)
        )

    def mark(self, message: Message) -> None:
        """Record the state of a message that the journal knows already."""
        self.record(records.MARK, 0, records.encode(records.message_state(message)))

    def copy(self, message: Message) -> None:
        """Record a message whole; it lies there from now on."""
        if message.body is None:
            # Until the record is on disk nobody could read it there.
            message.body = self.body(message)
            self._paged.append(message)
        wall = message.location.wall
        location = self.record(records.COPY, 0, records.encode(records.message_state(message)), message.body)
        location.wall = wall
        self.state.relocate(message, location)

    def record_group(self, group: Group) -> None:
        """Record the state of a group; it lies there from now on."""
        location = self.record(records.GROUP, 0, records.encode(records.group_state(group)))
        self.state.relocate_group(group, location)

    def record_gather(self, group: Group, gather: Gather) -> None:
        """Record the state of a gather; it lies there from now on."""
        location = self.record(records.GATHER, 0, records.encode(records.gather_state(group, gather)))
        self.state.relocate_gather(group, gather, location)

    def record_queue(self, queue: Queue) -> None:
        """Record how a queue is declared and whether it is paused."""
        self.record(records.QUEUE, 0, records.encode(records.QueueState(queue.options, queue.paused)))

    def record_epoch(self) -> None:
        """Record the epoch of the broker."""
        self.record(records.STARTED, 0, records.encode(self.state.epoch))

    def record_oldest(self, segment: int) -> None:
        """Record that the segments from this one on must be there."""
        self.record(records.OLDEST, 0, records.encode(segment))

    def record_closed_groups(self, groups: Iterable[str]) -> None:
        """Record that these groups have ended, and all that was theirs."""
        self.record(records.GROUPS_CLOSED, 0, records.encode(list(groups)))

    def copy_live(self, segment: int, budget: int) -> bool:
        """Record again what lies in `segment` or before it and is alive, until that takes `budget` bytes.

        False when nothing does any more. To be called between rounds, when all that was recorded has its place.
        """
        state = self.state
        most = budget // COPIED + 1
        for group in _lying_in(segment, state.groups.values(), lambda group: group.location, most):
            self.record_group(group)
            budget -= COPIED
            if budget < 0:
                return True
        for message in _lying_in(segment, state.messages.values(), lambda message: message.location, most):
            self.copy(message)
            budget -= COPIED + message.weight
            if budget < 0:
                return True
        gathers = ((group, group.gathers[key]) for (_, key), group in state.gathers.items() if group.gathers)
        for group, gather in _lying_in(segment, gathers, lambda pair: pair[1].location, most):
            self.record_gather(group, gather)
            budget -= COPIED + gather.weight
            if budget < 0:
                return True
        return bool(self.records)

    def weigh(self, segment: int) -> int:
        """About how many bytes `copy_live` would record of what lies in `segment` or before it."""
        state = self.state
        groups, messages = len(state.groups), len(state.messages)
        weight = COPIED * len(_lying_in(segment, state.groups.values(), lambda group: group.location, groups))
        for message in _lying_in(segment, state.messages.values(), lambda message: message.location, messages):
            weight += COPIED + message.weight
        gathers = ((group, group.gathers[key]) for (_, key), group in state.gathers.items() if group.gathers)
        for _, gather in _lying_in(segment, gathers, lambda pair: pair[1].location, len(state.gathers)):
            weight += COPIED + gather.weight
        return weight

    def restate(self, oldest: int = 0) -> None:
        """Record anew what lies in no particular segment, so that any may go; all before `oldest` will have gone."""
        state = self.state
        if oldest:
            self.record_oldest(oldest)
        for queue in state.queues.values():
            self.record_queue(queue)
        for fact in state.facts.items():
            self.record(records.FACT, 0, records.encode(fact))
        frames = state.last_frames | {s.peer: s.highest_frame for s in state.sessions.values()}
        self.record(records.SESSIONS, 0, records.encode(list(frames.items())))
        self.record_epoch()


def _lying_in(segment: int, things: Iterable[_T], location: Callable[[_T], RecordLocation], most: int) -> list[_T]:
    found = []
    for thing in islice(things, most):
        if location(thing).segment > segment:
            break
        found.append(thing)
    return found
