"""All segments in their order, batch by batch, past damage too. It reads; what follows from it is for others to decide.

A survey may run beside the broker that writes the journal. Then what it sees may be older than what it saw before: a
batch that looked torn is looked at again after anything newer was seen, and a segment that has been given back is left
out.
"""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

from stageflow_brokers.journal.filesystem import FileSystem
from stageflow_brokers.journal.format import BATCH_HEADER, SECTOR, SUFFIX, Batch, SegmentHeader, file_name
from stageflow_brokers.journal.segment_reader import BrokenBatch, NextBatch, SegmentEnd, SegmentReader

__all__ = ["Damage", "JournalScanner", "ScannedSegment", "segment_numbers"]


class Damage(NamedTuple):
    """Bytes that cannot be read from `offset` of `segment` on, where batch `number` was to be.

    `fatal`: it lies in what was acknowledged. If not, it is the torn end of the last segment, which reaches to `torn`.
    At offset 0 the header is damaged, or the file missing; `rebuilt` is what the header must have said, where batches
    behind it tell. Elsewhere `salt` is the segment's. `until` is where something whole follows in it, or 0.
    `cut`: the file is shorter than it was made.
    """

    segment: int
    offset: int
    number: int
    reason: str
    fatal: bool
    torn: int = 0
    salt: int = 0
    rebuilt: SegmentHeader | None = None
    until: int = 0
    cut: bool = False

    @property
    def file(self) -> str:
        return file_name(self.segment)


class ScannedSegment(NamedTuple):
    """A segment read to its end: `end` is where batch `following` would begin; `marked`: an end mark is there, and
    says, if `followed`, that there is a next segment."""

    header: SegmentHeader
    end: int
    following: int
    marked: bool
    size: int
    followed: bool = False


def segment_numbers(files: FileSystem, directory: Path) -> list[int]:
    """The numbers of all segments in the directory, in order."""
    names = (name.removesuffix(SUFFIX) for name in files.listdir(directory) if name.endswith(SUFFIX))
    return sorted(int(name) for name in names if len(name) == 16 and name.isascii() and name.isdigit())


class JournalScanner:
    """`read` it once; `segments` then holds what was read to its end.

    Raises JournalVersion on a segment of a newer format.
    """

    def __init__(self, files: FileSystem, directory: Path) -> None:
        self.segments: list[ScannedSegment] = []
        self._files = files
        self._directory = directory
        self._numbers: list[int] = []

    def read(self) -> Generator[Batch | Damage, None, None]:
        """Whole batches and damage, as they come. Close it if you stop before its end: it holds an open file."""
        self._numbers = segment_numbers(self._files, self._directory)
        previous: ScannedSegment | None = None
        stopped: SegmentEnd | BrokenBatch = SegmentEnd(marked=True)
        at = -1  # the segment read last
        while (number := next((n for n in self._numbers if n > at), None)) is not None:
            if at >= 0 and number != at + 1 and self._still_there(at):
                yield Damage(at + 1, 0, previous.following if previous else 0, "the file is missing", fatal=True)
                previous = None
            try:
                reader = SegmentReader(self._files, self._directory, number)
            except FileNotFoundError:
                if self._still_there(number):
                    raise
                previous, at = None, number
                continue
            with reader:
                header = reader.header
                if isinstance(header, BrokenBatch):
                    if not self._still_there(number):
                        previous, at = None, number
                        continue
                    damage = self._bad_header(reader, header, previous)
                    yield damage
                    if damage.rebuilt is None:
                        previous, at = None, number
                        continue
                    header = damage.rebuilt
                if previous is not None and header.first != previous.following:
                    yield self._gap(previous, stopped, header)
                end = yield from self._chain(reader, header)
            previous, at = None, number
            if end is not None:
                previous, stopped = end
                self.segments.append(previous)

    def _chain(
        self, reader: SegmentReader, header: SegmentHeader
    ) -> Generator[Batch | Damage, None, tuple[ScannedSegment, SegmentEnd | BrokenBatch] | None]:
        """The batches of one segment. None at the end if the segment was given back meanwhile."""
        offset, number, salt = SECTOR, header.first, header.salt
        growing = False
        while True:
            later: NextBatch | None = None
            mark = 0
            found = reader.batch(offset, number, header)
            if not isinstance(found, Batch):
                # Behind the end of a segment that grows is only what was written since the rest was looked through.
                # To look through it each time would never come to an end beside a busy writer.
                if not growing and self._first_of(reader.number + 1) != number:
                    later, mark = reader.find_next_batch(offset, number, salt)
                again = self._look_again(reader, offset, number, header)
                if again is None:
                    return None
                goes_on = isinstance(again, Batch) and later is None and reader.number == self._numbers[-1]
                if growing and goes_on:
                    return ScannedSegment(header, offset, number, False, reader.size), SegmentEnd(marked=False)
                growing = goes_on
                found = again
            if isinstance(found, Batch):
                yield found
                offset, number = _behind(found, offset), number + 1
                continue
            if isinstance(found, SegmentEnd) and (later is not None or mark):
                found = BrokenBatch("a batch has been lost", mark)
            if isinstance(found, SegmentEnd):
                if found.followed and reader.number == self._numbers[-1]:
                    yield Damage(reader.number, offset, number, "the segment behind it is missing", True, salt=salt)
                return ScannedSegment(header, offset, number, found.marked, reader.size, found.followed), found
            damage = Damage(reader.number, offset, number, found.reason, fatal=True, salt=salt, cut=found.cut)
            if later is not None:
                yield damage._replace(until=later.offset)
                offset, number = later.offset, later.number
                continue
            yield from self._end(reader, found, damage, mark)
            return ScannedSegment(header, offset, number, False, reader.size), found

    def _look_again(
        self, reader: SegmentReader, offset: int, number: int, header: SegmentHeader
    ) -> Batch | SegmentEnd | BrokenBatch | None:
        """What stands there now, after anything newer was seen; None if the segment is there no more.

        A batch that was in the making then is whole now, if anything was written behind it. And a segment that is still
        there after it was read has not been given back, to be overwritten, before.
        """
        self._numbers = segment_numbers(self._files, self._directory)
        while reader.number in self._numbers:
            before = self._numbers
            reader.refresh()
            found = reader.batch(offset, number, header)
            self._numbers = segment_numbers(self._files, self._directory)
            if isinstance(found, Batch) or self._numbers == before:
                return found
        return None

    def _end(self, reader: SegmentReader, found: BrokenBatch, damage: Damage, mark: int) -> Iterator[Damage]:
        """Damage with nothing whole behind it in this segment, but perhaps its own end mark, which ends at `mark`."""
        if reader.number == self._numbers[-1]:
            torn = found.torn if found.torn is not None else reader.content_end(damage.offset)
            # What the disk does not give back is no torn write: perhaps it is all there, and another time to be read.
            yield damage._replace(fatal=found.unreadable, torn=max(torn, mark))
        elif self._first_of(reader.number + 1) is None:
            # A sealed segment ends cleanly. If the next one can be read, it says how many batches are missing here.
            yield damage

    def _gap(self, previous: ScannedSegment, stopped: SegmentEnd | BrokenBatch, header: SegmentHeader) -> Damage:
        last = header.first - 1
        lost = (
            f"batches {previous.following} to {last} are missing" if last > previous.following else "a batch is missing"
        )
        if header.first < previous.following:
            lost = f"{file_name(header.number)} begins again with batch {header.first}"
        reason = f"{stopped.reason}; {lost}" if isinstance(stopped, BrokenBatch) else lost
        number, salt = previous.header.number, previous.header.salt
        return Damage(number, previous.end, previous.following, reason, fatal=True, salt=salt)

    def _bad_header(self, reader: SegmentReader, broken: BrokenBatch, previous: ScannedSegment | None) -> Damage:
        number = previous.following if previous else 0
        guess = reader.rebuild_header()
        if guess is None:
            whole, _ = reader.find_next_batch(SECTOR, number, None)
            if whole is not None:
                guess = SegmentHeader(reader.number, whole.salt, number or whole.number, reader.size)
        return Damage(reader.number, 0, number, broken.reason, fatal=True, rebuilt=guess)

    def _first_of(self, number: int) -> int | None:
        """The number of the first batch of that segment, if it is there and says so."""
        if number not in self._numbers:
            return None
        try:
            with SegmentReader(self._files, self._directory, number) as reader:
                return reader.header.first if isinstance(reader.header, SegmentHeader) else None
        except FileNotFoundError:
            return None

    def _still_there(self, number: int) -> bool:
        self._numbers = segment_numbers(self._files, self._directory)
        return number in self._numbers


def _behind(batch: Batch, offset: int) -> int:
    """Where the batch after this one begins; O(1), as a survey of a large journal does it a hundred thousand times."""
    end = batch.blob_offsets[-1] + len(batch.records[-1].blob) if batch.records else offset + BATCH_HEADER
    return -(-end // SECTOR) * SECTOR
