"""Read all segments in order, batch by batch, and continue after damage. The caller decides what follows from damage.

A scanner may run beside the broker that writes the journal, and then may read old data after newer data. Therefore,
when it has read anything newer, it reads each batch that looked torn a second time; and it skips a segment that was
released.
"""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

from stageflow_brokers.journal.filesystem import FileSystem
from stageflow_brokers.journal.format import (
    BATCH_HEADER_BYTES,
    SECTOR_BYTES,
    SEGMENT_SUFFIX,
    Batch,
    SegmentHeader,
    file_name,
)
from stageflow_brokers.journal.segment_reader import BrokenBatch, NextBatch, SegmentEnd, SegmentReader

__all__ = ["Damage", "JournalScanner", "ScannedSegment", "segment_numbers"]


class Damage(NamedTuple):
    """A damaged place: `offset` in `segment`, where batch `number` is expected.

    At offset 0 the header is damaged or the file is missing.

    Args:
        segment: Number of the segment.
        offset: Offset in bytes.
        number: Number of the expected batch.
        reason: Description of the damage.
        fatal: True if it lies in acknowledged data. Otherwise it is the torn end of the last segment.
        torn_end: End of the torn data in bytes.
        salt: Salt of the segment; 0 if the header is damaged.
        rebuilt: Content of a damaged header, if batches after it show it.
        until: Offset of the next intact data; 0 if there is none.
        cut: True if the file is shorter than its header says.
    """

    segment: int
    offset: int
    number: int
    reason: str
    fatal: bool
    torn_end: int = 0
    salt: int = 0
    rebuilt: SegmentHeader | None = None
    until: int = 0
    cut: bool = False

    @property
    def file(self) -> str:
        return file_name(self.segment)


class ScannedSegment(NamedTuple):
    """A segment that was read to its end. `end` is the offset where batch `following` would begin.

    `marked`: it has an end mark. `followed`: the mark says that a next segment exists.
    """

    header: SegmentHeader
    end: int
    following: int
    marked: bool
    size: int
    followed: bool = False


def segment_numbers(files: FileSystem, directory: Path) -> list[int]:
    """Return the numbers of all segments in the directory, in order."""
    names = (name.removesuffix(SEGMENT_SUFFIX) for name in files.listdir(directory) if name.endswith(SEGMENT_SUFFIX))
    return sorted(int(name) for name in names if len(name) == 16 and name.isascii() and name.isdigit())


class JournalScanner:
    """Reads a journal once, with `read`; `segments` then holds the segments that were read to their end.

    Raises JournalVersion at a segment of a newer format.
    """

    def __init__(self, files: FileSystem, directory: Path) -> None:
        self.segments: list[ScannedSegment] = []
        self._files = files
        self._directory = directory
        self._numbers: list[int] = []

    def read(self) -> Generator[Batch | Damage, None, None]:
        """Yield intact batches and damage in order. Close the generator if you stop early: it holds an open file."""
        self._numbers = segment_numbers(self._files, self._directory)
        previous: ScannedSegment | None = None
        stopped: SegmentEnd | BrokenBatch = SegmentEnd(marked=True)
        at = -1  # the segment read last
        while (number := next((n for n in self._numbers if n > at), None)) is not None:
            if at >= 0 and number != at + 1 and self._exists(at):
                yield Damage(at + 1, 0, previous.following if previous else 0, "the file is missing", fatal=True)
                previous = None
            try:
                reader = SegmentReader(self._files, self._directory, number)
            except FileNotFoundError:
                if self._exists(number):
                    raise
                previous, at = None, number
                continue
            with reader:
                header = reader.header
                if isinstance(header, BrokenBatch):
                    if not self._exists(number):
                        previous, at = None, number
                        continue
                    damage = self._header_damage(reader, header, previous)
                    yield damage
                    if damage.rebuilt is None:
                        previous, at = None, number
                        continue
                    header = damage.rebuilt
                if previous is not None and header.first != previous.following:
                    yield self._missing_batches(previous, stopped, header)
                end = yield from self._read_segment(reader, header)
            previous, at = None, number
            if end is not None:
                previous, stopped = end
                self.segments.append(previous)

    def _read_segment(
        self, reader: SegmentReader, header: SegmentHeader
    ) -> Generator[Batch | Damage, None, tuple[ScannedSegment, SegmentEnd | BrokenBatch] | None]:
        """Yield the batches of one segment; return its end, or None if the segment was released at the same time."""
        offset, number, salt = SECTOR_BYTES, header.first, header.salt
        growing = False
        while True:
            next_batch: NextBatch | None = None
            mark = 0
            found = reader.read_batch(offset, number, header)
            if not isinstance(found, Batch):
                # After the end of a growing segment lies only data written since the last search. Searching it each
                # time would never end beside a busy writer.
                if not growing and self._first_batch_of(reader.number + 1) != number:
                    next_batch, mark = reader.find_next_batch(offset, number, salt)
                current = self._reread(reader, offset, number, header)
                if current is None:
                    return None
                continues = isinstance(current, Batch) and next_batch is None and reader.number == self._numbers[-1]
                if growing and continues:
                    return ScannedSegment(header, offset, number, False, reader.size), SegmentEnd(marked=False)
                growing = continues
                found = current
            if isinstance(found, Batch):
                yield found
                offset, number = _offset_after(found, offset), number + 1
                continue
            if isinstance(found, SegmentEnd) and (next_batch is not None or mark):
                found = BrokenBatch("a batch has been lost", mark)
            if isinstance(found, SegmentEnd):
                if found.followed and reader.number == self._numbers[-1]:
                    yield Damage(reader.number, offset, number, "the segment after it is missing", True, salt=salt)
                return ScannedSegment(header, offset, number, found.marked, reader.size, found.followed), found
            damage = Damage(reader.number, offset, number, found.reason, fatal=True, salt=salt, cut=found.cut)
            if next_batch is not None:
                yield damage._replace(until=next_batch.offset)
                offset, number = next_batch.offset, next_batch.number
                continue
            yield from self._classify_end(reader, found, damage, mark)
            return ScannedSegment(header, offset, number, False, reader.size), found

    def _reread(
        self, reader: SegmentReader, offset: int, number: int, header: SegmentHeader
    ) -> Batch | SegmentEnd | BrokenBatch | None:
        """Read the batch at `offset` again, after newer data was read; return None if the segment was released.

        A batch that was being written is intact now if anything was written after it. A segment that still exists
        after the read was not released, and so not overwritten, before.
        """
        self._numbers = segment_numbers(self._files, self._directory)
        while reader.number in self._numbers:
            before = self._numbers
            reader.refresh()
            found = reader.read_batch(offset, number, header)
            self._numbers = segment_numbers(self._files, self._directory)
            if isinstance(found, Batch) or self._numbers == before:
                return found
        return None

    def _classify_end(self, reader: SegmentReader, found: BrokenBatch, damage: Damage, mark: int) -> Iterator[Damage]:
        """Yield damage that nothing intact follows in this segment, except its own end mark up to `mark`, if any."""
        if reader.number == self._numbers[-1]:
            end = found.torn_end if found.torn_end is not None else reader.content_end(damage.offset)
            # Unreadable data is not a torn write: it may be complete, and readable at another time.
            yield damage._replace(fatal=found.unreadable, torn_end=max(end, mark))
        elif self._first_batch_of(reader.number + 1) is None:
            # A sealed segment ends cleanly. If the next one can be read, it shows how many batches are missing here.
            yield damage

    def _missing_batches(
        self, previous: ScannedSegment, stopped: SegmentEnd | BrokenBatch, header: SegmentHeader
    ) -> Damage:
        last = header.first - 1
        lost = (
            f"batches {previous.following} to {last} are missing" if last > previous.following else "a batch is missing"
        )
        if header.first < previous.following:
            lost = f"{file_name(header.number)} repeats batch {header.first}"
        reason = f"{stopped.reason}; {lost}" if isinstance(stopped, BrokenBatch) else lost
        number, salt = previous.header.number, previous.header.salt
        return Damage(number, previous.end, previous.following, reason, fatal=True, salt=salt)

    def _header_damage(self, reader: SegmentReader, broken: BrokenBatch, previous: ScannedSegment | None) -> Damage:
        number = previous.following if previous else 0
        guess = reader.rebuild_header()
        if guess is None:
            whole, _ = reader.find_next_batch(SECTOR_BYTES, number, None)
            if whole is not None:
                guess = SegmentHeader(reader.number, whole.salt, number or whole.number, reader.size)
        return Damage(reader.number, 0, number, broken.reason, fatal=True, rebuilt=guess)

    def _first_batch_of(self, number: int) -> int | None:
        """Return the number of the first batch of a segment; None if it is missing or its header is damaged."""
        if number not in self._numbers:
            return None
        try:
            with SegmentReader(self._files, self._directory, number) as reader:
                return reader.header.first if isinstance(reader.header, SegmentHeader) else None
        except FileNotFoundError:
            return None

    def _exists(self, number: int) -> bool:
        self._numbers = segment_numbers(self._files, self._directory)
        return number in self._numbers


def _offset_after(batch: Batch, offset: int) -> int:
    """Return where the next batch begins. O(1), because a large journal has hundreds of thousands of batches."""
    end = batch.blob_offsets[-1] + len(batch.records[-1].blob) if batch.records else offset + BATCH_HEADER_BYTES
    return -(-end // SECTOR_BYTES) * SECTOR_BYTES
