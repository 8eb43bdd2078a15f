"""Repair of a damaged journal: keep everything before the first damage, list and give up the rest.

`repair` takes the lock of the journal. It copies everything that it changes before it changes it, and reports what is
lost. It must never run beside a broker.
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from stageflow_brokers.errors import JournalError, JournalFailed
from stageflow_brokers.journal.filesystem import FileSystem, write_at
from stageflow_brokers.journal.format import Batch, SegmentHeader, encode_segment, file_name
from stageflow_brokers.journal.lock import DirectoryLock
from stageflow_brokers.journal.recovery import clear_end, copy_aside, remove_leftovers, unused
from stageflow_brokers.journal.salvage import Lost, salvage
from stageflow_brokers.journal.scanner import Damage, JournalScanner, ScannedSegment, segment_numbers
from stageflow_brokers.journal.segment_allocator import TEMPORARY
from stageflow_brokers.journal.verify import require_journal

__all__ = ["LOST_NAMES_PATTERN", "RepairReport", "repair"]

LOST_NAMES_PATTERN = "given-up*.txt"
"""Beside the copies of a repair: each damaged place as a comment (``#``), then the names of what was given up, one a
line, then as a part of its own those that may have been in what is damaged."""


class RepairReport(NamedTuple):
    """What `repair` did. Nothing was wrong if `file` is empty.

    `file`, `offset` and `reason` say where the first damage was; `batches` and `records` how many whole ones behind it
    were given up; `copies` are the files copied aside. `names` are what the batches given up are known by. `lost` is
    what is damaged itself, and `perhaps` further names, of what may have been in there, as far as it can be read;
    `listed` is the file that holds all of that, None if nothing was given up. `unreadable` bytes of the copies are
    zeros, because the disk did not give them back. `left`: whether a segment remains.
    """

    file: str
    offset: int
    reason: str
    batches: int
    records: int
    copies: list[Path]
    names: list[str]
    listed: Path | None
    unreadable: int = 0
    lost: Sequence[Lost] = ()
    perhaps: Sequence[str] = ()
    left: bool = True


def repair(
    directory: Path,
    *,
    backup_dir: Path | None = None,
    files: FileSystem | None = None,
    names: Callable[[Batch], Iterable[str]] = lambda batch: (),
    perhaps: Callable[[Batch], Iterable[str]] = lambda batch: (),
) -> RepairReport:
    """Make the journal one that opens: keep everything before the first damage, give up what follows it.

    A damaged segment header is written anew when the batches behind it tell what it said, and nothing is given up for
    it. Copies go to `backup_dir`, by default a new directory ``repair`` inside. `names` tells what a batch is known by,
    `perhaps` the same of what can be read of a damaged one: a list of what is given up lies beside the copies, on disk
    before anything is cut. Stopped half-way it can be run again; what the first run gave up is in its own list then.

    Raises JournalLocked while a broker runs, JournalFull without room for a copy (what has been cut by then has been
    copied), JournalVersion, and JournalError if there is no journal.
    """
    files = require_journal(files, directory)
    try:
        lock = DirectoryLock(files, directory, os.getpid())
    except OSError as error:
        raise JournalError(f"cannot use {directory} to repair the journal in it: {error}") from error
    try:
        remove_leftovers(files, directory)
        return _Repair(files, directory, backup_dir, names, perhaps).run()
    except OSError as error:
        raise JournalFailed(f"{directory} could not be repaired: {error}; run it again when the disk works") from error
    finally:
        lock.release()


class _Repair:
    def __init__(
        self,
        files: FileSystem,
        directory: Path,
        backup_dir: Path | None,
        names: Callable[[Batch], Iterable[str]],
        perhaps: Callable[[Batch], Iterable[str]],
    ) -> None:
        self._files = files
        self._directory = directory
        self._backup = backup_dir if backup_dir is not None else unused(files, directory, "repair", "")
        self._names_of = names
        self._perhaps_in = perhaps
        self._names: dict[str, None] = {}
        self._perhaps: dict[str, None] = {}
        self._lost: list[Lost] = []
        self._listed: Path | None = None
        self._copies: list[Path] = []
        self._unreadable = 0
        self._batches = self._records = 0
        self._before: ScannedSegment | None = None

    def run(self) -> RepairReport:
        first: Damage | None = None
        last: tuple[str, int, str] | None = None
        # A header written anew may show more damage behind it; a cut leaves nothing behind. So this ends.
        while (damage := self._next_damage()) is not None:
            here = (damage.file, damage.offset, damage.reason)
            if here == last:
                raise JournalError(f"{damage.file} cannot be repaired at offset {damage.offset}: {damage.reason}")
            last = here
            if first is None:
                first = damage
                self._files.mkdir(self._backup)
            if damage.rebuilt is not None:
                self._write_header(damage.file, damage.rebuilt)
            else:
                self._cut(damage)
        if first is None:
            return RepairReport("", 0, "", 0, 0, [], [], None)
        return RepairReport(
            first.file,
            first.offset,
            first.reason,
            self._batches,
            self._records,
            self._copies,
            list(self._names),
            self._listed,
            self._unreadable,
            self._lost,
            self._only_perhaps(),
            bool(segment_numbers(self._files, self._directory)),
        )

    def _only_perhaps(self) -> list[str]:
        return [name for name in self._perhaps if name not in self._names]

    def _next_damage(self) -> Damage | None:
        """The first damage. If it is one to be cut at, that and what is behind it is counted as given up."""
        damage: Damage | None = None
        survey = JournalScanner(self._files, self._directory)
        with closing(survey.read()) as items:
            for item in items:
                if isinstance(item, Batch):
                    if damage is not None:
                        self._batches += 1
                        self._records += len(item.records)
                        self._names.update(dict.fromkeys(self._names_of(item)))
                    continue
                if damage is None:
                    damage = item
                    self._before = survey.segments[-1] if survey.segments else None
                    if damage.rebuilt is not None:
                        return damage
                if item.rebuilt is None:
                    self._lose(item)
        return damage

    def _lose(self, damage: Damage) -> None:
        for lost, batch in salvage(self._files, self._directory, damage):
            self._lost.append(lost)
            if batch is not None:
                self._perhaps.update(dict.fromkeys(self._perhaps_in(batch)))

    def _write_header(self, name: str, header: SegmentHeader) -> None:
        if self._copy(name):
            self._move(name, None)
        sector = encode_segment(header)
        fd = self._files.open(self._directory / name)
        try:
            write_at(self._files, fd, [sector], len(sector), 0)
            self._files.fsync(fd)
        finally:
            self._files.close(fd)

    def _list(self) -> None:
        """What is given up, by its place and its names, for good before anything is cut."""
        listed = unused(self._files, self._backup, *LOST_NAMES_PATTERN.split("*"))
        temporary = listed.with_name(listed.name + TEMPORARY)
        lines = [f"# {each.told()}" for each in self._lost]
        lines += self._names
        if perhaps := self._only_perhaps():
            lines += ["# possibly too, by what can be read of what is damaged:", *perhaps]
        content = "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
        fd = self._files.open(temporary, create=True)
        try:
            write_at(self._files, fd, [content], len(content), 0)
            self._files.fsync(fd)
        finally:
            self._files.close(fd)
        self._files.rename(temporary, listed)
        self._files.fsync_dir(self._backup)
        self._listed = listed

    def _cut(self, damage: Damage) -> None:
        self._list()
        if damage.offset == 0:
            self._forget_next(damage.segment)
        # From the newest back to the damage: stopped in between, the damage is still there to be found again.
        for number in reversed(segment_numbers(self._files, self._directory)):
            if number > damage.segment or (number == damage.segment and damage.offset == 0):
                self._copy(file_name(number))
                self._files.unlink(self._directory / file_name(number))
                self._files.fsync_dir(self._directory)
        if damage.offset > 0:
            if self._copy(damage.file):
                self._move(damage.file, damage.offset)
            path = self._directory / damage.file
            clear_end(self._files, path, damage.offset, damage.number, damage.salt, sys.maxsize, grow=True)

    def _forget_next(self, segment: int) -> None:
        """The segment before this one, which goes, is to be followed by none: before anything goes, as in a crash."""
        before = self._before
        if before is not None and before.followed and before.header.number == segment - 1:
            path = self._directory / file_name(before.header.number)
            clear_end(self._files, path, before.end, before.following, before.header.salt, 0)

    def _copy(self, name: str) -> int:
        """Copy that file aside. How many bytes of it cannot be read."""
        target = unused(self._files, self._backup, name, "")
        unreadable = copy_aside(self._files, self._directory / name, 0, None, target)
        self._unreadable += unreadable
        self._copies.append(target)
        return unreadable

    def _move(self, name: str, end: int | None) -> None:
        """Let the file lie elsewhere on the disk, up to `end`: an unreadable sector may take no write either."""
        path = self._directory / name
        copy_aside(self._files, path, 0, end, path)
