"""The errors of the history.

    StageFlowError
    └── HistoryError            .path
        ├── HistoryMissing      the file does not exist: restore it
        ├── HistoryOutdated     it lacks rows that the journal has counted: restore both
        ├── JournalMissing      its journal is missing or replaced: restore both
        ├── HistoryDamaged      it is corrupt or not a history: restore both
        ├── HistoryTooNew       written by a newer release: upgrade
        └── HistoryUnavailable  disk full, locked: nothing was written, try again

Callers decide by type alone: only `HistoryUnavailable` may be retried. Exceptions of SQLite about the file must not
leave this package.
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
    """Base of this package's errors. `path` is the file of the history."""

    def __init__(self, path: Path | str, message: str) -> None:
        super().__init__(message)
        self.path = Path(path)


class HistoryMissing(HistoryError):
    """The history does not exist, but the journal has recorded one; a new file would lose results and instance ids."""

    def __init__(self, path: Path | str, detail: str = "") -> None:
        super().__init__(
            path,
            f"the history of finished instances is missing: {path}{f' ({detail})' if detail else ''}. "
            "Restore it from the backup taken with the journal; "
            "without it, finished instances could run a second time",
        )


class HistoryOutdated(HistoryError):
    """The history is older than the journal: it lacks `missing` rows that were durable."""

    def __init__(self, path: Path | str, missing: int) -> None:
        super().__init__(
            path,
            f"the history {path} is older than the journal: the last {missing} rows that were written to it are "
            f"missing (was it copied without its write-ahead log {Path(path).name}-wal?). Restore both from one "
            "backup; with this history, finished instances could run a second time",
        )
        self.missing = missing


class JournalMissing(HistoryError):
    """The history had a journal, but the present journal does not know it: live instances would be lost."""

    def __init__(self, path: Path | str, journal: Path | str) -> None:
        super().__init__(
            path,
            f"the journal of the history {path} is missing or replaced: {journal}. It holds the live instances. "
            "Restore it from the backup taken with the history, or start with another data directory",
        )


class HistoryDamaged(HistoryError):
    """The file exists, but is corrupt or not a history."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(
            path,
            f"the history {path} is damaged or is not a history: {reason}. "
            "Restore it, and the journal with it, from the last backup",
        )


class HistoryTooNew(HistoryError):
    """The file has the format `found`; this release reads formats up to `known`."""

    def __init__(self, path: Path | str, found: int, known: int) -> None:
        super().__init__(
            path,
            f"the history {path} has format {found}, and this release reads up to {known}: "
            "upgrade stageflow-actors to the release that wrote it",
        )
        self.found = found
        self.known = known


class HistoryUnavailable(HistoryError):
    """The history cannot be read or written at present. Nothing was written, and the call may be repeated.

    This also holds after a failed sync: SQLite writes the pages again in the next transaction, and does not rely on
    those whose sync failed.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(
            path,
            f"the history {path} cannot be used at present: {reason}. Nothing was written, and the runtime tries "
            "again; free space on its disk, or end the process that locks it",
        )


_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT})


@contextmanager
def typed_errors(path: Path) -> Iterator[None]:
    """Translate SQLite's errors about the file; mistakes of the calling code, such as wrong types, pass through."""
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
