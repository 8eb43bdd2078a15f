"""verify, scan and repair from outside, also beside a broker that writes."""

import errno
import os
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from stageflow_brokers.errors import JournalCorrupt, JournalError, JournalLocked, JournalVersion
from stageflow_brokers.journal.format import SECTOR_BYTES, Batch, file_name, read_header, span
from stageflow_brokers.journal.journal import Journal
from stageflow_brokers.journal.repair import LOST_NAMES_PATTERN, RepairReport, repair
from stageflow_brokers.journal.salvage import LostData
from stageflow_brokers.journal.verify import Finding, scan, verify
from stageflow_brokers.testing.simulated_disk import Crash, SimulatedDisk


def filled(bench: Any, batches: int = 6, per_segment: int = 2) -> list[Any]:
    journal = bench.open()
    said = []
    for number in range(1, batches + 1):
        said += bench.fill(journal, 1, first=number)
        if number % per_segment == 0 and number < batches:
            journal.seal()
    journal.close()
    return said


def flip(bench: Any, segment: int, at: int) -> None:
    content = bytearray(bench.content(segment))
    content[at] ^= 1
    bench.disk.damage(bench.path(segment), content)


def second(bench: Any, segment: int) -> int:
    return SECTOR_BYTES + span(read_header(bench.content(segment), SECTOR_BYTES).length)


def of_version(version: int, content: bytes) -> bytes:
    fields = content[:8] + struct.pack("<I", version) + content[12:60]
    return fields + struct.pack("<I", crc32(fields)) + content[64:]


def contents(bench: Any) -> dict[str, bytes]:
    names = bench.disk.listdir(bench.directory)
    return {name: bench.disk.content(bench.directory / name) for name in names if name != "repair"}


def look(bench: Any) -> list[Finding]:
    before = contents(bench)
    findings = verify(bench.directory, files=bench.disk)
    assert contents(bench) == before
    return findings


def test_a_whole_journal_has_no_findings_and_scans_in_full(bench: Any) -> None:
    filled(bench)
    assert look(bench) == []
    assert [batch.number for batch in scan(bench.directory, files=bench.disk)] == [1, 2, 3, 4, 5, 6]


def test_verify_finds_all_damage_not_only_the_first(bench: Any) -> None:
    filled(bench, 9, 3)
    flip(bench, 1, SECTOR_BYTES + 50)
    flip(bench, 2, second(bench, 2) + 60)
    flip(bench, 3, 3)
    places = [(file_name(1), SECTOR_BYTES, True), (file_name(2), second(bench, 2), True), (file_name(3), 0, True)]
    assert [(found.file, found.offset, found.damage) for found in look(bench)] == places
    with pytest.raises(JournalCorrupt) as caught:
        list(scan(bench.directory, files=bench.disk))
    assert (caught.value.file, caught.value.offset) == places[0][:2]


def test_a_torn_end_is_no_damage_and_not_even_a_finding_while_a_broker_runs(bench: Any) -> None:
    filled(bench, 2)
    flip(bench, 1, second(bench, 1) + 45)
    assert [found.damage for found in look(bench)] == [False]
    assert [batch.number for batch in scan(bench.directory, files=bench.disk)] == [1]
    fd = bench.disk.open(bench.directory / "lock")
    bench.disk.pwritev(fd, [b"%d" % os.getpid()], 0)
    assert len(look(bench)) == 1
    bench.disk.living.add(os.getpid())
    assert look(bench) == []


def test_there_must_be_a_journal_to_look_at(bench: Any, real: Any) -> None:
    for call in (verify, lambda directory, files: list(scan(directory, files=files)), repair):
        with pytest.raises(JournalError, match="there is no journal"):
            call(bench.directory, files=bench.disk)
        with pytest.raises(JournalError, match="there is no journal"):
            call(real.directory, files=None)


def test_reading_a_newer_format_reports_it(bench: Any) -> None:
    filled(bench)
    content = bench.content(2)
    bench.disk.damage(bench.path(2), of_version(9, content))
    for call in (look, lambda bench: repair(bench.directory, files=bench.disk)):
        with pytest.raises(JournalVersion):
            call(bench)


class Watched(SimulatedDisk):
    """Something else happens between two reads."""

    def __init__(self, *, meanwhile: Callable[[], None]) -> None:
        super().__init__()
        self.meanwhile = meanwhile
        self.reading: Callable[[], None] = lambda: None

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        self.reading()
        data = super().pread(fd, size, offset)
        self.meanwhile()
        return data

    def listdir(self, path: Path) -> list[str]:
        names = super().listdir(path)
        self.meanwhile()
        return names


@pytest.mark.parametrize("seed", range(60))
def test_scan_and_verify_beside_a_busy_writer_see_no_damage(make_bench: Any, seed: int) -> None:
    chance = random.Random(seed)
    busy = False
    left = 80

    def meanwhile() -> None:
        nonlocal busy, left
        if busy or left == 0 or chance.random() < 0.4:
            return
        busy = True
        left -= 1
        for _ in range(chance.randint(1, 6)):
            bench.fill(journal, 1, first=journal.last_batch + 1, size=chance.choice([50, 400, 3000]))
            if len(journal.segments()) > 3 and chance.random() < 0.6:
                journal.drop_oldest()
        busy = False

    bench = make_bench()
    bench.disk = Watched(meanwhile=lambda: None)
    bench.disk.living.add(os.getpid())
    journal = bench.open(segment_bytes=8 << 10)
    bench.fill(journal, 20)
    before = journal.last_batch
    bench.disk.meanwhile = meanwhile
    assert verify(bench.directory, files=bench.disk) == []
    numbers = [batch.number for batch in scan(bench.directory, files=bench.disk)]
    oldest = journal.segments()[0].first
    assert numbers == sorted(set(numbers))
    assert set(range(oldest, before + 1)) <= set(numbers)


def test_a_batch_in_the_making_does_not_count_as_damage(bench: Any) -> None:
    journal = bench.open()
    bench.disk.living.add(os.getpid())
    bench.fill(journal, 2)
    looked = 0

    def on_call(name: str, path: str) -> int | None:
        nonlocal looked
        looked += 1
        assert verify(bench.directory, files=bench.disk) == []
        assert [batch.number for batch in scan(bench.directory, files=bench.disk)] in ([1, 2], [1, 2, 3])
        return 700 if name == "pwritev" else None

    bench.disk.on_call = on_call
    bench.fill(journal, 1, first=3, size=4000)
    assert looked > 3


def test_repair_has_nothing_to_do_on_a_whole_journal(bench: Any) -> None:
    said = filled(bench)
    assert repair(bench.directory, files=bench.disk) == RepairReport("", 0, "", 0, 0, [], [], None)
    bench.open()
    assert bench.replayed == said


def test_repair_copies_aside_keeps_what_is_before_the_damage_and_counts_what_it_gives_up(bench: Any) -> None:
    said = filled(bench, 9, 3)
    flip(bench, 2, second(bench, 2) + 60)
    before = {number: bench.content(number) for number in (1, 2, 3)}
    report = repair(bench.directory, files=bench.disk)
    assert report[:2] == (file_name(2), second(bench, 2))
    assert "checksum" in report.reason
    assert (report.batches, report.records) == (4, 8)
    assert {path.name: bench.disk.content(path) for path in report.copies} == {
        file_name(2): before[2],
        file_name(3): before[3],
    }
    assert look(bench) == []
    with bench.open() as journal:
        assert bench.replayed == said[:4]
        assert bench.warnings == []
        said = said[:4] + bench.fill(journal, 20, first=5)
    bench.open()
    assert bench.replayed == said


def headers_of(batch: Batch) -> list[str]:
    return [bytes(record.header).decode(errors="replace") for record in batch.records]


def test_repair_reports_where_each_damaged_batch_was_and_what_can_still_be_read_of_it(bench: Any) -> None:
    filled(bench, 6, 6)
    length = span(read_header(bench.content(1), SECTOR_BYTES).length)
    begin = [SECTOR_BYTES + at * length for at in range(6)]
    flip(bench, 1, begin[1] + 120)  # in a body
    flip(bench, 1, begin[2] + 6)  # in the number of the batch
    flip(bench, 1, begin[3] + 31)  # in its length
    report = repair(bench.directory, files=bench.disk, names_in=headers_of, possible_names_in=headers_of)
    size = read_header(bench.content(1), begin[0]).length + 40
    assert [(lost.offset, lost.records) for lost in report.lost] == [(begin[1], 2), (begin[2], 2), (begin[3], None)]
    assert [lost.length for lost in report.lost] == [size, size, length]
    assert {(lost.file, lost.is_torn, lost.whole_file) for lost in report.lost} == {(file_name(1), False, False)}
    assert list(report.possible_names) == [f"header {number}.{each}" for number in (2, 3, 4) for each in (0, 1)]
    assert report.names == [f"header {number}.{each}" for number in (5, 6) for each in (0, 1)]
    listed = bench.disk.content(report.list_file).decode().splitlines()
    assert f"# {file_name(1)} at offset {begin[1]}, {size} bytes, 2 records: {report.reason}" in listed
    assert listed.index("header 5.0") < listed.index("header 2.0")


@pytest.mark.parametrize("size", [0, 10, SECTOR_BYTES, 3 * SECTOR_BYTES])
def test_repair_reports_that_a_whole_segment_was_given_up_with_its_contents(bench: Any, size: int) -> None:
    filled(bench, 2)
    bench.disk.damage(bench.path(1), bytes(size))
    report = repair(bench.directory, files=bench.disk, names_in=headers_of, possible_names_in=headers_of)
    (lost,) = report.lost
    assert lost == LostData(file_name(1), 0, size, None, report.reason, whole_file=True)
    assert not report.has_segments
    assert "the whole file" in bench.disk.content(report.list_file).decode()


def test_what_a_file_held_before_its_reuse_is_not_reported_as_given_up(bench: Any) -> None:
    filled(bench, 4, 4)
    earlier = bench.content(1)
    bench.disk = SimulatedDisk(seed=7)  # where segments get another salt
    filled(bench, 2)
    begin = second(bench, 1)
    content = bytearray(bench.content(1))
    content[begin + 2 * SECTOR_BYTES : len(earlier)] = earlier[begin + 2 * SECTOR_BYTES :]
    content[begin + 50] ^= 1
    bench.disk.damage(bench.path(1), content)
    report = repair(bench.directory, files=bench.disk, possible_names_in=headers_of)
    assert [(lost.offset, lost.is_torn) for lost in report.lost] == [(begin, True)]
    assert list(report.possible_names) == ["header 2.0", "header 2.1"]


@pytest.mark.parametrize("seed", range(40))
def test_whatever_the_damage_is_repair_ends_and_reports_places_within_the_file(bench: Any, seed: int) -> None:
    chance = random.Random(seed)
    filled(bench, 6, 3)
    for number in (1, 2):
        content = bytearray(bench.content(number))
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(SECTOR_BYTES, 6 * SECTOR_BYTES)
            content[at : at + chance.randint(1, 700)] = chance.randbytes(chance.randint(1, 700))
        bench.disk.damage(bench.path(number), content[: bench.segment_bytes])
    report = repair(bench.directory, files=bench.disk, names_in=headers_of, possible_names_in=headers_of)
    assert look(bench) == []
    assert bool(report.lost) == bool(report.copies)
    for lost in report.lost:
        assert 0 <= lost.offset <= lost.offset + lost.length <= bench.segment_bytes


def test_repair_rewrites_a_damaged_header_and_gives_up_nothing_for_it(bench: Any) -> None:
    said = filled(bench, 9, 3)
    for number in (1, 2, 3):
        flip(bench, number, 30)
    report = repair(bench.directory, files=bench.disk)
    assert (report.file, report.offset, report.batches, report.records) == (file_name(1), 0, 0, 0)
    assert [path.name for path in report.copies] == [file_name(1), file_name(2), file_name(3)]
    bench.open()
    assert bench.replayed == said


def test_repair_mends_several_kinds_of_damage_in_one_go(bench: Any) -> None:
    said = filled(bench, 9, 3)
    flip(bench, 1, 30)
    flip(bench, 2, SECTOR_BYTES + 44)
    report = repair(bench.directory, files=bench.disk)
    assert (report.file, report.offset, report.batches) == (file_name(1), 0, 5)
    bench.open()
    assert bench.replayed == said[:3]


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_repair_puts_segments_behind_a_missing_one_aside(bench: Any, lost: int) -> None:
    said = filled(bench)
    bench.disk.remove(bench.path(lost))
    report = repair(bench.directory, files=bench.disk)
    bench.open()
    if lost == 2:
        assert (report.file, report.offset, report.batches) == (file_name(2), 0, 2)
        assert bench.replayed == said[:2]
    elif lost == 3:
        assert (report.file, report.reason) == (file_name(2), "the segment after it is missing")
        assert (report.offset, report.batches) == (3 * SECTOR_BYTES, 0)
        assert bench.replayed == said[:4]
    else:
        assert report.file == ""  # nothing says that it was ever there
        assert bench.replayed == [each for each in said if (each[0] + 1) // 2 != lost]


def test_repair_of_a_torn_end_cuts_it_and_gives_up_nothing_whole(bench: Any) -> None:
    said = filled(bench, 2)
    flip(bench, 1, second(bench, 1) + 41)
    report = repair(bench.directory, files=bench.disk)
    assert (report.offset, report.batches) == (second(bench, 1), 0)
    bench.open()
    assert bench.replayed == said[:1]
    assert bench.warnings == []


@pytest.mark.parametrize("segment", [1, 2])
def test_repair_of_a_journal_that_ends_anywhere_ends_and_leaves_one_that_opens(
    real: Any, tmp_path: Path, segment: int
) -> None:
    journal = real.open()
    real.fill(journal, 2)
    journal.seal()
    real.fill(journal, 2, first=3)
    journal.close()
    content = real.path(segment).read_bytes()
    end = SECTOR_BYTES + 2 * span(read_header(content, SECTOR_BYTES).length)
    header = range(end - 3, end + 60, 3)
    for cut in [*range(SECTOR_BYTES, end, 97), *header, end + SECTOR_BYTES]:
        there = tmp_path / str(cut)
        shutil.copytree(real.directory, there)
        os.truncate(there / file_name(segment), cut)
        report = repair(there)
        assert len(report.copies) <= 3
        assert verify(there) == []
        Journal.open(there, replay=lambda batch: None).close()


def test_repair_copies_to_a_directory_of_your_choice(real: Any, tmp_path: Path) -> None:
    journal = real.open()
    real.fill(journal, 2)
    journal.seal()
    real.fill(journal, 1, first=3)
    journal.close()
    data = bytearray(real.path(1).read_bytes())
    data[SECTOR_BYTES + 50] ^= 1
    real.path(1).write_bytes(data)
    later = real.path(2).read_bytes()
    report = repair(real.directory, backup_dir=tmp_path / "kept" / "here")
    assert sorted(report.copies) == [tmp_path / "kept" / "here" / file_name(number) for number in (1, 2)]
    assert (tmp_path / "kept" / "here" / file_name(1)).read_bytes() == data
    assert (tmp_path / "kept" / "here" / file_name(2)).read_bytes() == later
    assert (report.batches, report.records) == (2, 4)
    assert not real.path(2).exists()
    real.open().close()
    assert real.replayed == []


def test_repair_is_refused_while_a_broker_holds_the_lock(bench: Any) -> None:
    bench.open()
    with pytest.raises(JournalLocked):
        repair(bench.directory, files=bench.disk)


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("at", range(8, 12))
def test_a_flipped_bit_of_the_version_is_damage_and_is_mended(bench: Any, at: int, bit: int) -> None:
    said = filled(bench)
    content = bytearray(bench.content(2))
    content[at] ^= 1 << bit
    bench.disk.damage(bench.path(2), bytes(content))
    assert [(found.file, found.offset, found.damage) for found in look(bench)] == [(file_name(2), 0, True)]
    with pytest.raises(JournalCorrupt):
        bench.open()
    report = repair(bench.directory, files=bench.disk)
    assert (report.file, report.offset, report.batches) == (file_name(2), 0, 0)
    bench.open()
    assert bench.replayed == said


@pytest.mark.parametrize("sectors", [0, 1])
def test_a_last_segment_without_readable_records_is_refused_and_removed_by_repair(bench: Any, sectors: int) -> None:
    said = filled(bench)
    bench.disk.damage(bench.path(3), bytes(sectors * bench.segment_bytes))
    (finding,) = look(bench)
    assert (finding.file, finding.offset, finding.damage) == (file_name(3), 0, True)
    with pytest.raises(JournalCorrupt):
        bench.open()
    report = repair(bench.directory, files=bench.disk)
    assert [path.name for path in report.copies] == [file_name(3)]
    assert (report.file, report.batches) == (file_name(3), 0)
    assert look(bench) == []
    with bench.open() as journal:
        assert bench.replayed == said[:4]
        assert bench.warnings == []
        assert journal.segments()[-1].number == 2


def test_what_was_cut_off_a_last_segment_between_two_batches_is_found_and_mended(bench: Any) -> None:
    said = filled(bench, 4, 4)
    end = SECTOR_BYTES + 2 * SECTOR_BYTES
    bench.disk.damage(bench.path(1), bench.content(1)[:end])
    (finding,) = look(bench)
    assert (finding.file, finding.offset, finding.damage) == (file_name(1), end, False)
    assert finding.reason == (
        f"the file is {end} bytes long, but {bench.segment_bytes} were allocated: the data after batch 2 is lost"
    )
    report = repair(bench.directory, files=bench.disk)
    assert (report.offset, report.reason) == (end, finding.reason)
    assert look(bench) == []
    bench.open()
    assert bench.replayed == said[:2]
    assert bench.warnings == []


def test_a_last_segment_that_lost_only_what_is_behind_its_end_mark_is_whole(bench: Any) -> None:
    said = filled(bench, 4, 4)
    end = SECTOR_BYTES + 4 * SECTOR_BYTES
    bench.disk.damage(bench.path(1), bench.content(1)[: end + SECTOR_BYTES])
    assert look(bench) == []
    with bench.open() as journal:
        assert bench.warnings == []
        assert len(bench.content(1)) == bench.segment_bytes
        said += bench.fill(journal, 1, first=5)
    bench.open()
    assert bench.replayed == said


def broken_beyond_telling(bench: Any) -> None:
    """Of the first segment nothing is left, and whole ones follow it."""
    filled(bench)
    bench.disk.damage(bench.path(1), bytes(bench.segment_bytes))


def test_a_repair_killed_after_its_first_unlink_leaves_nothing_alive_behind_the_damage(bench: Any) -> None:
    broken_beyond_telling(bench)
    unlinked = 0

    def on_call(name: str, path: str) -> None:
        nonlocal unlinked
        unlinked += name == "unlink"
        if unlinked == 2:
            raise Crash

    bench.disk.on_call = on_call
    with pytest.raises(Crash):
        repair(bench.directory, files=bench.disk)
    bench.disk.kill()
    assert len([name for name in bench.disk.listdir(bench.directory) if name.endswith(".journal")]) == 2
    with pytest.raises(JournalCorrupt) as caught:
        bench.open()
    assert (caught.value.file, caught.value.offset) == (file_name(1), 0)
    assert bench.replayed == []
    repair(bench.directory, files=bench.disk)
    bench.open()
    assert bench.replayed == []


def test_a_rewritten_header_is_durable_before_repair_reports_it(bench: Any) -> None:
    said = filled(bench)
    flip(bench, 2, 30)
    repair(bench.directory, files=bench.disk)
    bench.disk.crash()
    assert look(bench) == []
    bench.open()
    assert bench.replayed == said


def test_what_repair_cuts_off_is_durably_gone_before_it_reports_it(bench: Any) -> None:
    said = filled(bench, 2)
    flip(bench, 1, second(bench, 1) + 41)
    repair(bench.directory, files=bench.disk)
    bench.disk.crash()
    assert look(bench) == []
    bench.open()
    assert bench.replayed == said[:1]
    assert bench.warnings == []


@pytest.mark.parametrize("segment", [1, 2, 3])
@pytest.mark.parametrize("sector", [0, 1, 2])
def test_an_unreadable_sector_is_damage_with_a_place_and_repair_reports_what_it_could_not_copy(
    bench: Any, segment: int, sector: int
) -> None:
    said = filled(bench)
    content = bench.content(segment)
    bench.disk.spoil(bench.path(segment), sector * SECTOR_BYTES)
    (finding,) = look(bench)
    reason = f"the sector at offset {sector * SECTOR_BYTES} cannot be read"
    assert (finding.file, finding.offset, finding.damage) == (file_name(segment), sector * SECTOR_BYTES, True)
    assert reason in finding.reason
    with pytest.raises(JournalCorrupt, match=reason) as caught:
        bench.open()
    assert (caught.value.file, caught.value.offset) == (file_name(segment), sector * SECTOR_BYTES)
    report = repair(bench.directory, files=bench.disk)
    assert report.unreadable == SECTOR_BYTES
    zeros = content[: sector * SECTOR_BYTES] + bytes(SECTOR_BYTES) + content[(sector + 1) * SECTOR_BYTES :]
    assert {path.name: bench.disk.content(path) for path in report.copies}[file_name(segment)] == zeros
    assert look(bench) == []
    bench.open()
    assert bench.replayed == (said if sector == 0 else said[: 2 * segment - 3 + sector])


class WornOut(SimulatedDisk):
    """What cannot be read cannot be read after a write either."""

    def pwritev(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> int:
        inode = self._open[fd][0]
        bad = set(inode.bad)
        written = super().pwritev(fd, buffers, offset)
        inode.bad |= bad
        return written


@pytest.mark.parametrize("sector", [0, 1, 2])
def test_a_sector_that_takes_no_write_either_is_left_behind_by_repair(bench: Any, sector: int) -> None:
    bench.disk = WornOut()
    said = filled(bench)
    bench.disk.spoil(bench.path(2), sector * SECTOR_BYTES)
    report = repair(bench.directory, files=bench.disk)
    assert (report.file, report.offset, report.unreadable) == (file_name(2), sector * SECTOR_BYTES, SECTOR_BYTES)
    bench.disk.crash()
    assert look(bench) == []
    with bench.open() as journal:
        assert bench.replayed == (said if sector == 0 else said[: 1 + sector])
        assert bench.warnings == []
        after = bench.replayed + bench.fill(journal, 3, first=journal.last_batch + 1)
    bench.open()
    assert bench.replayed == after


def test_a_sector_that_cannot_be_read_once_is_read_again(bench: Any) -> None:
    said = filled(bench)
    left = 3

    def meanwhile() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.EIO, "injected")

    names = dict(bench.disk._names)
    bench.disk = Watched(meanwhile=lambda: None)
    bench.disk.mkdir(bench.directory)
    for path, inode in names.items():
        bench.disk.damage(path, bytes(inode.content))
    bench.disk.reading = meanwhile
    assert look(bench) == []
    assert left < 0
    bench.open()
    assert bench.replayed == said


def test_a_journal_without_read_permission_is_reported(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(bench)

    def refuse(path: Path, *, create: bool = False, write: bool = True) -> int:
        raise PermissionError(errno.EACCES, "not for you")

    monkeypatch.setattr(bench.disk, "open", refuse)
    for call in (verify, lambda directory, files: list(scan(directory, files=files))):
        with pytest.raises(JournalError, match="cannot be read"):
            call(bench.directory, files=bench.disk)


@pytest.mark.parametrize("elsewhere", [None, Path("/elsewhere")])
def test_repair_stopped_at_any_call_loses_no_byte_and_can_be_run_again(make_bench: Any, elsewhere: Path | None) -> None:
    def named(batch: Batch) -> list[str]:
        return [f"batch-{batch.number}"]

    step = 0
    while True:
        bench = make_bench(seed=step)
        said = filled(bench, 9, 3)
        flip(bench, 1, 30)
        flip(bench, 2, second(bench, 2) + 60)
        originals = {file_name(number): bench.content(number) for number in (1, 2, 3)}
        left = step

        def on_call(name: str, path: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash

        bench.disk.on_call = on_call
        stopped = False
        try:
            repair(bench.directory, backup_dir=elsewhere, files=bench.disk, names_in=named)
        except Crash:
            stopped = True
        bench.disk.crash(random.Random(step))
        repair(bench.directory, backup_dir=elsewhere, files=bench.disk, names_in=named)
        bench.open().close()
        assert bench.replayed == said[:4]
        everything = [bytes(inode.durable) for inode in bench.disk._durable_names.values()]
        assert all(original in everything for original in originals.values())
        lists = [path for path in bench.disk._durable_names if path.match(LOST_NAMES_PATTERN)]
        listed = {line for path in lists for line in bench.disk.content(path).decode().splitlines()}
        assert {line for line in listed if line[0] != "#"} == {"batch-6", "batch-7", "batch-8", "batch-9"}
        if not stopped:
            break
        step += 1
    assert step > 15
