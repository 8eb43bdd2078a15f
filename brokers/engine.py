"""One round of the broker: drain, commit, dispatch. Joins the machine to its journal; knows no transport.

The order here is the promise of the whole product: what a round decided is on disk before any of it leaves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from brokers.core.machine import Limits, Machine
from brokers.core.message import Place
from brokers.core.replay import Replay
from brokers.errors import JournalFull
from brokers.journal.format import Batch, Record
from brokers.journal.journal import Journal

__all__ = ["Engine", "Frame", "Outgoing"]

Frame = tuple[int, bytes, bytes, bytes]
"""(peer, operation, header, blob) as it came in."""

Outgoing = tuple[int, bytes, bytes]
"""(peer, header, blob) to be sent."""

SEGMENTS_SPARED = 3
"""Segments beyond twice the live bytes before the oldest is copied forward: rewriting less often costs disk, no time."""


FULL_RETRY = 0.2
"""Seconds between tries when the disk has no room for the next segment."""


class Engine:
    """A machine, and the journal it answers to (None: messages live as long as this object)."""

    def __init__(
        self,
        *,
        journal_dir: Path | None,
        durability: Literal["fsync", "write"] = "fsync",
        limits: Limits | None = None,
        supervised: bool = False,
        segment_bytes: int = 64 << 20,
        warn: Callable[[str], None] = lambda text: None,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._segment_bytes = segment_bytes
        self.machine = Machine(
            limits=limits, supervised=supervised, paging=journal_dir is not None, read_body=self._read_body
        )
        self.journal: Journal | None = None
        if journal_dir is not None:
            replay = Replay(self.machine.store)

            def replay_batch(batch: Batch) -> None:
                for record, offset in zip(batch.records, batch.blob_offsets, strict=True):
                    place = Place(batch.wall, batch.segment, offset)
                    replay.apply(
                        record.kind, record.first_id, record.peer, bytes(record.header), bytes(record.blob), place
                    )

            self.journal = Journal.open(
                journal_dir, replay=replay_batch, durability=durability, segment_bytes=segment_bytes, warn=warn
            )
        now, wall_now = monotonic(), wall()
        self.machine.begin(now, wall_now)
        self.machine.started(now, wall_now)
        self._commit()

    def round(self, frames: Iterable[Frame]) -> list[Outgoing]:
        """Take frames, do what is due, make it durable, and give what may leave. Raises `JournalFailed` to end it all."""
        machine = self.machine
        machine.begin(self._monotonic(), self._wall())
        for peer, operation, header, blob in frames:
            machine.receive(peer, operation, header, blob)
        machine.tick()
        if self._commit():
            self._reclaim()
        return machine.dispatch()

    def patience(self, most: float) -> float:
        """Seconds until the next round must be, if nothing arrives; at most `most`."""
        due = self.machine.next_deadline()
        return most if due is None else min(most, max(0.0, due - self._monotonic()))

    def close(self) -> None:
        """Let go of the journal."""
        if self.journal is not None:
            self.journal.close()

    def _commit(self) -> bool:
        records = self.machine.take_records()
        if not records:
            return False
        if self.journal is None:
            self.machine.placed(-1, [-1] * len(records))
            return False
        batch = [Record(*record) for record in records]
        while True:
            try:
                place = self.journal.commit(batch, self.machine.store.wall)
                break
            except JournalFull:
                # Nothing was written and nothing has left: wait for room, with everything still to be said.
                self._refuse_starts()
                time.sleep(FULL_RETRY)
        self.machine.placed(place.segment, place.blob_offsets)
        if self.journal.room_low and not self.journal.prepare():
            self._refuse_starts()
        elif self.machine.refusing:
            self.machine.refusing = ""
        return True

    def _refuse_starts(self) -> None:
        self.machine.refusing = "the disk that holds the journal is nearly full; free some space and submit again"

    def _reclaim(self) -> None:
        """Give the oldest segment back, once what is alive in it has been written again and synced."""
        assert self.journal is not None
        segments = self.journal.segments()
        if len(segments) <= SEGMENTS_SPARED:
            return
        total = sum(segment.used for segment in segments)
        if total <= 2 * self.machine.store.live_bytes + SEGMENTS_SPARED * self._segment_bytes:
            return
        self.machine.copy_forward(segments[0].number)
        self._commit()
        self.journal.drop_oldest()

    def _read_body(self, segment: int, offset: int, size: int) -> bytes:
        assert self.journal is not None
        return self.journal.read(segment, offset, size)
