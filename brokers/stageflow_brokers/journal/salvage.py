"""Read what remains of damaged batches: their places, their lengths, and the records that can still be decoded.

The result is a guess, for reports to people: a checksum shows that bytes have changed, but not which ones. Data that is
read here must never be replayed. A length is used only within the damaged range.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stageflow_brokers.journal.filesystem import FileSystem, read_around
from stageflow_brokers.journal.format import (
    BATCH_HEADER_BYTES,
    BATCH_MARKER,
    END_MARKERS,
    SECTOR_BYTES,
    Batch,
    BatchHeader,
    has_batch_checksum,
    is_end_mark,
    read_header,
    readable_records,
    span,
)
from stageflow_brokers.journal.scanner import Damage

__all__ = ["LostData", "salvage"]

MAX_SALVAGE_BYTES = 256 << 20
"""Bytes of one damaged place that are searched: more than the largest segment that is created automatically."""

MIN_RECORD_BYTES = 25
"""Bytes of a record without header and blob."""


class LostData(NamedTuple):
    """`length` damaged bytes at `offset` of `file`: one batch, or several that cannot be distinguished.

    `records` is the count in the header of the batch, None if the header cannot be read. `is_torn`: the bytes lie at
    the end of the journal, like a write that was never acknowledged. `whole_file`: the whole file is discarded.
    """

    file: str
    offset: int
    length: int
    records: int | None
    reason: str
    is_torn: bool = False
    whole_file: bool = False

    def describe(self) -> str:
        """Return a line with file, offset, length, count of records and reason."""
        if self.whole_file:
            return f"{self.file}: the whole file, {self.length:,} bytes: {self.reason}"
        length = f", {self.length:,} bytes" if self.length else ""
        records = "" if self.records is None else f", {self.records:,} record{'' if self.records == 1 else 's'}"
        return f"{self.file} at offset {self.offset}{length}{records}: {self.reason}"


def salvage(files: FileSystem, directory: Path, damage: Damage) -> Iterator[tuple[LostData, Batch | None]]:
    """Yield the data lost with this damage, and of each batch in it the records that can be read.

    The records end where they cannot be decoded; the last one may be cut short.
    """
    first = LostData(damage.file, damage.offset, 0, None, damage.reason, not damage.fatal, damage.offset == 0)
    if damage.file not in files.listdir(directory):
        yield first._replace(whole_file=False), None
        return
    start = damage.offset or SECTOR_BYTES
    fd = files.open(directory / damage.file, write=False)
    try:
        size = files.size(fd)
        end = min(
            size, damage.until or (damage.torn_end if damage.torn_end > start else size), start + MAX_SALVAGE_BYTES
        )
        data = memoryview(read_around(files, fd, end - start, start)[0] if end > start else b"")
    finally:
        files.close(fd)
    if damage.offset == 0:
        yield first._replace(length=size), None
    for at, length, header in _pieces(data, damage):
        reason = damage.reason
        if at or damage.offset == 0:
            reason = (
                "the bytes here cannot be understood" if header is None else f"batch {header.number} is damaged too"
            )
        lost = first._replace(offset=start + at, length=length, reason=reason, whole_file=False)
        count = None if header is None or header.records * MIN_RECORD_BYTES > length else header.records
        if header is not None:
            lost = lost._replace(records=count)
        elif damage.offset == 0:
            continue  # reported already; bytes from an earlier use of the file say nothing about this one
        elif not length:
            yield lost, None
            continue
        payload = data[at + BATCH_HEADER_BYTES : at + length]
        records = readable_records(payload, count)
        number, wall = (damage.number, 0.0) if header is None else (header.number, header.wall)
        yield lost, Batch(number, damage.segment, wall, records, [], lost.offset)


def _pieces(data: memoryview, damage: Damage) -> Iterator[tuple[int, int, BatchHeader | None]]:
    """Yield (offset, length, header) of each damaged batch; the first one begins at offset 0.

    The header is None if it is not plausible; its piece extends to the next plausible header.
    """
    at, piece_start = 0, -1
    while at < len(data):
        header = read_header(data, at) if at + BATCH_HEADER_BYTES <= len(data) else None
        if header is not None and _is_end(header, damage):
            if not at and not damage.until:
                break
            if piece_start >= 0:
                yield piece_start, at - piece_start, None
                piece_start = -1
            if not damage.until:
                return  # after the end mark lie bytes of an earlier use of the file
            if not at:
                piece_start = at  # a batch should be here
        elif header is not None and _is_plausible(header, data[at:], damage, first=not at):
            if piece_start >= 0:
                yield piece_start, at - piece_start, None
                piece_start = -1
            length = BATCH_HEADER_BYTES + header.length
            yield at, length, header
            at += span(header.length)
            continue
        elif piece_start < 0 and (not at or data[at : at + SECTOR_BYTES].tobytes().strip(b"\0")):
            piece_start = at
        at += SECTOR_BYTES
    if piece_start >= 0 or not at:
        rest = data[max(piece_start, 0) :]
        yield max(piece_start, 0), len(rest) if damage.until else len(rest.tobytes().rstrip(b"\0")) if at else 0, None


def _is_end(header: BatchHeader, damage: Damage) -> bool:
    return header.marker in END_MARKERS and is_end_mark(header, header.number, damage.salt or header.salt)


def _is_plausible(header: BatchHeader, data: memoryview, damage: Damage, *, first: bool) -> bool:
    """True if a batch that was lost here may have had this header."""
    length = BATCH_HEADER_BYTES + header.length
    if length > len(data) or not header.records or header.number < damage.number:
        return False
    # The first batch is known to have been here, so one of the two fields may be damaged.
    signs = (header.marker == BATCH_MARKER, damage.salt in (0, header.salt))
    if not all(signs) and not (first and any(signs) and header.number == damage.number):
        return False
    return damage.offset == 0 or not has_batch_checksum(header, data[:length])
