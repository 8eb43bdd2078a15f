"""Giving the oldest segments of the journal back, while the broker works.

A slice of what is alive in the oldest segment is recorded again with each commit, so that no round waits for it; when
nothing there is alive any more, and the records that say so are on disk, the segment goes. Never another than
the oldest: it may hold the acknowledgement of a message that an older one still holds.
"""

from __future__ import annotations

from brokers.core.machine import Machine
from brokers.errors import JournalFull
from brokers.journal.journal import Journal

__all__ = ["Reclaim"]

SLICE = 1 << 20
"""Fewest bytes to copy with one commit; a commit that wrote more makes room for as much."""

SEGMENTS_SPARED = 3
"""Segments beyond twice what is alive before any is given back: rewriting less often costs disk, no time."""

PER_MESSAGE, PER_GROUP, PER_REASON = 128, 64, 1024
"""About how many bytes of journal one takes, the bodies left out; why a dead letter is one takes some more."""


MARGIN = 9 / 8
"""What is copied may take this much more than it was thought to, and this much more than what is alive is to be used
before anything is given back for want of room."""

RESERVE = 3 / 2
"""How often what is alive must find room beside what is used already, for starts to be taken."""

LOOKS_APART = 8
"""Rounds between looks at whether the oldest segment fits by now, where it did not: a look goes over all in it."""


class Reclaim:
    """The reclaiming of one journal."""

    def __init__(self, machine: Machine, journal: Journal, segment_bytes: int) -> None:
        self._machine = machine
        self._journal = journal
        self._segment_bytes = segment_bytes
        self._oldest = 0
        self._restated = False
        self._all_before = 0
        self._look_in = 0

    @property
    def compacting(self) -> bool:
        """Whether every segment is being given back that was there when this was asked for."""
        return self._all_before > 0

    @property
    def busy(self) -> bool:
        """Whether a segment is being given back."""
        return self._oldest > 0

    @property
    def needed(self) -> int:
        """Bytes that have to be had so that what is alive can always be worked off: to write it once more; of a large
        backlog a quarter, and some segments, for it goes segment by segment."""
        alive = self._alive()
        return int(RESERVE * min(alive, alive // 4 + 4 * self._segment_bytes))

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
        if not self._oldest and not self._begin(pressed):
            return
        if journal.room_low and not self._fits(self._oldest):
            self._oldest = self._all_before = 0
            return
        budget = max(SLICE, written)
        if pressed:
            budget = min(budget, max(journal.room.left // 4, SLICE // 16))
        if self._machine.ledger.copy_forward(self._oldest, budget):
            return
        if not self._restated:
            self._machine.ledger.restate(self._oldest + 1)
            self._restated = True
            return
        journal.drop_oldest()
        self._oldest = 0

    def _begin(self, pressed: bool) -> bool:
        """Whether there is a segment to give back now."""
        segments = self._journal.segments()
        if self._all_before:
            if segments[0].number >= self._all_before:
                self._all_before = 0
                return False
        else:
            used = sum(each.used for each in segments)
            if pressed and len(segments) > 1:
                if used < MARGIN * self._alive() or not self._fits(segments[0].number):
                    return False
            elif len(segments) <= SEGMENTS_SPARED or not self._worthwhile(used):
                return False
        self._oldest = segments[0].number
        self._restated = False
        return True

    def _fits(self, segment: int) -> bool:
        """Whether what is alive there can be copied into the room that there is."""
        room = self._journal.room
        if self._look_in > 0:
            self._look_in -= 1
            return False
        if self._machine.ledger.weigh(segment) * MARGIN <= room.left + room.spare + self._journal.free * 7 // 8:
            return True
        self._look_in = LOOKS_APART
        return False

    def _alive(self) -> int:
        store = self._machine.store
        dead = sum(len(queue.dead) for queue in store.queues.values())
        bodies = store.live_bytes + store.step_bytes + store.fact_bytes
        return bodies + PER_MESSAGE * len(store.messages) + PER_GROUP * len(store.groups) + PER_REASON * dead

    def _worthwhile(self, used: int) -> bool:
        return used > 2 * self._alive() + SEGMENTS_SPARED * self._segment_bytes
