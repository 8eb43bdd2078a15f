"""Read one segment: the batch at an offset, and the next intact batch after damage.

This module must never write. It checks each length against the size of the file, so damage cannot make it allocate more
memory than the file has bytes.
"""

from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self
from zlib import crc32

from stageflow_brokers.errors import JournalVersion
from stageflow_brokers.journal.filesystem import FileSystem, read_around, read_at
from stageflow_brokers.journal.format import (
    BATCH_HEADER_BYTES,
    BATCH_MARKER,
    END_MARKERS,
    FOLLOWED_MARKER,
    FORMAT_VERSION,
    SECTOR_BYTES,
    Batch,
    BatchHeader,
    SegmentHeader,
    file_name,
    has_batch_checksum,
    is_end_mark,
    parse_records,
    read_header,
    read_segment,
)

__all__ = ["BrokenBatch", "NextBatch", "SegmentEnd", "SegmentReader", "check_batch"]

WINDOW_BYTES = 4 << 20
_PIECE_BYTES = 1 << 20


class SegmentEnd(NamedTuple):
    """A clean end. `marked` is false if a full segment of an earlier release ends without an end mark.

    `followed`: the mark says that a next segment exists.
    """

    marked: bool
    followed: bool = False


class BrokenBatch(NamedTuple):
    """Neither an intact batch nor a clean end. `torn_end` is the end of the batch according to its header, or None.

    `unreadable`: the disk cannot read the bytes, so their content is unknown. `cut`: the file is shorter than its
    header says, which no crash causes.
    """

    reason: str
    torn_end: int | None = None
    unreadable: bool = False
    cut: bool = False


class NextBatch(NamedTuple):
    """The place to continue after damage, and the proof that acknowledged data is damaged.

    At `offset` begins the intact batch `number`, or the intact end mark before batch `number`.
    """

    offset: int
    number: int
    salt: int


class SegmentReader:
    """An open segment. Raises FileNotFoundError if it does not exist, JournalVersion if its format is newer."""

    def __init__(self, files: FileSystem, directory: Path, number: int) -> None:
        self.number = number
        self.name = file_name(number)
        self._files = files
        self._bad: set[int] = set()
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

    def _read_header(self) -> SegmentHeader | BrokenBatch:
        header = read_segment(self._read(SECTOR_BYTES, 0))
        if broken := self._unreadable(0, SECTOR_BYTES):
            return broken
        if isinstance(header, int):
            raise JournalVersion(
                f"{self.name} has format version {header}, this program reads versions up to {FORMAT_VERSION}: "
                "use the program that wrote it, or a newer one",
                file=self.name,
                found=header,
                supported=FORMAT_VERSION,
            )
        if isinstance(header, str):
            return BrokenBatch(header)
        if header.number != self.number:
            return BrokenBatch(f"the file holds segment {header.number}")
        return header

    def read_batch(self, offset: int, number: int, segment: SegmentHeader) -> Batch | SegmentEnd | BrokenBatch:
        """Read what stands at `offset`, where batch `number` is expected. `segment` is the header of the segment."""
        remaining = self.size - offset
        if remaining <= 0 and offset >= segment.size:
            return SegmentEnd(marked=False)
        if remaining < BATCH_HEADER_BYTES:
            return self._short(number, segment)
        header = read_header(self._view(offset, BATCH_HEADER_BYTES))
        if broken := self._unreadable(offset, offset + BATCH_HEADER_BYTES):
            return broken
        if is_end_mark(header, number - 1, segment.salt):
            return SegmentEnd(marked=True, followed=header.marker == FOLLOWED_MARKER)
        if header.marker != BATCH_MARKER:
            return BrokenBatch("there is neither a batch nor an end mark")
        if header.salt != segment.salt:
            return BrokenBatch("the batch here is from an earlier use of the file")
        if header.number != number:
            return BrokenBatch(f"batch {header.number} is here instead of batch {number}")
        if BATCH_HEADER_BYTES + header.length > remaining:
            if self.size < segment.size:
                return self._short(number, segment)
            return BrokenBatch(f"the length of batch {number} extends past the end of the file", self.size)
        return self._parse_batch(offset, header)

    def _short(self, number: int, segment: SegmentHeader) -> BrokenBatch:
        lost = f"the data after batch {number - 1} is lost" if number > 1 else "its data is lost"
        return BrokenBatch(
            f"the file is {self.size} bytes long, but {segment.size} were allocated: {lost}", self.size, cut=True
        )

    def _parse_batch(self, offset: int, header: BatchHeader) -> Batch | BrokenBatch:
        """Read the batch whose header is at `offset` and fits into the file."""
        view = self._view(offset, BATCH_HEADER_BYTES + header.length)
        end = offset + len(view)
        if broken := self._unreadable(offset, end):
            return broken
        if not has_batch_checksum(header, view):
            return BrokenBatch(f"the checksum of batch {header.number} does not match", end)
        try:
            records, offsets = parse_records(view[BATCH_HEADER_BYTES:], header.records, offset + BATCH_HEADER_BYTES)
        except ValueError as error:
            return BrokenBatch(f"the records of batch {header.number} cannot be decoded: {error}", end)
        return Batch(header.number, self.number, header.wall, records, offsets, offset)

    def find_next_batch(self, offset: int, number: int, salt: int | None) -> tuple[NextBatch | None, int]:
        """Search from `offset` for the proof that batch `number`, or a later one, was acknowledged.

        The proof is an intact batch with this or a higher number, an end mark with a higher number, or the mark of a
        followed segment. With `salt` None, intact batches of any salt count. The end mark of batch `number` itself only
        shows that its write began; the second value is the end of that mark, 0 if there is none.
        """
        mark = 0
        while offset < self.size:
            chunk = self._read(WINDOW_BYTES, offset)
            if not chunk:
                break
            for at in range(0, len(chunk), SECTOR_BYTES):
                marker = chunk[at : at + 4]
                if marker == BATCH_MARKER:
                    if found := self._parse_later_batch(offset + at, number, salt):
                        return found, mark
                elif marker in END_MARKERS and len(chunk) - at >= BATCH_HEADER_BYTES and salt is not None:
                    end = read_header(chunk, at)
                    if end.number < number or not is_end_mark(end, end.number, salt):
                        continue
                    if end.number > number or marker == FOLLOWED_MARKER:
                        return NextBatch(offset + at, end.number + 1, salt), mark
                    mark = offset + at + BATCH_HEADER_BYTES
            offset += len(chunk)
        return None, mark

    def _parse_later_batch(self, offset: int, number: int, salt: int | None) -> NextBatch | None:
        remaining = self.size - offset
        if remaining < BATCH_HEADER_BYTES:
            return None
        header = read_header(self._view(offset, BATCH_HEADER_BYTES))
        if (
            header.number < number
            or (salt is not None and header.salt != salt)
            or BATCH_HEADER_BYTES + header.length > remaining
        ):
            return None
        if isinstance(self._parse_batch(offset, header), BrokenBatch):
            return None
        return NextBatch(offset, header.number, header.salt)

    def rebuild_header(self) -> SegmentHeader | None:
        """Return the content of a damaged header, derived from the batch or end mark after it; None if unknown."""
        if self.size < SECTOR_BYTES + BATCH_HEADER_BYTES:
            return None
        header = read_header(self._view(SECTOR_BYTES, BATCH_HEADER_BYTES))
        if is_end_mark(header, header.number, header.salt):
            return SegmentHeader(self.number, header.salt, header.number + 1, self.size)
        if header.marker == BATCH_MARKER and self._parse_later_batch(SECTOR_BYTES, header.number, header.salt):
            return SegmentHeader(self.number, header.salt, header.number, self.size)
        return None

    def refresh(self) -> None:
        """Drop the bytes read ahead: a writer may have written since."""
        self._window = b""
        self._bad.clear()
        self.size = self._files.size(self._fd)

    def content_end(self, offset: int) -> int:
        """Return the end of the last byte from `offset` on that is not zero; `offset` if there is none."""
        end = at = offset
        while at < self.size and (chunk := self._read(WINDOW_BYTES, at)):
            if content := chunk.rstrip(b"\0"):
                end = at + len(content)
            at += len(chunk)
        return end

    def _view(self, offset: int, size: int) -> memoryview:
        """Return `size` bytes at `offset`. The caller has compared them with the size of the file."""
        start = offset - self._start
        if start < 0 or start + size > len(self._window):
            self._window = self._read(max(size, min(WINDOW_BYTES, self.size - offset)), offset)
            self._start, start = offset, 0
            if len(self._window) < size:  # the file was cut since; zeros are no intact batch either
                self._window = self._window.ljust(size, b"\0")
        return memoryview(self._window)[start : start + size]

    def _read(self, size: int, offset: int) -> bytes:
        """Read bytes, with zeros for unreadable sectors, and remember these sectors."""
        data, bad = read_around(self._files, self._fd, size, offset)
        self._bad.update(bad)
        return data

    def _unreadable(self, start: int, end: int) -> BrokenBatch | None:
        """Return the damage if the disk could not read all of these bytes, otherwise None."""
        if not self._bad:
            return None
        bad = min((sector for sector in self._bad if start < sector + SECTOR_BYTES and sector < end), default=None)
        return None if bad is None else BrokenBatch(f"the sector at offset {bad} cannot be read", end, unreadable=True)


def check_batch(files: FileSystem, fd: int, offset: int, salt: int) -> tuple[int, str]:
    """Check the batch at `offset`, in pieces; return its end, and a description of the damage ("" if there is none).

    Raises the OSError of a read.
    """
    head = read_at(files, fd, BATCH_HEADER_BYTES, offset)
    if len(head) < BATCH_HEADER_BYTES:
        return offset, "the file ends inside a batch header"
    header = read_header(head)
    if header.marker != BATCH_MARKER or header.salt != salt:
        return offset, "there is no batch of this segment"
    at, end = offset + BATCH_HEADER_BYTES, offset + BATCH_HEADER_BYTES + header.length
    crc = crc32(head[:-4])
    while at < end and (piece := read_at(files, fd, min(_PIECE_BYTES, end - at), at)):
        crc = crc32(piece, crc)
        at += len(piece)
    return end, "" if at == end and crc == header.crc else f"the checksum of batch {header.number} does not match"
