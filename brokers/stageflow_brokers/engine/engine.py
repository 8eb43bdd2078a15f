"""One round of the broker: receive, decide, commit, dispatch. Joins the machine to its journal, without a transport.

The order is the central promise of the product: the decisions of a round are on disk before any of them leaves. The
engine must never dispatch before the commit has succeeded.
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
from stageflow_brokers.engine.disk_space import MAX_ROUND_BYTES, NEARLY_FULL, DiskSpaceGuard, Frame
from stageflow_brokers.errors import JournalCorrupt, JournalFailed, JournalFull, ProtocolError
from stageflow_brokers.failpoints import failpoint
from stageflow_brokers.journal.filesystem import FileSystem
from stageflow_brokers.journal.format import Batch, Record, file_name
from stageflow_brokers.journal.journal import Journal
from stageflow_brokers.pause_flags import PauseFlags

__all__ = ["Engine", "Frame", "Outgoing", "check_oldest", "replay_batch"]

_REPLAY_ERRORS = (
    ProtocolError,
    msgspec.MsgspecError,
    ArithmeticError,
    AssertionError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""Errors that a replay may raise for a record that is undamaged, but cannot be decoded or applied."""

HELD_FRAMES_RETRY_SECONDS = 0.05
"""Seconds between rounds while frames wait for disk space."""

DISK_FULL_RETRY_SECONDS = 0.2
"""Seconds between attempts to commit while the disk has no space for the next segment."""


def replay_batch(replay: Replay, batch: Batch) -> None:
    """Replay each record of a batch. Raises `JournalCorrupt` if a record cannot be understood."""
    for record, offset in zip(batch.records, batch.blob_offsets, strict=True):
        location = RecordLocation(batch.wall, batch.segment, offset, batch.offset)
        try:
            replay.apply(record.kind, record.first_id, record.peer, record.header, record.blob, location)
        except _REPLAY_ERRORS as error:
            file, reason = file_name(batch.segment), f"{type(error).__name__}: {error}"
            raise JournalCorrupt(
                f"{file} holds a record at offset {batch.offset} that this release cannot understand ({reason}); if a "
                "newer release wrote the journal, use that release, otherwise restore a backup",
                file=file,
                offset=batch.offset,
                reason=reason,
            ) from error


def check_oldest(replay: Replay, first: int) -> None:
    """Check that no segment before `first`, the first one replayed, is missing. Raises `JournalCorrupt`."""
    if 0 < replay.oldest < first:
        file = file_name(replay.oldest)
        raise JournalCorrupt(
            f"{file} is missing: the segments from it to {file_name(first - 1)} were not deleted by compaction and "
            "hold acknowledged data. Nothing has been changed; restore a backup",
            file=file,
            offset=0,
            reason="the file is missing",
        )


class Engine:
    """A machine together with its journal.

    Args:
        journal_dir: Directory of the journal. None: messages live as long as this object.
        durability: "fsync" syncs each commit; "write" leaves that to the operating system.
        limits: Limits of the machine. Default: those of `Limits`.
        supervised: True if nothing is delivered before a supervisor has reported the workers.
        segment_bytes: Size of a segment once the journal has grown. Default: 64 MiB.
        warn: Called with a sentence if recovery cuts off a torn end.
        files: The file system. Default: that of the operating system.
        monotonic: Clock for timers, in seconds.
        wall: Clock for records, in seconds since 1970.
        pause_flags: Flags of paused queues that workers read. Default: none.
        stop_requested: Polled while the disk is full. True ends the wait, and the round raises `JournalFull`.
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
        pause_flags: PauseFlags | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._stop_requested = stop_requested
        self._pause_flags = pause_flags
        self._failed = ""
        self._oldest_recorded_in = 0
        self.machine = Machine(
            limits=limits, supervised=supervised, paging=journal_dir is not None, read_body=self._read_body
        )
        self.journal: Journal | None = None
        self._compactor: Compactor | None = None
        self._disk_space: DiskSpaceGuard | None = None
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
            self._compactor = Compactor(self.machine, self.journal, segment_bytes)
            self._disk_space = DiskSpaceGuard(self.machine, self.journal, self._compactor)
        failpoint("broker.recovered")
        now, wall_now = monotonic(), wall()
        self.machine.begin(now, wall_now)
        self.machine.begin_epoch(now, wall_now)
        if self.journal is not None:
            self.machine.writer.record_oldest(self.journal.segments()[0].number)
        self._commit()
        if pause_flags is not None:
            pause_flags.set_all([queue.name for queue in self.machine.state.queues.values() if queue.paused])
        failpoint("broker.started")

    def round(self, frames: Sequence[Frame], *, more: bool = False) -> list[Outgoing]:
        """Receive frames, run due timers, commit, and return the frames to send. `more`: further frames wait already.

        Raises `JournalFailed` if the state on disk is unknown: the process must end. Every later round raises it
        again, because the outgoing frames of the failed round must never leave.
        """
        if self._failed:
            raise JournalFailed(f"the broker stopped after an earlier failure, restart it: {self._failed}")
        try:
            return self._round(frames, more)
        except BaseException as error:
            self._failed = str(error) or repr(error)
            raise

    def _round(self, frames: Sequence[Frame], more: bool) -> list[Outgoing]:
        machine = self.machine
        machine.begin(self._monotonic(), self._wall())
        holding = False
        if self._disk_space is not None:
            self._disk_space.check_disk(frames)
            frames = self._disk_space.admit(frames)
            holding = self._disk_space.is_holding
        for peer, operation, header, blob in frames:
            machine.receive(peer, operation, header, blob)
        if self._disk_space is None or not self._disk_space.is_exhausted:
            # The last frames of a peer that died may be among the held ones.
            machine.tick(more=more or holding)
        if frames:
            failpoint("broker.received")
        written = self._commit()
        if written:
            failpoint("broker.committed")
        if machine.state.pause_changes:
            self._set_pause_flags(machine.state.pause_changes)
        if self._compactor is None:
            machine.compacting = False
        else:
            if machine.compacting:
                self._compactor.compact()
            if written or machine.compacting or machine.refusal_reason:
                self._compactor.advance(written, space_low=bool(machine.refusal_reason))
            machine.compacting = self._compactor.is_compacting
        return machine.dispatch()

    def next_timeout(self, most: float) -> float:
        """Return the seconds until the next round must run if no frame arrives; at most `most`."""
        machine = self.machine
        if machine.writer.records or machine.state.changed_queues or machine.compacting:
            return 0.0
        if machine.refusal_reason and self._compactor is not None and self._compactor.is_busy:
            return 0.0
        if self._disk_space is not None and (self._disk_space.is_holding or self._disk_space.is_exhausted):
            return min(most, HELD_FRAMES_RETRY_SECONDS)
        due = machine.next_deadline()
        return most if due is None else min(most, max(0.0, due - self._monotonic()))

    @property
    def round_bytes(self) -> int:
        """The most bytes of frames that a round should receive."""
        return MAX_ROUND_BYTES if self._disk_space is None else self._disk_space.round_bytes

    def close(self) -> None:
        """Close the journal."""
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
                location = self.journal.commit(batch, self.machine.state.wall)
                break
            except JournalFull:
                # Nothing was written or sent: keep everything and wait for space. Frames without space are held before
                # they change anything, so only decisions of the broker itself, such as timers, get here.
                if self._compactor is not None and self._compactor.free_segment():
                    continue
                if self._stop_requested():
                    raise
                self.machine.refusal_reason = NEARLY_FULL
                time.sleep(DISK_FULL_RETRY_SECONDS)
        self.machine.set_record_locations(location.segment, location.batch, location.blob_offsets)
        if location.segment != self._oldest_recorded_in:
            # Each segment records the oldest one: whichever segments are lost, a remaining one reveals the loss.
            if self._oldest_recorded_in:
                self.machine.writer.record_oldest(self.journal.segments()[0].number)
            self._oldest_recorded_in = location.segment
        if self.journal.is_space_low:
            self.machine.refusal_reason = NEARLY_FULL
        return location.blob_offsets[-1] - location.blob_offsets[0] + len(batch[-1].blob) + 1

    def _set_pause_flags(self, changes: dict[str, bool]) -> None:
        """Set the flags before the answers leave: after the answer to a pause, no message of the queue begins."""
        if self._pause_flags is not None:
            for queue, paused in changes.items():
                self._pause_flags.set(queue, paused)
        changes.clear()

    def _read_body(self, segment: int, batch: int, offset: int, size: int) -> bytes:
        assert self.journal is not None
        return self.journal.read(segment, offset, size, batch=batch)
