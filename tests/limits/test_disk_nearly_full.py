"""A real cluster on a disk that fills up: starts are refused, work in hand ends, the history waits, it recovers."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors import QueueFull, Runtime, Workflow, WorkflowStatus


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 24 MB of its own, in memory."""
    directory = Path(tempfile.mkdtemp(prefix="small-disk-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(directory)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        directory.rmdir()
        pytest.skip(f"mounting a small disk is not permitted here: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
        directory.rmdir()


def workflow(gate: Path, returned: int = 0) -> Any:
    """Two stages that return so many characters; the first one waits until the gate is there."""
    orders: Any = Workflow("orders")

    @orders.stage
    def wait(order: dict[str, Any]) -> str | None:
        import time

        while not gate.exists():
            time.sleep(0.01)
        return "r" * returned or None

    @orders.stage
    def ship(order: dict[str, Any]) -> str | None:
        order["shipped"] = True
        return "r" * returned or None

    return orders


def fill(path: Path) -> None:
    """Take all the room there is, in addition to the room that the file has taken before."""
    with path.open("ab", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(64 << 10))
        except OSError:
            pass


def test_a_disk_that_fills_up_refuses_starts_finishes_work_lets_the_history_wait_and_clears(
    small_disk: Path, tmp_path: Path, eventually: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    gate = tmp_path / "gate"
    orders = workflow(gate)
    ballast = small_disk / "ballast"
    with Runtime(orders, data_dir=small_disk / "data") as runtime:
        accepted = []
        with pytest.raises(QueueFull, match="nearly full; free some space"):
            while len(accepted) < 40_000:
                contexts = [{"n": len(accepted) + each, "note": "x" * 1000} for each in range(200)]
                accepted += runtime.submit_many(orders, contexts)
        assert len(accepted) >= 1000
        # Another program takes the free space again and again; the journal keeps the space that it has reserved. When
        # the journal deletes a segment, either the history or that program can be first to take its space, and with the
        # space the history would grow and starts would be accepted. The lock gives all of it to the other program.
        fill(ballast)
        with closing(sqlite3.connect(small_disk / "data" / "history.db", isolation_level=None)) as history:
            history.execute("BEGIN IMMEDIATE")
            gate.touch()
            eventually(lambda: _at_work(runtime) == 0, "all stages have done their work", timeout=60)
            eventually(lambda: _stays_full(runtime, ballast), "the journal deletes no more segments", timeout=60)
            caplog.clear()
        eventually(lambda: "disk is full (SQLITE_FULL)" in caplog.text, "the history finds no space", timeout=60)
        assert _finished(runtime) == len(accepted)
        with pytest.raises(QueueFull):
            runtime.submit(orders, {"n": -1, "note": "one more"})
        # It clears automatically when there is room again, and nothing has been lost.
        ballast.unlink()
        results = [instance.result(timeout=60) for instance in accepted]
        assert all(result.status == WorkflowStatus.completed for result in results)
        assert [result.context["n"] for result in results] == list(range(len(accepted)))
        again = eventually(lambda: _submitted(runtime, orders), "a start is taken again", timeout=60)
        assert again.result(timeout=60).success


def test_stages_whose_results_make_instances_larger_all_end_on_a_disk_that_is_full(
    small_disk: Path, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    gate, ballast = tmp_path / "gate", small_disk / "ballast"
    orders = workflow(gate, returned=2000)
    with _as_many_as_go_in(small_disk, orders) as (runtime, accepted):
        assert len(accepted) >= 100
        gate.touch()
        eventually(lambda: _at_work(runtime) == 0, "all stages have done their work", timeout=60)
        ballast.unlink()
        results = [instance.result(timeout=60) for instance in accepted]
        assert all(result.status == WorkflowStatus.completed for result in results)
        again = eventually(lambda: _submitted(runtime, orders), "a start is taken again", timeout=60)
        assert again.result(timeout=60).success


def test_where_results_grow_beyond_the_reserve_work_waits_queries_are_answered_and_it_clears(
    small_disk: Path, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    gate, ballast = tmp_path / "gate", small_disk / "ballast"
    orders = workflow(gate, returned=15_000)
    with _as_many_as_go_in(small_disk, orders) as (runtime, accepted):
        before = _at_work(runtime)
        gate.touch()
        eventually(lambda: _finished(runtime) > 0 or _at_work(runtime) < before, "something is done", timeout=60)
        seen = [-1]

        def stands() -> bool:
            seen.append(sum(queue.ready for queue in runtime.queues()))
            return len(seen) > 50 and len(set(seen[-50:])) == 1

        eventually(stands, "work waits for room", timeout=60)
        assert _at_work(runtime) > 0
        with pytest.raises(QueueFull, match="nearly full; free some space"):
            runtime.submit(orders, {"n": -1, "note": "one more"})
        ballast.unlink()
        # Nothing is lost.
        results = [instance.result(timeout=90) for instance in accepted]
        assert all(result.status == WorkflowStatus.completed for result in results)
        # So small a disk has no room for all of them in the history, too, where they are written twice.
        runtime.stop(grace=0.0)


@contextmanager
def _as_many_as_go_in(disk: Path, orders: Any) -> Iterator[tuple[Runtime, list[Any]]]:
    """A cluster on a disk that something else has filled, and the instances that were accepted all the same."""
    with Runtime(orders, data_dir=disk / "data") as runtime:
        fill(disk / "ballast")
        yield runtime, _submitted_until_full(runtime, orders)


def _submitted_until_full(runtime: Runtime, orders: Any) -> list[Any]:
    accepted: list[Any] = []
    with pytest.raises(QueueFull, match="nearly full; free some space"):
        while len(accepted) < 40_000:
            accepted += runtime.submit_many(orders, [{"n": len(accepted) + n, "note": "x" * 5000} for n in range(10)])
    return accepted


def _stays_full(runtime: Runtime, ballast: Path) -> bool:
    """Fill the disk; return True if it stays full for 200 rounds of the broker, more than the longest copy takes."""
    fill(ballast)
    for _ in range(200):
        runtime.queues()
        if shutil.disk_usage(ballast.parent).free:
            return False
    return True


def _at_work(runtime: Runtime) -> int:
    return sum(q.ready + q.leased for q in runtime.queues() if q.name.startswith("stageflow.orders."))


def _finished(runtime: Runtime) -> int:
    return sum(q.ready + q.leased for q in runtime.queues() if q.name == "stageflow.finished")


def _submitted(runtime: Runtime, orders: Any) -> Any:
    try:
        return runtime.submit(orders, {"n": -1, "note": "one more"})
    except QueueFull:
        return None
