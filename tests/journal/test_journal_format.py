"""The bytes of format version 1. They must stay readable: never change them here."""

import struct
from typing import Any

import pytest

from stageflow_brokers.errors import PayloadTooLarge
from stageflow_brokers.journal import format as fmt
from stageflow_brokers.journal.format import Record, SegmentHeader

HEADER = (
    "42524f4b45524a0a" "01000000" "00000000" "0300000000000000" "efcdab8967452301" "0700000000000000"
    "0010000000000000" "000000000000000000000000"
)  # fmt: skip
BATCH = (
    "d3f7b1ff" "0700000000000000" "efcdab8967452301" "000000000000f83f" "3a000000" "02000000"
)  # fmt: skip
PAYLOAD = (
    "05" "0900000000000000" "ffffffffffffffff" "02000000" "03000000" "6868" "626262"
    "00" "0000000000000000" "0000000000000000" "00000000" "03000000" "000000"
)  # fmt: skip
END = "d3f7e2ff" "0700000000000000" "efcdab8967452301" "0000000000000000" "00000000" "00000000"  # fmt: skip

SALT = 0x0123456789ABCDEF
RECORDS = [Record(5, 9, 2**64 - 1, b"hh", b"bbb"), Record(0, 0, 0, b"", b"\0\0\0")]


def golden() -> bytes:
    """A file of version 1, put together by the tables of the specification and not by the code."""
    from zlib import crc32

    def with_crc(fields: bytes, payload: bytes = b"") -> bytes:
        return fields + struct.pack("<I", crc32(fields + payload)) + payload

    sectors = (
        with_crc(bytes.fromhex(HEADER)),
        with_crc(bytes.fromhex(BATCH), bytes.fromhex(PAYLOAD)),
        with_crc(bytes.fromhex(END)),
    )
    return b"".join(sector.ljust(512, b"\0") for sector in sectors).ljust(4096, b"\0")


def test_the_bytes_of_version_1_are_written() -> None:
    pieces, length, offsets = fmt.encode_payload(RECORDS, 512 + 40)
    header = fmt.encode_header(7, SALT, 1.5, pieces, length, 2)
    content = (
        fmt.encode_segment(SegmentHeader(3, SALT, 7, 4096))
        + (header + b"".join(pieces)).ljust(512, b"\0")
        + fmt.encode_end(7, SALT)
    )
    assert content.ljust(4096, b"\0") == golden()
    assert [golden()[offset : offset + 3] for offset in offsets] == [b"bbb", b"\0\0\0"]


def test_the_bytes_of_version_1_are_read(bench: Any) -> None:
    bench.open().close()
    bench.disk.remove(bench.path(1))
    fd = bench.disk.open(bench.path(3), create=True)
    bench.disk.pwritev(fd, [golden()], 0)
    with bench.open() as journal:
        assert bench.replayed == [(7, 1.5, bench.kept(RECORDS))]
        assert bench.warnings == []
        assert journal.segments() == [(3, 7, 1024, 4096, False)]


def test_names_of_segments_sort_as_their_numbers_do() -> None:
    numbers = [1, 2, 9, 10, 99, 100, 10**15]
    assert sorted(map(fmt.file_name, reversed(numbers))) == [fmt.file_name(number) for number in numbers]


def test_a_payload_longer_than_its_length_field_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fmt, "MAX_PAYLOAD_BYTES", 1000)
    with pytest.raises(PayloadTooLarge, match="commit them in several batches") as caught:
        fmt.encode_payload([Record(0, 0, 0, b"", b"x" * 1000)], 0)
    assert (caught.value.size, caught.value.limit) == (1025, 1000)


@pytest.mark.parametrize(
    ("payload", "count", "why"),
    [
        (b"", 1, "do not fit"),
        (bytes(24), 0, "left over"),
        (bytes(30), 1, "left over"),
        (struct.pack("<BQQII", 0, 0, 0, 1, 0), 1, "past the end"),
        (struct.pack("<BQQII", 0, 0, 0, 2**32 - 1, 2**32 - 1), 1, "past the end"),
        (struct.pack("<BQQII", 0, 0, 0, 25, 0) + bytes(25), 2, "cut short"),
    ],
)
def test_records_that_do_not_fill_their_batch_are_refused(payload: bytes, count: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        fmt.parse_records(memoryview(payload), count, 0)
