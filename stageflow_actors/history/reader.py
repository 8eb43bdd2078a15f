"""`HistoryReader`: reads the history while the coordinator, in another process, writes it.

Each call sees all transactions committed before it started. No call may leave a read transaction open after it returns:
that would delay the writer's checkpoints. A reader must not change the file.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from stageflow_actors.core.tracebacks.references import find_references, with_tracebacks
from stageflow_actors.history.errors import HistoryDamaged, typed_errors
from stageflow_actors.history.rows import HistoryRow
from stageflow_actors.history.schema import COLUMNS, META_PRUNED, connect

__all__ = ["HistoryReader"]

Rows = list[Any]  # in the class, `list` is a method
Findings = list[str]
HistoryRows = list[HistoryRow]
Digests = list[bytes]

_ROWS_PER_QUERY = 500  # old builds of SQLite allow 999 variables in a query


class HistoryReader:
    """A read-only connection to the history. It is thread-safe."""

    @classmethod
    def open(cls, path: Path | str, *, offline: bool = False) -> HistoryReader:
        """Open the history at `path`; pass `offline` if no process writes it.

        Raises `HistoryMissing`, `HistoryDamaged`, `HistoryTooNew` or `HistoryUnavailable`.
        """
        return cls(Path(path), offline=offline)

    def __init__(self, path: Path, *, offline: bool = False) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._connection, self._identity = connect(path, read_only=True, offline=offline)

    @property
    def identity(self) -> str:
        """The random id of this history, made when the file was created."""
        return self._identity

    def get(self, instance_id: str) -> HistoryRow | None:
        """Return the row of an instance, or None if it has not finished or was pruned."""
        rows = self._query(f"SELECT {COLUMNS} FROM instance WHERE instance_id = ?", (instance_id,))
        return self._rows_of(rows)[0] if rows else None

    def get_many(self, instance_ids: Iterable[str]) -> dict[str, HistoryRow]:
        """Return the rows of the finished instances among `instance_ids`, by id."""
        wanted = list(instance_ids)
        found: dict[str, HistoryRow] = {}
        for start in range(0, len(wanted), _ROWS_PER_QUERY):
            chunk = wanted[start : start + _ROWS_PER_QUERY]
            marks = ",".join("?" * len(chunk))
            rows = self._query(f"SELECT {COLUMNS} FROM instance WHERE instance_id IN ({marks})", chunk)
            found.update((row.instance_id, row) for row in self._rows_of(rows))
        return found

    def exists(self, instance_id: str) -> bool:
        """Return True if the history has a row of the instance."""
        return bool(self._query("SELECT 1 FROM instance WHERE instance_id = ?", (instance_id,)))

    def list(
        self, status: str | None = None, workflow: str | None = None, limit: int = 100, error: str | None = None
    ) -> HistoryRows:
        """Return at most `limit` rows with that status and workflow id, those written last first.

        `error`: only rows whose error contains this text.
        """
        conditions, parameters = _conditions(status, workflow, error)
        rows = self._query(
            f"SELECT {COLUMNS} FROM instance{conditions} ORDER BY seq DESC LIMIT ?", [*parameters, limit]
        )
        return self._rows_of(rows)

    def iterate(self, status: str | None = None, workflow: str | None = None) -> Iterator[HistoryRow]:
        """Yield all rows with that status and workflow id, in the order in which they were written."""
        conditions, parameters = _conditions(status, workflow)
        conditions = f"{conditions} AND" if conditions else " WHERE"
        last = -1
        while True:
            rows = self._query(
                f"SELECT seq, {COLUMNS} FROM instance{conditions} seq > ? ORDER BY seq LIMIT ?",
                [*parameters, last, _ROWS_PER_QUERY],
            )
            yield from self._rows_of([row[1:] for row in rows])
            if len(rows) < _ROWS_PER_QUERY:
                return
            last = rows[-1][0]

    def workflows(self) -> set[str]:
        """Return the ids of the workflows of all rows."""
        return {row[0] for row in self._query("SELECT DISTINCT workflow_id FROM instance", ())}

    def count(self, workflow: str | None = None) -> dict[str, int]:
        """Return the number of instances by status, without the statuses that no instance has."""
        if workflow is not None:
            rows = self._query(
                "SELECT status, count(*) FROM instance WHERE workflow_id = ? GROUP BY status", [workflow]
            )
            return dict(rows)
        # Both parts use indexes only; grouping the table would read each outcome.
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
        """Return the epochs of the finished instances among `instance_ids`, by id."""
        wanted = list(instance_ids)
        found: dict[str, int] = {}
        for start in range(0, len(wanted), _ROWS_PER_QUERY):
            chunk = wanted[start : start + _ROWS_PER_QUERY]
            marks = ",".join("?" * len(chunk))
            found.update(self._query(f"SELECT instance_id, epoch FROM instance WHERE instance_id IN ({marks})", chunk))
        return found

    def pruned_before(self) -> float:
        """Return the time before which rows may be pruned, in seconds since the Unix epoch; 0 if none was."""
        rows = self._query("SELECT value FROM meta WHERE name = ?", (META_PRUNED,))
        return float(rows[0][0]) if rows else 0.0

    def latest(self) -> float:
        """Return the finish time of the row written last, in seconds since the Unix epoch; 0 without rows."""
        rows = self._query("SELECT finished_at FROM instance ORDER BY seq DESC LIMIT 1", ())
        return float(rows[0][0]) if rows else 0.0

    def check(self, *, thorough: bool = False) -> Findings:
        """Read the whole file and return its faults, one string each; an empty list if it is sound.

        `thorough`: also check that each index has exactly one entry for each row.
        """
        try:
            statement = "PRAGMA integrity_check" if thorough else "PRAGMA quick_check"
            findings = [row[0] for row in self._query(statement, ())]
        except HistoryDamaged as error:
            return [str(error)]
        return [] if findings == ["ok"] else findings

    def close(self) -> None:
        """Close the file. Further calls do nothing."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> HistoryReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rows_of(self, found: Rows) -> HistoryRows:
        """Return rows with the tracebacks to which their outcomes refer."""
        rows = [HistoryRow._make(row) for row in found]
        for at, row in enumerate(rows):
            digests = find_references(row.outcome)
            if digests:
                rows[at] = row._replace(outcome=with_tracebacks(row.outcome, self._tracebacks(digests)))
        return rows

    def _tracebacks(self, digests: Digests) -> dict[bytes, bytes]:
        if not self._query("SELECT 1 FROM sqlite_schema WHERE name = 'traceback'", ()):
            return {}  # the outcome holds user data that looks like a reference
        wanted = digests[:_ROWS_PER_QUERY]
        marks = ",".join("?" * len(wanted))
        return dict(self._query(f"SELECT digest, packed FROM traceback WHERE digest IN ({marks})", wanted))

    def _query(self, statement: str, parameters: Iterable[Any]) -> Rows:
        with self._lock, typed_errors(self.path):
            return self._connection.execute(statement, tuple(parameters)).fetchall()


def _conditions(status: str | None, workflow: str | None, error: str | None = None) -> tuple[str, list[Any]]:
    clauses: list[str] = []
    parameters: list[Any] = []
    if status is not None:
        # SQLite uses the partial index only with this literal: it cannot know that a parameter is not 'completed'.
        clauses.append("status = ?" if status == "completed" else "status = ? AND status <> 'completed'")
        parameters.append(status)
    if workflow is not None:
        clauses.append("workflow_id = ?")
        parameters.append(workflow)
    if error is not None:
        clauses.append("instr(error, ?) > 0")
        parameters.append(error)
    return (f" WHERE {' AND '.join(clauses)}" if clauses else ""), parameters
