"""A real cluster on a small disk that fills up: starts are refused, work in hand ends, the history waits, it clears."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
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


def workflow(gate: Path) -> Any:
    """Two stages; the first one waits until the gate is there."""
    orders: Any = Workflow("orders")

    @orders.stage
    def wait(order: dict[str, Any]) -> None:
        import time

        while not gate.exists():
            time.sleep(0.01)

    @orders.stage
    def ship(order: dict[str, Any]) -> None:
        order["shipped"] = True

    return orders


def fill(path: Path) -> None:
    """Take all the room there is."""
    with path.open("wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(64 << 10))
        except OSError:
            pass


def test_a_disk_that_fills_up_refuses_starts_finishes_work_lets_the_history_wait_and_clears(
    small_disk: Path, tmp_path: Path, eventually: Callable[..., Any]
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
        # Somebody takes what is left, so that the history cannot grow; the journal keeps what it has reserved.
        fill(ballast)
        gate.touch()
        eventually(
            lambda: sum(q.ready + q.leased for q in runtime.queues() if q.name.startswith("stageflow.orders.")) == 0,
            "all stages have done their work",
            patience=60,
        )
        with pytest.raises(QueueFull):
            runtime.submit(orders, {"n": -1, "note": "one more"})
        # It clears by itself when there is room again, and nothing has been lost.
        ballast.unlink()
        results = [instance.result(timeout=60) for instance in accepted]
        assert all(result.status == WorkflowStatus.completed for result in results)
        assert [result.context["n"] for result in results] == list(range(len(accepted)))
        again = eventually(lambda: _submitted(runtime, orders), "a start is taken again", patience=60)
        assert again.result(timeout=60).success


def _submitted(runtime: Runtime, orders: Any) -> Any:
    try:
        return runtime.submit(orders, {"n": -1, "note": "one more"})
    except QueueFull:
        return None
