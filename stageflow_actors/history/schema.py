"""The file of the history: its format; creating and opening it.

A history is created under another name and then renamed, so it appears completely or not at all: a file without a
schema is damaged, not the result of an interrupted start. This module must not write rows of instances.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from uuid import uuid4

from stageflow_actors.history.errors import (
    HistoryDamaged,
    HistoryMissing,
    HistoryTooNew,
    HistoryUnavailable,
    typed_errors,
)

__all__ = [
    "COLUMNS",
    "META_JOURNAL",
    "META_PRUNED",
    "META_WRITTEN",
    "TRACEBACKS",
    "connect",
    "create",
    "has_log",
    "in_wal_mode",
    "make_private",
]

APPLICATION_ID = 0x53464148  # "SFAH"
FORMAT = 1

COLUMNS = (
    "instance_id, epoch, workflow_id, version, status, started_at, finished_at, error, failed_stage, digest, outcome"
)
"""The columns in the order of `HistoryRow`."""

TRACEBACKS = """
CREATE TABLE IF NOT EXISTS traceback (
    digest BLOB PRIMARY KEY, packed BLOB NOT NULL, written_at REAL NOT NULL
) WITHOUT ROWID
"""
"""The tracebacks to which outcomes refer; `written_at` is the time of the latest such row.

The writer creates the table for the first one. A release that does not know it reads and writes the other rows."""

META_PRUNED = "pruned"
"""Key in `meta`: rows that finished before this time (seconds since the Unix epoch) may be pruned."""

META_JOURNAL = "journal"
"""Key in `meta`: a journal has recorded the identity of this history."""

META_WRITTEN = "written"
"""Key in `meta`: the number of rows ever written, including those replaced or deleted later."""

_BUSY_TIMEOUT_SECONDS = 10.0
"""A checkpoint or vacuum by another process takes less time."""

# The partial index has only instances that did not complete: an index on every status would cost each completed
# instance half a microsecond, and users search for the failed ones.
_SCHEMA = f"""
CREATE TABLE instance (
    seq INTEGER PRIMARY KEY,
    instance_id TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    workflow_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    status TEXT NOT NULL,
    started_at REAL NOT NULL,
    finished_at REAL NOT NULL,
    error TEXT,
    failed_stage TEXT,
    digest BLOB,
    outcome BLOB NOT NULL
);
CREATE UNIQUE INDEX instance_by_id ON instance (instance_id);
CREATE INDEX instance_not_completed ON instance (status, seq) WHERE status <> 'completed';
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {FORMAT};
"""


def create(path: Path) -> None:
    """Create an empty history at `path`, durably, with mode 0600: contexts and results are private data.

    Raises `HistoryMissing` if the write-ahead log of an older history is there.
    """
    if has_log(path):
        # SQLite would replay the log of the lost file into the new file.
        raise HistoryMissing(path, f"its write-ahead log {path.name}-wal is still there")
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        # SQLite would make the file readable for all users; its log and index get the mode of the file.
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
        connection = sqlite3.connect(draft, isolation_level=None)
        try:
            # Pages of 8 KiB need a fifth less CPU per row than 4 KiB: fewer frames are written and checksummed.
            connection.execute("PRAGMA page_size = 8192")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_SCHEMA)
            connection.execute("INSERT INTO meta VALUES ('identity', ?)", (str(uuid4()),))
        finally:
            connection.close()
        _sync(draft)
        os.replace(draft, path)
        _sync(path.parent)
    except (OSError, sqlite3.DatabaseError) as error:
        raise HistoryUnavailable(path, str(error)) from error
    finally:
        for file in _files(draft):
            file.unlink(missing_ok=True)


def make_private(path: Path) -> None:
    """Set mode 0600 on the files of a history of this user that an earlier release made readable for others."""
    for file in _files(path):
        try:
            found = file.stat()
            if found.st_uid == os.geteuid() and found.st_mode & 0o077:
                file.chmod(0o600)
        except OSError:
            continue  # no such file, or a file system without modes


def _files(path: Path) -> list[Path]:
    """Return the file, and the files that SQLite keeps next to it while it is open."""
    return [path, Path(f"{path}-wal"), Path(f"{path}-shm")]


def has_log(path: Path) -> bool:
    """Return True if the write-ahead log is not empty: some rows may be only there."""
    log = Path(f"{path}-wal")
    return log.exists() and log.stat().st_size > 0


def in_wal_mode(path: Path) -> bool:
    """Return True if the header of the file names write-ahead logging."""
    with path.open("rb") as file:
        return file.read(20)[18:20] == b"\x02\x02"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def connect(path: Path, *, read_only: bool, offline: bool = False) -> tuple[sqlite3.Connection, str]:
    """Return a connection to the history at `path`, and the identity of the history.

    Pass `offline` if no process writes the file: reading then creates no files next to it, unless the log has rows.

    The connection is in autocommit mode; several threads may use it, one at a time. Raises `HistoryMissing`,
    `HistoryDamaged`, `HistoryTooNew` or `HistoryUnavailable`.
    """
    if not path.is_file():
        raise HistoryMissing(path)
    with typed_errors(path):
        mode = "ro" if read_only else "rw"
        if read_only and offline and not has_log(path):
            mode += "&immutable=1"
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=_BUSY_TIMEOUT_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            return connection, _identity(path, connection)
        except BaseException:
            connection.close()
            raise


def _identity(path: Path, connection: sqlite3.Connection) -> str:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if application != APPLICATION_ID:
        raise HistoryDamaged(path, "its application id is not that of a StageFlow history")
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if found > FORMAT:
        raise HistoryTooNew(path, found, FORMAT)
    row = connection.execute("SELECT value FROM meta WHERE name = 'identity'").fetchone()
    if row is None:
        raise HistoryDamaged(path, "it has no identity")
    return str(row[0])
