"""Reads the history while the coordinator, in another process, writes it. Never changes anything.

Each call sees everything committed before it began; no call keeps a read transaction open after it returns, so a
reader never holds back the writer's checkpoints.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from stageflow_actors.history.errors import HistoryDamaged, typed_errors
from stageflow_actors.history.rows import HistoryRow
from stageflow_actors.history.schema import COLUMNS, META_PRUNED, connect

__all__ = ["HistoryReader"]

Rows = list[Any]  # inside the class, `list` is the method
Findings = list[str]
HistoryRows = list[HistoryRow]

_ROWS_PER_QUERY = 500  # names per query: below the 999 variables of old SQLite builds


class HistoryReader:
    """A read-only view of the history. One may be used by several threads."""

    @classmethod
    def open(cls, path: Path | str, *, offline: bool = False) -> HistoryReader:
        """Opens the history at `path`; `offline` if nobody writes it.

        Raises `HistoryMissing`, `HistoryDamaged`, `HistoryTooNew` or `HistoryUnavailable`.
        """
        return cls(Path(path), offline=offline)

    def __init__(self, path: Path, *, offline: bool = False) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._connection, self._identity = connect(path, read_only=True, offline=offline)

    @property
    def identity(self) -> str:
        """The name given to this history when it was made."""
        return self._identity

    def get(self, instance_id: str) -> HistoryRow | None:
        """The row of `instance_id`, or None if it has not finished (or was pruned)."""
        rows = self._query(f"SELECT {COLUMNS} FROM instance WHERE instance_id = ?", (instance_id,))
        return HistoryRow._make(rows[0]) if rows else None

    def get_many(self, instance_ids: Iterable[str]) -> dict[str, HistoryRow]:
        """The rows of those of `instance_ids` that have finished, by id."""
        wanted = list(instance_ids)
        found: dict[str, HistoryRow] = {}
        for start in range(0, len(wanted), _ROWS_PER_QUERY):
            chunk = wanted[start : start + _ROWS_PER_QUERY]
            marks = ",".join("?" * len(chunk))
            rows = self._query(f"SELECT {COLUMNS} FROM instance WHERE instance_id IN ({marks})", chunk)
            found.update((row[0], HistoryRow._make(row)) for row in rows)
        return found

    def exists(self, instance_id: str) -> bool:
        """Whether `instance_id` has finished."""
        return bool(self._query("SELECT 1 FROM instance WHERE instance_id = ?", (instance_id,)))

    def list(self, status: str | None = None, workflow: str | None = None, limit: int = 100) -> HistoryRows:
        """The instances that finished last, newest first, at most `limit`, of that status and workflow id."""
        conditions, parameters = _conditions(status, workflow)
        rows = self._query(
            f"SELECT {COLUMNS} FROM instance{conditions} ORDER BY seq DESC LIMIT ?", [*parameters, limit]
        )
        return [HistoryRow._make(row) for row in rows]

    def iterate(self, status: str | None = None, workflow: str | None = None) -> Iterator[HistoryRow]:
        """All instances that have finished, in the order in which they did, of that status and workflow id."""
        conditions, parameters = _conditions(status, workflow)
        conditions = f"{conditions} AND" if conditions else " WHERE"
        last = -1
        while True:
            rows = self._query(
                f"SELECT seq, {COLUMNS} FROM instance{conditions} seq > ? ORDER BY seq LIMIT ?",
                [*parameters, last, _ROWS_PER_QUERY],
            )
            for row in rows:
                yield HistoryRow._make(row[1:])
            if len(rows) < _ROWS_PER_QUERY:
                return
            last = rows[-1][0]

    def count(self, workflow: str | None = None) -> dict[str, int]:
        """How many instances ended in which status, statuses without any left out."""
        if workflow is not None:
            rows = self._query(
                "SELECT status, count(*) FROM instance WHERE workflow_id = ? GROUP BY status", [workflow]
            )
            return dict(rows)
        # Both parts come from indexes alone; grouping the table itself would read every outcome.
        rows = self._query(
            "SELECT status, count(*) FROM instance WHERE status <> 'completed' GROUP BY status "
            "UNION ALL SELECT NULL, count(*) FROM instance",
            (),
        )
        counts = dict(rows)
        total = counts.pop(None, 0)
        completed = total - sum(counts.values())
        return {"completed": completed, **counts} if completed else counts

    def epochs(self, instance_ids: Iterable[str]) -> dict[str, int]:
        """The epochs of those of `instance_ids` that have finished, by id."""
        wanted = list(instance_ids)
        found: dict[str, int] = {}
        for start in range(0, len(wanted), _ROWS_PER_QUERY):
            chunk = wanted[start : start + _ROWS_PER_QUERY]
            marks = ",".join("?" * len(chunk))
            found.update(self._query(f"SELECT instance_id, epoch FROM instance WHERE instance_id IN ({marks})", chunk))
        return found

    def pruned_before(self) -> float:
        """Rows that finished before this time (seconds since the Unix epoch) may have been deleted; 0 if none was."""
        rows = self._query("SELECT value FROM meta WHERE name = ?", (META_PRUNED,))
        return float(rows[0][0]) if rows else 0.0

    def latest(self) -> float:
        """When the instance that was written last finished, in seconds since the Unix epoch; 0 for none."""
        rows = self._query("SELECT finished_at FROM instance ORDER BY seq DESC LIMIT 1", ())
        return float(rows[0][0]) if rows else 0.0

    def check(self, *, thorough: bool = False) -> Findings:
        """What is wrong with the file, one finding a line; empty when it is sound. Reads all of it.

        `thorough`: whether each index has an entry for each row, and nothing else, too.
        """
        try:
            statement = "PRAGMA integrity_check" if thorough else "PRAGMA quick_check"
            findings = [row[0] for row in self._query(statement, ())]
        except HistoryDamaged as error:
            return [str(error)]
        return [] if findings == ["ok"] else findings

    def close(self) -> None:
        """Closes the file. May be called twice."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> HistoryReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _query(self, statement: str, parameters: Iterable[Any]) -> Rows:
        with self._lock, typed_errors(self.path):
            return self._connection.execute(statement, tuple(parameters)).fetchall()


def _conditions(status: str | None, workflow: str | None) -> tuple[str, list[Any]]:
    clauses: list[str] = []
    parameters: list[Any] = []
    if status is not None:
        # The literal lets SQLite use the partial index: a parameter may be 'completed' for all it knows.
        clauses.append("status = ?" if status == "completed" else "status = ? AND status <> 'completed'")
        parameters.append(status)
    if workflow is not None:
        clauses.append("workflow_id = ?")
        parameters.append(workflow)
    return (f" WHERE {' AND '.join(clauses)}" if clauses else ""), parameters
