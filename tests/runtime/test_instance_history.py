"""`Instance.history()`: the events of an instance with their times, live and finished."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors import InstanceNotFound, Retry, Runtime, Stage, Workflow
from stageflow_actors.runtime.client.completion import Completion
from stageflow_actors.runtime.client.instance import Instance


def book(context: dict[str, Any]) -> str:
    return "B-1"


def undo(context: dict[str, Any]) -> None:
    pass


def flaky(context: dict[str, Any], ctx: Any) -> None:
    if ctx.attempt == 1:
        raise ValueError("not yet")


def fail(context: dict[str, Any]) -> None:
    if not Path(context.get("switch", "")).is_file():
        raise ValueError("no")


def pause(context: dict[str, Any]) -> None:
    import time

    while not Path(context["switch"]).exists():
        time.sleep(0.005)


saga = Workflow("saga").add_stage(book, compensation=undo).add_stage(flaky, retry=Retry.fixed(2, 0)).add_stage(fail)
waits = Workflow("waits").add_stage(book).add_signal("go")
wide = Workflow("wide").add_stage(book).add_parallel("both", [Stage(book, id="quick"), Stage(pause, id="slow")])
parks = Workflow("parks", on_failure="park").add_stage(book).add_stage(fail)


@pytest.fixture(scope="module")
def runtime(serve: Any) -> Runtime:
    return serve(saga, waits, wide, parks)


def lines(instance: Instance[Any]) -> list[tuple[str, str]]:
    history = instance.history()
    times = [moment.at for moment in history]
    assert times == sorted(times)
    assert all(times)
    return [(moment.what, moment.stage_id) for moment in history]


def test_a_finished_instance_has_its_whole_history(runtime: Runtime) -> None:
    instance = runtime.submit(saga, {}, instance_id="told")
    result = instance.result(timeout=20)
    expected = [
        ("submitted", ""),
        ("completed", "book"),
        ("completed", "flaky"),
        ("failed", "fail"),
        ("compensated", "book"),
        ("ended: compensated", "fail"),
    ]
    assert lines(instance) == lines(runtime.instance("told")) == expected
    history = instance.history()
    assert (history[0].at, history[-1].at) == (result.started_at, result.finished_at)
    assert (history[1].data, history[2].attempt, history[3].error) == ("B-1", 2, "ValueError: no")


def test_a_waiting_instance_names_what_it_waits_for(runtime: Runtime, eventually: Any) -> None:
    instance = runtime.submit(waits, {})
    eventually(lambda: instance.status() == "waiting", "the signal to be waited for")
    assert lines(instance) == [("submitted", ""), ("completed", "book"), ("waiting", "signal:go")]
    instance.signal("go")
    instance.result(timeout=20)
    assert lines(instance)[-2:] == [("completed", "go"), ("ended: completed", "")]


def test_completed_branches_are_reported_while_others_run(runtime: Runtime, eventually: Any, tmp_path: Path) -> None:
    switch = tmp_path / "on"
    instance = runtime.submit(wide, {"switch": str(switch)})
    eventually(lambda: ("completed", "quick") in lines(instance), "the quick branch")
    eventually(lambda: ("running", "slow") in lines(instance), "the slow branch")
    assert lines(instance)[:2] == [("submitted", ""), ("completed", "book")]
    assert ("waiting", "both") in lines(instance)
    switch.touch()
    instance.result(timeout=20)
    assert sorted(lines(instance)[1:-1]) == [("completed", name) for name in ("book", "both", "quick", "slow")]


def test_a_parked_instance_has_its_reason_and_a_continued_history_after_its_requeue(
    runtime: Runtime, tmp_path: Path
) -> None:
    switch = tmp_path / "on"
    instance = runtime.submit(parks, {"switch": str(switch)})
    runtime.drain(timeout=20)
    assert lines(instance) == [("submitted", ""), ("completed", "book"), ("parked", "fail")]
    assert instance.history()[-1].error == "ValueError: no"
    switch.touch()
    instance.retry().result(timeout=20)
    assert lines(instance)[-1] == ("ended: completed", "")


def test_an_unknown_instance_has_no_history_and_that_is_reported_at_once(runtime: Runtime) -> None:
    began = time.monotonic()
    for ask in (Instance.history, Instance.status, Instance.done, Instance.result, Instance.retry, Instance.cancel):
        with pytest.raises(InstanceNotFound, match="'unheard-of'"):
            ask(Instance(Completion(runtime._session, "unheard-of", None)))
    assert time.monotonic() - began < 8
