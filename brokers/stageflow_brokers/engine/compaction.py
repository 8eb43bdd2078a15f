"""Compaction: copy the live records of the oldest segment and delete it, while the broker works.

Each commit copies one slice of the live records, so that no round waits for the rest. The segment is deleted when
nothing in it is live and the records that say so are on disk. Never delete another segment than the oldest: it may
hold the acknowledgement of a message that an older segment still holds.
"""

from __future__ import annotations

from stageflow_brokers.core.machine import Machine
from stageflow_brokers.errors import JournalFull
from stageflow_brokers.journal.journal import Journal, SegmentInfo

__all__ = ["Compactor"]

SLICE_BYTES = 1 << 20
"""The fewest bytes copied with one commit. A commit that wrote more is followed by a copy of as many bytes."""

SPARED_SEGMENTS = 3
"""Compaction begins when the journal exceeds twice its live bytes by so many segments. Rewriting less often costs disk
space, but no time."""

MESSAGE_OVERHEAD_BYTES = 128
"""Estimate of the journal bytes of a message without its body."""

GROUP_OVERHEAD_BYTES = 64
"""Estimate of the journal bytes of a group."""

DEAD_LETTER_OVERHEAD_BYTES = 1024
"""Estimate of the journal bytes that the failure of a dead letter adds."""

COPY_MARGIN = 9 / 8
"""A copy may need this factor more than its estimate. When disk space is low, compaction also begins only if the used
bytes exceed the live bytes by this factor."""

RESERVE_FACTOR = 2
"""Starts are accepted while the disk has space for this many times the expected growth of the live bytes. The
intermediate stages of the growing messages are written too, and their segments are deleted one by one."""

SLACK_BYTES = 256 << 10
"""Space for records that the broker writes without a request: due timers, and the state that each segment repeats.
With small segments only a share of it."""

CHECK_INTERVAL_ROUNDS = 8
"""Rounds between checks whether the oldest segment, which did not fit, fits now. A check visits each record of the
segment that is live."""


class Compactor:
    """The compaction of one journal."""

    def __init__(self, machine: Machine, journal: Journal, segment_bytes: int) -> None:
        self._machine = machine
        self._journal = journal
        self._segment_bytes = segment_bytes
        self.slack_bytes = min(SLACK_BYTES, segment_bytes // 16)
        self._oldest = 0
        self._restated = False
        self._recyclable_to = 0
        self._compact_to = 0
        self._rounds_to_check = 0
        self._estimate = (0, 0, 0)

    @property
    def is_compacting(self) -> bool:
        """True while a requested compaction has segments left that existed at the request."""
        return self._compact_to > 0

    @property
    def is_busy(self) -> bool:
        """True while the live records of a segment are being copied."""
        return self._oldest > 0

    @property
    def live_bytes(self) -> int:
        """Estimate of the bytes needed to write everything that is live."""
        state = self._machine.state
        dead = sum(len(queue.dead_letters) for queue in state.queues.values())
        bodies = state.live_bytes + state.step_bytes + state.fact_bytes
        overhead = MESSAGE_OVERHEAD_BYTES * len(state.messages) + GROUP_OVERHEAD_BYTES * len(state.groups)
        return bodies + overhead + DEAD_LETTER_OVERHEAD_BYTES * dead

    def growth_bytes(self, final_bytes: float) -> int:
        """Return how many bytes the live data may grow by until each group has ended and waits for the history.

        `final_bytes` is the average size of an ended group, 0 if not known. The result is at least the live bytes
        themselves, or for a large backlog a quarter of them and some segments.
        """
        live = self.live_bytes
        expected = int(len(self._machine.state.groups) * final_bytes) - live
        return max(expected, min(live, live // 4 + 4 * self._segment_bytes))

    @property
    def recyclable_bytes(self) -> int:
        """Bytes of segments that can be deleted at any time. They are kept so that no other program takes the space."""
        return sum(segment.size for segment in self._journal.segments() if segment.number < self._recyclable_to)

    @property
    def available_bytes(self) -> int:
        """Bytes that can still be written if no other program takes the free space."""
        space = self._journal.free_space
        return space.open_bytes + space.spare_bytes + self.recyclable_bytes + self._journal.disk_free_bytes * 7 // 8

    def reserved_bytes(self) -> int:
        """Return the bytes that only compaction may use.

        The live records of any one segment must be copied before the segment is deleted; without this space, dead
        records could never be removed. 0 if compaction would gain nothing, or cannot run any more.
        """
        segments = self._occupied_segments()
        live, available = self.live_bytes, self.available_bytes
        if len(segments) < 2 or sum(each.used for each in segments) < COPY_MARGIN * live:
            return 0
        largest = int(COPY_MARGIN * max(min(each.used, live) for each in segments))
        if largest <= available:
            return largest
        first = int(COPY_MARGIN * self._live_bytes_in(segments[0].number))
        return first if first <= available else 0

    def compact(self) -> None:
        """Begin to compact all segments, the open one too, whether or not it gains space.

        Segments remain if the disk has no space for another segment or for the copies of live records.
        """
        if not self._compact_to:
            try:
                self._journal.seal()
            except JournalFull:
                pass
            self._compact_to = self._journal.segments()[-1].number

    def advance(self, written: int, *, space_low: bool = False) -> None:
        """Copy the next slice. Call it after each commit of about `written` bytes; the next commit writes the copies.

        With `space_low`, compaction begins as soon as it gains space.
        """
        journal = self._journal
        self._delete_recyclable(space_low)
        if not self._oldest and not self._begin_segment(space_low):
            return
        if journal.is_space_low and not self._fits(self._oldest):
            self._oldest = self._compact_to = 0
            return
        budget = max(SLICE_BYTES, written)
        if space_low:
            budget = min(budget, max(journal.free_space.open_bytes // 4, SLICE_BYTES // 16))
        if self._machine.writer.copy_live(self._oldest, budget):
            return
        if not self._restated:
            self._machine.writer.record_global_state(self._oldest + 1)
            self._restated = True
            return
        self._recyclable_to = self._oldest + 1
        self._oldest = 0
        self._delete_recyclable(space_low)

    def free_segment(self) -> bool:
        """Delete a recyclable segment to make space for a batch that found none. Return False if there is none."""
        segments = self._journal.segments()
        if segments[0].number >= self._recyclable_to:
            return False
        self._journal.drop_oldest()
        return True

    def _delete_recyclable(self, space_low: bool) -> None:
        """Delete the recyclable segments.

        While space is low, wait until the journal has no spare: it keeps only one, and the space of a second one could
        be taken by another program at once.
        """
        while self._journal.segments()[0].number < self._recyclable_to:
            space = self._journal.free_space
            if (
                space_low
                and space.spare_bytes
                and space.open_bytes + space.spare_bytes < RESERVE_FACTOR * self.live_bytes
            ):
                return
            self._journal.drop_oldest()

    def _occupied_segments(self) -> list[SegmentInfo]:
        return [segment for segment in self._journal.segments() if segment.number >= self._recyclable_to]

    def _begin_segment(self, space_low: bool) -> bool:
        """Choose the oldest segment for compaction; return False if it should not be compacted now."""
        segments = self._occupied_segments()
        if self._compact_to:
            if segments[0].number >= self._compact_to:
                self._compact_to = 0
                return False
        else:
            used = sum(each.used for each in segments)
            if space_low and len(segments) > 1:
                if used < COPY_MARGIN * self.live_bytes or not self._fits(segments[0].number):
                    return False
            elif len(segments) <= SPARED_SEGMENTS or not self._is_worthwhile(used):
                return False
        self._oldest = segments[0].number
        self._restated = False
        return True

    def _live_bytes_in(self, segment: int) -> int:
        """Return the live bytes of a segment, from an estimate that is at most some rounds old."""
        estimated, weight, rounds = self._estimate
        if estimated != segment or rounds <= 0:
            weight, rounds = self._machine.writer.estimate_copy_bytes(segment), CHECK_INTERVAL_ROUNDS
        self._estimate = (segment, weight, rounds - 1)
        return weight

    def _fits(self, segment: int) -> bool:
        """True if the available space is enough to copy the live records of the segment."""
        if self._rounds_to_check > 0:
            self._rounds_to_check -= 1
            return False
        if self._machine.writer.estimate_copy_bytes(segment) * COPY_MARGIN <= self.available_bytes:
            return True
        self._rounds_to_check = CHECK_INTERVAL_ROUNDS
        return False

    def _is_worthwhile(self, used: int) -> bool:
        return used > 2 * self.live_bytes + SPARED_SEGMENTS * self._segment_bytes
