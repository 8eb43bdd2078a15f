"""Tracebacks in the history: equal ones are stored once, and come back with each result."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

from msgspec import Raw

from stageflow_actors.core.envelope import EMPTY_TRAIL, Outcome, decode_outcome, encode
from stageflow_actors.core.tracebacks.references import MARK, refer_to_tracebacks
from stageflow_actors.core.tracebacks.table import pack_traceback, read_tracebacks, with_traceback
from stageflow_actors.history.reader import HistoryReader
from stageflow_actors.history.rows import HistoryRow
from stageflow_actors.history.writer import HistoryWriter

NOISE = "".join(f"{number:x}" for number in range(2_000))


def outcome_of(*tracebacks: tuple[str, str], context: Any = None) -> Outcome:
    table = None
    for place, text in tracebacks:
        table = with_traceback(table, place, pack_traceback(text))
    return Outcome("orders", 1, "failed", Raw(encode(context)), EMPTY_TRAIL, 1.0, 2.0, "ValueError", tracebacks=table)


def stored(writer: HistoryWriter, ids: list[str], outcome: Outcome) -> None:
    texts: dict[bytes, bytes] = {}
    if outcome.tracebacks is not None:
        outcome.tracebacks, texts = refer_to_tracebacks(outcome.tracebacks)
    body = encode(outcome)
    rows = [HistoryRow(id, 1, "orders", 1, "failed", 1.0, 2.0, "ValueError", None, None, body) for id in ids]
    writer.write(rows, texts)


def tracebacks_of(row: HistoryRow | None) -> dict[str, str]:
    assert row is not None
    return read_tracebacks(decode_outcome(row.outcome).tracebacks)


def test_equal_tracebacks_of_many_instances_are_stored_once_and_read_with_each(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    with HistoryWriter.open(path, create=True) as writer:
        stored(writer, [f"i{number}" for number in range(500)], outcome_of(("pay", NOISE)))
        stored(writer, ["other"], outcome_of(("pay", NOISE), ("ship", "another")))
    packed = pack_traceback(NOISE)
    assert packed is not None
    assert path.read_bytes().count(packed[:64]) == 1
    with HistoryReader.open(path) as reader:
        assert tracebacks_of(reader.get("i7")) == {"pay": NOISE}
        assert tracebacks_of(reader.get_many(["i7", "other"])["other"]) == {"pay": NOISE, "ship": "another"}
        assert [tracebacks_of(row) for row in reader.list(limit=2)] == [
            {"pay": NOISE, "ship": "another"},
            {"pay": NOISE},
        ]
        assert sum(tracebacks_of(row) == {"pay": NOISE} for row in reader.iterate()) == 500
        assert reader.check(thorough=True) == []


def test_a_history_without_failures_has_no_table_of_tracebacks(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    with HistoryWriter.open(path, create=True) as writer:
        stored(writer, ["a"], outcome_of())
        assert writer.prune(1e12) == 1
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'traceback'").fetchall() == []
    connection.close()


def test_user_data_that_looks_like_a_reference_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    mine = outcome_of(context={"raw": MARK + b"x" * 16})
    with HistoryWriter.open(path, create=True) as writer:
        stored(writer, ["a"], mine)
    with HistoryReader.open(path) as reader:
        row = reader.get("a")
        assert row is not None
        assert row.outcome == encode(mine)


def test_pruning_deletes_tracebacks_that_no_row_refers_to_any_more(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    with HistoryWriter.open(path, create=True) as writer:
        stored(writer, ["a"], outcome_of(("pay", "text")))
        assert writer.prune(1.5) == 0
        with HistoryReader.open(path) as reader:
            assert tracebacks_of(reader.get("a")) == {"pay": "text"}
        assert writer.prune(time.time() + 60) == 1
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM traceback").fetchone() == (0,)
    connection.close()


def test_a_traceback_that_is_gone_leaves_the_rest_of_the_row(tmp_path: Path) -> None:
    path = tmp_path / "history.sqlite"
    with HistoryWriter.open(path, create=True) as writer:
        stored(writer, ["a"], outcome_of(("pay", "text"), context={"n": 1}))
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM traceback")
    connection.close()
    with HistoryReader.open(path) as reader:
        row = reader.get("a")
        assert tracebacks_of(row) == {}
        assert row is not None
        assert bytes(decode_outcome(row.outcome).context) == encode({"n": 1})
