"""`HistoryWriter`: the only writer of the history. The coordinator uses it, in one thread at a time.

When `write` returns, the rows are on disk (WAL, `synchronous=FULL`), so the broker may delete the instances. The writer
must not leave a transaction open: an error rolls back, and the caller may write the same rows again.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import TracebackType

from stageflow_actors.history.errors import HistoryMissing, typed_errors
from stageflow_actors.history.rows import HistoryRow
from stageflow_actors.history.schema import (
    COLUMNS,
    META_JOURNAL,
    META_PRUNED,
    META_WRITTEN,
    TRACEBACKS,
    connect,
    create,
    make_private,
)

__all__ = ["ROWS_PER_TRANSACTION", "HistoryWriter"]

ROWS_PER_TRANSACTION = 2_000
"""With this number the cost of the sync per row is negligible, and a transaction takes about 10 ms."""

_CHECKPOINT_PAGES = 2_000  # of 8 KiB: about 16 MB of log between checkpoints
_CACHE_KIB = 64 * 1024
_LAST_CHECKPOINT_MS = 500
_MAX_LOG_BYTES = 64 << 20

# An instance has one row, that of its latest run. A message for the history that is delivered again rewrites its row; a
# late one of an earlier epoch must not replace a later row. A replaced row becomes the newest.
_UPSERT = f"""
INSERT INTO instance ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (instance_id) DO UPDATE SET
    seq = (SELECT max(seq) FROM instance) + 1,
    epoch = excluded.epoch, workflow_id = excluded.workflow_id, version = excluded.version,
    status = excluded.status, started_at = excluded.started_at, finished_at = excluded.finished_at,
    error = excluded.error, failed_stage = excluded.failed_stage, digest = excluded.digest,
    outcome = excluded.outcome
WHERE excluded.epoch >= epoch
"""

_PRUNED = """
INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value
WHERE CAST(excluded.value AS REAL) > CAST(value AS REAL)
"""

_TRACEBACK = """
INSERT INTO traceback VALUES (?, ?, ?)
ON CONFLICT (digest) DO UPDATE SET written_at = max(written_at, excluded.written_at)
"""

_WRITTEN = """
INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value
"""


class HistoryWriter:
    """Writes and prunes rows of finished instances. Not thread-safe."""

    @classmethod
    def open(cls, path: Path | str, *, create: bool) -> HistoryWriter:
        """Open the history at `path`; with `create`, create it first if the file does not exist.

        Pass `create=False` if the journal has recorded a history. Raises `HistoryMissing`, `HistoryDamaged`,
        `HistoryTooNew` or `HistoryUnavailable`.
        """
        return cls(Path(path), create_missing=create)

    def __init__(self, path: Path, *, create_missing: bool) -> None:
        if create_missing and not path.exists():
            create(path)
        make_private(path)
        self.path = path
        self._connection, self._identity = connect(path, read_only=False)
        self._inode = path.stat().st_ino
        try:
            with typed_errors(path):
                execute = self._connection.execute
                execute("PRAGMA journal_mode = WAL")
                execute("PRAGMA synchronous = FULL")
                execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
                execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
                # Truncate the log after a long read has let it grow.
                execute(f"PRAGMA journal_size_limit = {_MAX_LOG_BYTES}")
                found = execute("SELECT value FROM meta WHERE name = ?", (META_WRITTEN,)).fetchone()
                self._written = 0 if found is None else int(found[0])
        except BaseException:
            self._connection.close()
            raise

    @property
    def identity(self) -> str:
        """The random id of this history, made when the file was created; the journal records it."""
        return self._identity

    @property
    def has_journal(self) -> bool:
        """True if a journal has recorded the identity of this history."""
        with typed_errors(self.path):
            return bool(self._connection.execute("SELECT 1 FROM meta WHERE name = ?", (META_JOURNAL,)).fetchall())

    def mark_journal_bound(self) -> None:
        """Record that a journal knows this history; from then on a journal without its identity is refused."""
        if not self.has_journal:
            self._transact("INSERT INTO meta VALUES (?, ?)", [(META_JOURNAL, "yes")])

    @property
    def written(self) -> int:
        """The number of rows ever written, including those replaced or deleted later."""
        return self._written

    def written_since(self, before: int, at_once: int) -> Iterator[dict[str, int]]:
        """Yield the epochs by instance of all rows written after the first `before`, and possibly of older ones.

        The newest rows come first, at most `at_once` in one dict. Do not write until the iterator is exhausted.
        """
        remaining = self._written - before
        last = None
        while remaining > 0:
            with typed_errors(self.path):
                rows = self._connection.execute(
                    "SELECT seq, instance_id, epoch FROM instance WHERE ? IS NULL OR seq < ? ORDER BY seq DESC LIMIT ?",
                    (last, last, min(remaining, at_once)),
                ).fetchall()
            if not rows:
                return
            yield {instance_id: epoch for _, instance_id, epoch in rows}
            remaining -= len(rows)
            last = rows[-1][0]

    def write(self, rows: Iterable[HistoryRow], tracebacks: Mapping[bytes, bytes] | None = None) -> None:
        """Store `rows` durably. A row replaces that of the same instance unless the latter has a higher epoch.

        `tracebacks` are those to which the outcomes refer, by digest.

        A transaction has at most 2,000 rows. Raises `HistoryUnavailable` if the disk is full: nothing of the failed
        transaction is stored, and all rows may be written again.
        """
        remaining = iter(rows)
        while batch := list(islice(remaining, ROWS_PER_TRANSACTION)):
            written = self._written + len(batch)
            self._transact(_UPSERT, batch, written, tracebacks)
            self._written = written

    def prune(self, older_than: float, *, limit: int | None = None) -> int:
        """Delete instances that finished before `older_than` (seconds since the Unix epoch), and return their number.

        Reads the rows in the order of writing, 2,000 at a time, and stops at the first batch that has no old row, or
        when `limit` rows are deleted. The file keeps its size and reuses the space; `vacuum` makes it smaller.
        """
        deleted, after = 0, -1
        while limit is None or deleted < limit:
            size = ROWS_PER_TRANSACTION if limit is None else min(ROWS_PER_TRANSACTION, limit - deleted)
            with typed_errors(self.path):
                batch = self._connection.execute(
                    "SELECT seq, finished_at FROM instance WHERE seq > ? ORDER BY seq LIMIT ?",
                    (after, ROWS_PER_TRANSACTION),
                ).fetchall()
            old = [(seq,) for seq, finished_at in batch if finished_at < older_than][:size]
            if not old:
                break
            if not deleted:
                # Record the time before deleting: a row that is missing and not pruned counts as lost.
                self._transact(_PRUNED, [(META_PRUNED, repr(older_than))])
            self._transact("DELETE FROM instance WHERE seq = ?", old)
            deleted += len(old)
            after = batch[-1][0]
        if deleted and limit is None:
            self._prune_tracebacks(older_than)
        return deleted

    def _prune_tracebacks(self, older_than: float) -> None:
        """Delete the tracebacks of rows that are older; an old row that is left loses its own."""
        with typed_errors(self.path):
            known = self._connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'traceback'").fetchall()
        if known:
            self._transact("DELETE FROM traceback WHERE written_at < ?", [(older_than,)])

    def vacuum(self) -> None:
        """Rewrite the file without unused space, and empty the log. Needs free disk space of the size of the file."""
        with typed_errors(self.path):
            self._connection.execute("VACUUM")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Close the file. All rows are durable before; if no process reads the file, the log is moved into it.

        Further calls do nothing.
        """
        try:
            # SQLite does this only for the process that closes the file last, and that may be a reader.
            self._connection.execute(f"PRAGMA busy_timeout = {_LAST_CHECKPOINT_MS}")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error:
            pass
        try:
            self._connection.close()
        except sqlite3.DatabaseError:
            # The checkpoint at closing may fail on a full disk; SQLite replays the log at the next opening.
            pass

    def __enter__(self) -> HistoryWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _transact(
        self,
        statement: str,
        parameters: list[HistoryRow] | list[tuple[int]] | list[tuple[float]] | list[tuple[str, str]],
        written: int | None = None,
        tracebacks: Mapping[bytes, bytes] | None = None,
    ) -> None:
        connection = self._connection
        # SQLite continues to write to a file that was deleted, and the rows would be lost when it is closed.
        try:
            moved = os.stat(self.path).st_ino != self._inode
        except OSError:
            moved = True
        if moved:
            raise HistoryMissing(self.path, "it was removed or replaced while in use")
        with typed_errors(self.path):
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.executemany(statement, parameters)
                if tracebacks:
                    # Not the time of these rows: the next ones may refer to the same tracebacks.
                    now = time.time()
                    connection.execute(TRACEBACKS)
                    connection.executemany(_TRACEBACK, [(*one, now) for one in tracebacks.items()])
                if written is not None:
                    connection.execute(_WRITTEN, (META_WRITTEN, str(written)))
                connection.execute("COMMIT")
            except BaseException:
                # SQLite rolls back automatically after some errors, such as a full disk, but not after all.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
