"""Damage on disk: a torn end is cut off; acknowledged batches are replayed, or the start is refused."""

import random
import struct
from typing import Any
from zlib import crc32

import pytest

from stageflow_brokers.errors import JournalCorrupt, JournalVersion
from stageflow_brokers.journal.format import (
    SECTOR_BYTES,
    Record,
    encode_end,
    encode_header,
    encode_payload,
    file_name,
    read_header,
    span,
)
from stageflow_brokers.testing.simulated_disk import Crash


def committed(bench: Any, count: int = 3, **options: Any) -> tuple[list[Any], list[int], bytes]:
    """Some batches in segment 1: what they say, where each begins (and the next one would), and the file."""
    journal = bench.open()
    said = bench.fill(journal, count, **options)
    journal.close()
    content = bench.content(1)
    starts = [SECTOR_BYTES]
    for _ in said:
        starts.append(starts[-1] + span(read_header(content, starts[-1]).length))
    return said, starts, content


def test_the_last_batch_cut_at_each_byte_leaves_the_state_before_or_after_it(bench: Any) -> None:
    said, starts, content = committed(bench)
    whole = starts[2] + 40 + read_header(content, starts[2]).length
    for cut in range(starts[2], starts[3] + SECTOR_BYTES + 1):
        bench.disk.damage(bench.path(1), content[:cut])
        with bench.open() as journal:
            assert bench.replayed == (said if cut >= whole else said[:2])
            assert bool(bench.warnings) is (cut < starts[3] + 40)
            if cut == starts[2]:
                (warning,) = bench.warnings
                assert f"{bench.path(1)} has no clean end at offset {cut}" in warning
                assert f"the file is {cut} bytes long, but 16384 were allocated" in warning
                assert "the data after batch 2 is lost" in warning
        with bench.open() as journal:
            assert bench.warnings == []
            after = bench.replayed + bench.fill(journal, 1, first=journal.last_batch + 1)
        with bench.open():
            assert bench.replayed == after
            assert bench.warnings == []
        assert len(bench.content(1)) == bench.segment_bytes


def test_a_torn_end_is_copied_aside_before_it_is_cut(bench: Any) -> None:
    _, starts, content = committed(bench, size=1000)
    torn = content[: starts[2] + 700]
    bench.disk.damage(bench.path(1), torn)
    for copy in (f"0000000000000001.{starts[2]}.broken", f"0000000000000001.{starts[2]}.2.broken"):
        with bench.open() as journal:
            (warning,) = bench.warnings
            assert copy in warning
            assert f"offset {starts[2]}" in warning
            assert bench.disk.content(bench.directory / copy) == torn[starts[2] :]
            assert not any(bench.content(1)[starts[2] + SECTOR_BYTES :])
            assert journal.last_batch == 2
        bench.disk.damage(bench.path(1), torn)


def test_a_flip_of_any_byte_of_an_earlier_batch_is_refused_with_file_and_offset(bench: Any) -> None:
    _, starts, content = committed(bench, 4)
    payload = [40 + read_header(content, start).length for start in starts[:-1]]
    for batch in (0, 1, 2):
        for at in range(starts[batch], starts[batch] + payload[batch]):
            broken = bytearray(content)
            broken[at] ^= 1 << at % 8
            bench.disk.damage(bench.path(1), broken)
            with pytest.raises(JournalCorrupt, match="stageflow journal verify") as caught:
                bench.open()
            assert (caught.value.file, caught.value.offset) == (file_name(1), starts[batch])
            assert bench.content(1) == broken
            assert [number for number, _, _ in bench.replayed] == list(range(1, batch + 1))


def test_a_flip_anywhere_in_a_sealed_segment_is_refused(bench: Any) -> None:
    journal = bench.open()
    bench.fill(journal, 2)
    journal.seal()
    journal.close()
    content = bench.content(1)
    end = SECTOR_BYTES
    for _ in range(2):
        end += span(read_header(content, end).length)
    used = {*range(64), *range(SECTOR_BYTES, end)} - padding(content, SECTOR_BYTES, end)
    for at in used:
        broken = bytearray(content)
        broken[at] ^= 0x10
        bench.disk.damage(bench.path(1), broken)
        with pytest.raises(JournalCorrupt) as caught:
            bench.open()
        assert caught.value.file == file_name(1)


def padding(content: bytes, start: int, end: int) -> set[int]:
    free: set[int] = set()
    while start < end:
        length = read_header(content, start).length
        free |= set(range(start + 40 + length, start + span(length)))
        start += span(length)
    return free


def test_a_flip_in_the_last_batch_counts_as_a_torn_write_and_is_reported(bench: Any) -> None:
    said, starts, content = committed(bench)
    for at in range(starts[2], starts[2] + 40 + read_header(content, starts[2]).length):
        broken = bytearray(content)
        broken[at] ^= 1
        bench.disk.damage(bench.path(1), broken)
        bench.open().close()
        assert bench.replayed == said[:2]
        assert len(bench.warnings) == 1


@pytest.mark.parametrize("fill", [b"\0", b"\xff", None], ids=["zeroed", "ones", "garbled"])
def test_any_sectors_of_an_unsynced_batch_may_be_lost(bench: Any, fill: bytes | None) -> None:
    chance = random.Random(1)
    said, starts, content = committed(bench, 3, size=2000)
    sectors = range(starts[2], starts[3] + SECTOR_BYTES, SECTOR_BYTES)
    lost_alone = [{sector} for sector in sectors]
    for lost in lost_alone + [{sector for sector in sectors if chance.random() < 0.5} for _ in range(60)]:
        broken = bytearray(content)
        for sector in lost:
            broken[sector : sector + SECTOR_BYTES] = (
                chance.randbytes(SECTOR_BYTES) if fill is None else fill * SECTOR_BYTES
            )
        bench.disk.damage(bench.path(1), broken)
        with bench.open() as journal:
            assert bench.replayed == (said[:2] if lost - {starts[3]} else said)
            assert bool(bench.warnings) == bool(lost)
            bench.fill(journal, 1, first=journal.last_batch + 1)
        bench.open().close()
        assert bench.warnings == []


def test_a_lost_first_sector_of_an_acknowledged_batch_is_refused_even_if_it_leaves_the_old_end_mark(bench: Any) -> None:
    said, starts, _ = committed(bench, 2)
    with_mark = bench.content(1)[starts[2] : starts[2] + SECTOR_BYTES]
    with bench.open() as journal:
        bench.fill(journal, 2, first=3)
    broken = bytearray(bench.content(1))
    broken[starts[2] : starts[2] + SECTOR_BYTES] = with_mark
    bench.disk.damage(bench.path(1), broken)
    with pytest.raises(JournalCorrupt) as caught:
        bench.open()
    assert (caught.value.offset, caught.value.reason) == (starts[2], "a batch has been lost")
    assert bench.replayed == said


def test_a_recycled_segment_cut_anywhere_never_brings_back_old_batches(bench: Any) -> None:
    journal = bench.open()
    bench.fill(journal, 20)
    while len(journal.segments()) > 1:
        journal.drop_oldest()
    journal.seal()
    said = bench.fill(journal, 2, first=21, size=1500)
    segment = journal.segments()[-1].number
    place = journal.segments()[-1].used
    journal.close()
    content = bench.content(segment)
    for sector in range(SECTOR_BYTES, place + SECTOR_BYTES, SECTOR_BYTES):
        broken = bytearray(content)
        broken[sector : place + SECTOR_BYTES] = random.Random(sector).randbytes(place + SECTOR_BYTES - sector)
        bench.disk.damage(bench.path(segment), broken)
        bench.open().close()
        recovered = [each for each in bench.replayed if each[0] > 20]
        assert recovered == said[: len(recovered)]
        assert len(recovered) < 2 or sector == place
        assert len(bench.warnings) == 1


def test_batches_of_another_journal_in_the_spare_segment_are_never_replayed(make_bench: Any) -> None:
    """A backup was restored beside a newer spare: numbers, sizes and places agree, only the salt differs."""
    other = make_bench(seed=1)
    filled = other.open()
    other.fill(filled, 1)
    filled.seal()
    other.fill(filled, 4, first=2)
    bench = make_bench(seed=2)
    journal = bench.open()
    bench.disk.damage(bench.directory / "spare", other.content(2))
    said = bench.fill(journal, 1)
    journal.seal()
    said += bench.fill(journal, 1, first=2)
    end = journal.segments()[-1].used
    journal.close()
    with bench.open():
        assert bench.replayed == said
        assert bench.warnings == []
    # The sector of the end mark did not make it to the disk: a whole batch of the other journal follows ours.
    ours, theirs = bench.content(2), other.content(2)
    bench.disk.damage(bench.path(2), ours[:end] + theirs[end : end + SECTOR_BYTES] + ours[end + SECTOR_BYTES :])
    with bench.open():
        assert bench.replayed == said
        assert "an earlier use of the file" in bench.warnings[0]


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFFFFF, 17 << 10])
def test_a_length_that_lies_is_compared_with_the_file_before_anything_is_read(bench: Any, length: int) -> None:
    _, starts, content = committed(bench)
    broken = bytearray(content)
    struct.pack_into("<I", broken, starts[2] + 28, length)
    bench.disk.damage(bench.path(1), broken)
    bench.open()
    assert len(bench.replayed) == 2
    assert "extends past the end of the file" in bench.warnings[0]


def three_segments(bench: Any) -> list[Any]:
    journal = bench.open()
    said = []
    for number in (1, 2, 3):
        said += bench.fill(journal, 1, first=number)
        if number < 3:
            journal.seal()
    journal.close()
    return said


def test_a_missing_segment_in_the_middle_is_refused(bench: Any) -> None:
    three_segments(bench)
    bench.disk.remove(bench.path(2))
    with pytest.raises(JournalCorrupt, match="the file is missing") as caught:
        bench.open()
    assert caught.value.file == file_name(2)


def test_a_damaged_header_before_a_batch_is_refused_in_every_segment(bench: Any) -> None:
    three_segments(bench)
    for number in (1, 2, 3):
        content = bench.content(number)
        for at in (0, 17, 25, 33, 41, 60):
            bench.disk.damage(bench.path(number), content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
            with pytest.raises(JournalCorrupt) as caught:
                bench.open()
            assert (caught.value.file, caught.value.offset) == (file_name(number), 0)
        bench.disk.damage(bench.path(number), content)


def test_a_batch_lost_at_the_end_of_a_sealed_segment_is_refused(bench: Any) -> None:
    journal = bench.open()
    bench.fill(journal, 2)
    journal.seal()
    journal.close()
    content = bench.content(1)
    second = SECTOR_BYTES + span(read_header(content, SECTOR_BYTES).length)
    for broken in (content[:second], content[:second] + bytes(len(content) - second), content[: second + 100]):
        bench.disk.damage(bench.path(1), broken)
        with pytest.raises(JournalCorrupt, match="missing") as caught:
            bench.open()
        assert (caught.value.file, caught.value.offset) == (file_name(1), second)


def test_segments_that_changed_places_are_refused(bench: Any) -> None:
    three_segments(bench)
    one, two = bench.content(1), bench.content(2)
    bench.disk.damage(bench.path(1), two)
    bench.disk.damage(bench.path(2), one)
    with pytest.raises(JournalCorrupt, match="the file holds segment 2"):
        bench.open()


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"BROKERJ\n", b"x" * 1000])
@pytest.mark.parametrize("number", [3, 4])
def test_a_last_segment_without_a_header_is_refused(bench: Any, content: bytes, number: int) -> None:
    """Its header was durable before its name: so it held acknowledged batches."""
    three_segments(bench)
    bench.disk.damage(bench.path(number), content)
    with pytest.raises(JournalCorrupt) as caught:
        bench.open()
    assert (caught.value.file, caught.value.offset) == (file_name(number), 0)
    assert bench.content(number) == content


@pytest.mark.parametrize("size", [0, 1, 63, 64, SECTOR_BYTES - 1])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_segment_cut_within_its_first_sector_is_refused(bench: Any, number: int, size: int) -> None:
    three_segments(bench)
    bench.disk.damage(bench.path(number), bench.content(number)[:size])
    with pytest.raises(JournalCorrupt, match="the file ends inside the segment header") as caught:
        bench.open()
    assert (caught.value.file, caught.value.offset) == (file_name(number), 0)


def test_a_missing_newest_segment_is_refused_with_its_place(bench: Any) -> None:
    said = three_segments(bench)
    bench.disk.remove(bench.path(3))
    with pytest.raises(JournalCorrupt, match="the segment after it is missing") as caught:
        bench.open()
    assert (caught.value.file, caught.value.offset) == (file_name(2), 2 * SECTOR_BYTES)
    assert bench.replayed == said[:2]


@pytest.mark.parametrize("marked", [1, 2])
def test_segments_not_yet_marked_as_followed_are_marked_after_the_next_start(bench: Any, marked: int) -> None:
    """A crash came between the next segment and the mark; or an earlier release wrote them."""
    said = three_segments(bench)
    for number in range(marked, 3):
        content = bench.content(number)
        salt = read_header(content, SECTOR_BYTES).salt
        bench.disk.damage(
            bench.path(number), content[: 2 * SECTOR_BYTES] + encode_end(number, salt) + content[3 * SECTOR_BYTES :]
        )
    with bench.open():
        assert bench.replayed == said
        assert bench.warnings == []
    bench.disk.crash()
    for number in (3, 2):
        bench.disk.remove(bench.path(number))
        with pytest.raises(JournalCorrupt, match="the segment after it is missing") as caught:
            bench.open()
        assert caught.value.file == file_name(number - 1)


def test_a_segment_filled_to_its_last_byte_by_an_earlier_release_is_whole_and_can_be_followed(bench: Any) -> None:
    committed(bench, 1)
    content = bytearray(bench.content(1))
    salt = read_header(bytes(content), SECTOR_BYTES).salt
    size = bench.segment_bytes - SECTOR_BYTES - 40
    record = Record(1, 1, 1, b"", b"x" * (size - 25))
    pieces, length, _ = encode_payload([record], 0)
    content[SECTOR_BYTES:] = encode_header(1, salt, 1.0, pieces, length, 1) + b"".join(pieces)
    assert len(content) == bench.segment_bytes
    bench.disk.damage(bench.path(1), bytes(content))
    with bench.open() as journal:
        assert bench.replayed == [(1, 1.0, bench.kept([record]))]
        assert bench.warnings == []
        assert journal.free_space.open_bytes == 0
        bench.fill(journal, 1, first=2)
        assert journal.segments()[-1].number == 2
    assert bench.content(1) == content
    bench.open()
    assert [number for number, _, _ in bench.replayed] == [1, 2]


@pytest.mark.parametrize("lost", [1, 2, 3, 23])
def test_an_end_mark_shows_that_batches_before_it_were_acknowledged(bench: Any, lost: int) -> None:
    said, starts, content = committed(bench, 23)
    broken = bytearray(content)
    broken[starts[23 - lost] : starts[23]] = bytes(starts[23] - starts[23 - lost])
    bench.disk.damage(bench.path(1), broken)
    if lost == 1:  # the end mark of the very batch that is not there: a torn write
        bench.open().close()
        assert len(bench.warnings) == 1
        assert bench.replayed == said[:22]
        bench.open()
        assert bench.warnings == []
        return
    with pytest.raises(JournalCorrupt) as caught:
        bench.open()
    assert (caught.value.file, caught.value.offset) == (file_name(1), starts[23 - lost])
    assert bench.content(1) == broken


def test_a_last_batch_that_left_the_end_mark_before_it_and_its_own_is_not_dropped_without_a_word(bench: Any) -> None:
    said, starts, before = committed(bench, 2)
    with bench.open() as journal:
        bench.fill(journal, 1, first=3, size=1000)
    content = bench.content(1)
    at = starts[2]
    bench.disk.damage(bench.path(1), content[:at] + before[at : at + SECTOR_BYTES] + content[at + SECTOR_BYTES :])
    bench.open().close()
    assert bench.replayed == said
    assert "a batch has been lost" in bench.warnings[0]
    bench.open()
    assert bench.warnings == []


def test_the_mark_of_a_followed_segment_shows_that_its_last_batch_was_acknowledged(bench: Any) -> None:
    three_segments(bench)
    bench.disk.remove(bench.path(3))
    content = bytearray(bench.content(2))
    content[SECTOR_BYTES + 50] ^= 1
    bench.disk.damage(bench.path(2), content)
    with pytest.raises(JournalCorrupt, match="checksum") as caught:
        bench.open()
    assert (caught.value.file, caught.value.offset) == (file_name(2), SECTOR_BYTES)


def test_a_newer_format_has_its_own_error(bench: Any) -> None:
    three_segments(bench)
    for number in (1, 3):
        content = bench.content(number)
        fields = content[:8] + struct.pack("<I", 2) + content[12:60]
        bench.disk.damage(bench.path(number), fields + struct.pack("<I", crc32(fields)) + content[64:])
        with pytest.raises(JournalVersion, match="format version 2") as caught:
            bench.open()
        assert (caught.value.file, caught.value.found, caught.value.supported) == (file_name(number), 2, 1)
        bench.disk.damage(bench.path(number), content)


def test_what_a_dead_process_was_making_is_removed_and_the_rest_left_alone(bench: Any) -> None:
    said = three_segments(bench)
    for name in ("spare.tmp", "0000000000000004.journal.tmp", "1.512.broken.tmp", "notes.txt", "12.journal"):
        bench.disk.open(bench.directory / name, create=True)
    bench.open()
    assert bench.replayed == said
    left = bench.disk.listdir(bench.directory)
    assert not [name for name in left if name.endswith(".tmp")]
    assert {"notes.txt", "12.journal"} <= set(left)


def test_an_open_segment_that_was_cut_short_gets_its_length_back(bench: Any) -> None:
    said, starts, content = committed(bench)
    bench.disk.damage(bench.path(1), content[: starts[3] + 3])
    with bench.open() as journal:
        assert journal.segments()[-1].size == len(bench.content(1)) == bench.segment_bytes
        assert bench.replayed == said


def test_a_shortened_segment_on_a_full_disk_is_left_for_the_spare(make_bench: Any) -> None:
    bench = make_bench(size_bytes=40 << 10)
    said, starts, content = committed(bench)
    bench.disk.damage(bench.path(1), content[: starts[3]])
    bench.disk.size_bytes = bench.disk.used()
    with bench.open() as journal:
        assert bench.replayed == said
        said += bench.fill(journal, 1, first=4)
        assert journal.segments()[-1].number == 2
    bench.open()
    assert bench.replayed == said


def test_a_torn_end_on_a_full_disk_takes_the_room_of_the_spare_for_its_copy(make_bench: Any) -> None:
    bench = make_bench()
    _, starts, content = committed(bench, size=1000)
    bench.disk.damage(bench.path(1), content[: starts[2] + 600].ljust(len(content), b"\0"))
    bench.disk.size_bytes = bench.disk.used()
    with bench.open() as journal:
        assert "copied to" in bench.warnings[0]
        assert journal.is_space_low
        bench.fill(journal, 1, first=3)


def test_a_crash_at_any_step_of_recovery_leaves_a_journal_that_recovers(bench: Any) -> None:
    said, starts, content = committed(bench, size=1000)
    torn = content[: starts[2] + 600]

    def crash_at(step: int) -> bool:
        left = step

        def on_call(name: str, path: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash

        bench.disk.on_call = on_call
        try:
            bench.open()
        except Crash:
            return True
        return False

    step = 0
    while True:
        bench.disk.damage(bench.path(1), torn)
        crashed = crash_at(step)
        bench.disk.crash(random.Random(step))
        with bench.open() as journal:
            assert bench.replayed == said[:2]
            bench.fill(journal, 1, first=3)
        if not crashed:
            break
        step += 1
    assert step > 10


def test_huge_header_lengths_inside_a_batch_that_passes_its_checksum_are_refused(bench: Any) -> None:
    """Not by chance, but by a program with a bug: the lengths of a record must fill its batch exactly."""
    _, starts, content = committed(bench, 2, size=10)
    broken = bytearray(content)
    struct.pack_into("<I", broken, starts[0] + 40 + 17, 0xFFFFFFF0)
    length = read_header(content, starts[0]).length
    crc = crc32(broken[starts[0] + 40 : starts[0] + 40 + length], crc32(broken[starts[0] : starts[0] + 36]))
    struct.pack_into("<I", broken, starts[0] + 36, crc)
    bench.disk.damage(bench.path(1), broken)
    with pytest.raises(JournalCorrupt, match="cannot be decoded"):
        bench.open()


def test_recovery_of_large_bodies_reads_them_once_and_gives_their_offsets(bench: Any) -> None:
    with bench.open() as journal:
        journal.commit([Record(1, 1, 1, b"h", b"a" * 9_000_000), Record(1, 2, 1, b"i", b"b")], 0.0)
        bench.fill(journal, 1, first=2)
    with bench.open() as journal:
        first = bench.batches[0]
        assert journal.read(first.segment, first.blob_offsets[1], 1, batch=first.offset) == b"b"
        assert len(first.records[0].blob) == 9_000_000
