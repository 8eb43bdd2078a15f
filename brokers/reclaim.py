"""Giving the oldest segments of the journal back, while the broker works.

A slice of what is alive in the oldest segment is recorded again with each commit, so that no round waits for it; when
nothing there is alive any more, and the records that say so are on disk, the segment goes. Never another than
the oldest: it may hold the acknowledgement of a message that an older one still holds.
"""

from __future__ import annotations

from brokers.core.machine import Machine
from brokers.journal.journal import Journal

__all__ = ["Reclaim"]

SLICE = 1 << 20
"""Fewest bytes to copy with one commit; a commit that wrote more makes room for as much."""

SEGMENTS_SPARED = 3
"""Segments beyond twice what is alive before any is given back: rewriting less often costs disk, no time."""

PER_MESSAGE, PER_GROUP = 128, 64
"""About how many bytes of journal one takes, the bodies left out."""


class Reclaim:
    """The reclaiming of one journal."""

    def __init__(self, machine: Machine, journal: Journal, segment_bytes: int) -> None:
        self._machine = machine
        self._journal = journal
        self._segment_bytes = segment_bytes
        self._oldest = 0
        self._restated = False
        self._all_before = 0

    @property
    def compacting(self) -> bool:
        """Whether every segment is being given back that was sealed when this was asked for."""
        return self._all_before > 0

    def compact(self) -> None:
        """Give back all segments but the open one, whether it is worthwhile or not."""
        if not self._all_before:
            self._all_before = self._journal.segments()[-1].number

    def step(self, written: int) -> None:
        """To be called after each commit, of about `written` bytes. What is recorded here goes with the next one."""
        journal = self._journal
        if not self._oldest:
            segments = journal.segments()
            if self._all_before:
                if segments[0].number >= self._all_before:
                    self._all_before = 0
                    return
            elif len(segments) <= SEGMENTS_SPARED or not self._worthwhile(sum(each.used for each in segments)):
                return
            self._oldest = segments[0].number
            self._restated = False
        if self._machine.ledger.copy_forward(self._oldest, max(SLICE, written)):
            return
        if not self._restated:
            self._machine.ledger.restate()
            self._restated = True
            return
        journal.drop_oldest()
        self._oldest = 0

    def _worthwhile(self, used: int) -> bool:
        store = self._machine.store
        alive = store.live_bytes + PER_MESSAGE * len(store.messages) + PER_GROUP * len(store.groups)
        return used > 2 * alive + SEGMENTS_SPARED * self._segment_bytes
