"""Whether there is room for what is new. What is under way is never asked: room is kept for it.

Starts are taken while all that is alive could be written once more (of a large backlog, part of it): only then can the
work in hand be finished and the dead be given back, whatever happens to the disk. Must never write anything but
segments to come.
"""

from __future__ import annotations

from collections.abc import Sequence

from brokers.core.machine import Machine
from brokers.journal.journal import Journal
from brokers.reclaim import Reclaim

__all__ = ["NEARLY_FULL", "RoomKeeper"]

NEARLY_FULL = "the disk that holds the journal is nearly full; free some space and submit again"

LOOK_AGAIN = 0.2
"""Seconds between looks at a disk that was nearly full."""

UNSEEN = 8 << 20
"""Most bytes that come in before the disk is looked at again: others write to it too."""

PLENTY = 8
"""A disk with so many times what is needed is not nearly full: nothing has to be taken yet."""

STEP = 1 << 20
"""What is kept for later grows by so many bytes."""

SMALLEST_ROUND, LARGEST_ROUND = 64 << 10, 64 << 20


class RoomKeeper:
    """Keeps `machine.refusing` true to the disk that holds `journal`."""

    def __init__(self, machine: Machine, journal: Journal, reclaim: Reclaim) -> None:
        self._machine = machine
        self._journal = journal
        self._reclaim = reclaim
        self._unseen = 0
        self._look_at = 0.0

    @property
    def round_bytes(self) -> int:
        """How much may come in with one round, so that it fits into what is reserved already."""
        room = self._journal.room
        return max(SMALLEST_ROUND, min(LARGEST_ROUND, max(room.left, room.spare) // 2))

    def look(self, frames: Sequence[tuple[int, bytes, bytes, bytes]]) -> None:
        """Before a round takes these frames: may starts among them be taken?"""
        coming = 0
        for frame in frames:
            coming += len(frame[2]) + len(frame[3])
        self._unseen -= coming
        machine = self._machine
        now = machine.store.now
        if machine.refusing:
            if now < self._look_at:
                return
        elif self._unseen >= 0 and not self._journal.room.low:
            return
        self._look_at = now + LOOK_AGAIN
        spared = self._spared(coming)
        # What comes in takes room, and has to find some once more.
        self._unseen = min(spared // 4, UNSEEN)
        machine.refusing = NEARLY_FULL if spared < 0 else ""

    def _spared(self, coming: int) -> int:
        """Bytes that could be done without, with all that is `coming` written and all that is alive still in hand."""
        journal = self._journal
        if journal.room_low and not journal.prepare():
            return -1
        if coming > self.round_bytes and not journal.prepare(2 * coming):
            return -1
        needed = self._reclaim.needed + 2 * coming
        spared = self._beside() - needed
        if spared >= 0 or journal.free >= PLENTY * max(needed, UNSEEN):
            return spared if spared >= 0 else UNSEEN
        # Others write to this disk too: what has to be had is taken now.
        journal.prepare(-(-(needed - journal.room.left) // STEP) * STEP)
        while (spared := self._beside() - needed) < 0 and 0 < journal.room.spare < journal.free // 2:
            journal.seal()  # takes the spare, and another one is made of what is free
        return spared

    def _beside(self) -> int:
        """Bytes reserved beside what is used already, and beside the largest segment, which may be the one to go."""
        room = self._journal.room
        sizes = [segment.size for segment in self._journal.segments()]
        sizes.append(room.spare)
        return min(room.left + room.spare, sum(sizes) - max(sizes))
