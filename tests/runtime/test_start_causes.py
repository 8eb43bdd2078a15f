"""A cause for which workers cannot start is told once, however many workers and pools it stops, then counted."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest

from stageflow_actors import Runtime, Workflow
from stageflow_actors.core.plan import Naming, compile_plan
from stageflow_actors.runtime.ipc.pool_spec import PoolSpec, VersionCode
from stageflow_actors.runtime.node import start_causes
from stageflow_actors.runtime.node.start_causes import StartCause, StartCauses

PLAN = compile_plan(Workflow("w").add_stage(lambda context: None, id="s"), Naming())


def pool(name: str) -> PoolSpec:
    return PoolSpec(name, "w", "s", "stage", 2, {}, [VersionCode(1, b"", PLAN)])


def cause(error: str = "OSError: away", details: str = "Traceback: away") -> StartCause:
    return StartCause(f"service 'bank' cannot be made: {error}", error, details)


class _Broker:
    """Keeps what it is told of starts."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.admin = self

    def report_starts(self, queues: list[Any]) -> Future[None]:
        self.told += queues
        return Future()


@pytest.fixture
def broker() -> _Broker:
    return _Broker()


@pytest.fixture
def causes(
    broker: _Broker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> tuple[StartCauses, list[float]]:
    """The causes, and the time that they read."""
    now = [100.0]
    monkeypatch.setattr(start_causes.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, "stageflow_actors.node.pool")
    return StartCauses(cast(Any, broker)), now


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == level and record.name == "stageflow_actors.node.pool"
    ]


def test_a_cause_is_told_once_then_counted_and_its_end_is_told(
    causes: tuple[StartCauses, list[float]], caplog: pytest.LogCaptureFixture
) -> None:
    book, now = causes
    for number in range(7):
        for _ in range(3):
            book.record(pool(f"q{number}"), cause(), 2, 102.0)
    (warning,) = said(caplog, logging.WARNING)
    assert warning.startswith(
        "stage 's' of workflow 'w': its workers cannot start: service 'bank' cannot be made: OSErr"
    )
    assert [record.exc_text for record in caplog.records if record.exc_text] == ["Traceback: away"]
    for _ in range(40):
        book.tick()
        now[0] += 0.25
    counts = said(caplog, logging.INFO)
    assert counts[0] == "14 workers of 7 pools cannot start: OSError: away; next try in 1.0 s"
    assert len(counts) == 3, "less often with time"
    for number in range(7):
        book.recover(f"q{number}")
    book.recover("q0")
    assert said(caplog, logging.INFO)[3:] == [
        "14 workers of 7 pools can start again after 10.0 s: the cause has ended (OSError: away)"
    ]
    assert len(said(caplog, logging.WARNING)) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("OSError: <Connection object at 0x7f11aa22>: refused", "OSError: <Connection object at 0x7fbb0011>: refused"),
        ("OSError: port 4711 is in use", "OSError: port 4712 is in use"),
        ("KeyError: request 6b0ec7f89e27367d failed", "KeyError: request 6b0ec803bf2799cc failed"),
    ],
)
def test_what_differs_from_worker_to_worker_makes_no_cause_of_its_own(
    one: str, other: str, causes: tuple[StartCauses, list[float]], caplog: pytest.LogCaptureFixture
) -> None:
    book, _ = causes
    book.record(pool("a"), cause(one), 1, 102.0)
    book.record(pool("b"), cause(other), 1, 102.0)
    assert len(said(caplog, logging.WARNING)) == 1


def test_another_cause_of_the_same_pool_is_told_and_the_first_is_not_counted_any_more(
    causes: tuple[StartCauses, list[float]], caplog: pytest.LogCaptureFixture
) -> None:
    book, now = causes
    book.record(pool("a"), cause("OSError: refused"), 1, 102.0)
    book.record(pool("a"), cause("OSError: wrong password"), 1, 102.0)
    assert len(said(caplog, logging.WARNING)) == 2
    now[0] += 5
    book.tick()
    assert said(caplog, logging.INFO) == ["1 worker of 1 pool cannot start: OSError: wrong password; next try in 0.0 s"]


def test_a_cause_that_comes_and_goes_is_told_again_only_after_a_while(
    causes: tuple[StartCauses, list[float]], caplog: pytest.LogCaptureFixture
) -> None:
    book, now = causes
    for _ in range(5):
        book.record(pool("a"), cause(), 1, 102.0)
        now[0] += 1
        book.recover("a")
    assert len(said(caplog, logging.WARNING)) == 1
    now[0] += 61
    book.record(pool("a"), cause(), 1, 102.0)
    assert len(said(caplog, logging.WARNING)) == 2


def test_the_broker_receives_each_change_once(causes: tuple[StartCauses, list[float]], broker: _Broker) -> None:
    book, _ = causes
    book.report("a", False, "")
    for _ in range(3):
        book.report("a", True, "why", 7.0)
    book.report("a", False, "")
    book.report("a", False, "")
    assert broker.told == [("a", True, "why", 7.0), ("a", False, "", 0.0)]


def config() -> object:
    return open(os.environ["CONFIG_FILE"]).close()


def ledger(config: object) -> object:
    return config


def work(context: dict[str, Any], *, config: Any) -> None: ...


def book(context: dict[str, Any], *, ledger: Any) -> None: ...


def test_fourteen_workers_of_seven_pools_make_one_warning_with_one_traceback_of_user_frames(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    eventually: Callable[..., Any],
) -> None:
    path = tmp_path / "config.toml"
    monkeypatch.setenv("CONFIG_FILE", str(path))
    caplog.set_level(logging.INFO, "stageflow_actors.node.pool")
    flow = Workflow("flow")
    for number in range(7):
        flow.add_stage(work if number % 2 else book, id=f"s{number}", actors=2)
    with Runtime(flow, data_dir=tmp_path / "data", services={"config": config, "ledger": ledger}) as runtime:
        count = "14 workers of 7 pools cannot start: FileNotFoundError: "
        eventually(lambda: any(text.startswith(count) for text in said(caplog, logging.INFO)), "the count")
        path.touch()
        assert runtime.execute(flow, {}, timeout=60).success
        ended = f"the cause has ended (FileNotFoundError: [Errno 2] No such file or directory: '{path}')"
        eventually(lambda: any(text.endswith(ended) for text in said(caplog, logging.INFO)), "its end")
    assert len(said(caplog, logging.WARNING)) == 1
    (trace,) = [record.exc_text for record in caplog.records if record.exc_text]
    assert re.findall(r'File "([^"]+)"', trace) == [__file__]
    assert "Traceback" not in capfd.readouterr().err, "nothing is printed by each worker"
