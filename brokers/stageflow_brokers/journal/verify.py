"""Read a journal without its lock: `verify` reports damage, `scan` yields the batches.

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
from stageflow_brokers.journal.recovery import corrupt_error
from stageflow_brokers.journal.scanner import Damage, JournalScanner

__all__ = ["Finding", "require_journal", "scan", "verify"]


class Finding(NamedTuple):
    """A damaged place: `offset` in `file`. If `damage` is false it is a torn end, which the next start cuts off.

    `cut`: the file is shorter than its header says, so acknowledged data may be missing.
    """

    file: str
    offset: int
    reason: str
    damage: bool
    cut: bool = False


def verify(directory: Path, *, files: FileSystem | None = None) -> list[Finding]:
    """Return every damaged place of the journal in `directory`; an empty list if there is none.

    Reads the whole journal and changes nothing. Raises JournalVersion, and JournalError if there is no journal or it
    cannot be read.
    """
    files = require_journal(files, directory)
    with _reading(directory):
        findings = [
            Finding(item.file, item.offset, item.reason, item.fatal, item.cut)
            for item in JournalScanner(files, directory).read()
            if isinstance(item, Damage)
        ]
    if writer_of(files, directory) is not None:
        return [finding for finding in findings if finding.damage]  # the broker may be writing its last batch
    return findings


def scan(directory: Path, *, files: FileSystem | None = None) -> Iterator[Batch]:
    """Yield all intact batches in `directory`, in order, up to a torn end.

    A batch that a broker writes at the same time may or may not be included. Raises JournalCorrupt at damage,
    JournalVersion, and JournalError if there is no journal or it cannot be read.
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
                raise corrupt_error(item, directory)


@contextmanager
def _reading(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise JournalError(f"the journal in {directory} cannot be read: {error}") from error


def require_journal(files: FileSystem | None, directory: Path) -> FileSystem:
    """Return the file system to use. Raises JournalError if there is no journal in `directory`."""
    files = files if files is not None else OsFileSystem()
    try:
        files.listdir(directory)
    except OSError as error:
        raise JournalError(f"there is no journal in {directory}: {error}") from error
    return files
