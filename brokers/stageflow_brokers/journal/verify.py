"""Reading a journal without its lock: `verify` reports damage, `scan` yields the batches.

Both may run beside the broker that writes. They must never change a file.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from stageflow_brokers.errors import JournalError
from stageflow_brokers.journal.filesystem import FileSystem, OsFileSystem
from stageflow_brokers.journal.format import Batch
from stageflow_brokers.journal.lock import writer_of
from stageflow_brokers.journal.recovery import corrupt
from stageflow_brokers.journal.scanner import Damage, JournalScanner

__all__ = ["Finding", "require_journal", "scan", "verify"]


class Finding(NamedTuple):
    """Something wrong at `offset` of `file`. If not `damage`, it is a torn end, which the next start cuts off. `cut`:
    the file is shorter than it was made, so that what was acknowledged may be missing."""

    file: str
    offset: int
    reason: str
    damage: bool
    cut: bool = False


def verify(directory: Path, *, files: FileSystem | None = None) -> list[Finding]:
    """Everything wrong with the journal in `directory`; an empty list if nothing is.

    Reads all of it and changes nothing. Raises JournalVersion, and JournalError if there is no journal or it may not
    be read.
    """
    files = require_journal(files, directory)
    with _reading(directory):
        findings = [
            Finding(item.file, item.offset, item.reason, item.fatal, item.cut)
            for item in JournalScanner(files, directory).read()
            if isinstance(item, Damage)
        ]
    if writer_of(files, directory) is not None:
        return [finding for finding in findings if finding.damage]  # a batch in the making is not whole yet
    return findings


def scan(directory: Path, *, files: FileSystem | None = None) -> Iterator[Batch]:
    """All whole batches in `directory`, in order, up to a torn end. Batches in the making may or may not be seen.

    Raises JournalCorrupt where it meets damage, JournalVersion, and JournalError if there is no journal or it may not
    be read.
    """
    with closing(JournalScanner(require_journal(files, directory), directory).read()) as items:
        while True:
            with _reading(directory):
                item = next(items, None)
            if item is None:
                return
            if isinstance(item, Batch):
                yield item
            elif item.fatal:
                raise corrupt(item, directory)


@contextmanager
def _reading(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise JournalError(f"the journal in {directory} cannot be read: {error}") from error


def require_journal(files: FileSystem | None, directory: Path) -> FileSystem:
    files = files if files is not None else OsFileSystem()
    try:
        files.listdir(directory)
    except OSError as error:
        raise JournalError(f"there is no journal in {directory}: {error}") from error
    return files
