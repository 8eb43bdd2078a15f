"""Collect the records of a round, and set their locations.

Each change of state that must survive the process is recorded here. This module must not decide anything, and must not
change the state of the broker, except for locations and for bodies that are dropped from memory.
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
"""Called as (segment, batch, offset, size) to read a body; `batch` is the offset of the batch that holds it."""

RECORD_OVERHEAD_BYTES = 128
"""Approximate bytes of a record besides its body."""

_T = TypeVar("_T")


class RecordWriter:
    """Collects the records of each round.

    Args:
        state: The state of the broker.
        read_body: Reads a body from the journal; None if bodies always stay in memory.

    Attributes:
        records: The records of this round, until `take_records`.
    """

    def __init__(self, state: BrokerState, read_body: ReadBody | None) -> None:
        self.state = state
        self.records: list[Record] = []
        self._read_body = read_body
        self._locations: list[RecordLocation] = []
        self._paged: list[Message] = []

    def take_records(self) -> list[Record]:
        """Return the records of this round.

        They must be durable before any frame is sent.
        """
        records = self.records
        self.records = []
        return records

    def set_locations(self, segment: int, batch: int, offsets: Sequence[int]) -> None:
        """Set the locations of the records that `take_records` returned.

        They share a batch; `offsets` are those of their blobs. Bodies that can be read there are dropped from memory.
        """
        for location, offset in zip(self._locations, offsets, strict=True):
            location.segment = segment
            location.batch = batch
            location.offset = offset
        self._locations.clear()
        for message in self._paged:
            if message.holder is None:
                message.body = None
        self._paged.clear()
        candidates = self.state.page_out_candidates
        if candidates:
            if self.state.paging:
                for message in candidates:
                    if message.state() in (DELAYED, PARKED) and message.location.segment >= 0:
                        message.body = None
            candidates.clear()

    def record(self, kind: int, peer: int, header: bytes, blob: bytes = b"") -> RecordLocation:
        """Add a record to this round and return its location.

        The location is set after the record is written.
        """
        state = self.state
        location = RecordLocation(state.wall)
        self.records.append((kind, state.next_id, peer, header, blob))
        self._locations.append(location)
        return location

    def body(self, message: Message) -> bytes:
        """Return the body of a message; read it from the journal if necessary."""
        if message.body is not None:
            return message.body
        location = message.location
        if self._read_body is None or location.segment < 0:
            raise RuntimeError(f"message {message.id} has neither a body nor a location")
        return self._read_body(location.segment, location.batch, location.offset + message.body_offset, message.size)

    def head(self, message: Message, size: int) -> bytes:
        """Return the first `size` bytes of the body of a message."""
        if message.body is not None:
            return message.body[:size]
        location = message.location
        if self._read_body is None or location.segment < 0:
            raise RuntimeError(f"message {message.id} has neither a body nor a location")
        return self._read_body(
            location.segment, location.batch, location.offset + message.body_offset, min(size, message.size)
        )

    def record_message_state(self, message: Message) -> None:
        """Record the state of a message whose body is in the journal already."""
        self.record(records.MARK, 0, records.encode(records.message_state(message)))

    def record_message(self, message: Message) -> None:
        """Record a message with its body; this record is its location from now on."""
        if message.body is None:
            # The new location cannot be read until it is on disk, so the body stays in memory until then.
            message.body = self.body(message)
            self._paged.append(message)
        wall = message.location.wall
        location = self.record(records.COPY, 0, records.encode(records.message_state(message)), message.body)
        location.wall = wall
        self.state.relocate(message, location)

    def record_group(self, group: Group) -> None:
        """Record the state of a group; this record is its location from now on."""
        location = self.record(records.GROUP, 0, records.encode(records.group_state(group)))
        self.state.relocate_group(group, location)

    def record_gather(self, group: Group, gather: Gather) -> None:
        """Record the state of a gather; this record is its location from now on."""
        location = self.record(records.GATHER, 0, records.encode(records.gather_state(group, gather)))
        self.state.relocate_gather(group, gather, location)

    def record_queue(self, queue: Queue) -> None:
        """Record the options of a queue, and whether it is paused."""
        self.record(records.QUEUE, 0, records.encode(records.QueueState(queue.options, queue.paused)))

    def record_epoch(self) -> None:
        """Record the epoch of the broker."""
        self.record(records.STARTED, 0, records.encode(self.state.epoch))

    def record_oldest(self, segment: int) -> None:
        """Record that all segments from this one on must exist."""
        self.record(records.OLDEST, 0, records.encode(segment))

    def record_closed_groups(self, groups: Iterable[str]) -> None:
        """Record that these groups are closed, and everything that belongs to them."""
        self.record(records.GROUPS_CLOSED, 0, records.encode(list(groups)))

    def copy_live(self, segment: int, budget: int) -> bool:
        """Record the live state of `segment` and earlier segments again.

        At most about `budget` bytes are recorded. Return False if these segments hold no live state any more. Must be
        called between rounds, when every record has its location.
        """
        state = self.state
        limit = budget // RECORD_OVERHEAD_BYTES + 1
        for group in _until_segment(segment, state.groups.values(), lambda group: group.location, limit):
            self.record_group(group)
            budget -= RECORD_OVERHEAD_BYTES
            if budget < 0:
                return True
        for message in _until_segment(segment, state.messages.values(), lambda message: message.location, limit):
            self.record_message(message)
            budget -= RECORD_OVERHEAD_BYTES + message.weight
            if budget < 0:
                return True
        gathers = ((group, group.gathers[key]) for (_, key), group in state.gathers.items() if group.gathers)
        for group, gather in _until_segment(segment, gathers, lambda pair: pair[1].location, limit):
            self.record_gather(group, gather)
            budget -= RECORD_OVERHEAD_BYTES + gather.weight
            if budget < 0:
                return True
        return bool(self.records)

    def estimate_copy_bytes(self, segment: int) -> int:
        """Estimate the bytes that `copy_live` would record for `segment`."""
        state = self.state
        groups, messages = len(state.groups), len(state.messages)
        weight = RECORD_OVERHEAD_BYTES * len(
            _until_segment(segment, state.groups.values(), lambda group: group.location, groups)
        )
        for message in _until_segment(segment, state.messages.values(), lambda message: message.location, messages):
            weight += RECORD_OVERHEAD_BYTES + message.weight
        gathers = ((group, group.gathers[key]) for (_, key), group in state.gathers.items() if group.gathers)
        for _, gather in _until_segment(segment, gathers, lambda pair: pair[1].location, len(state.gathers)):
            weight += RECORD_OVERHEAD_BYTES + gather.weight
        return weight

    def record_global_state(self, oldest: int = 0) -> None:
        """Record again the state that has no location of its own.

        After that, every older segment can be deleted. If `oldest` is given, segments before it are about to be
        deleted, and may be missing from then on.
        """
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


def _until_segment(
    segment: int, things: Iterable[_T], location: Callable[[_T], RecordLocation], limit: int
) -> list[_T]:
    """Return the things in `segment` and earlier ones, at most `limit`.

    `things` must be ordered by location.
    """
    found = []
    for thing in islice(things, limit):
        if location(thing).segment > segment:
            break
        found.append(thing)
    return found
