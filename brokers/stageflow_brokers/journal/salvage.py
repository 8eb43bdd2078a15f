"""What lay in damage: where each batch was, how long, and what of it can still be read.

All of it is a guess, to be told to people: a checksum says that something here is not what was written, and not what.
Nothing that is read here may be replayed. A length is believed only as far as the damage reaches.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stageflow_brokers.journal.filesystem import FileSystem, read_around
from stageflow_brokers.journal.format import (
    BATCH_HEADER,
    BATCH_MARKER,
    END_MARKERS,
    SECTOR,
    Batch,
    BatchHeader,
    is_batch,
    is_end,
    read_header,
    readable_records,
    span,
)
from stageflow_brokers.journal.scanner import Damage

__all__ = ["Lost", "salvage"]

MOST = 256 << 20
"""Bytes of one damaged place that are looked through: more than the largest segment that is made by itself."""


SMALLEST = 25
"""Bytes of a record with nothing in it."""


class Lost(NamedTuple):
    """`length` bytes that are damaged at `offset` of `file`: one batch, or what cannot be told apart.

    `records` is how many the batch's header speaks of, None where it cannot be read. `torn`: it lies at the end of the
    journal, like a write that nobody was told of. `whole`: all of the file is given up for it, whatever it held.
    """

    file: str
    offset: int
    length: int
    records: int | None
    reason: str
    torn: bool = False
    whole: bool = False

    def told(self) -> str:
        """In words: file, offset, length, count of records, reason."""
        if self.whole:
            return f"{self.file}: all of it, {self.length:,} bytes as it is now: {self.reason}"
        length = f", {self.length:,} bytes" if self.length else ""
        records = "" if self.records is None else f", {self.records:,} record{'' if self.records == 1 else 's'}"
        return f"{self.file} at offset {self.offset}{length}{records}: {self.reason}"


def salvage(files: FileSystem, directory: Path, damage: Damage) -> Iterator[tuple[Lost, Batch | None]]:
    """What is lost with this damage, and what can be read of each batch in it: the records up to where they make no
    sense, of which the last may be cut short."""
    first = Lost(damage.file, damage.offset, 0, None, damage.reason, not damage.fatal, damage.offset == 0)
    if damage.file not in files.listdir(directory):
        yield first._replace(whole=False), None
        return
    start = damage.offset or SECTOR
    fd = files.open(directory / damage.file, write=False)
    try:
        size = files.size(fd)
        end = min(size, damage.until or (damage.torn if damage.torn > start else size), start + MOST)
        data = memoryview(read_around(files, fd, end - start, start)[0] if end > start else b"")
    finally:
        files.close(fd)
    if damage.offset == 0:
        yield first._replace(length=size), None
    for at, length, header in _pieces(data, damage):
        reason = damage.reason
        if at or damage.offset == 0:
            reason = "what is here makes no sense" if header is None else f"batch {header.number} is damaged too"
        lost = first._replace(offset=start + at, length=length, reason=reason, whole=False)
        count = None if header is None or header.records * SMALLEST > length else header.records
        if header is not None:
            lost = lost._replace(records=count)
        elif damage.offset == 0:
            continue  # said already, and of what was written before the file got its present use nothing can be told
        elif not length:
            yield lost, None
            continue
        payload = data[at + BATCH_HEADER : at + length]
        records = readable_records(payload, count)
        number, wall = (damage.number, 0.0) if header is None else (header.number, header.wall)
        yield lost, Batch(number, damage.segment, wall, records, [], lost.offset)


def _pieces(data: memoryview, damage: Damage) -> Iterator[tuple[int, int, BatchHeader | None]]:
    """(offset, length, header) of each damaged batch, the first one at the beginning; a header that says nothing
    believable is None, and its piece reaches to the next that does."""
    at, begun = 0, -1
    while at < len(data):
        header = read_header(data, at) if at + BATCH_HEADER <= len(data) else None
        if header is not None and _is_end(header, damage):
            if not at and not damage.until:
                break
            if begun >= 0:
                yield begun, at - begun, None
                begun = -1
            if not damage.until:
                return  # behind the end lies what the file held in an earlier life
            if not at:
                begun = at  # it is in the place of a batch
        elif header is not None and _believable(header, data[at:], damage, first=not at):
            if begun >= 0:
                yield begun, at - begun, None
                begun = -1
            length = BATCH_HEADER + header.length
            yield at, length, header
            at += span(header.length)
            continue
        elif begun < 0 and (not at or data[at : at + SECTOR].tobytes().strip(b"\0")):
            begun = at
        at += SECTOR
    if begun >= 0 or not at:
        rest = data[max(begun, 0) :]
        yield max(begun, 0), len(rest) if damage.until else len(rest.tobytes().rstrip(b"\0")) if at else 0, None


def _is_end(header: BatchHeader, damage: Damage) -> bool:
    return header.marker in END_MARKERS and is_end(header, header.number, damage.salt or header.salt)


def _believable(header: BatchHeader, data: memoryview, damage: Damage, *, first: bool) -> bool:
    """Whether a batch that was lost here may have had this header."""
    length = BATCH_HEADER + header.length
    if length > len(data) or not header.records or header.number < damage.number:
        return False
    # One sound field may be wanting of the first, for it is known to have been here: the damage may be in its header.
    signs = (header.marker == BATCH_MARKER, damage.salt in (0, header.salt))
    if not all(signs) and not (first and any(signs) and header.number == damage.number):
        return False
    return damage.offset == 0 or not is_batch(header, data[:length])
