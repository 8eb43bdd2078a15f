"""Committed batches are replayed, and their places are known."""

import struct
from pathlib import Path
from typing import Any

import pytest

from stageflow_brokers.errors import JournalCorrupt, JournalError, JournalFull, JournalLocked
from stageflow_brokers.journal import journal as journal_module
from stageflow_brokers.journal import segment_allocator as allocator_module
from stageflow_brokers.journal.format import SECTOR_BYTES, Batch, Record, encode_end, encode_header
from stageflow_brokers.journal.journal import BatchLocation, Journal
from stageflow_brokers.journal.segment_allocator import SegmentAllocator
from stageflow_brokers.testing.simulated_disk import SimulatedDisk


def test_every_committed_batch_is_replayed_in_order(bench: Any) -> None:
    journal = bench.open()
    said = bench.fill(journal, 200)
    journal.close()
    assert len(journal_files(bench)) > 3
    again = bench.open()
    assert bench.replayed == said
    assert bench.warnings == []
    assert again.last_batch == 200


def journal_files(bench: Any) -> list[str]:
    return [name for name in bench.disk.listdir(bench.directory) if name.endswith(".journal")]


def test_a_new_journal_replays_nothing_and_makes_its_directory(real: Any) -> None:
    real.directory = real.directory / "below" / "that"
    with real.open() as journal:
        assert journal.last_batch == 0
    assert real.replayed == []


def test_batches_go_on_counting_after_each_start(bench: Any) -> None:
    said = []
    for start in range(5):
        journal = bench.open()
        assert bench.replayed == said
        said += bench.fill(journal, 30, first=1 + 30 * start)
        journal.close()


def test_extreme_values_survive(bench: Any) -> None:
    records = [
        Record(0, 0, 0, b"", b""),
        Record(255, 2**64 - 1, 2**64 - 1, bytes(range(256)), memoryview(b"\0" * 700)),
        Record(7, 1, 2, memoryview(b"abc")[1:], memoryview(bytearray(b"writable"))),
    ]
    with bench.open() as journal:
        journal.commit(records, -1.5)
    bench.open()
    assert bench.replayed == [(1, -1.5, bench.kept(records))]


def test_bodies_that_hold_journal_bytes_are_not_read_as_records(bench: Any) -> None:
    with bench.open() as journal:
        bench.fill(journal, 3)
        salt = struct.unpack_from("<Q", bench.content(1), 24)[0]
        forged = [
            b"".join((encode_header(n, salt + d, 0.0, [], 0, 0).ljust(SECTOR_BYTES, b"\0")) for n in range(1, 9))
            for d in (0, 1)
        ]
        journal.commit([Record(1, 1, 1, b"", bench.content(1)[: 6 * SECTOR_BYTES])], 4.0)
        journal.commit([Record(1, 1, 1, b"", body) for body in (*forged, encode_end(5, salt) * 3)], 5.0)
        before = bench.content(1)
    bench.open().close()
    assert len(bench.replayed) == 5
    # The same bytes in a torn batch are still only its body.
    end = bytes(before).rindex(encode_end(5, salt)[:40])
    bench.disk.damage(bench.path(1), before[: end - SECTOR_BYTES])
    bench.open()
    assert [number for number, _, _ in bench.replayed] == [1, 2, 3, 4]


def test_a_commit_costs_one_write_and_one_sync(bench: Any) -> None:
    journal = bench.open()
    bench.disk.calls.clear()
    journal.commit(bench.records(1, count=3), 0.0)
    assert [name for name, _ in bench.disk.calls] == ["pwritev", "fdatasync"]


def test_durability_write_does_not_sync_commits_but_does_before_it_goes_on_in_another_segment(bench: Any) -> None:
    journal = bench.open(durability="write")
    bench.disk.calls.clear()
    journal.commit(bench.records(1), 0.0)
    assert [name for name, _ in bench.disk.calls] == ["pwritev"]
    journal.seal()
    bench.fill(journal, 3, first=2)
    bench.disk.crash()
    bench.open()
    assert [number for number, _, _ in bench.replayed] == [1]


def test_commit_does_not_change_the_length_of_the_file(bench: Any) -> None:
    journal = bench.open()
    for number in range(1, 12):
        journal.commit(bench.records(number), 0.0)
        assert len(bench.content(journal.segments()[-1].number)) == bench.segment_bytes


@pytest.mark.parametrize("size", [10, 5000, 300_000])
def test_a_body_is_read_back_from_the_place_that_commit_and_replay_return(real: Any, size: int) -> None:
    with real.open(segment_bytes=1 << 20) as journal:
        places: list[tuple[BatchLocation, list[Record]]] = []
        for number in range(1, 9):
            records = real.records(number, count=5, size=size)
            places.append((journal.commit(records, 0.0), records))
        assert len(journal.segments()) > 1 or size < 300_000
        for place, records in places:
            for offset, record in zip(place.blob_offsets, records, strict=True):
                assert journal.read(place.segment, offset, len(record.blob), batch=place.batch) == record.blob
    with real.open() as journal:
        assert [(batch.segment, batch.blob_offsets, batch.offset) for batch in real.batches] == [
            place for place, _ in places
        ]


def test_reading_opens_few_files_however_many_segments_there_are(real: Any) -> None:
    with real.open(segment_bytes=4 * SECTOR_BYTES) as journal:
        places = [journal.commit(real.records(number, count=1), 0.0) for number in range(1, 310)]
        assert len(journal.segments()) > 100
        for _ in range(2):
            for number, place in enumerate(places, start=1):
                blob = real.records(number, count=1)[0].blob
                assert journal.read(place.segment, place.blob_offsets[0], len(blob), batch=place.batch) == blob
        open_files = [link for link in Path("/proc/self/fd").iterdir() if str(real.directory) in str(link.resolve())]
        assert len(open_files) < 80


def test_a_batch_larger_than_a_segment_gets_a_segment_of_its_own_size(bench: Any) -> None:
    journal = bench.open()
    said = bench.fill(journal, 1)
    large = [Record(1, 2, 3, b"h", bytes(range(256)) * 400)]
    place = journal.commit(large, 2.0)
    said += [(2, 2.0, bench.kept(large)), *bench.fill(journal, 2, first=3)]
    assert journal.read(place.segment, place.blob_offsets[0], 102_400, batch=place.batch) == large[0].blob
    assert [info.size for info in journal.segments()] == [
        16 << 10,
        len(large[0].blob) // SECTOR_BYTES * SECTOR_BYTES + 3 * SECTOR_BYTES,
        16 << 10,
    ]
    journal.close()
    bench.open()
    assert bench.replayed == said


@pytest.mark.parametrize("spare", range(0, 3 * SECTOR_BYTES, 61))
def test_a_segment_may_be_filled_to_its_last_byte(bench: Any, spare: int) -> None:
    """Whatever is left at its end: room for an end mark, a sector, nothing."""
    journal = bench.open()
    first = [Record(1, 1, 1, b"", b"x" * (bench.segment_bytes - SECTOR_BYTES - 40 - 25 - spare))]
    journal.commit(first, 1.0)
    bench.disk.crash()
    journal = bench.open()
    assert bench.replayed == [(1, 1.0, bench.kept(first))]
    assert bench.warnings == []
    said = bench.replayed + bench.fill(journal, 2, first=2)
    bench.disk.crash()
    bench.open()
    assert bench.replayed == said


def test_segments_lists_their_contents(bench: Any) -> None:
    journal = bench.open()
    bench.fill(journal, 2)
    journal.seal()
    bench.fill(journal, 1, first=3)
    assert [tuple(info) for info in journal.segments()] == [
        (1, 1, 3 * SECTOR_BYTES, 16 << 10, True),
        (2, 3, 2 * SECTOR_BYTES, 16 << 10, False),
    ]
    before = journal.segments()
    journal.close()
    assert bench.open().segments() == before


def test_only_the_oldest_sealed_segment_can_be_dropped(bench: Any) -> None:
    journal = bench.open()
    for number in range(1, 5):
        bench.fill(journal, 1, first=number)
        journal.seal()
    for oldest in (1, 2, 3, 4):
        assert journal.segments()[0].number == oldest
        journal.drop_oldest()
        assert bench.path(oldest).name not in bench.disk.listdir(bench.directory)
    with pytest.raises(JournalError, match="the only segment"):
        journal.drop_oldest()
    with pytest.raises(JournalError, match="no longer part of the journal"):
        journal.read(1, SECTOR_BYTES + 65, 1, batch=SECTOR_BYTES)
    said = bench.fill(journal, 2, first=5)
    journal.close()
    bench.open()
    assert bench.replayed == said


def test_a_dropped_segment_is_used_again_and_its_old_batches_are_not(bench: Any) -> None:
    journal = bench.open()
    bench.fill(journal, 25)
    while len(journal.segments()) > 1:
        journal.drop_oldest()
    recycled = journal._allocator  # the spare is now an old segment, full of whole batches
    assert recycled.spare_bytes == bench.segment_bytes
    stale = bytes(bench.disk.content(bench.directory / "spare"))
    journal.seal()
    segment = journal.segments()[-1].number
    assert bench.content(segment)[2 * SECTOR_BYTES :] == stale[2 * SECTOR_BYTES :]
    said = bench.fill(journal, 1, first=26)
    for cut in (False, True):
        bench.disk.crash()
        journal = bench.open()
        assert bench.replayed[-1:] == said
        assert bench.warnings == []
        if not cut:
            said = bench.fill(journal, 1, first=27)


def test_a_journal_in_steady_state_takes_no_more_room(bench: Any) -> None:
    journal = bench.open()
    most = 0
    for number in range(1, 500):
        bench.fill(journal, 1, first=number)
        while len(journal.segments()) > 2:
            journal.drop_oldest()
        most = max(most, bench.disk.used())
    assert most <= 5 * bench.segment_bytes


def test_small_journals_have_small_segments() -> None:
    allocator = SegmentAllocator.__new__(SegmentAllocator)
    allocator._segment_bytes = 64 << 20
    sizes: list[int] = []
    for _ in range(7):
        sizes.append(allocator.next_size(sum(sizes) - 4000 * len(sizes)))  # none is filled to its last byte
    assert [size >> 20 for size in sizes] == [4, 8, 16, 32, 64, 64, 64]


def test_a_small_journal_that_is_compacted_again_and_again_stays_small(bench: Any) -> None:
    journal = bench.open(segment_bytes=64 << 20)
    bench.fill(journal, 2)
    room = []
    for number in range(3, 12):
        journal.seal()
        bench.fill(journal, 1, first=number)
        while len(journal.segments()) > 1:
            journal.drop_oldest()
        room.append(bench.disk.used())
        journal.close()
        journal = bench.open(segment_bytes=64 << 20)
    assert max(room) == room[0] < (16 << 20) + SECTOR_BYTES


def test_a_journal_that_is_filled_has_larger_and_larger_segments(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator_module, "MIN_SEGMENT_BYTES", 64 << 10)
    journal = bench.open(segment_bytes=512 << 10)
    bench.fill(journal, 600, size=1000)
    sizes = [info.size >> 10 for info in journal.segments()]
    assert sizes[:5] == [64, 128, 256, 512, 512]


class Counting(SimulatedDisk):
    """Counts the bytes that are read, and the largest read."""

    read = largest = 0

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        data = super().pread(fd, size, offset)
        self.read += len(data)
        self.largest = max(self.largest, size)
        return data


def test_many_bodies_of_one_batch_are_read_with_one_verification_and_little_memory(bench: Any) -> None:
    bench.disk = Counting()
    journal = bench.open(segment_bytes=16 << 20)
    records = [Record(1, number, 0, b"", bytes([number % 251]) * 3000) for number in range(2500)]
    place = journal.commit(records, 0.0)
    bench.disk.read = bench.disk.largest = 0
    for record, offset in zip(records, place.blob_offsets, strict=True):
        assert journal.read(place.segment, offset, 3000, batch=place.batch) == record.blob
    assert bench.disk.read < 2 * 2500 * 3000 + 2500 * 40
    assert bench.disk.largest <= 1 << 20


def test_a_damaged_body_is_not_handed_out_but_refused_with_file_and_offset(bench: Any) -> None:
    journal = bench.open()
    bench.fill(journal, 1)
    place = journal.commit(bench.records(2), 0.0)
    content = bytearray(bench.content(1))
    content[place.blob_offsets[0] + 3] ^= 1
    bench.disk.damage(bench.path(1), bytes(content))
    for blob in (0, 1):  # the batch is not whole, so none of it is believed
        with pytest.raises(JournalCorrupt, match="checksum of batch 2") as caught:
            journal.read(place.segment, place.blob_offsets[blob], 10, batch=place.batch)
        assert (caught.value.file, caught.value.offset) == (bench.path(1).name, place.batch)


def test_a_body_on_an_unreadable_sector_is_refused_with_file_and_offset(bench: Any) -> None:
    journal = bench.open()
    place = journal.commit(bench.records(1, count=1, size=5000), 0.0)
    assert journal.read(1, place.blob_offsets[0], 2500, batch=place.batch)
    bench.disk.spoil(bench.path(1), place.batch + 3 * SECTOR_BYTES)
    with pytest.raises(JournalCorrupt) as caught:
        journal.read(1, place.blob_offsets[0], 2500, batch=place.batch)
    assert (caught.value.file, caught.value.offset) == (bench.path(1).name, place.batch)


def test_a_batch_of_an_earlier_life_of_the_segment_is_no_body_of_ours(bench: Any) -> None:
    journal = bench.open()
    bench.fill(journal, 1)
    journal.seal()
    old = bench.content(1)
    journal.drop_oldest()
    journal.seal()
    place = journal.commit(bench.records(1), 0.0)
    bench.disk.damage(bench.path(3), bench.content(3)[:SECTOR_BYTES] + old[SECTOR_BYTES:])
    with pytest.raises(JournalCorrupt, match="no batch of this segment"):
        journal.read(3, place.blob_offsets[0], 10, batch=place.batch)


def test_bytes_that_are_not_of_the_batch_are_refused(bench: Any) -> None:
    journal = bench.open()
    place = journal.commit(bench.records(1), 0.0)
    for offset, size in ((place.batch, 10), (place.blob_offsets[-1], 101)):
        with pytest.raises(JournalError, match="does not hold"):
            journal.read(1, offset, size, batch=place.batch)


def test_which_batches_were_verified_is_forgotten_with_their_segment_and_when_there_are_many(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_MAX_CHECKED_BATCHES", 3)
    journal = bench.open()
    places = []
    for number in range(1, 7):
        places.append(journal.commit(bench.records(number), 0.0))
        if number == 4:
            journal.seal()
    for place in places:
        journal.read(place.segment, place.blob_offsets[0], 10, batch=place.batch)
    assert list(journal._checked_batches) == [(place.segment, place.batch) for place in places[3:]]
    journal.drop_oldest()
    assert list(journal._checked_batches) == [(place.segment, place.batch) for place in places[4:]]


def test_a_spare_is_ready_before_it_is_needed(bench: Any) -> None:
    journal = bench.open()
    assert journal.free_space == (True, False, bench.segment_bytes - 2 * SECTOR_BYTES, bench.segment_bytes)
    bench.disk.calls.clear()
    assert journal.prepare()
    assert bench.disk.calls == []
    journal.seal()
    assert journal.free_space.has_spare


def test_without_room_for_a_spare_commits_go_on_and_the_room_is_called_low(make_bench: Any) -> None:
    bench = make_bench(size_bytes=40 << 10)
    journal = bench.open()
    assert not journal.is_space_low
    said = []
    number = 1
    with pytest.raises(JournalFull, match="free some space") as caught:
        while True:
            said += bench.fill(journal, 1, first=number)
            number += 1
    assert caught.value.needed == bench.segment_bytes
    assert journal.is_space_low
    assert not journal.free_space.has_spare
    assert not journal.prepare()
    assert not [name for name in bench.disk.listdir(bench.directory) if name.endswith(".tmp")]
    # Room again: nothing was lost, and no restart is needed.
    journal.drop_oldest()
    assert not journal.is_space_low
    said = [each for each in said if each[0] >= journal.segments()[0].first]
    said += bench.fill(journal, 1, first=number)
    bench.disk.crash()
    bench.open()
    assert bench.replayed == said


def test_a_full_disk_that_another_process_frees_clears_automatically(make_bench: Any) -> None:
    bench = make_bench(size_bytes=20 << 10)
    journal = bench.open()
    assert journal.is_space_low
    bench.disk.size_bytes = None
    assert journal.prepare()
    assert not journal.is_space_low
    assert journal.free_space.has_spare


def test_a_disk_without_room_for_the_first_segment_is_reported(make_bench: Any) -> None:
    bench = make_bench(size_bytes=4 << 10)
    with pytest.raises(JournalFull, match="free some space"):
        bench.open()
    bench.disk.size_bytes = None
    bench.open()


def test_records_at_fault_leave_the_journal_alive(bench: Any) -> None:
    journal = bench.open()
    with pytest.raises(struct.error):
        journal.commit([Record(256, 0, 0, b"", b"")], 0.0)
    with pytest.raises(ValueError, match="without records"):
        journal.commit([], 0.0)
    assert len(bench.fill(journal, 1)) == journal.last_batch == 1


def test_an_error_of_the_replay_goes_up_and_leaves_the_journal_closed(bench: Any) -> None:
    with bench.open() as journal:
        bench.fill(journal, 2)

    def fail(batch: Batch) -> None:
        raise LookupError(batch.number)

    with pytest.raises(LookupError, match="1"):
        Journal.open(bench.directory, replay=fail, files=bench.disk)
    bench.open()
    assert len(bench.replayed) == 2


def test_a_second_journal_in_the_same_directory_is_refused_by_name(bench: Any) -> None:
    journal = bench.open()
    with pytest.raises(JournalLocked, match="stop it, or choose another directory") as caught:
        bench.open()
    assert caught.value.pid is not None
    assert caught.value.path == str(bench.directory / "lock")
    journal.close()
    journal.close()
    bench.open()


def test_a_closed_journal_raises_an_error_that_names_it(bench: Any) -> None:
    journal = bench.open()
    journal.close()
    for call in (journal.seal, journal.drop_oldest, journal.prepare, lambda: bench.fill(journal, 1)):
        with pytest.raises(JournalError, match="closed"):
            call()


def test_a_segment_too_small_for_anything_is_refused(bench: Any) -> None:
    with pytest.raises(ValueError, match="give at least 2048"):
        bench.open(segment_bytes=1000)
