"""The one writer of the history. It lives in the coordinator, in one thread at a time.

When `write` returns the rows are on disk (WAL, `synchronous=FULL`), so the broker may forget the instances. It
must never leave a transaction open: an error rolls back, and the same rows may be given again.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator
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
    connect,
    create,
    make_private,
)

__all__ = ["ROWS_PER_TRANSACTION", "HistoryWriter"]

ROWS_PER_TRANSACTION = 2_000
"""Rows per transaction: the sync is spread over enough rows not to count, and the stall stays near 10 ms."""

_CHECKPOINT_PAGES = 2_000  # of 8 KiB: some 16 MB of log between checkpoints
_CACHE_KIB = 64 * 1024
_LAST_CHECKPOINT_MS = 500

# An instance has one row, that of its latest run. A finished event that is delivered again rewrites its row; one
# of an earlier epoch that arrives late must not replace a later one. A row that is replaced becomes the newest.
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


_WRITTEN = """
INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value
"""


class HistoryWriter:
    """Writes finished instances. Not safe for use by several threads at once."""

    @classmethod
    def open(cls, path: Path | str, *, create: bool) -> HistoryWriter:
        """Opens the history at `path`; with `create`, makes it first if there is none.

        Pass `create=False` whenever the journal says that a history has existed. Raises `HistoryMissing`,
        `HistoryDamaged`, `HistoryTooNew` or `HistoryUnavailable`.
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
                # Cut the log back after a long reader has let it grow.
                execute("PRAGMA journal_size_limit = 67108864")
                found = execute("SELECT value FROM meta WHERE name = ?", (META_WRITTEN,)).fetchone()
                self._written = 0 if found is None else int(found[0])
        except BaseException:
            self._connection.close()
            raise

    @property
    def identity(self) -> str:
        """The name given to this history when it was made; the journal remembers it."""
        return self._identity

    @property
    def has_journal(self) -> bool:
        """Whether a journal belongs to it that remembers it."""
        with typed_errors(self.path):
            return bool(self._connection.execute("SELECT 1 FROM meta WHERE name = ?", (META_JOURNAL,)).fetchall())

    def mark_journal_bound(self) -> None:
        """From now on a journal remembers it: one that does not is not its own."""
        if not self.has_journal:
            self._transact("INSERT INTO meta VALUES (?, ?)", [(META_JOURNAL, "yes")])

    @property
    def written(self) -> int:
        """How many rows have ever been written, those that were replaced or deleted since included."""
        return self._written

    def written_since(self, before: int, at_once: int) -> Iterator[dict[str, int]]:
        """The epochs by instance of all rows written after the first `before`, and maybe of some more: the newest
        first, up to `at_once` at a time. Nothing may be written meanwhile.
        """
        left = self._written - before
        last = None
        while left > 0:
            with typed_errors(self.path):
                rows = self._connection.execute(
                    "SELECT seq, instance_id, epoch FROM instance WHERE ? IS NULL OR seq < ? ORDER BY seq DESC LIMIT ?",
                    (last, last, min(left, at_once)),
                ).fetchall()
            if not rows:
                return
            yield {instance_id: epoch for _, instance_id, epoch in rows}
            left -= len(rows)
            last = rows[-1][0]

    def write(self, rows: Iterable[HistoryRow]) -> None:
        """Stores `rows` durably, replacing rows of the same instance whose epoch is not higher.

        One transaction per 2,000 rows. Raises `HistoryUnavailable` for a full disk: of the transaction that failed
        nothing is stored, and giving all rows again is harmless.
        """
        remaining = iter(rows)
        while batch := list(islice(remaining, ROWS_PER_TRANSACTION)):
            written = self._written + len(batch)
            self._transact(_UPSERT, batch, written)
            self._written = written

    def prune(self, older_than: float, *, limit: int | None = None) -> int:
        """Deletes instances that finished before `older_than` (seconds since the Unix epoch), oldest first.

        Goes through the history in transactions of 2,000 rows, and ends at the first stretch of that length in
        which all are younger, or once `limit` are deleted. Returns how many were. The space is reused; `vacuum`
        gives it back.
        """
        deleted, after = 0, -1
        while limit is None or deleted < limit:
            size = ROWS_PER_TRANSACTION if limit is None else min(ROWS_PER_TRANSACTION, limit - deleted)
            with typed_errors(self.path):
                stretch = self._connection.execute(
                    "SELECT seq, finished_at FROM instance WHERE seq > ? ORDER BY seq LIMIT ?",
                    (after, ROWS_PER_TRANSACTION),
                ).fetchall()
            old = [(seq,) for seq, finished_at in stretch if finished_at < older_than][:size]
            if not old:
                break
            if not deleted:
                # Said before it is done: a row that is missing without having been pruned was lost.
                self._transact(_PRUNED, [(META_PRUNED, repr(older_than))])
            self._transact("DELETE FROM instance WHERE seq = ?", old)
            deleted += len(old)
            after = stretch[-1][0]
        return deleted

    def vacuum(self) -> None:
        """Rewrites the file without unused space, and empties the log. Needs free space of the file's size."""
        with typed_errors(self.path):
            self._connection.execute("VACUUM")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Closes the file; what was written is there already, in the log or, if nobody reads now, in the file itself.
        May be called twice."""
        try:
            # By itself SQLite does this for whoever closes the file last, and that may be somebody who only reads it.
            self._connection.execute(f"PRAGMA busy_timeout = {_LAST_CHECKPOINT_MS}")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error:
            pass
        try:
            self._connection.close()
        except sqlite3.DatabaseError:
            # The closing checkpoint is a convenience: with a full disk it fails, and the log is replayed when the
            # history is opened next.
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
        parameters: list[HistoryRow] | list[tuple[int]] | list[tuple[str, str]],
        written: int | None = None,
    ) -> None:
        connection = self._connection
        # SQLite would go on for ever with a file that has no name any more, and the rows would be gone at the end.
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
                if written is not None:
                    connection.execute(_WRITTEN, (META_WRITTEN, str(written)))
                connection.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors (disk full), not after others.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
