"""The reserve of segments: it grows where there is space, and leaves space to other users of the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from stageflow_brokers.errors import JournalFull
from stageflow_brokers.journal.format import Record
from stageflow_brokers.journal.journal import Journal
from stageflow_brokers.testing.simulated_disk import SimulatedDisk

DIRECTORY = Path("/journal")
MB = 1 << 20


def journal(disk: SimulatedDisk) -> Journal:
    return Journal.open(DIRECTORY, replay=lambda batch: None, files=disk, warn=lambda text: None)


def test_the_spare_grows_in_its_place_where_there_is_no_room_for_two() -> None:
    disk = SimulatedDisk(size_bytes=20 * MB + 21)  # the lock takes some, too
    with journal(disk) as opened:
        assert opened.free_space.spare_bytes == 8 * MB
        assert opened.prepare(12 * MB)
        assert (opened.free_space.spare_bytes, opened.disk_free_bytes) == (12 * MB, 4 * MB)
        assert not opened.prepare(17 * MB), "there is no room for that"
        assert opened.free_space.spare_bytes == 12 * MB
        opened.commit([Record(1, 1, 0, b"", bytes(11 * MB))], 0.0)
        assert opened.segments()[-1].size == 12 * MB
    with journal(disk) as again:
        assert again.last_batch == 1


def test_where_there_is_no_room_for_a_whole_spare_a_smaller_one_is_kept() -> None:
    disk = SimulatedDisk(size_bytes=10 * MB)
    with journal(disk) as opened:
        assert (opened.free_space.spare_bytes, opened.free_space.is_low) == (4 * MB, False)


def test_the_reserve_takes_at_most_half_of_the_free_space() -> None:
    disk = SimulatedDisk(size_bytes=64 * MB)
    with journal(disk) as opened:
        while opened.segments()[-1].number < 4:
            free, spare = opened.disk_free_bytes, opened.free_space.spare_bytes
            opened.seal()
            assert opened.free_space.spare_bytes
            assert opened.disk_free_bytes >= free // 2, f"of {free} free, with a spare of {spare}"
        assert opened.prepare(opened.free_space.spare_bytes + MB), "work in hand may take more"


def test_a_spare_segment_leaves_room_to_other_users_of_the_disk() -> None:
    disk = SimulatedDisk(size_bytes=8 * MB + 100)
    with journal(disk) as opened:
        assert (opened.free_space.spare_bytes, opened.free_space.is_low) == (0, True)
        assert not opened.prepare()
        # What must be written takes all that there is.
        for number in range(6):
            opened.commit([Record(1, number, 0, b"", bytes(MB))], 0.0)
        assert opened.segments()[-1].number == 2


def test_a_journal_uses_all_free_space_before_it_reports_that_it_is_full() -> None:
    disk = SimulatedDisk(size_bytes=7 * MB)
    with journal(disk) as opened:
        with pytest.raises(JournalFull, match="no space for a segment of"):
            for number in range(100):
                opened.commit([Record(1, number, 0, b"", bytes(100_000))], 0.0)
        assert disk.size_bytes is not None
        assert disk.used() > disk.size_bytes - 2 * 100_000 - 3 * 512
    with journal(disk) as again:
        assert again.last_batch > 60
