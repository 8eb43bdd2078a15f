"""One segment, read: what stands at an offset, and where the next whole batch is. Nothing here writes.

A length is believed only after it has been checked against the size of the file, so no damage makes this allocate more
than the file holds.
"""

from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from brokers.errors import JournalVersion
from brokers.journal.files import Files, read_at
from brokers.journal.format import (
    BATCH_HEADER,
    BATCH_MARKER,
    SECTOR,
    VERSION,
    Batch,
    BatchHeader,
    SegmentHeader,
    file_name,
    is_batch,
    is_end,
    parse_records,
    read_header,
    read_segment,
)

__all__ = ["Broken", "End", "Later", "SegmentReader"]

WINDOW = 4 << 20


class End(NamedTuple):
    """A clean end. `marked` is false where the file ends without an end mark, as a full segment does."""

    marked: bool


class Broken(NamedTuple):
    """Neither a whole batch nor a clean end. `torn` is where a batch that claims to begin here would end, or None."""

    reason: str
    torn: int | None = None


class Later(NamedTuple):
    """A whole batch further on."""

    offset: int
    number: int
    salt: int


class SegmentReader:
    """An open segment. Raises FileNotFoundError if it is not there, JournalVersion if it is of a newer format."""

    def __init__(self, files: Files, directory: Path, number: int) -> None:
        self.number = number
        self.name = file_name(number)
        self._files = files
        self._fd = files.open(directory / self.name, write=False)
        try:
            self.size = files.size(self._fd)
            self.header = self._read_header()
        except BaseException:
            files.close(self._fd)
            raise
        self._start = 0
        self._window = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close(self._fd)

    def _read_header(self) -> SegmentHeader | Broken:
        header = read_segment(read_at(self._files, self._fd, SECTOR, 0))
        if isinstance(header, int):
            raise JournalVersion(
                f"{self.name} has format version {header}, this program reads versions up to {VERSION}: "
                "use the program that wrote it, or a newer one",
                file=self.name,
                found=header,
                supported=VERSION,
            )
        if isinstance(header, str):
            return Broken(header)
        if header.number != self.number:
            return Broken(f"the file holds segment {header.number}")
        return header

    def batch(self, offset: int, number: int, salt: int) -> Batch | End | Broken:
        """What stands at `offset`, where batch `number` would follow."""
        left = self.size - offset
        if left <= 0:
            return End(marked=False)
        if left < BATCH_HEADER:
            return Broken("the file ends inside a batch header")
        header = read_header(self._view(offset, BATCH_HEADER))
        if is_end(header, number - 1, salt):
            return End(marked=True)
        if header.marker != BATCH_MARKER:
            return Broken("neither a batch nor an end mark is here")
        if header.salt != salt:
            return Broken("the batch here belongs to an earlier life of this file")
        if header.number != number:
            return Broken(f"batch {header.number} is here instead of batch {number}")
        if BATCH_HEADER + header.length > left:
            return Broken(f"the length of batch {number} reaches past the end of the file", self.size)
        return self._whole(offset, header)

    def _whole(self, offset: int, header: BatchHeader) -> Batch | Broken:
        """The batch whose header is at `offset` and fits into the file."""
        view = self._view(offset, BATCH_HEADER + header.length)
        torn = offset + len(view)
        if not is_batch(header, view):
            return Broken(f"the checksum of batch {header.number} does not match", torn)
        try:
            records, offsets = parse_records(view[BATCH_HEADER:], header.records, offset + BATCH_HEADER)
        except ValueError as error:
            return Broken(f"the records of batch {header.number} make no sense: {error}", torn)
        return Batch(header.number, self.number, header.wall, records, offsets)

    def later(self, offset: int, number: int, salt: int | None) -> Later | None:
        """The first whole batch at `offset` or behind it whose number is `number` or higher; any salt if it is None."""
        while offset < self.size:
            chunk = read_at(self._files, self._fd, WINDOW, offset)
            hit = chunk.find(BATCH_MARKER)
            while hit >= 0:
                if hit % SECTOR == 0 and (found := self._later_at(offset + hit, number, salt)):
                    return found
                hit = chunk.find(BATCH_MARKER, hit + 1)
            if not chunk:
                return None
            offset += len(chunk)
        return None

    def _later_at(self, offset: int, number: int, salt: int | None) -> Later | None:
        left = self.size - offset
        if left < BATCH_HEADER:
            return None
        header = read_header(self._view(offset, BATCH_HEADER))
        if header.number < number or (salt is not None and header.salt != salt) or BATCH_HEADER + header.length > left:
            return None
        if isinstance(self._whole(offset, header), Broken):
            return None
        return Later(offset, header.number, header.salt)

    def guess_header(self) -> SegmentHeader | None:
        """What a damaged header must have said, by the batch or the end mark behind it."""
        if self.size < SECTOR + BATCH_HEADER:
            return None
        header = read_header(self._view(SECTOR, BATCH_HEADER))
        if is_end(header, header.number, header.salt):
            return SegmentHeader(self.number, header.salt, header.number + 1, self.size)
        if header.marker == BATCH_MARKER and self._later_at(SECTOR, header.number, header.salt):
            return SegmentHeader(self.number, header.salt, header.number, self.size)
        return None

    def refresh(self) -> None:
        """Forget what was read ahead: a writer may have gone on since."""
        self._window = b""
        self.size = self._files.size(self._fd)

    def used(self, offset: int) -> int:
        """Where the last byte from `offset` on ends that is not zero; `offset` if there is none."""
        used = at = offset
        while at < self.size and (chunk := read_at(self._files, self._fd, WINDOW, at)):
            if content := chunk.rstrip(b"\0"):
                used = at + len(content)
            at += len(chunk)
        return used

    def _view(self, offset: int, size: int) -> memoryview:
        """`size` bytes at `offset`, which the caller has compared with the size of the file."""
        start = offset - self._start
        if start < 0 or start + size > len(self._window):
            self._window = read_at(self._files, self._fd, max(size, min(WINDOW, self.size - offset)), offset)
            self._start, start = offset, 0
            if len(self._window) < size:  # cut off since we looked; zeros are not whole either
                self._window = self._window.ljust(size, b"\0")
        return memoryview(self._window)[start : start + size]
