"""A disk that fails at the n-th call, or a machine that stops there, for each n: nothing acknowledged is lost."""

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stageflow_brokers.errors import JournalCorrupt, JournalError, JournalFailed, JournalFull
from stageflow_brokers.journal.filesystem import write_at
from stageflow_brokers.journal.format import Batch, Record
from stageflow_brokers.journal.journal import Journal
from stageflow_brokers.testing.simulated_disk import Crash, SimulatedDisk

DIRECTORY = Path("/data/journal")
SEGMENT = 8 << 10
Kept = list[tuple[int, bytes]]


class Story:
    """One run of a journal with every operation, and its acknowledgements."""

    def __init__(self, disk: SimulatedDisk) -> None:
        self.disk = disk
        self.acked: dict[int, bytes] = {}
        self.tried: dict[int, bytes] = {}
        self.dropped = 0  # batches up to this one were deleted
        self.dropping = 0  # or perhaps up to this one
        self.failed = False
        self.journal: Journal | None = None

    def open(self) -> Journal:
        self.journal = Journal.open(
            DIRECTORY, replay=lambda batch: None, files=self.disk, segment_bytes=SEGMENT, warn=lambda text: None
        )
        return self.journal

    def run(self) -> None:
        journal = self.open()
        for size in (100, 1500, 3000, 100, 700, 20_000, 10):
            self.commit(journal, size)
        self.attempt(journal.seal)
        self.commit(journal, 300)
        for _ in range(3):
            self.drop(journal)
            self.commit(journal, 2500)
        self.attempt(journal.prepare)
        self.commit(journal, 2500)

    def commit(self, journal: Journal, size: int) -> None:
        number = journal.last_batch + 1
        body = b"%d " % number * (size // 4)
        self.tried[number] = body
        if self.attempt(lambda: journal.commit([Record(1, number, 0, b"header", body)], 0.0)):
            self.acked[number] = body

    def drop(self, journal: Journal) -> None:
        if len(segments := journal.segments()) > 1:
            self.dropping = segments[1].first - 1
            if self.attempt(journal.drop_oldest):
                self.dropped = self.dropping

    def attempt(self, call: Callable[[], Any]) -> bool:
        """Go on after every error, as a broker must not: nothing may succeed after a failure."""
        try:
            call()
        except JournalFull:
            return False
        except JournalError:
            self.failed = True
            return False
        assert not self.failed, "something succeeded after a failed write or sync"
        return True

    def recover(self) -> None:
        """What is on disk is what was acknowledged, and at most the one batch more that was being committed."""
        batches: dict[int, bytes] = {}

        def replay(batch: Batch) -> None:
            (record,) = batch.records
            batches[batch.number] = bytes(record.blob)

        self.disk.size_bytes = None
        journal = Journal.open(DIRECTORY, replay=replay, files=self.disk, segment_bytes=SEGMENT, warn=lambda text: None)
        last = max(self.acked, default=0)
        assert all(batches[number] == self.tried[number] for number in batches)
        assert {number for number in self.acked if number > self.dropping} <= set(batches)
        assert not batches or (min(batches) > self.dropped and max(batches) <= last + 1)
        journal.commit([Record(1, 1, 0, b"", b"after")], 0.0)
        journal.close()


def fail_from(disk: SimulatedDisk, step: int, code: int, *, for_ever: bool) -> list[str]:
    """Let call `step` fail, or all from there on; the list gets the names of those that did."""
    hit: list[str] = []

    def on_call(name: str, path: str) -> int | None:
        nonlocal step
        step -= 1
        if step == -1 or (step < 0 and for_ever):
            hit.append(name)
            if code == 0:
                return 300 if name == "pwritev" else None
            if code == errno.EINTR and name in ("rename", "unlink", "create", "fallocate"):
                return None
            raise OSError(code, "injected")
        return None

    disk.on_call = on_call
    return hit


@pytest.mark.parametrize(
    ("code", "for_ever"),
    [
        (errno.EIO, False),
        (errno.EIO, True),
        (errno.ENOSPC, False),
        (errno.ENOSPC, True),
        (errno.EINTR, False),
        (0, False),
        (0, True),
    ],
    ids=[
        "EIO once",
        "EIO for ever",
        "ENOSPC once",
        "ENOSPC for ever",
        "EINTR",
        "a short write",
        "short writes for ever",
    ],
)
def test_whatever_call_fails_nothing_acknowledged_is_lost_and_nothing_follows_a_failure(
    code: int, for_ever: bool
) -> None:
    seen: set[str] = set()
    step = 0
    while True:
        for ends in ("process", "machine"):
            disk = SimulatedDisk(seed=step)
            story = Story(disk)
            hit = fail_from(disk, step, code, for_ever=for_ever)
            try:
                story.run()
            except JournalError:
                assert story.journal is None, "only opening may raise here"
            seen.update(hit[:1])
            if code == 0:
                assert not story.failed
                assert len(story.acked) == 12
            if ends == "process":
                disk.kill()
            else:
                disk.crash(random.Random(step))
            story.recover()
        if not hit:
            break
        step += 1
    assert seen >= {"create", "pwritev", "fdatasync", "fsync", "fallocate", "rename", "unlink", "fsync_dir"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("spare", ["there", "none"])
def test_a_failed_sync_of_the_spare_segment_stops_the_journal_whatever_the_error(code: int, spare: str) -> None:
    disk = SimulatedDisk()
    journal = Story(disk).open()
    if spare == "none":
        assert journal._allocator.release_spare()

    def on_call(name: str, path: str) -> None:
        if name == "fsync":
            disk.on_call = lambda name, path: None
            raise OSError(code, "injected")

    disk.on_call = on_call
    with pytest.raises(JournalFailed):
        journal.prepare(4 * SEGMENT)
    with pytest.raises(JournalFailed):
        journal.commit([Record(1, 1, 0, b"", b"")], 0.0)


def test_the_mark_that_a_segment_is_followed_lasts_before_a_batch_goes_into_the_next() -> None:
    """Whatever the durability: seen from the calls, and from what a crash leaves."""
    disk = SimulatedDisk()
    journal = Journal.open(DIRECTORY, replay=lambda batch: None, files=disk, segment_bytes=SEGMENT, durability="write")
    journal.commit([Record(1, 1, 0, b"", b"")], 0.0)
    disk.calls.clear()
    journal.seal()
    calls = [name for name, _ in disk.calls[:7]]
    assert calls == ["fdatasync", "pwritev", "fsync", "rename", "fsync_dir", "pwritev", "fdatasync"]
    disk.crash()
    disk.remove(DIRECTORY / "0000000000000002.journal")
    with pytest.raises(JournalCorrupt, match="the segment after it is missing"):
        Story(disk).open()


def test_a_mark_that_a_killed_process_did_not_sync_is_synced_before_anyone_trusts_it() -> None:
    disk = SimulatedDisk()
    story = Story(disk)
    journal = story.open()
    story.commit(journal, 100)

    def on_call(name: str, path: str) -> None:
        if name == "fdatasync":
            raise Crash

    disk.on_call = on_call
    with pytest.raises(Crash):
        journal.seal()
    disk.kill()
    journal = story.open()
    story.commit(journal, 100)
    disk.crash()
    disk.remove(DIRECTORY / "0000000000000002.journal")
    with pytest.raises(JournalCorrupt, match="the segment after it is missing"):
        story.open()


@pytest.mark.parametrize("name", ["pwritev", "fdatasync"])
def test_after_a_failed_commit_no_commit_succeeds_though_the_disk_works_again(name: str) -> None:
    disk = SimulatedDisk()
    story = Story(disk)
    journal = story.open()
    story.commit(journal, 100)

    def on_call(called: str, path: str) -> None:
        if called == name:
            disk.on_call = lambda name, path: None
            raise OSError(errno.EIO, "injected")

    disk.on_call = on_call
    for _ in range(3):
        with pytest.raises(JournalFailed, match="end this process and start it again"):
            journal.commit([Record(1, 2, 0, b"", b"")], 0.0)
    for call in (journal.seal, journal.drop_oldest, journal.prepare):
        with pytest.raises(JournalFailed):
            call()
    journal.close()
    assert story.open().last_batch == 1


def test_what_a_failed_sync_left_in_memory_does_not_count_as_on_disk() -> None:
    """The pages of a failed sync are clean and can be read; a machine that stops later would prove them wrong."""
    disk = SimulatedDisk()
    story = Story(disk)
    journal = story.open()
    story.commit(journal, 100)
    hit = fail_from(disk, 1, errno.EIO, for_ever=False)
    story.commit(journal, 100)
    assert hit == ["fdatasync"]
    disk.kill()
    assert story.open().last_batch == 1


def test_what_a_killed_process_wrote_is_synced_before_it_is_replayed() -> None:
    disk = SimulatedDisk()
    journal = Journal.open(DIRECTORY, replay=lambda batch: None, files=disk, segment_bytes=SEGMENT, durability="write")
    journal.commit([Record(1, 1, 0, b"", b"")], 0.0)
    disk.kill()
    seen: list[int] = []

    def replay(batch: Batch) -> None:
        seen.append(batch.number)
        raise Crash

    for _ in range(2):
        with pytest.raises(Crash):
            Journal.open(DIRECTORY, replay=replay, files=disk, segment_bytes=SEGMENT)
        disk.crash()
    assert seen == [1, 1]


def test_a_write_that_is_cut_short_and_interrupted_again_and_again_is_finished() -> None:
    disk = SimulatedDisk()
    pieces: list[bytes | memoryview] = [bytes([each % 251]) * (each % 40) for each in range(3000)]
    chance = random.Random(3)

    def on_call(name: str, path: str) -> int | None:
        if name == "pwritev" and chance.random() < 0.3:
            raise InterruptedError(errno.EINTR, "injected")
        return chance.randint(1, 2000)

    fd = disk.open(DIRECTORY / "file", create=True)
    disk.on_call = on_call
    whole = b"".join(pieces)
    write_at(disk, fd, pieces, len(whole), 100)
    assert disk.content(DIRECTORY / "file") == bytes(100) + whole


def test_a_disk_that_takes_nothing_is_not_asked_for_ever() -> None:
    disk = SimulatedDisk()
    journal = Story(disk).open()
    disk.on_call = lambda name, path: 0
    with pytest.raises(JournalFailed):
        journal.commit([Record(1, 1, 0, b"", b"")], 0.0)


def test_an_interruption_between_write_and_sync_is_the_end_too() -> None:
    disk = SimulatedDisk()
    journal = Story(disk).open()

    def on_call(name: str, path: str) -> None:
        if name == "fdatasync":
            raise KeyboardInterrupt

    disk.on_call = on_call
    with pytest.raises(KeyboardInterrupt):
        journal.commit([Record(1, 1, 0, b"", b"")], 0.0)
    disk.on_call = lambda name, path: None
    with pytest.raises(JournalFailed):
        journal.commit([Record(1, 1, 0, b"", b"")], 0.0)


def stop_at_each_call(make: Callable[[int], SimulatedDisk], chances: int) -> int:
    """Stop the machine at each call of the story, keeping nothing unsynced or any part of it. The number of calls."""
    step = 0
    while True:
        for chance in (None, *(random.Random(f"{step} {each}") for each in range(chances))):
            disk = make(step)
            story = Story(disk)
            left = step

            def on_call(name: str, path: str) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Crash

            disk.on_call = on_call
            stopped = False
            try:
                story.run()
            except Crash:
                stopped = True
            disk.crash(chance)
            story.recover()
        if not stopped:
            return step
        step += 1


def test_a_machine_that_stops_at_any_call_loses_nothing_acknowledged() -> None:
    assert stop_at_each_call(lambda step: SimulatedDisk(seed=step), chances=8) > 70


class WithoutDirectorySync(SimulatedDisk):
    def fsync_dir(self, path: Path) -> None:
        pass


class WithoutSync(SimulatedDisk):
    def fdatasync(self, fd: int) -> None:
        pass


class WithoutFileSync(SimulatedDisk):
    def fsync(self, fd: int) -> None:
        pass


@pytest.mark.parametrize("mutant", [WithoutDirectorySync, WithoutSync, WithoutFileSync])
def test_a_journal_that_leaves_one_kind_of_sync_out_is_found_out(mutant: type[SimulatedDisk]) -> None:
    with pytest.raises((AssertionError, JournalCorrupt)):
        stop_at_each_call(lambda step: mutant(seed=step), chances=8)


def test_a_new_segment_is_durable_in_its_directory_before_a_batch_goes_into_it() -> None:
    """The mutant without a directory fsync, alone: the name of the new segment is gone, with what was acknowledged."""
    for make, survives in ((SimulatedDisk, True), (WithoutDirectorySync, False)):
        disk = make()
        story = Story(disk)
        journal = story.open()
        disk.fsync_dir = SimulatedDisk.fsync_dir.__get__(disk)  # type: ignore[method-assign]
        disk.fsync_dir(DIRECTORY)
        disk.fsync_dir = make.fsync_dir.__get__(disk)  # type: ignore[method-assign]
        story.commit(journal, 100)
        journal.seal()
        story.commit(journal, 100)
        disk.crash()
        if survives:
            assert story.open().last_batch == 2
        else:
            with pytest.raises(JournalCorrupt, match="the segment after it is missing"):
                story.open()


def test_a_dropped_segment_is_deleted_durably_before_its_bytes_are_used_again() -> None:
    for make, survives in ((SimulatedDisk, True), (WithoutDirectorySync, False)):
        disk = make()
        story = Story(disk)
        journal = story.open()
        story.commit(journal, 100)
        journal.seal()
        story.commit(journal, 100)
        SimulatedDisk.fsync_dir(disk, DIRECTORY)
        journal.drop_oldest()
        disk.crash()
        assert ("0000000000000001.journal" not in disk.listdir(DIRECTORY)) is survives
