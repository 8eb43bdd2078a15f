"""The format of the journal on disk. This module only encodes and decodes: it must never open a file or read a clock.

A journal is a directory of *segments*, ``{number:016d}.journal``, numbered without a gap; numbers are little-endian.
Each item starts at a multiple of 512 bytes (a *sector*), so that no write touches a sector that holds acknowledged
data.

Segment
    Sector 0 holds the segment header; the batches follow from byte 512. The file has the length ``size`` from the
    moment it gets its name: an append never changes the length of the file.

    ======  ====  =======================================================================
    offset  size  segment header
    ======  ====  =======================================================================
    0       8     magic, ``BROKERJ\\n``
    8       4     format version (1). Magic and version have this place in all versions
    12      4     zero
    16      8     number of the segment
    24      8     salt: random, different for each segment
    32      8     number of the first batch
    40      8     size of the file in bytes
    48      12    zero
    60      4     CRC-32 of bytes 0 to 59
    ======  ====  =======================================================================

Batch
    The records of one commit. Numbers increase by one, across segments too. A batch lies in one segment.

    ======  ====  =======================================================================
    offset  size  batch header
    ======  ====  =======================================================================
    0       4     marker
    4       8     number of the batch
    12      8     salt of the segment
    20      8     wall time, seconds since 1970 (float)
    28      4     length of the payload
    32      4     count of records
    36      4     CRC-32 of bytes 0 to 35, continued over the payload
    40            payload: the records; then zeros up to the next sector
    ======  ====  =======================================================================

Record
    ``kind`` u8, ``first_id`` u64, ``peer`` u64, length of header u32, length of blob u32; then header, then blob. Their
    meaning is defined by the writer (`stageflow_brokers.core.records`).

End mark
    After the last batch, written with it and overwritten by the next one, stands a sector with an *end mark*: a batch
    header with its own marker, the number of the batch before it, no time and no payload. It distinguishes a clean end
    from a lost one: segments are recycled, so the bytes after it may be batches of an earlier use of the file. Those
    carry an earlier salt and are ignored. The last sector of a segment is reserved for the end mark; a segment of an
    earlier release may be filled to its last byte and has none.

    When the next segment is durable in its directory, and before a batch is written to it, a second kind of end mark
    replaces this one: *followed*. So the loss of the newest segment is always noticed. An earlier release does not
    recognize this mark, which does no harm in a segment that is not the last one.

How it is read
    Batch after batch, while each is intact: marker, salt, the expected number, a length that fits into the file, and
    the CRC. After the last one there is either the end mark (a clean end) or damage.

    Damage in the last segment with nothing intact after it is a write that a crash has torn, and was never
    acknowledged. The end mark of the damaged batch itself belongs to that write.

    Damage lies in acknowledged data if it is followed by an intact batch or end mark of a higher number, by the mark of
    a followed segment, or by a segment that begins with a higher number: batch n + 1 is never written before batch n is
    synced. A damaged segment header is acknowledged data too: it was synced before the file got its name.

    A last segment that is shorter than its header says, and has no end mark, counts as torn: nothing shows which data
    it held.
"""

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from zlib import crc32

from stageflow_brokers.errors import PayloadTooLarge

__all__ = [
    "BATCH_HEADER_BYTES",
    "BATCH_MARKER",
    "END_MARKERS",
    "FOLLOWED_MARKER",
    "FORMAT_VERSION",
    "MAX_PAYLOAD_BYTES",
    "SECTOR_BYTES",
    "SEGMENT_SUFFIX",
    "Batch",
    "BatchHeader",
    "Buffer",
    "Record",
    "SegmentHeader",
    "encode_end",
    "encode_header",
    "encode_payload",
    "encode_segment",
    "file_name",
    "has_batch_checksum",
    "is_end_mark",
    "parse_records",
    "read_header",
    "read_segment",
    "readable_records",
    "span",
]

Buffer = bytes | memoryview

MAGIC = b"BROKERJ\n"
FORMAT_VERSION = 1
SECTOR_BYTES = 512
SEGMENT_SUFFIX = ".journal"
BATCH_HEADER_BYTES = 40
MAX_PAYLOAD_BYTES = 0xFFFFFFFF

# High bytes that neither ASCII nor UTF-8 text contains in this order, so that a search rarely finds them by chance.
BATCH_MARKER = b"\xd3\xf7\xb1\xff"
END_MARKER = b"\xd3\xf7\xe2\xff"
FOLLOWED_MARKER = b"\xd3\xf7\xe4\xff"
END_MARKERS = (END_MARKER, FOLLOWED_MARKER)

_SEGMENT = struct.Struct("<8sI4xQQQQ12x")
_BATCH = struct.Struct("<4sQQdII")
_RECORD = struct.Struct("<BQQII")
_U32 = struct.Struct("<I")


class Record(NamedTuple):
    """One record. `header` and `blob` are opaque; `first_id` and `peer` are unsigned 64-bit numbers.

    Memoryviews must be contiguous and of single bytes.
    """

    kind: int
    first_id: int
    peer: int
    header: Buffer
    blob: Buffer


class Batch(NamedTuple):
    """A batch that was read. In the file of `segment` the batch begins at `offset`, and the blob of `records[i]` at
    `blob_offsets[i]`.

    Blobs are views into a shared buffer of up to several megabytes: copy a blob in order to keep it. Headers are bytes.
    """

    number: int
    segment: int
    wall: float
    records: list[Record]
    blob_offsets: list[int]
    offset: int = 0


class SegmentHeader(NamedTuple):
    """The fields of sector 0: `first` is the number of the first batch, `size` the length of the file in bytes."""

    number: int
    salt: int
    first: int
    size: int


class BatchHeader(NamedTuple):
    """The header fields of a batch or an end mark, not checked against the CRC."""

    marker: bytes
    number: int
    salt: int
    wall: float
    length: int
    records: int
    crc: int


def file_name(number: int) -> str:
    """Return the name of a segment file; names sort like numbers."""
    return f"{number:016d}{SEGMENT_SUFFIX}"


def span(length: int) -> int:
    """Return the bytes that a batch with a payload of `length` bytes occupies, with padding."""
    return -(-(BATCH_HEADER_BYTES + length) // SECTOR_BYTES) * SECTOR_BYTES


def encode_segment(header: SegmentHeader) -> bytes:
    """Return the bytes of sector 0."""
    fields = _SEGMENT.pack(MAGIC, FORMAT_VERSION, header.number, header.salt, header.first, header.size)
    return (fields + _U32.pack(crc32(fields))).ljust(SECTOR_BYTES, b"\0")


def read_segment(sector: bytes) -> SegmentHeader | int | str:
    """Return the header, the version if it is a newer one, or a description of the damage."""
    if len(sector) < SECTOR_BYTES:
        return "the file ends inside the segment header"
    magic, version, number, salt, first, size = _SEGMENT.unpack_from(sector)
    if magic != MAGIC:
        return "the file does not begin with the magic of a segment"
    crc = _U32.unpack_from(sector, _SEGMENT.size)[0]
    if version > FORMAT_VERSION:
        if crc == crc32(sector[12 : _SEGMENT.size], crc32(sector[:8] + _U32.pack(FORMAT_VERSION))):
            return "the format version in the segment header is damaged"
        return int(version)  # before the CRC, which a newer format may have elsewhere
    if crc != crc32(sector[: _SEGMENT.size]):
        return "the checksum of the segment header does not match"
    return SegmentHeader(number, salt, first, size)


def encode_payload(records: Sequence[Record], offset: int) -> tuple[list[Buffer], int, list[int]]:
    """Return the pieces of a payload that begins at `offset`, its length, and the offset of each record's blob.

    Raises PayloadTooLarge, or struct.error for a number out of its range; both before any byte is written.
    """
    pieces: list[Buffer] = []
    offsets: list[int] = []
    add, add_offset, pack, start = pieces.append, offsets.append, _RECORD.pack, offset
    for kind, first_id, peer, header, blob in records:
        header_length, blob_length = len(header), len(blob)
        add(pack(kind, first_id, peer, header_length, blob_length))
        add(header)
        add(blob)
        offset += 25 + header_length
        add_offset(offset)
        offset += blob_length
    length = offset - start
    if length > MAX_PAYLOAD_BYTES:
        raise PayloadTooLarge(
            f"one commit holds at most {MAX_PAYLOAD_BYTES} bytes, but these {len(records)} records have {length}: "
            "commit them in several batches",
            size=length,
            limit=MAX_PAYLOAD_BYTES,
        )
    return pieces, length, offsets


def encode_header(number: int, salt: int, wall: float, payload: Iterable[Buffer], length: int, count: int) -> bytes:
    """Return the header of a batch whose payload consists of these pieces, `length` bytes in total."""
    fields = _BATCH.pack(BATCH_MARKER, number, salt, wall, length, count)
    crc = crc32(fields)
    for piece in payload:
        crc = crc32(piece, crc)
    return fields + _U32.pack(crc)


def encode_end(number: int, salt: int, *, followed: bool = False) -> bytes:
    """Return the end mark after batch `number`; `followed` adds that a next segment exists."""
    fields = _BATCH.pack(FOLLOWED_MARKER if followed else END_MARKER, number, salt, 0.0, 0, 0)
    return (fields + _U32.pack(crc32(fields))).ljust(SECTOR_BYTES, b"\0")


def read_header(buffer: Buffer, at: int = 0) -> BatchHeader:
    """Decode the 40 bytes at `at`, without any check."""
    return BatchHeader(*_BATCH.unpack_from(buffer, at), *_U32.unpack_from(buffer, at + _BATCH.size))


def has_batch_checksum(header: BatchHeader, buffer: memoryview) -> bool:
    """True if the checksum of `buffer`, header and payload, matches."""
    head = _BATCH.size
    return header.crc == crc32(buffer[BATCH_HEADER_BYTES:], crc32(buffer[:head]))


def is_end_mark(header: BatchHeader, number: int, salt: int) -> bool:
    """True if this is the end mark, of either kind, after batch `number`."""
    if header.marker not in END_MARKERS or header.number != number or header.salt != salt:
        return False
    return header.crc == crc32(_BATCH.pack(*header[:6]))


def parse_records(payload: memoryview, count: int, offset: int) -> tuple[list[Record], list[int]]:
    """Decode a payload. Raises ValueError if `count` records do not fill it exactly."""
    records: list[Record] = []
    offsets: list[int] = []
    unpack, at, end = _RECORD.unpack_from, 0, len(payload)
    if count * _RECORD.size > end:
        raise ValueError(f"{count} records do not fit into {end} bytes")
    for _ in range(count):
        if at + 25 > end:
            raise ValueError("a record is cut short")
        kind, first_id, peer, header_length, blob_length = unpack(payload, at)
        blob = at + 25 + header_length
        following = blob + blob_length
        if following > end:
            raise ValueError("a record extends past the end of its batch")
        records.append(Record(kind, first_id, peer, bytes(payload[at + 25 : blob]), payload[blob:following]))
        offsets.append(offset + blob)
        at = following
    if at != end:
        raise ValueError(f"{end - at} bytes are left over after the last record")
    return records, offsets


def readable_records(payload: memoryview, count: int | None) -> list[Record]:
    """Decode as many records as possible from a damaged payload, at most `count` if it is known.

    The last one may be cut short, or not be a record at all.
    """
    records: list[Record] = []
    at, end = 0, len(payload)
    while at + 25 <= end and (count is None or len(records) < count):
        kind, first_id, peer, header_length, blob_length = _RECORD.unpack_from(payload, at)
        if not kind and not header_length and not blob_length:
            break  # a record of zeros would repeat to the end
        blob = at + 25 + header_length
        following = blob + blob_length
        records.append(Record(kind, first_id, peer, bytes(payload[at + 25 : blob]), payload[blob:following]))
        at = following
    return records
