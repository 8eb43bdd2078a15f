"""Repair of a damaged journal: keep everything before the first damage, list and discard the rest.

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
from stageflow_brokers.journal.recovery import clear_end, copy_aside, remove_leftovers, unused_path
from stageflow_brokers.journal.salvage import LostData, salvage
from stageflow_brokers.journal.scanner import Damage, JournalScanner, ScannedSegment, segment_numbers
from stageflow_brokers.journal.segment_allocator import TEMPORARY_SUFFIX
from stageflow_brokers.journal.verify import require_journal

__all__ = ["LOST_NAMES_PATTERN", "RepairReport", "repair"]

LOST_NAMES_PATTERN = "given-up*.txt"
"""Files beside the copies of a repair that list the discarded data: first each damaged place as a comment (``#``), then
the names in the discarded batches, one per line, then in a separate part the names that the damaged bytes may hold."""


class RepairReport(NamedTuple):
    """The result of `repair`. `file` is empty if there was no damage.

    Args:
        file: Name of the segment with the first damage.
        offset: Offset of the first damage in bytes.
        reason: Description of the first damage.
        batches: Number of undamaged batches after the damage, which were discarded.
        records: Number of their records.
        copies: The files that were copied aside.
        names: Names found in the discarded batches.
        list_file: The file that lists the discarded data; None if nothing was discarded.
        unreadable: Number of bytes in the copies that are zeros because the disk could not read them.
        lost: The damaged data.
        possible_names: Further names that the damaged data may hold, as far as it can be read.
        has_segments: True if a segment remains.
    """

    file: str
    offset: int
    reason: str
    batches: int
    records: int
    copies: list[Path]
    names: list[str]
    list_file: Path | None
    unreadable: int = 0
    lost: Sequence[LostData] = ()
    possible_names: Sequence[str] = ()
    has_segments: bool = True


def repair(
    directory: Path,
    *,
    backup_dir: Path | None = None,
    files: FileSystem | None = None,
    names_in: Callable[[Batch], Iterable[str]] = lambda batch: (),
    possible_names_in: Callable[[Batch], Iterable[str]] = lambda batch: (),
) -> RepairReport:
    """Make the journal usable: keep everything before the first damage, discard everything after it.

    A damaged segment header is rewritten if the batches after it show its content; nothing is discarded for it. A list
    of the discarded data is on disk, beside the copies, before anything is cut. A repair that was interrupted can be
    run again; the data that the first run discarded is in the list of the first run.

    Args:
        directory: Directory of the journal.
        backup_dir: Directory for the copies. Default: a new directory ``repair`` in `directory`.
        files: The file system. Default: that of the operating system.
        names_in: Returns the names in a batch, for the list. Default: none.
        possible_names_in: Returns the names that the readable part of a damaged batch may hold. Default: none.

    Raises:
        JournalLocked: A broker uses the journal.
        JournalFull: The disk has no space for a copy. Everything cut so far has been copied.
        JournalVersion: A newer program wrote the journal.
        JournalError: There is no journal, or the repair does not succeed.
    """
    files = require_journal(files, directory)
    try:
        lock = DirectoryLock(files, directory, os.getpid())
    except OSError as error:
        raise JournalError(f"cannot use {directory} to repair the journal in it: {error}") from error
    try:
        remove_leftovers(files, directory)
        return _Repair(files, directory, backup_dir, names_in, possible_names_in).run()
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
        names_in: Callable[[Batch], Iterable[str]],
        possible_names_in: Callable[[Batch], Iterable[str]],
    ) -> None:
        self._files = files
        self._directory = directory
        self._backup = backup_dir if backup_dir is not None else unused_path(files, directory, "repair", "")
        self._names_in = names_in
        self._possible_names_in = possible_names_in
        self._names: dict[str, None] = {}
        self._possible_names: dict[str, None] = {}
        self._lost: list[LostData] = []
        self._list_file: Path | None = None
        self._copies: list[Path] = []
        self._unreadable = 0
        self._batches = self._records = 0
        self._before: ScannedSegment | None = None

    def run(self) -> RepairReport:
        first: Damage | None = None
        last: tuple[str, int, str] | None = None
        # A rewritten header may reveal more damage after it, and a cut leaves nothing after it. So the loop ends.
        while (damage := self._next_damage()) is not None:
            place = (damage.file, damage.offset, damage.reason)
            if place == last:
                raise JournalError(f"{damage.file} cannot be repaired at offset {damage.offset}: {damage.reason}")
            last = place
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
            self._list_file,
            self._unreadable,
            self._lost,
            self._only_possible(),
            bool(segment_numbers(self._files, self._directory)),
        )

    def _only_possible(self) -> list[str]:
        return [name for name in self._possible_names if name not in self._names]

    def _next_damage(self) -> Damage | None:
        """Return the first damage. If the journal must be cut there, count it and everything after it as discarded."""
        damage: Damage | None = None
        scanner = JournalScanner(self._files, self._directory)
        with closing(scanner.read()) as items:
            for item in items:
                if isinstance(item, Batch):
                    if damage is not None:
                        self._batches += 1
                        self._records += len(item.records)
                        self._names.update(dict.fromkeys(self._names_in(item)))
                    continue
                if damage is None:
                    damage = item
                    self._before = scanner.segments[-1] if scanner.segments else None
                    if damage.rebuilt is not None:
                        return damage
                if item.rebuilt is None:
                    self._lose(item)
        return damage

    def _lose(self, damage: Damage) -> None:
        for lost, batch in salvage(self._files, self._directory, damage):
            self._lost.append(lost)
            if batch is not None:
                self._possible_names.update(dict.fromkeys(self._possible_names_in(batch)))

    def _write_header(self, name: str, header: SegmentHeader) -> None:
        if self._copy(name):
            self._rewrite(name, None)
        sector = encode_segment(header)
        fd = self._files.open(self._directory / name)
        try:
            write_at(self._files, fd, [sector], len(sector), 0)
            self._files.fsync(fd)
        finally:
            self._files.close(fd)

    def _write_list(self) -> None:
        """Write the list of the discarded data and sync it, before anything is cut."""
        list_file = unused_path(self._files, self._backup, *LOST_NAMES_PATTERN.split("*"))
        temporary = list_file.with_name(list_file.name + TEMPORARY_SUFFIX)
        lines = [f"# {each.describe()}" for each in self._lost]
        lines += self._names
        if possible := self._only_possible():
            lines += ["# possibly also, as far as the damaged bytes can be read:", *possible]
        content = "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
        fd = self._files.open(temporary, create=True)
        try:
            write_at(self._files, fd, [content], len(content), 0)
            self._files.fsync(fd)
        finally:
            self._files.close(fd)
        self._files.rename(temporary, list_file)
        self._files.fsync_dir(self._backup)
        self._list_file = list_file

    def _cut(self, damage: Damage) -> None:
        self._write_list()
        if damage.offset == 0:
            self._unmark_followed(damage.segment)
        # From the newest back to the damage: after an interruption, the next repair finds the damage again.
        for number in reversed(segment_numbers(self._files, self._directory)):
            if number > damage.segment or (number == damage.segment and damage.offset == 0):
                self._copy(file_name(number))
                self._files.unlink(self._directory / file_name(number))
                self._files.fsync_dir(self._directory)
        if damage.offset > 0:
            if self._copy(damage.file):
                self._rewrite(damage.file, damage.offset)
            path = self._directory / damage.file
            clear_end(self._files, path, damage.offset, damage.number, damage.salt, sys.maxsize, grow=True)

    def _unmark_followed(self, segment: int) -> None:
        """Remove the followed mark from the segment before `segment`, before that one is deleted.

        Otherwise a crash in between would leave a journal whose next segment seems to be lost.
        """
        before = self._before
        if before is not None and before.followed and before.header.number == segment - 1:
            path = self._directory / file_name(before.header.number)
            clear_end(self._files, path, before.end, before.following, before.header.salt, 0)

    def _copy(self, name: str) -> int:
        """Copy the file aside. Return how many bytes of it cannot be read."""
        target = unused_path(self._files, self._backup, name, "")
        unreadable = copy_aside(self._files, self._directory / name, 0, None, target)
        self._unreadable += unreadable
        self._copies.append(target)
        return unreadable

    def _rewrite(self, name: str, end: int | None) -> None:
        """Write the file, up to `end`, to other blocks of the disk: an unreadable sector may reject writes, too."""
        path = self._directory / name
        copy_aside(self._files, path, 0, end, path)
