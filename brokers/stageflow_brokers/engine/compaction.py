"""Giving the oldest segments of the journal back, while the broker works.

A slice of what is alive in the oldest segment is recorded again with each commit, so that no round waits for it; when
nothing there is alive any more, and the records that say so are on disk, the segment goes. Never another than
the oldest: it may hold the acknowledgement of a message that an older one still holds.
"""

from __future__ import annotations

from stageflow_brokers.core.machine import Machine
from stageflow_brokers.errors import JournalFull
from stageflow_brokers.journal.journal import Journal, SegmentInfo

__all__ = ["Compactor"]

SLICE = 1 << 20
"""Fewest bytes to copy with one commit; a commit that wrote more makes room for as much."""

SEGMENTS_SPARED = 3
"""Segments beyond twice what is alive before any is given back: rewriting less often costs disk, no time."""

PER_MESSAGE, PER_GROUP, PER_REASON = 128, 64, 1024
"""About how many bytes of journal one takes, the bodies left out; why a dead letter is one takes some more."""


MARGIN = 9 / 8
"""What is copied may take this much more than it was thought to, and this much more than what is alive is to be used
before anything is given back for want of room."""

RESERVE = 2
"""How often what is alive may still grow by must find room beside what is used already, for starts to be taken: the
stages on the way to the largest are written too, and are given back segment by segment."""

SLACK = 256 << 10
"""Bytes for what the broker writes on its own account: timers that are due, what a segment must say again. Of small
segments a share."""

LOOKS_APART = 8
"""Rounds between looks at whether the oldest segment fits by now, where it did not: a look goes over all in it."""


class Compactor:
    """The reclaiming of one journal."""

    def __init__(self, machine: Machine, journal: Journal, segment_bytes: int) -> None:
        self._machine = machine
        self._journal = journal
        self._segment_bytes = segment_bytes
        self.slack = min(SLACK, segment_bytes // 16)
        self._oldest = 0
        self._restated = False
        self._clean_to = 0
        self._all_before = 0
        self._look_in = 0
        self._weighed = (0, 0, 0)

    @property
    def compacting(self) -> bool:
        """Whether every segment is being given back that was there when this was asked for."""
        return self._all_before > 0

    @property
    def busy(self) -> bool:
        """Whether a segment is being given back."""
        return self._oldest > 0

    @property
    def alive(self) -> int:
        """About how many bytes it takes to write all that is alive."""
        store = self._machine.state
        dead = sum(len(queue.dead_letters) for queue in store.queues.values())
        bodies = store.live_bytes + store.step_bytes + store.fact_bytes
        return bodies + PER_MESSAGE * len(store.messages) + PER_GROUP * len(store.groups) + PER_REASON * dead

    def growth(self, final: float) -> int:
        """By how many bytes what is alive may grow until all has ended and waits, where a group takes about `final`
        bytes in the end (0: not known). Never less than by as much as there is; of a large backlog by a quarter, and
        some segments."""
        alive = self.alive
        seen = int(len(self._machine.state.groups) * final) - alive
        return max(seen, min(alive, alive // 4 + 4 * self._segment_bytes))

    @property
    def clean(self) -> int:
        """Bytes of segments that may go at any time, and are kept because others would take their room."""
        return sum(segment.size for segment in self._journal.segments() if segment.number < self._clean_to)

    @property
    def have(self) -> int:
        """Bytes that could still be written, if nobody else takes what is free."""
        room = self._journal.room
        return room.left + room.spare + self.clean + self._journal.free * 7 // 8

    def keep(self) -> int:
        """Bytes that must not be used up by anything else, or what is dead could never be given back: what is alive in
        any one segment has to be copied before it goes. None where that would gain nothing, or is too late."""
        segments = self._unclean()
        alive, have = self.alive, self.have
        if len(segments) < 2 or sum(each.used for each in segments) < MARGIN * alive:
            return 0
        most = int(MARGIN * max(min(each.used, alive) for each in segments))
        if most <= have:
            return most
        first = int(MARGIN * self._weight(segments[0].number))
        return first if first <= have else 0

    def compact(self) -> None:
        """Give back all segments, the open one too, whether it is worthwhile or not.

        Where there is no room to begin another segment, or to copy what is alive, some of them stay.
        """
        if not self._all_before:
            try:
                self._journal.seal()
            except JournalFull:
                pass
            self._all_before = self._journal.segments()[-1].number

    def step(self, written: int, *, pressed: bool = False) -> None:
        """To be called after each commit, of about `written` bytes. What is recorded here goes with the next one.

        `pressed`: there is little room, so whatever is dead is wanted back.
        """
        journal = self._journal
        self._let_go(pressed)
        if not self._oldest and not self._begin(pressed):
            return
        if journal.room_low and not self._fits(self._oldest):
            self._oldest = self._all_before = 0
            return
        budget = max(SLICE, written)
        if pressed:
            budget = min(budget, max(journal.room.left // 4, SLICE // 16))
        if self._machine.writer.copy_forward(self._oldest, budget):
            return
        if not self._restated:
            self._machine.writer.restate(self._oldest + 1)
            self._restated = True
            return
        self._clean_to = self._oldest + 1
        self._oldest = 0
        self._let_go(pressed)

    def give_way(self) -> bool:
        """Make room of a segment that may go, for a batch that has found none; false if there is no such segment."""
        segments = self._journal.segments()
        if segments[0].number >= self._clean_to:
            return False
        self._journal.drop_oldest()
        return True

    def _let_go(self, pressed: bool) -> None:
        """Give back what may go. Where room is short not before there is no spare: only one can be had, and the room of
        any other would be somebody else's at once."""
        while self._journal.segments()[0].number < self._clean_to:
            room = self._journal.room
            if pressed and room.spare and room.left + room.spare < RESERVE * self.alive:
                return
            self._journal.drop_oldest()

    def _unclean(self) -> list[SegmentInfo]:
        return [segment for segment in self._journal.segments() if segment.number >= self._clean_to]

    def _begin(self, pressed: bool) -> bool:
        """Whether there is a segment to give back now."""
        segments = self._unclean()
        if self._all_before:
            if segments[0].number >= self._all_before:
                self._all_before = 0
                return False
        else:
            used = sum(each.used for each in segments)
            if pressed and len(segments) > 1:
                if used < MARGIN * self.alive or not self._fits(segments[0].number):
                    return False
            elif len(segments) <= SEGMENTS_SPARED or not self._worthwhile(used):
                return False
        self._oldest = segments[0].number
        self._restated = False
        return True

    def _weight(self, segment: int) -> int:
        """What is alive there, as it was some rounds ago at most."""
        of, weight, looks = self._weighed
        if of != segment or looks <= 0:
            weight, looks = self._machine.writer.weigh(segment), LOOKS_APART
        self._weighed = (segment, weight, looks - 1)
        return weight

    def _fits(self, segment: int) -> bool:
        """Whether what is alive there can be copied into the room that there is."""
        if self._look_in > 0:
            self._look_in -= 1
            return False
        if self._machine.writer.weigh(segment) * MARGIN <= self.have:
            return True
        self._look_in = LOOKS_APART
        return False

    def _worthwhile(self, used: int) -> bool:
        return used > 2 * self.alive + SEGMENTS_SPARED * self._segment_bytes
