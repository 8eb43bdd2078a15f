"""A pool whose workers cannot start is tried without end, and says why wherever somebody asks."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors import Config, Runtime, Workflow
from stageflow_actors.cli.main import main as stageflow
from stageflow_actors.diagnostics import health

QUEUE = "stageflow.needy.stage0"
ERROR = "ConnectionError: no route to bank"
WHY = f"service 'bank' cannot be made: {ERROR}"


def use(context: dict[str, Any], *, bank: Any) -> None: ...


def bank() -> object:
    if not Path(os.environ["BANK_OPEN"]).exists():
        raise ConnectionError("no route to bank")
    return object()


needy = Workflow("needy").add_stage(use, id="use", actors=3)


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that lets the service be made."""
    monkeypatch.setenv("BANK_OPEN", str(tmp_path / "open"))
    return tmp_path / "open"


@pytest.fixture
def failing(opened: Path, tmp_path: Path, eventually: Callable[..., Any]) -> Iterator[Runtime]:
    """A runtime whose pool is failing."""
    runtime = Runtime(needy, data_dir=tmp_path / "data", services={"bank": bank}).start()
    try:
        eventually(lambda: runtime.queues(QUEUE)[0].state == "failing", "the state")
        yield runtime
    finally:
        runtime.stop(grace=0)


def test_a_pool_that_fails_says_so_in_each_place_and_recovers_by_itself(
    failing: Runtime,
    opened: Path,
    eventually: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health, "FAULT_CONFIRM_SECONDS", 0.0)
    data = str(failing.data_dir)
    instance = failing.submit(needy, {}, instance_id="order-1")
    (queue,) = failing.queues(QUEUE)
    assert queue.reason.startswith(WHY)
    assert queue.next_start_at is not None
    assert abs(queue.next_start_at - time.time()) < 60
    expected = f"the workers of stage 'use' cannot start: {WHY}"
    with Runtime.connect(data) as client:
        for waiting in (instance, client.instance("order-1")):
            assert (waiting.waiting_for() or "").startswith(expected)
        (queue,) = client.queues(QUEUE)
        assert queue.state == "failing"
    capsys.readouterr()
    assert stageflow(["health", "--data", data]) == 1
    assert f"pool {QUEUE}: its workers cannot start: {WHY}" in capsys.readouterr().out
    assert stageflow(["queue", "list", "--output", "json", "--data", data]) == 0
    row = next(row for row in json.loads(capsys.readouterr().out) if row["name"] == QUEUE)
    assert (row["state"], row["reason"][: len(WHY)]) == ("failing", WHY)
    assert stageflow(["queue", "list", "--data", data]) == 0
    assert f"{QUEUE} is failing: {WHY}" in " ".join(capsys.readouterr().out.split())
    assert stageflow(["instances", "show", "order-1", "--data", data]) == 0
    assert expected in " ".join(capsys.readouterr().out.split())
    opened.touch()
    assert instance.result(60).success
    assert instance.waiting_for() is None
    eventually(lambda: failing.queues(QUEUE)[0].actors == 3, "all workers")
    (queue,) = failing.queues(QUEUE)
    assert (queue.state, queue.reason, queue.next_start_at) == ("open", "", None)
    assert stageflow(["health", "--data", data]) == 0


def test_a_pause_of_a_person_wins_in_the_state_and_the_reason_stays(failing: Runtime, opened: Path) -> None:
    instance = failing.submit(needy, {})
    failing.pause(QUEUE)
    (queue,) = failing.queues(QUEUE)
    assert (queue.state, queue.reason[: len(WHY)]) == ("paused", WHY)
    waits = instance.waiting_for() or ""
    assert waits.startswith(f"queue {QUEUE}, which is paused")
    assert WHY in waits
    opened.touch()
    failing.resume(QUEUE)
    assert instance.result(60).success


def test_a_call_that_waits_says_once_what_it_waits_for_and_its_timeout_says_it_too(
    failing: Runtime, opened: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stageflow_actors.runtime.client.completion.NOTE_SECONDS", 0.1)
    monkeypatch.setattr("stageflow_actors.runtime.client.instance.NOTE_SECONDS", 0.1)
    instance = failing.submit(needy, {}, instance_id="order-2")

    def notes() -> list[str]:
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        return [text for text in said if text.startswith("waiting for instance order-")]

    with pytest.raises(TimeoutError, match=r"'order-2' had not ended after 3 s; it goes on \(waiting for: .*no route"):
        instance.result(3)
    assert len(notes()) == 1
    assert WHY in notes()[0]
    with pytest.raises(TimeoutError, match=r"\(waiting for: the workers of stage 'use' cannot start"):
        failing.execute(needy, {}, timeout=3, instance_id="order-3")
    assert len(notes()) == 2

    async def wait() -> None:
        async with asyncio.timeout(3):
            await instance

    with pytest.raises(TimeoutError):
        asyncio.run(wait())
    assert len(notes()) == 3


def exits() -> object:
    os._exit(13)


def crashes() -> object:
    os.abort()


def says_stop() -> object:
    raise SystemExit("the bank is closed")


DEATHS = [
    (exits, "exit code 13, during the making of service 'bank'"),
    (crashes, "killed by SIGABRT (abort), during the making of service 'bank'"),
    (says_stop, "service 'bank' cannot be made: SystemExit: the bank is closed"),
]


@pytest.mark.parametrize(("make", "why"), DEATHS, ids=[make.__name__ for make, _ in DEATHS])
def test_a_service_that_ends_its_worker_is_named(
    make: Any, why: str, tmp_path: Path, eventually: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    runtime = Runtime(needy, data_dir=tmp_path, services={"bank": make}).start()
    try:
        eventually(lambda: runtime.queues(QUEUE)[0].reason.startswith(why), f"the reason {why!r}")
    finally:
        runtime.stop(grace=0)
    assert "Fatal Python error" not in capfd.readouterr().err, "each worker would print one"


def hangs() -> object:
    time.sleep(600)
    return None


def test_a_pool_that_has_not_started_in_time_is_failing_when_start_returns_and_names_the_service(
    tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    config = Config(start_timeout=6)
    runtime = Runtime(needy, data_dir=tmp_path, services={"bank": hangs}, config=config).start()
    try:
        instance = runtime.submit(needy, {})
        step = "the making of service 'bank' has not ended since"
        eventually(lambda: f"are starting: {step}" in (instance.waiting_for() or ""), "the step")
        eventually(lambda: runtime.queues(QUEUE)[0].state == "failing", "the state")
        why = f"no worker has started within 6 s (start_timeout): {step}"
        assert runtime.queues(QUEUE)[0].reason.startswith(why)
    finally:
        runtime.stop(grace=0)
