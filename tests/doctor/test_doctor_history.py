"""Journal and history of a directory at rest: faults in either, or between them, are found and explained."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors.cli.main import main
from stageflow_actors.history import HistoryWriter
from stageflow_brokers.core import records

Doctor = Callable[[Path], Any]


def test_what_has_ended_and_is_not_in_the_history_was_lost_there(books: Any, doctor: Doctor) -> None:
    books.finish("A", "B", "C")
    path = books.close()
    with sqlite3.connect(path / "history.db") as database:
        database.execute("DELETE FROM instance WHERE instance_id = 'B'")
    database.close()
    found = doctor(path).one("error", "agreement")
    assert found["where"] == "B"
    assert "the history does not have it" in found["what"]


def test_what_has_been_pruned_is_not_lost(books: Any, doctor: Doctor) -> None:
    books.finish("A")
    path = books.close()
    with HistoryWriter.open(path / "history.db", create=False) as writer:
        assert writer.prune(time.time() + 1) == 1
    report = doctor(path)
    assert (report.code, report.findings) == (0, [])


def test_an_instance_that_lives_and_has_finished_is_found(books: Any, doctor: Doctor) -> None:
    books.publish("A")
    books.record("A")
    found = doctor(books.close()).one("error", "agreement")
    assert found["where"] == "A"
    assert "finished a second time" in found["what"]


def test_a_history_that_is_gone_is_found(books: Any, doctor: Doctor) -> None:
    books.finish("A")
    path = books.close()
    (path / "history.db").unlink()
    found = doctor(path).one("error", "history")
    assert found["where"] == str(path / "history.db")
    assert "missing" in found["what"]


def test_the_history_of_another_cluster_is_found(books: Any, doctor: Doctor, tmp_path: Path) -> None:
    books.finish("A")
    path = books.close()
    HistoryWriter.open(tmp_path / "other.db", create=True).close()
    shutil.copy(tmp_path / "other.db", path / "history.db")
    report = doctor(path)
    assert "another one" in report.one("error", "history")["what"]
    assert report.one("error", "agreement")["where"] == "A"


def test_a_damaged_history_is_found(books: Any, doctor: Doctor) -> None:
    books.finish(*(f"A{n}" for n in range(200)))
    path = books.close()
    with (path / "history.db").open("r+b") as file:
        file.seek(3 * 8192)
        file.write(bytes(8192))
    assert {one["check"] for one in doctor(path).errors()} >= {"history"}


def test_an_index_that_has_lost_a_row_is_found(books: Any, doctor: Doctor) -> None:
    books.finish("A", "B")
    path = books.close()
    with sqlite3.connect(path / "history.db") as database:
        # The row stays and its entry goes: the table is edited while SQLite does not know of the index.
        (sql,) = database.execute("SELECT sql FROM sqlite_master WHERE name = 'instance_by_id'").fetchone()
        database.execute("PRAGMA writable_schema = ON")
        database.execute("UPDATE sqlite_master SET sql = ? || ' WHERE epoch > 5' WHERE name = 'instance_by_id'", (sql,))
    database.close()
    assert any("instance_by_id" in one["what"] for one in doctor(path).errors())


def test_a_history_out_of_wal_mode_is_reported(books: Any, doctor: Doctor) -> None:
    books.finish("A")
    path = books.close()
    with sqlite3.connect(path / "history.db") as database:
        database.execute("PRAGMA journal_mode = DELETE")
    database.close()
    report = doctor(path)
    assert report.code == 0
    assert "WAL" in report.one("warning", "history")["what"]


def test_a_journal_that_is_gone_is_found(books: Any, doctor: Doctor) -> None:
    books.finish("A")
    path = books.close()
    shutil.rmtree(path / "journal")
    assert "the journal is missing" in doctor(path).one("error", "journal")["what"]


def test_the_journal_of_another_cluster_is_reported(books: Any, doctor: Doctor) -> None:
    books.finish("A")
    books.ask.set_fact("history", "")
    path = books.close()
    books.append((records.FACT, ("history", "someone else's")))
    assert "another one" in doctor(path).one("error", "history")["what"]


def plant(path: Path, column: str, value: object) -> None:
    with sqlite3.connect(path / "history.db") as database:
        database.execute(f"UPDATE instance SET {column} = ? WHERE instance_id = 'B'", (value,))
    database.close()


@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("outcome", b"\x99garbled", "its outcome cannot be read"),
        ("status", "compensated", "its row says status 'compensated', its outcome 'completed'"),
        ("workflow_id", "parcels", "its row says workflow 'parcels'"),
        ("error", "ValueError: no", "its row says error 'ValueError: no', its outcome None"),
    ],
)
def test_a_row_that_cannot_be_true_is_found(books: Any, doctor: Doctor, column: str, value: object, what: str) -> None:
    books.finish("A", "B", "C")
    path = books.close()
    assert doctor(path).said["checked"]["ended"] == 3
    plant(path, column, value)
    report = doctor(path)
    found = report.one("error", "ending")
    assert found["where"] == "B"
    assert what in found["what"]
    assert report.said["checked"]["ended"] == 3, "it goes on behind it"


def test_the_number_of_compared_ends_is_reported(books: Any, capfd: pytest.CaptureFixture[str]) -> None:
    books.finish("A", "B")
    books.record("given back with its segment")
    assert main(["doctor", "--data", str(books.close())]) == 0
    assert "3 ended (2 of them still in the journal)" in capfd.readouterr().out
