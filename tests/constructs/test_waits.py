"""Delays and signals: waiting instances occupy no actor, keep early signals, and survive a restart."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from constructs_fixtures import does, done, stage_of, statuses, undoes, undone

from stageflow_actors import (
    Config,
    InstanceNotFound,
    InstanceParked,
    InvalidContext,
    Replace,
    Runtime,
    Stage,
    StageFlowError,
    Workflow,
    WorkflowDefinitionError,
)
from stageflow_actors.testing import run

# delays

short = (
    Workflow("short")
    .add_stage(does("before"), id="before", compensation=undoes("before"))
    .add_delay("pause", 0.3)
    .add_stage(does("after"), id="after", after=["pause"])
)
long = Workflow("long").add_delay("first", 3600).add_stage(does("after"), id="after")
nothing = Workflow("nothing").add_delay("one", 0).add_delay("two", 0.0).add_delay("last", 0)


def test_a_delay_is_waited_for_and_recorded(runtime: Runtime) -> None:
    result = runtime.execute(short, {}, timeout=20)
    assert statuses(result) == {"before": "completed", "pause": "completed", "after": "completed"}
    before, pause, after = result.stages
    assert after.started_at - before.started_at >= 0.3
    assert pause.attempts == 1


timed = (
    Workflow("timed")
    .add_stage(does("before"), id="before")
    .add_delay("pause", 0.2)
    .add_signal("bare", timeout=3600)
    .add_signal("taken", timeout=3600, on_signal=lambda context, payload: None)
    .add_signal("missed", timeout=0.2, on_timeout=lambda context: None)
    .add_parallel("both", [Stage(lambda context: time.sleep(0.1), id="left"), Stage(does("right"), id="right")])
    .add_map("items", lambda item: time.sleep(0.1), over=lambda context: [1])
    .add_signal("never", timeout=0.2)
)


def test_what_waits_is_recorded_with_its_beginning_and_its_length(execute: Any, request: Any) -> None:
    result = execute(timed, {}, signals={"bare": 1, "taken": 2})
    assert (result.status, result.failed_stage) == ("failed", "never")
    stages = {stage.stage_id: stage for stage in result.stages}
    assert list(stages) == ["before", "pause", "bare", "taken", "missed", "both", "left", "right", "items", "never"]
    behind = 0.0
    for name in ("before", "pause", "bare", "taken", "missed", "both", "items", "never"):
        stage = stages[name]
        assert stage.started_at >= behind - 0.001, f"{name} began before what comes before it was over"
        behind = stage.started_at + stage.duration
    assert behind <= result.finished_at + 0.001
    least = {"both": 0.1, "items": 0.1}
    if "real" in request.node.name:
        least |= {"pause": 0.2, "missed": 0.2, "never": 0.2}  # no time is waited for in this process
    for name, seconds in least.items():
        assert stages[name].duration >= seconds * 0.99, name


def test_a_signal_that_is_waited_for_took_so_long(runtime: Runtime, eventually: Any) -> None:
    instance = runtime.submit(plain, {})
    eventually(lambda: instance.status() == "waiting", "it waits")
    seen = time.time()
    eventually(lambda: time.time() > seen + 0.1, "for some time")
    instance.signal("answer")
    ask, answer, _ = instance.result(timeout=20).stages
    assert ask.started_at <= answer.started_at <= seen + 0.001
    assert answer.duration >= 0.1


def test_a_delay_is_over_at_once_in_this_process() -> None:
    began = time.monotonic()
    result = run(long, {})
    assert (result.status, done(result.instance_id)) == ("completed", ["after"])
    assert time.monotonic() - began < 60


def test_a_delay_may_be_of_no_time_and_the_last(execute: Any) -> None:
    result = execute(nothing, {"kept": 1})
    assert (result.status, result.context) == ("completed", {"kept": 1})
    assert statuses(result) == dict.fromkeys(["one", "two", "last"], "completed")


def test_a_failure_behind_a_delay_undoes_what_came_before(execute: Any) -> None:
    result = execute(short, {"fail": {"after": "raise"}})
    assert (result.status, undone(result.instance_id)) == ("compensated", ["before"])
    assert statuses(result)["pause"] == "completed"


def test_an_instance_in_a_delay_is_waiting(runtime: Runtime, eventually: Any) -> None:
    instance = runtime.submit(long, {})
    eventually(lambda: instance.status() == "waiting", "it waits")
    assert instance.id in {one.id for one in runtime.instances("waiting")}
    assert instance.cancel() == "cancelled"


# signals


def approve(context: dict[str, Any], payload: Any) -> Any:
    if payload == "no":
        raise PermissionError("not approved")
    context["approved_by"] = payload
    return {"replaced": Replace({"by": payload})}.get(context.get("how"), {"said": payload})


def escalate(context: dict[str, Any]) -> str | None:
    if context.get("strict"):
        raise TimeoutError("nobody cares")
    context["escalated"] = True
    return "escalated"


plain = (
    Workflow("plain")
    .add_stage(does("ask"), id="ask", compensation=undoes("ask"))
    .add_signal("answer")
    .add_stage(does("after"), id="after", after=["answer"])
)
handled = (
    Workflow("handled")
    .add_stage(does("ask"), id="ask", compensation=undoes("ask"))
    .add_signal("approval", name="approve", timeout=3600, on_signal=approve, on_timeout=escalate)
    .add_stage(does("after"), id="after")
)
votes = Workflow("votes").add_signal("one", name="vote").add_signal("two", name="vote").add_signal("three", name="vote")
hasty = (
    Workflow("hasty")
    .add_stage(does("ask"), id="ask", compensation=undoes("ask"))
    .add_signal("approval", timeout=0.05, on_timeout=escalate)
    .add_stage(does("after"), id="after")
)
impatient = (
    Workflow("impatient")
    .add_stage(does("ask"), id="ask", compensation=undoes("ask"))
    .add_signal("answer", timeout=0.05)
    .add_stage(does("after"), id="after")
)
strict = (
    Workflow("strict")
    .add_stage(does("ask"), id="ask", compensation=undoes("ask"))
    .add_signal("approval", timeout=0.05, on_signal=approve)
)


@pytest.mark.parametrize("payload", [None, 0, "yes", {"a": [1, b"\xff"]}], ids=str)
def test_the_payload_of_a_signal_is_the_result_of_its_stage(execute: Any, payload: Any) -> None:
    result = execute(plain, {}, signals={"answer": payload})
    assert result.status == "completed"
    assert statuses(result) == {"ask": "completed", "answer": "completed", "after": "completed"}
    assert stage_of(result, "answer").data == payload


def test_on_signal_takes_it_in(execute: Any) -> None:
    result = execute(handled, {}, signals={"approve": "ann"})
    assert (result.status, result.context) == ("completed", {"approved_by": "ann"})
    assert stage_of(result, "approval").data == {"said": "ann"}
    result = execute(handled, {"how": "replaced"}, signals={"approve": "bob"})
    assert (result.context, stage_of(result, "approval").data) == ({"by": "bob"}, None)


def test_on_signal_may_fail_the_stage(execute: Any) -> None:
    result = execute(handled, {}, signals={"approve": "no"})
    assert (result.status, result.failed_stage) == ("compensated", "approval")
    assert result.error == "PermissionError: not approved"
    assert undone(result.instance_id) == ["ask"]


def test_without_a_signal_in_time_the_stage_has_failed(execute: Any) -> None:
    for workflow, stage, name in ((impatient, "answer", "answer"), (strict, "approval", "approval")):
        result = execute(workflow, {})
        assert (result.status, result.failed_stage) == ("compensated", stage)
        assert result.error == f"StageTimeout: no signal {name!r} came within 0.05 s"
        assert undone(result.instance_id) == ["ask"]
        assert statuses(result)[stage] == "failed"


def test_on_timeout_decides_when_none_came_in_time(execute: Any) -> None:
    result = execute(hasty, {})
    assert (result.status, result.context, stage_of(result, "approval").data) == (
        "completed",
        {"escalated": True},
        "escalated",
    )
    result = execute(hasty, {"strict": True})
    assert (result.status, result.error) == ("compensated", "TimeoutError: nobody cares")


def test_a_signal_without_sender_or_timeout_is_reported_in_this_process() -> None:
    with pytest.raises(StageFlowError, match=r"waits for the signal 'answer'.*signals="):
        run(plain, {})


def test_a_signal_is_waited_for_and_taken(runtime: Runtime, eventually: Any) -> None:
    instance = runtime.submit(plain, {})
    eventually(lambda: instance.status() == "waiting", "it waits")
    assert done(instance.id) == ["ask"]
    instance.signal("answer", 42)
    result = instance.result(timeout=20)
    assert (result.status, stage_of(result, "answer").data) == ("completed", 42)


def test_a_signal_that_comes_early_is_kept(runtime: Runtime, gate: Path, eventually: Any) -> None:
    instance = runtime.submit(plain, {"fail": {"ask": str(gate)}})
    eventually(lambda: done(instance.id), "the stage before is at work")
    instance.signal("answer", "early")
    gate.touch()
    assert stage_of(instance.result(timeout=20), "answer").data == "early"


def test_several_signals_are_taken_first_in_first_out(runtime: Runtime, execute: Any, eventually: Any) -> None:
    instance = runtime.submit(votes, {})
    eventually(lambda: instance.status() == "waiting", "it waits")
    with suppress(InstanceNotFound):  # with the third it ends
        for number in range(5):
            instance.signal("vote", number)
    result = instance.result(timeout=20)
    assert [stage.data for stage in result.stages] == [0, 1, 2]


def test_several_signals_may_be_given_in_this_process() -> None:
    result = run(votes, {}, signals=[("vote", "a"), ("vote", "b"), ("vote", "c")])
    assert [stage.data for stage in result.stages] == ["a", "b", "c"]


def test_equal_signals_are_several(runtime: Runtime) -> None:
    instance = runtime.submit(votes, {})
    for _ in range(3):
        instance.signal("vote", "same")
    assert instance.result(timeout=20).success


def test_a_signal_to_an_unknown_instance_is_an_error(runtime: Runtime) -> None:
    finished = runtime.submit(nothing, {})
    finished.result(timeout=20)
    with pytest.raises(InstanceNotFound):
        finished.signal("answer")


def test_a_signal_that_the_workflow_never_waits_for_is_refused_with_those_it_does(runtime: Runtime) -> None:
    asked, quiet = runtime.submit(votes, {}), runtime.submit(long, {})
    with pytest.raises(
        StageFlowError, match=r"'votes' version 1 never waits for a signal 'veto': it waits for 'vote'$"
    ):
        asked.signal("veto")
    with pytest.raises(StageFlowError, match="'long' version 1 never waits for a signal 'x': it waits for no signal"):
        quiet.signal("x")
    for name in ("", None, 5, b"vote"):
        with pytest.raises(ValueError, match="the name of a signal must be a non-empty string, not "):
            asked.signal(name)  # type: ignore[arg-type]
    for instance in (asked, quiet):
        assert instance.cancel() == "cancelled"


def test_a_payload_that_cannot_travel_is_refused(runtime: Runtime) -> None:
    instance = runtime.submit(plain, {})
    with pytest.raises(InvalidContext, match="the payload of signal 'answer'"):
        instance.signal("answer", {1, 2})
    instance.signal("answer")
    assert instance.result(timeout=20).success


def test_waiting_instances_hold_no_actor(runtime: Runtime, eventually: Any) -> None:
    waiting = [runtime.submit(handled, {}) for _ in range(20)]
    eventually(lambda: all(one.status() == "waiting" for one in waiting), "all wait")
    queues = runtime.queues("stageflow.handled.")
    assert sum(queue.ready + queue.leased + queue.delayed for queue in queues) == 0
    for one in waiting:
        one.signal("approve", one.id)
    assert [one.result(timeout=20).context["approved_by"] for one in waiting] == [one.id for one in waiting]


@dataclass
class Leave:
    days: int
    approved: bool = False


def grant(leave: Leave, payload: Any) -> Leave:
    return Leave(leave.days, bool(payload))


leaves = Workflow("leaves", context=Leave).add_signal("boss", on_signal=grant)


def test_on_signal_may_replace_a_typed_context(execute: Any) -> None:
    assert execute(leaves, Leave(3), signals={"boss": True}).context == Leave(3, True)


parking = Workflow("parking", on_failure="park").add_signal("s", timeout=0.3).add_stage(does("after"), id="after")


def test_a_signal_that_did_not_come_may_be_parked_and_is_waited_for_again(runtime: Runtime, eventually: Any) -> None:
    instance = runtime.submit(parking, {})
    for _ in range(2):
        with pytest.raises(InstanceParked, match=r"no signal 's' came within 0.3 s"):
            instance.result(timeout=20)
        instance.retry()
        eventually(lambda: instance.status() == "waiting", "it waits again")
    instance.signal("s", "at last")
    assert stage_of(instance.result(timeout=20), "s").data == "at last"


def test_a_signal_that_did_not_come_is_a_parked_result_in_this_process() -> None:
    result = run(parking, {})
    assert (result.status, result.failed_stage) == ("parked", "s")


# over a restart


def test_delays_and_signals_survive_a_restart_and_go_on(tmp_path: Path, eventually: Any) -> None:
    pause = Workflow("pause").add_delay("d", 1).add_stage(does("after"), id="after")
    config = Config(durability="write")
    first = Runtime(plain, handled, hasty_later, long, pause, data_dir=tmp_path / "data", config=config)
    with first:
        ids = {w.id: first.submit(w, {}).id for w in (plain, handled, long)}
        eventually(lambda: len(first.instances("waiting")) == 3, "all wait")
        ids |= {w.id: first.submit(w, {}).id for w in (hasty_later, pause)}
        first.stop()
    again = Runtime(plain, handled, hasty_later, long, pause, data_dir=tmp_path / "data", config=config)
    with again:
        assert again.instance(ids["pause"]).result(timeout=20).success
        assert again.instance(ids["hasty-later"]).result(timeout=20).context == {"escalated": True}
        assert again.instance(ids["long"]).status() == "waiting"
        again.instance(ids["plain"]).signal("answer", 1)
        again.instance(ids["handled"]).signal("approve", "ann")
        assert stage_of(again.instance(ids["plain"]).result(timeout=20), "answer").data == 1
        assert again.instance(ids["handled"]).result(timeout=20).context == {"approved_by": "ann"}
        again.stop()


hasty_later = Workflow("hasty-later").add_signal("approval", timeout=1, on_timeout=escalate)


def test_500_instances_wait_for_little_and_all_can_be_signalled(runtime: Runtime, eventually: Any) -> None:
    before = runtime.stats()["live_bytes"]
    waiting = runtime.submit_many(handled, [{"n": n} for n in range(500)])
    eventually(lambda: len(runtime.instances("waiting", limit=1000)) >= 500, "all wait")
    assert runtime.stats()["live_bytes"] - before < 500 * 600
    for one in waiting:
        one.signal("approve", "all")
    assert all(one.result(timeout=30).success for one in waiting)


def test_what_no_wait_can_be_is_refused_when_it_is_written() -> None:
    with pytest.raises(WorkflowDefinitionError, match="delay 'd'"):
        Workflow("w").add_delay("d", -1)
    with pytest.raises(WorkflowDefinitionError, match=r"the delay 'd' must be finite, not inf: .*add_signal\(id\)"):
        Workflow("w").add_delay("d", float("inf"))
    with pytest.raises(WorkflowDefinitionError, match="on_signal of signal stage 's'"):
        Workflow("w").add_signal("s", on_signal="x")  # type: ignore[arg-type]
    with pytest.raises(WorkflowDefinitionError, match="timeout"):
        Workflow("w").add_signal("s", timeout=-1)
