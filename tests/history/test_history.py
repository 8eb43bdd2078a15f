"""The history: written rows are readable, by other processes too, and each failure has its error type."""

from __future__ import annotations

import os
import pickle
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stageflow_actors.errors import StageFlowError
from stageflow_actors.history import (
    HistoryDamaged,
    HistoryError,
    HistoryMissing,
    HistoryReader,
    HistoryRow,
    HistoryTooNew,
    HistoryUnavailable,
    HistoryWriter,
)


def row(instance_id: str, **changes: object) -> HistoryRow:
    plain = HistoryRow(instance_id, 0, "orders", 1, "completed", 10.0, 11.5, None, None, b"digest", b"\x90outcome")
    return plain._replace(**changes)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.db"


def test_a_row_comes_back_as_it_was_written(path: Path) -> None:
    written = row("a", epoch=3, status="failed", error="ValueError: ü\x00", failed_stage="pay", digest=None)
    with HistoryWriter.open(path, create=True) as writer, HistoryReader.open(path) as reader:
        writer.write([written])
        assert reader.get("a") == written
        assert reader.get("b") is None
        assert reader.exists("a")
        assert not reader.exists("b")


def test_the_identity_is_made_once_and_is_its_own(path: Path, tmp_path: Path) -> None:
    with HistoryWriter.open(path, create=True) as first:
        identity = first.identity
    with HistoryWriter.open(path, create=True) as again, HistoryReader.open(path) as reader:
        assert again.identity == reader.identity == identity
    with HistoryWriter.open(tmp_path / "other.db", create=True) as other:
        assert other.identity != identity


def test_another_process_sees_rows_as_soon_as_write_returns(path: Path) -> None:
    look = (
        "import sys; from stageflow_actors.history import HistoryReader; reader = HistoryReader.open(sys.argv[1])\n"
        "for line in sys.stdin: print(reader.exists(line.strip()), flush=True)"
    )
    with HistoryWriter.open(path, create=True) as writer:
        other = subprocess.Popen(
            [sys.executable, "-c", look, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with other:
            assert other.stdin is not None
            assert other.stdout is not None
            for instance_id in ("a", "b"):
                writer.write([row(instance_id)])
                other.stdin.write(f"{instance_id}\n")
                other.stdin.flush()
                assert other.stdout.readline() == "True\n"
            other.stdin.close()
    assert other.returncode == 0


def test_rows_survive_a_writer_that_is_killed(path: Path) -> None:
    die = (
        "import os, signal, sys; from stageflow_actors.history import *\n"
        "writer = HistoryWriter.open(sys.argv[1], create=True)\n"
        "writer.write([HistoryRow('a', 0, 'w', 1, 'completed', 1.0, 2.0, None, None, None, b'')])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", die, str(path)]).returncode == -9
    with HistoryReader.open(path) as reader:  # no other process has it open: the reader replays the log
        assert reader.exists("a")
    with HistoryWriter.open(path, create=False) as writer:
        writer.write([row("b")])
    with HistoryReader.open(path) as reader:
        assert reader.count() == {"completed": 2}


def test_each_transaction_is_synced(path: Path) -> None:
    with HistoryWriter.open(path, create=True) as writer:
        assert writer._connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert writer._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_later_epoch_replaces_the_row_and_an_earlier_one_does_not(path: Path) -> None:
    with HistoryWriter.open(path, create=True) as writer, HistoryReader.open(path) as reader:
        writer.write([row("a", epoch=1, status="failed"), row("b")])
        writer.write([row("a", epoch=2, status="completed")])
        writer.write([row("a", epoch=1, status="failed")])
        found = reader.get("a")
        assert found is not None
        assert (found.epoch, found.status) == (2, "completed")
        assert [each.instance_id for each in reader.list()] == ["a", "b"]
        assert reader.count() == {"completed": 2}


def test_a_batch_that_is_written_twice_counts_once(path: Path) -> None:
    batch = [row(f"i{n}") for n in range(4_500)]
    with HistoryWriter.open(path, create=True) as writer, HistoryReader.open(path) as reader:
        writer.write(batch)
        writer.write(iter(batch))
        assert reader.count() == {"completed": 4_500}
        assert reader.list(limit=1)[0].instance_id == "i4499"
        assert reader.check() == []


def test_the_same_instance_twice_in_a_batch_ends_with_the_later(path: Path) -> None:
    with HistoryWriter.open(path, create=True) as writer, HistoryReader.open(path) as reader:
        writer.write([row("a", outcome=b"1"), row("b"), row("a", outcome=b"2")])
        assert [(each.instance_id, each.outcome) for each in reader.list()] == [("a", b"2"), ("b", row("b").outcome)]


def test_list_filters_by_status_and_workflow_newest_first(path: Path) -> None:
    rows = [
        row(f"i{n}", status="failed" if n % 3 == 0 else "completed", workflow_id="odd" if n % 2 else "even")
        for n in range(12)
    ]
    with HistoryWriter.open(path, create=True) as writer, HistoryReader.open(path) as reader:
        writer.write(rows)
        names = lambda **filters: [each.instance_id for each in reader.list(**filters)]  # noqa: E731
        assert names(limit=2) == ["i11", "i10"]
        assert names(status="failed") == ["i9", "i6", "i3", "i0"]
        assert names(status="failed", workflow="odd", limit=1) == ["i9"]
        assert names(status="completed", workflow="even") == ["i10", "i8", "i4", "i2"]
        assert names(workflow="nobody") == []
        assert reader.count() == {"completed": 8, "failed": 4}
        assert reader.count("odd") == {"completed": 4, "failed": 2}


def test_what_failed_is_found_by_index(path: Path) -> None:
    with HistoryWriter.open(path, create=True), sqlite3.connect(path) as connection:
        plan = connection.execute(
            "EXPLAIN QUERY PLAN SELECT * FROM instance WHERE status = ? AND status <> 'completed' "
            "ORDER BY seq DESC LIMIT 5",
            ("failed",),
        ).fetchall()
    connection.close()
    assert len(plan) == 1
    assert "instance_not_completed" in plan[0][3]


def test_get_many_returns_what_has_finished_however_many_are_asked(path: Path) -> None:
    with HistoryWriter.open(path, create=True) as writer, HistoryReader.open(path) as reader:
        writer.write(row(f"i{n}") for n in range(0, 3_000, 2))
        found = reader.get_many(f"i{n}" for n in range(3_000))
        assert set(found) == {f"i{n}" for n in range(0, 3_000, 2)}
        assert found["i4"].instance_id == "i4"
        assert reader.get_many([]) == {}


def test_one_reader_serves_many_threads_while_the_writer_writes(path: Path) -> None:
    failures: list[object] = []

    def look() -> None:
        try:
            failures.extend(n for n in range(300) if not reader.exists(f"i{n % 100}"))
        except BaseException as error:
            failures.append(error)

    with HistoryWriter.open(path, create=True) as writer, HistoryReader.open(path) as reader:
        writer.write(row(f"i{n}") for n in range(100))
        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for n in range(20):
            writer.write([row(f"later{n}")])
        for thread in threads:
            thread.join()
    assert failures == []


def test_prune_deletes_only_what_is_older(path: Path) -> None:
    with HistoryWriter.open(path, create=True) as writer, HistoryReader.open(path) as reader:
        # Not quite in order of time, as rows arrive by several ways.
        writer.write(row(f"i{n}", finished_at=float(n + (7 if n % 2 else 0))) for n in range(5_000))
        assert writer.prune(4_100.0, limit=3) == 3
        writer.prune(4_100.0)
        times = [each.finished_at for each in reader.list(limit=10_000)]
        assert min(times) == 4_100.0
        assert len(times) == sum(n + (7 if n % 2 else 0) >= 4_100 for n in range(5_000))
        assert writer.prune(4_100.0) == 0


def test_vacuum_gives_space_back_and_keeps_rows(path: Path) -> None:
    with HistoryWriter.open(path, create=True) as writer, HistoryReader.open(path) as reader:
        writer.write(row(f"i{n}", outcome=bytes(1_000), finished_at=float(n)) for n in range(4_000))
        writer.prune(3_900.0)
        before = path.stat().st_size + Path(f"{path}-wal").stat().st_size
        writer.vacuum()
        assert path.stat().st_size < before / 5
        assert reader.count() == {"completed": 100}
        assert writer.identity == reader.identity


def test_a_missing_history_that_must_exist_is_an_error_with_advice(path: Path) -> None:
    for opening in (lambda: HistoryWriter.open(path, create=False), lambda: HistoryReader.open(path)):
        with pytest.raises(HistoryMissing, match=r"backup taken with the journal") as caught:
            opening()
        assert caught.value.path == path
        assert str(path) in str(caught.value)
    assert not path.exists()


def test_a_log_left_without_its_history_is_never_replayed_into_a_new_one(path: Path) -> None:
    with HistoryWriter.open(path, create=True) as writer:
        writer.write([row("a")])
        os.rename(path, path.with_suffix(".lost"))
        with pytest.raises(HistoryMissing, match="write-ahead log"):
            HistoryWriter.open(path, create=True)


def test_a_history_taken_away_while_in_use_is_not_written_to_silently(path: Path) -> None:
    with HistoryWriter.open(path, create=True) as writer:
        writer.write([row("a")])
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink()
        with pytest.raises(HistoryMissing):
            writer.write([row("b")])


@pytest.mark.parametrize(
    "content", [b"", b"not a database" * 500, b"SQLite format 3\0" + bytes(9_000)], ids=["empty", "text", "zeroed"]
)
def test_a_file_that_is_no_history_is_refused_in_clear_words(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    for opening in (
        lambda: HistoryWriter.open(path, create=True),
        lambda: HistoryWriter.open(path, create=False),
        lambda: HistoryReader.open(path),
    ):
        with pytest.raises(HistoryDamaged, match="backup"):
            opening()
    assert path.read_bytes() == content


def test_another_programs_database_is_refused(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE instance (x)")
    connection.close()
    with pytest.raises(HistoryDamaged, match="application id"):
        HistoryWriter.open(path, create=True)


def test_damage_in_the_middle_is_named_when_it_is_met(path: Path) -> None:
    with HistoryWriter.open(path, create=True) as writer:
        writer.write(row(f"i{n}", outcome=os.urandom(200)) for n in range(4_000))
    with path.open("r+b") as file:
        for page in range(10, 60):
            file.seek(page * 8192)
            file.write(os.urandom(8192))
    with HistoryReader.open(path) as reader:
        with pytest.raises(HistoryDamaged):
            reader.list(limit=10_000)
        assert reader.check() != []


def test_a_newer_format_is_an_error_that_advises_an_upgrade(path: Path) -> None:
    HistoryWriter.open(path, create=True).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(HistoryTooNew, match="upgrade") as caught:
        HistoryReader.open(path)
    assert (caught.value.found, caught.value.known) == (99, 1)


def test_a_full_disk_refuses_the_batch_and_the_same_batch_goes_through_later(path: Path) -> None:
    batch = [row(f"i{n}", outcome=bytes(500)) for n in range(2_000)]
    with HistoryWriter.open(path, create=True) as writer, HistoryReader.open(path) as reader:
        writer.write([row("before")])
        # SQLite's own limit gives the very error of a full disk, in the middle of the transaction.
        limit = writer._connection
        limit.execute("PRAGMA max_page_count = 20")
        for _ in range(2):
            with pytest.raises(HistoryUnavailable, match=r"full.*Nothing was written"):
                writer.write(batch)
            assert reader.count() == {"completed": 1}
        limit.execute("PRAGMA max_page_count = 1000000")
        writer.write(batch)
        assert reader.count() == {"completed": 2_001}


def test_rows_that_break_halfway_leave_nothing_and_the_writer_usable(path: Path) -> None:
    with HistoryWriter.open(path, create=True) as writer, HistoryReader.open(path) as reader:
        with pytest.raises(sqlite3.IntegrityError):
            writer.write([row("a"), row("b", outcome=None)])
        assert reader.count() == {}
        writer.write([row("a")])
        assert reader.exists("a")


def test_a_second_writer_waits_instead_of_failing(path: Path) -> None:
    with HistoryWriter.open(path, create=True) as writer:
        blocker = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        blocker.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.05, lambda: blocker.execute("ROLLBACK"))
        timer.start()
        writer.write([row("a")])  # would raise "database is locked" without a busy timeout
        timer.join()
        blocker.close()


def test_errors_survive_pickling_and_share_the_tree(path: Path) -> None:
    for error in (
        HistoryMissing(path),
        HistoryDamaged(path, "why"),
        HistoryTooNew(path, 2, 1),
        HistoryUnavailable(path, "disk full"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert str(copy) == str(error)
        assert copy.__dict__ == error.__dict__
        assert isinstance(error, HistoryError)
        assert isinstance(error, StageFlowError)


def test_a_directory_that_does_not_exist_is_an_error_of_the_history(tmp_path: Path) -> None:
    with pytest.raises(HistoryUnavailable):
        HistoryWriter.open(tmp_path / "nowhere" / "history.db", create=True)


def modes(path: Path) -> dict[str, int]:
    return {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_a_history_is_its_owners_alone(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with HistoryWriter.open(path, create=True) as writer:
            writer.write([row("a")])
            assert modes(path) == {"history.db": 0o600, "history.db-wal": 0o600, "history.db-shm": 0o600}
    finally:
        os.umask(before)


def test_a_history_that_others_can_read_is_closed_to_them_when_it_is_written_next(path: Path) -> None:
    with HistoryWriter.open(path, create=True) as writer, HistoryReader.open(path) as reader:
        writer.write([row("a")])
        for each in path.parent.iterdir():
            each.chmod(0o644)
        with HistoryWriter.open(path, create=False):
            assert modes(path) == {"history.db": 0o600, "history.db-wal": 0o600, "history.db-shm": 0o600}
        assert reader.get("a") is not None


def test_a_history_of_another_user_keeps_its_mode(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    HistoryWriter.open(path, create=True).close()
    path.chmod(0o644)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    HistoryWriter.open(path, create=False).close()
    assert modes(path) == {"history.db": 0o644}
