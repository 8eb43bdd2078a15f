"""What can go wrong with the history.

    StageFlowError
    └── HistoryError            .path
        ├── HistoryMissing      it is not where it must be: restore it
        ├── HistoryOutdated     it lacks what the journal knows to be written: restore both
        ├── HistoryDamaged      it is there and cannot be trusted: restore it
        ├── HistoryTooNew       written by a newer release: upgrade
        └── HistoryUnavailable  disk full, locked: nothing was written, try again

Callers decide by type alone: only `HistoryUnavailable` may be retried. SQLite's own exceptions never leave this
package.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stageflow_actors.errors import StageFlowError

__all__ = [
    "HistoryDamaged",
    "HistoryError",
    "HistoryMissing",
    "HistoryOutdated",
    "HistoryTooNew",
    "HistoryUnavailable",
    "JournalMissing",
    "typed_errors",
]


class HistoryError(StageFlowError):
    """Base of this package's errors. `path` is the history's file."""

    def __init__(self, path: Path | str, message: str) -> None:
        super().__init__(message)
        self.path = Path(path)


class HistoryMissing(HistoryError):
    """The history does not exist although it must: results and idempotency keys would be lost by starting afresh."""

    def __init__(self, path: Path | str, detail: str = "") -> None:
        super().__init__(
            path,
            f"the history of finished instances is missing: {path}{f' ({detail})' if detail else ''}. "
            "Restore it from the backup taken with the journal; "
            "starting without it would run finished instances a second time",
        )


class HistoryOutdated(HistoryError):
    """The history is older than the journal: ends of instances that were durable are not in it."""

    def __init__(self, path: Path | str, missing: int) -> None:
        super().__init__(
            path,
            f"the history {path} is older than the journal: the last {missing} of the rows that were written to it are "
            f"not there (has its write-ahead log, {Path(path).name}-wal, been left behind?). Restore both from one "
            "backup; with this one finished instances would be run a second time",
        )
        self.missing = missing


class JournalMissing(HistoryError):
    """The history has had a journal, and the one that is there knows nothing of it: live instances would be lost."""

    def __init__(self, path: Path | str, journal: Path | str) -> None:
        super().__init__(
            path,
            f"the journal that belongs to {path} is missing, or is another one: {journal}. It holds the instances that "
            "were live. Restore it from the backup taken with the history, or start with another data directory",
        )


class HistoryDamaged(HistoryError):
    """The file exists and is not a sound history."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(
            path,
            f"the history {path} is damaged or is not a history: {reason}. "
            "Restore it, and the journal with it, from the last backup",
        )


class HistoryTooNew(HistoryError):
    """The file has a format that this release does not know."""

    def __init__(self, path: Path | str, found: int, known: int) -> None:
        super().__init__(
            path,
            f"the history {path} has format {found}, and this release reads up to {known}: "
            "upgrade stageflow-actors to the release that wrote it",
        )
        self.found = found
        self.known = known


class HistoryUnavailable(HistoryError):
    """The history could not be read or written just now. Nothing was written; the call may be tried again.

    That holds after a failed sync too: SQLite writes the pages of the next transaction anew, over those whose
    sync failed, and never counts on them.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(
            path,
            f"the history {path} cannot be used at the moment: {reason}. Nothing was written, and it will be "
            "tried again; free space on its disk, or end what holds it",
        )


_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT})


@contextmanager
def typed_errors(path: Path) -> Iterator[None]:
    """Turns SQLite's errors about the file into this package's; mistakes in the calling code pass through."""
    try:
        yield
    except (sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.IntegrityError):
        raise
    except sqlite3.DatabaseError as error:
        raise _translate(path, error) from error


def _translate(path: Path, error: sqlite3.DatabaseError) -> HistoryError:
    extended = getattr(error, "sqlite_errorcode", 0)
    name = getattr(error, "sqlite_errorname", "")
    reason = f"{error} ({name})" if name else str(error)
    if extended & 0xFF in _DAMAGE or extended == sqlite3.SQLITE_IOERR_SHORT_READ or not extended:
        return HistoryDamaged(path, reason)
    if extended == sqlite3.SQLITE_READONLY_DBMOVED or not path.exists():
        return HistoryMissing(path, "it was removed or renamed while in use")
    if extended & 0xFF == sqlite3.SQLITE_ERROR:
        return HistoryDamaged(path, reason)  # "no such table": another program's database
    return HistoryUnavailable(path, reason)
