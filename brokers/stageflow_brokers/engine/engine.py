"""One round of the broker: drain, commit, dispatch. Joins the machine to its journal; knows no transport.

The order here is the promise of the whole product: what a round decided is on disk before any of it leaves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from stageflow_brokers.core.machine import Limits, Machine
from stageflow_brokers.core.message import RecordLocation
from stageflow_brokers.core.outbox import Outgoing
from stageflow_brokers.core.replay import Replay
from stageflow_brokers.engine.compaction import Compactor
from stageflow_brokers.engine.disk_space import LARGEST_ROUND, NEARLY_FULL, DiskSpaceGuard, Frame
from stageflow_brokers.errors import JournalCorrupt, JournalFailed, JournalFull, ProtocolError
from stageflow_brokers.failpoints import failpoint
from stageflow_brokers.journal.filesystem import FileSystem
from stageflow_brokers.journal.format import Batch, Record, file_name
from stageflow_brokers.journal.journal import Journal

__all__ = ["Engine", "Frame", "Outgoing", "check_oldest", "replay_batch"]

_SENSELESS = (
    ProtocolError,
    msgspec.MsgspecError,
    ArithmeticError,
    AssertionError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a replay may raise for a record that is whole and makes no sense."""

HOLDING_RETRY = 0.05
"""Seconds between looks at whether there is room by now for what waits."""

FULL_RETRY = 0.2
"""Seconds between tries when the disk has no room for the next segment."""


def replay_batch(replay: Replay, batch: Batch) -> None:
    """Give each record of a batch to a replay. Raises `JournalCorrupt` where one makes no sense."""
    for record, offset in zip(batch.records, batch.blob_offsets, strict=True):
        place = RecordLocation(batch.wall, batch.segment, offset, batch.offset)
        try:
            replay.apply(record.kind, record.first_id, record.peer, record.header, record.blob, place)
        except _SENSELESS as error:
            file, reason = file_name(batch.segment), f"{type(error).__name__}: {error}"
            raise JournalCorrupt(
                f"{file} holds a record at offset {batch.offset} that this release cannot understand ({reason}): was "
                "it written by a newer release? Use that, or restore a backup",
                file=file,
                offset=batch.offset,
                reason=reason,
            ) from error


def check_oldest(replay: Replay, first: int) -> None:
    """That no segment is missing before `first`, the first one that was replayed. Raises `JournalCorrupt`."""
    if 0 < replay.oldest < first:
        file = file_name(replay.oldest)
        raise JournalCorrupt(
            f"{file} is missing: the segments from there to {file_name(first - 1)} were not given back, and hold what "
            "was acknowledged. Nothing has been changed; restore a backup",
            file=file,
            offset=0,
            reason="the file is missing",
        )


class Engine:
    """A machine, and the journal it answers to (None: messages live as long as this object).

    `stop_requested` is asked while the disk is full: true ends the wait, and the round raises `JournalFull`.
    """

    def __init__(
        self,
        *,
        journal_dir: Path | None,
        durability: Literal["fsync", "write"] = "fsync",
        limits: Limits | None = None,
        supervised: bool = False,
        segment_bytes: int = 64 << 20,
        warn: Callable[[str], None] = lambda text: None,
        files: FileSystem | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._giving_up = stop_requested
        self._failed = ""
        self._stated_in = 0
        self.machine = Machine(
            limits=limits, supervised=supervised, paging=journal_dir is not None, read_body=self._read_body
        )
        self.journal: Journal | None = None
        self._reclaim: Compactor | None = None
        self._room: DiskSpaceGuard | None = None
        if journal_dir is not None:
            replay = Replay(self.machine.state)
            self.journal = Journal.open(
                journal_dir,
                replay=lambda batch: replay_batch(replay, batch),
                durability=durability,
                segment_bytes=segment_bytes,
                warn=warn,
                files=files,
            )
            try:
                check_oldest(replay, self.journal.segments()[0].number)
            except JournalCorrupt:
                self.journal.close()
                raise
            self._reclaim = Compactor(self.machine, self.journal, segment_bytes)
            self._room = DiskSpaceGuard(self.machine, self.journal, self._reclaim)
        failpoint("broker.recovered")
        now, wall_now = monotonic(), wall()
        self.machine.begin(now, wall_now)
        self.machine.begin_epoch(now, wall_now)
        if self.journal is not None:
            self.machine.writer.keep_oldest(self.journal.segments()[0].number)
        self._commit()
        failpoint("broker.started")

    def round(self, frames: Sequence[Frame], *, more: bool = False) -> list[Outgoing]:
        """Take frames, do what is due, make it durable, and give what may leave. `more`: further frames wait already.

        Raises `JournalFailed` when what is on disk is unknown: end the process then. Whoever does not is told so again
        in every round: what the failed one had ready to be said must never leave.
        """
        if self._failed:
            raise JournalFailed(f"the broker has failed before and says nothing any more: {self._failed}")
        try:
            return self._round(frames, more)
        except BaseException as error:
            self._failed = str(error) or repr(error)
            raise

    def _round(self, frames: Sequence[Frame], more: bool) -> list[Outgoing]:
        machine = self.machine
        machine.begin(self._monotonic(), self._wall())
        holding = False
        if self._room is not None:
            self._room.look(frames)
            frames = self._room.admit(frames)
            holding = self._room.holding
        for peer, operation, header, blob in frames:
            machine.receive(peer, operation, header, blob)
        if self._room is None or not self._room.cramped:
            # What somebody said before it died may be among what waits for room.
            machine.tick(more=more or holding)
        if frames:
            failpoint("broker.received")
        written = self._commit()
        if written:
            failpoint("broker.committed")
        if self._reclaim is None:
            machine.compacting = False
        else:
            if machine.compacting:
                self._reclaim.compact()
            if written or machine.compacting or machine.refusal_reason:
                self._reclaim.step(written, pressed=bool(machine.refusal_reason))
            machine.compacting = self._reclaim.compacting
        return machine.dispatch()

    def next_timeout(self, most: float) -> float:
        """Seconds until the next round must be, if nothing arrives; at most `most`."""
        machine = self.machine
        if machine.writer.records or machine.state.touched or machine.compacting:
            return 0.0
        if machine.refusal_reason and self._reclaim is not None and self._reclaim.busy:
            return 0.0
        if self._room is not None and (self._room.holding or self._room.cramped):
            return min(most, HOLDING_RETRY)
        due = machine.next_deadline()
        return most if due is None else min(most, max(0.0, due - self._monotonic()))

    @property
    def round_bytes(self) -> int:
        """How many bytes of frames a round should take at most."""
        return LARGEST_ROUND if self._room is None else self._room.round_bytes

    def close(self) -> None:
        """Let go of the journal."""
        if self.journal is not None:
            self.journal.close()

    def _commit(self) -> int:
        records = self.machine.take_records()
        if not records:
            return 0
        if self.journal is None:
            self.machine.set_record_locations(-1, -1, [-1] * len(records))
            return 0
        batch = [Record(*record) for record in records]
        while True:
            try:
                place = self.journal.commit(batch, self.machine.state.wall)
                break
            except JournalFull:
                # Nothing was written and nothing has left: wait for room, with everything still to be said. What comes
                # in waits before it is decided, and does not get here; what the broker decides by itself may.
                if self._reclaim is not None and self._reclaim.give_way():
                    continue
                if self._giving_up():
                    raise
                self.machine.refusal_reason = NEARLY_FULL
                time.sleep(FULL_RETRY)
        self.machine.set_record_locations(place.segment, place.batch, place.blob_offsets)
        if place.segment != self._stated_in:
            # Said in each segment: whichever are lost, those that are left tell of it.
            if self._stated_in:
                self.machine.writer.keep_oldest(self.journal.segments()[0].number)
            self._stated_in = place.segment
        if self.journal.room_low:
            self.machine.refusal_reason = NEARLY_FULL
        return place.blob_offsets[-1] - place.blob_offsets[0] + len(batch[-1].blob) + 1

    def _read_body(self, segment: int, batch: int, offset: int, size: int) -> bytes:
        assert self.journal is not None
        return self.journal.read(segment, offset, size, batch=batch)
