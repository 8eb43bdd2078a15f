"""`on_event`: completed stages and ended instances are sent to listeners in any process."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from stageflow_actors import Runtime, Stage, Workflow
from stageflow_actors.core.envelope import EMPTY_TRAIL, NIL, Envelope, StageRecord, append_record, encode
from stageflow_actors.events import (
    Event,
    StageCompleted,
    WorkflowCompensated,
    WorkflowCompleted,
    WorkflowFailed,
)
from stageflow_actors.runtime.client import event_decoder
from stageflow_actors.runtime.client.event_decoder import EventDecoder


def one(context: dict[str, Any]) -> int:
    context["one"] = True
    return 1


def two(context: dict[str, Any]) -> None:
    if context.get("fail"):
        raise ValueError("no")


def undo(context: dict[str, Any]) -> None:
    if context.get("stubborn"):
        raise ValueError("cannot be undone")


def item(value: int) -> int:
    return value + 1


flow = Workflow("flow").add_stage(one, compensation=undo).add_stage(two)
bare = Workflow("bare").add_stage(two)
wide = (
    Workflow("wide")
    .add_stage(one, id="first")
    .add_parallel("both", [Stage(lambda c: "left", id="left"), Stage(lambda c: "right", id="right")])
    .add_delay("nothing", 0)
    .add_map("each", item, over=lambda c: [1, 2, 3])
    .add_branch("way", lambda c: "a", {"a": [Stage(two, id="arm")]})
    .add_signal("go")
    .add_conditional(two, when=lambda c: False, id="never")
)


class Heard:
    """A callback that records its events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, instance_id: str) -> list[Event]:
        return [event for event in self.events if event.instance_id == instance_id]

    def told(self, instance_id: str) -> list[str]:
        """Stage ids and kinds of ends, in order."""
        return [e.stage_id if isinstance(e, StageCompleted) else type(e).__name__ for e in self.of(instance_id)]


@pytest.fixture(scope="module")
def runtime(serve: Any) -> Runtime:
    return serve(flow, bare, wide)


@pytest.fixture
def heard(runtime: Runtime) -> Any:
    heard = Heard()
    end = runtime.on_event(heard)
    yield heard
    end()


Eventually = Callable[..., Any]


def test_each_stage_and_the_end_are_reported_in_order(runtime: Runtime, heard: Heard, eventually: Eventually) -> None:
    result = runtime.submit(flow, {}, instance_id="plain").result(timeout=20)
    eventually(lambda: len(heard.of("plain")) == 3, "three events")
    assert heard.told("plain") == ["one", "two", "WorkflowCompleted"]
    first, _, end = heard.of("plain")
    assert isinstance(first, StageCompleted)
    assert (first.workflow_id, first.version, first.epoch, first.attempt, first.result) == ("flow", 1, 1, 1, 1)
    assert result.started_at <= first.started_at <= first.finished_at <= result.finished_at
    assert isinstance(end, WorkflowCompleted)
    assert end.result == result
    assert end.duration == result.duration


def test_failures_and_compensations_are_reported_as_what_they_are(
    runtime: Runtime, heard: Heard, eventually: Eventually
) -> None:
    runtime.submit(flow, {"fail": True}, instance_id="undone")
    runtime.submit(flow, {"fail": True, "stubborn": True}, instance_id="stuck")
    runtime.submit(bare, {"fail": True}, instance_id="failed")
    runtime.drain(timeout=20)
    eventually(lambda: len(heard.events) == 5, "five events")
    assert heard.told("undone") == ["one", "WorkflowCompensated"]
    assert heard.told("stuck") == ["one", "WorkflowFailed"]
    assert heard.told("failed") == ["WorkflowFailed"]
    [compensated, stuck, failed] = [heard.of(name)[-1] for name in ("undone", "stuck", "failed")]
    assert isinstance(compensated, WorkflowCompensated)
    assert (compensated.error, compensated.failed_stage) == ("ValueError: no", "two")
    assert isinstance(stuck, WorkflowFailed)
    assert isinstance(failed, WorkflowFailed)
    assert (str(stuck.status), str(failed.status)) == ("compensation_failed", "failed")


def test_every_construct_is_documented_once(runtime: Runtime, heard: Heard, eventually: Eventually) -> None:
    instance = runtime.submit(wide, {}, instance_id="wide")
    eventually(lambda: instance.status() == "waiting", "the signal to be waited for")
    eventually(lambda: "arm" in heard.told("wide"), "all before the signal to be told while it is waited for")
    instance.signal("go", "now")
    instance.result(timeout=20)
    eventually(lambda: heard.told("wide")[-1:] == ["WorkflowCompleted"], "the end")
    told = heard.told("wide")
    assert sorted(told[1:3]) == ["left", "right"]
    assert [told[0], *told[3:]] == ["first", "both", "nothing", "each", "way", "arm", "go", "WorkflowCompleted"]
    results = {e.stage_id: e.result for e in heard.of("wide") if isinstance(e, StageCompleted)}
    assert (results["left"], results["each"], results["way"], results["go"]) == ("left", [2, 3, 4], "a", "now")


def test_a_client_in_another_process_hears_of_instances_that_others_submit(
    runtime: Runtime, eventually: Eventually
) -> None:
    heard = Heard()
    with Runtime.connect(runtime.data_dir) as client:
        client.on_event(heard)
        ids = {instance.id for instance in runtime.submit_many(flow, [{"n": n} for n in range(200)])}
        eventually(lambda: len(heard.events) == 600, "all events")
        assert {event.instance_id for event in heard.events} == ids
        assert all(heard.told(id) == ["one", "two", "WorkflowCompleted"] for id in ids)


def test_a_callback_that_raises_is_logged_and_the_others_are_notified(
    runtime: Runtime, heard: Heard, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("bad callback")

    end = runtime.on_event(broken)
    assert runtime.execute(bare, {}, timeout=20).success
    eventually(lambda: len(heard.events) == 2, "two events")
    eventually(lambda: len(caplog.records) >= 2, "two complaints")
    end()
    assert "a callback of on_event has failed with StageCompleted" in caplog.text
    assert "bad callback" in caplog.text
    with pytest.raises(TypeError):
        runtime.on_event("nothing")  # type: ignore[arg-type]


def test_a_slow_callback_holds_nothing_up_and_what_was_dropped_is_counted(
    runtime: Runtime, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    monkeypatch.setattr("stageflow_actors.runtime.client.event_stream.MAX_QUEUED_BYTES", 20_000)
    gate, begun = threading.Event(), threading.Event()
    heard = Heard()

    def slow(event: Event) -> None:
        begun.set()
        gate.wait(20)
        heard(event)

    end = runtime.on_event(slow)
    results = list(runtime.map(bare, [{"n": n} for n in range(500)]))
    assert all(result.success for result in results), "results do not wait for callbacks"
    assert begun.wait(20)
    feed = runtime._session.events.stream
    assert feed is not None
    eventually(lambda: feed._dropped, "something to be dropped")
    gate.set()
    with caplog.at_level(logging.WARNING, "stageflow_actors.client.event_stream"):
        eventually(lambda: "were dropped: callbacks of on_event are too slow" in caplog.text, "the number to be logged")
    eventually(lambda: heard.events, "those that were kept to be told")
    assert len(heard.events) < 1000
    end()


def test_no_event_is_sent_once_there_is_no_listener(runtime: Runtime, eventually: Eventually) -> None:
    heard = Heard()
    end = runtime.on_event(heard)
    end()
    end()
    assert runtime.execute(bare, {}, timeout=20).success
    assert heard.events == []
    assert runtime._session.events.stream is None


def test_events_go_on_after_the_broker_was_killed(serve: Any, eventually: Eventually) -> None:
    heard = Heard()
    runtime = Runtime(bare, data_dir=serve(flow).data_dir / "inner")
    runtime.on_event(heard)
    with runtime:
        assert runtime.execute(bare, {}, timeout=20).success
        eventually(lambda: len(heard.events) == 2, "two events")
        [broker] = broker_pids(runtime.node_pid)
        os.kill(broker, signal.SIGKILL)
        assert runtime.execute(bare, {}, timeout=20).success
        subscribed_again(runtime, eventually)
        assert runtime.execute(bare, {}, instance_id="after", timeout=20).success
    assert heard.told("after") == ["two", "WorkflowCompleted"], "and leaving waits for the callbacks"


def broker_pids(node: int) -> list[int]:
    import psutil

    return [p.pid for p in psutil.Process(node).children() if "stageflow_brokers.zeromq" in " ".join(p.cmdline())]


def subscribed_again(runtime: Runtime, eventually: Eventually) -> None:
    feed = runtime._session.events.stream
    assert feed is not None
    assert feed._broker is not None
    feed._broker.admin.ping().result(20)


def trail(*records: tuple[str, float]) -> bytes:
    made = EMPTY_TRAIL
    for stage_id, started in records:
        made = append_record(made, StageRecord(stage_id, "completed", 1, started, 1.0))
    return made


def moved(trail: bytes) -> bytes:
    return encode(Envelope("flow", 1, "next", NIL, trail, 1.0))


def test_what_completed_before_there_was_a_listener_is_not_sent() -> None:
    decoder = EventDecoder(100.0, lambda workflow_id, version: None)
    events = decoder.events("i", 1, "next", moved(trail(("a", 10.0), ("b", 99.5), ("c", 100.0))))
    assert [e.stage_id for e in events if isinstance(e, StageCompleted)] == ["b", "c"]
    assert decoder.events("i", 1, "next", moved(trail(("a", 10.0), ("b", 99.5), ("c", 100.0)))) == []


def test_events_of_a_forgotten_instance_are_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_decoder, "MAX_TRACKED_INSTANCES", 2)
    decoder = EventDecoder(0.0, lambda workflow_id, version: None)
    for number, name in enumerate("abc"):
        assert len(decoder.events(name, 1, "next", moved(trail(("s", float(number)))))) == 1
    assert decoder.events("a", 1, "next", moved(trail(("s", 0.0)))) == []
    assert len(decoder.events("a", 1, "next", moved(trail(("s", 0.0), ("t", 9.0))))) == 1
