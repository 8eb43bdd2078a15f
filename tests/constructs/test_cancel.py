"""Cancelling at any point, and workflow timeouts: no new stage starts, and completed stages are undone."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from constructs_fixtures import does, done, note, noted, statuses, undoes, undone, wait_for_file
from msgspec import Raw

from stageflow_actors import (
    Instance,
    InstanceNotFound,
    InstanceParked,
    Retry,
    Runtime,
    Stage,
    StageContext,
    Workflow,
)
from stageflow_actors.core.envelope import EMPTY_TRAIL, Envelope, encode
from stageflow_actors.core.plan import Naming, compile_plan
from stageflow_actors.runtime.ipc.pool_spec import stage_codes
from stageflow_actors.runtime.messaging.settlements import Settlement
from stageflow_actors.runtime.worker.executors.base import ExecutorEnvironment
from stageflow_actors.runtime.worker.executors.registry import EXECUTORS
from stageflow_actors.testing import in_process, run
from stageflow_brokers.api import ACK, DeliveryExtra, DeliveryItem


def at_work(instance: Instance[Any], *names: str) -> Any:
    return lambda: set(names) <= set(done(instance.id))


plain = (
    Workflow("plain")
    .add_stage(does("a"), id="a", compensation=undoes("a"))
    .add_stage(does("b"), id="b", compensation=undoes("b"), retry=Retry.fixed(5, 3600))
    .add_stage(does("c"), id="c", compensation=undoes("c"))
)


def test_a_running_stage_is_killed_after_a_grace_and_what_completed_is_undone(
    runtime: Runtime, eventually: Any
) -> None:
    instance = runtime.submit(plain, {"fail": {"b": "hang"}})
    eventually(at_work(instance, "b"), "b hangs")
    assert instance.cancel("changed my mind") == "cancelled"
    result = instance.result(timeout=20)
    assert (result.status, result.error, result.success) == ("cancelled", "cancelled: changed my mind", False)
    assert (done(instance.id), undone(instance.id)) == (["a", "b"], ["a"])
    assert [(one.stage_id, str(one.status)) for one in result.compensations] == [("a", "completed")]
    assert statuses(result) == {"a": "compensated", "b": "pending", "c": "pending"}
    assert runtime.instance(instance.id).status() == "cancelled"


def test_a_stage_that_returns_early_has_completed_and_is_undone(runtime: Runtime, gate: Path, eventually: Any) -> None:
    instance = runtime.submit(heeding, {"gate": str(gate)})
    eventually(at_work(instance, "heeds"), "it is at work")
    assert instance.cancel() == "cancelled"
    result = instance.result(timeout=20)
    assert result.error == "cancelled"
    assert noted(instance.id, "heard") == [("True",)]
    assert (statuses(result), undone(instance.id)) == ({"heeds": "compensated", "after": "pending"}, ["heeds"])
    assert done(instance.id) == ["heeds"]


def heed(context: dict[str, Any], ctx: StageContext) -> None:
    note(ctx.instance_id, "did", "heeds", ctx.attempt)
    while not ctx.cancelled:
        time.sleep(0.005)
    note(ctx.instance_id, "heard", ctx.cancelled)


heeding = (
    Workflow("heeding").add_stage(heed, id="heeds", compensation=undoes("heeds")).add_stage(does("after"), id="after")
)


async def wait_for_ever(context: dict[str, Any], ctx: StageContext) -> None:
    note(ctx.instance_id, "did", "waits", ctx.attempt)
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        note(ctx.instance_id, "was cancelled")
        raise


asynchronous = (
    Workflow("asynchronous")
    .add_stage(does("a"), id="a", compensation=undoes("a"))
    .add_stage(wait_for_ever, id="waits", concurrency=4)
)


def test_an_async_stage_is_cancelled_and_its_neighbours_in_the_same_process_are_not(
    runtime: Runtime, eventually: Any
) -> None:
    one, other = runtime.submit(asynchronous, {}), runtime.submit(asynchronous, {})
    eventually(lambda: at_work(one, "waits")() and at_work(other, "waits")(), "both wait")
    assert one.cancel() == "cancelled"
    assert noted(one.id, "was cancelled") == [()]
    assert undone(one.id) == ["a"]
    assert (other.status(), noted(other.id, "was cancelled")) == ("running", [])
    assert done(other.id) == ["a", "waits"]
    assert other.cancel() == "cancelled"


def test_a_pending_instance_never_begins(runtime: Runtime, eventually: Any) -> None:
    runtime.scale(idle, "only", 0)
    eventually(lambda: runtime.queues("stageflow.idle.stage0")[0].actors == 0, "nobody works there")
    waiting = runtime.submit(idle, {})
    assert waiting.status() == "pending"
    runtime._session.ask(lambda admin: admin.cancel(waiting.id, "cancelled", []))
    assert waiting.status() == "pending", "whoever has to pass it on is not there"
    runtime.scale(idle, "only", 1)
    result = waiting.result(timeout=20)
    assert (result.status, done(waiting.id), statuses(result)) == ("cancelled", [], {"only": "pending"})


idle = Workflow("idle").add_stage(does("only"), id="only")


@pytest.mark.parametrize("kind", ["delay", "signal", "handled signal", "retry", "request"])
def test_an_instance_that_waits_is_cancelled_at_once(runtime: Runtime, eventually: Any, kind: str) -> None:
    workflow = {
        "delay": delayed,
        "signal": signalled,
        "handled signal": handled,
        "retry": plain,
        "request": asking,
    }[kind]
    instance = runtime.submit(workflow, {"fail": {"b": "raise"}})
    if kind == "retry":
        eventually(lambda: any(q.delayed for q in runtime.queues("stageflow.plain.stage1")), "it waits for a retry")
    elif kind == "request":
        eventually(lambda: any(q.ready for q in runtime.queues("stageflow.endpoint.nobody")), "it has asked")
    else:
        eventually(lambda: instance.status() == "waiting", "it waits")
    assert instance.cancel("enough") == "cancelled"
    result = instance.result(timeout=20)
    assert (result.error, undone(instance.id)) == ("cancelled: enough", ["a"])
    assert "after" not in done(instance.id)


before = {"id": "a", "compensation": undoes("a")}
delayed = Workflow("delayed").add_stage(does("a"), **before).add_delay("d", 3600).add_stage(does("after"), id="after")
signalled = Workflow("signalled").add_stage(does("a"), **before).add_signal("s").add_stage(does("after"), id="after")
handled = (
    Workflow("handled")
    .add_stage(does("a"), **before)
    .add_signal("s", on_signal=lambda context, payload: None, on_timeout=lambda context: note("never"))
    .add_stage(does("after"), id="after")
)
asking = (
    Workflow("asking")
    .add_stage(does("a"), **before)
    .add_stage(lambda context, ctx: ctx.request("nobody", 1), id="ask")
    .add_stage(does("after"), id="after")
)


@pytest.mark.parametrize("kind", ["delay", "signal"])
def test_a_stage_before_a_wait_that_ends_after_the_cancel_waits_for_nothing(
    runtime: Runtime, gate: Path, eventually: Any, kind: str
) -> None:
    instance = runtime.submit(delayed if kind == "delay" else signalled, {"fail": {"a": str(gate)}})
    eventually(at_work(instance, "a"), "a is at work")
    runtime._session.ask(lambda admin: admin.cancel(instance.id, "cancelled", ["signal:"]))
    gate.touch()
    result = instance.result(timeout=20)
    assert (result.status, undone(instance.id)) == ("cancelled", ["a"])


branches = (
    Workflow("branches")
    .add_stage(does("a"), **before)
    .add_parallel(
        "p",
        [
            Stage(does("left"), id="left", compensation=undoes("left")),
            Stage(does("right"), id="right", compensation=undoes("right")),
        ],
    )
    .add_stage(does("after"), id="after")
)


def test_branches_that_completed_are_undone_and_those_at_work_are_killed(runtime: Runtime, eventually: Any) -> None:
    instance = runtime.submit(branches, {"fail": {"right": "hang"}, "set": {"left": {"l": 1}}})
    eventually(at_work(instance, "left", "right"), "both are at work")
    eventually(lambda: not any(q.ready + q.leased for q in runtime.queues("stageflow.branches.stage1.left")), "left")
    assert instance.cancel() == "cancelled"
    result = instance.result(timeout=20)
    assert undone(instance.id) == ["left", "a"]
    ended = {"left": "compensated", "right": "skipped"}
    assert statuses(result) == {"a": "compensated", "p": "skipped", **ended, "after": "pending"}
    assert result.context["l"] == 1


def hold(item: dict[str, Any], ctx: StageContext) -> int:
    note(ctx.instance_id, "item", item["n"])
    if "gate" in item:
        wait_for_file(item["gate"])
    return int(item["n"])


def put_back(item: dict[str, Any], ctx: StageContext) -> None:
    note(ctx.instance_id, "put back", item["n"], ctx.results["m"])


mapping = (
    Workflow("mapping")
    .add_stage(does("a"), **before)
    .add_map("m", hold, over=lambda context: context["items"], compensation=put_back, actors=2)
    .add_stage(does("after"), id="after")
)


def test_items_that_are_done_are_undone_and_the_others_never_begin(runtime: Runtime, eventually: Any) -> None:
    items = [{"n": 0}, {"n": 1, "gate": "/never"}, {"n": 2, "gate": "/never"}, *({"n": n} for n in range(3, 9))]
    instance = runtime.submit(mapping, {"items": items})
    eventually(lambda: len(noted(instance.id, "item")) == 3, "two are at work and one is done")
    assert instance.cancel() == "cancelled"
    result = instance.result(timeout=20)
    assert {words[0] for words in noted(instance.id, "item")} == {"0", "1", "2"}
    assert noted(instance.id, "put back") == [("0", "0")]
    assert undone(instance.id) == ["a"]
    assert (result.status, statuses(result)) == (
        "cancelled",
        {"a": "compensated", "m": "compensated", "after": "pending"},
    )


def test_a_parked_instance_can_be_cancelled(runtime: Runtime) -> None:
    instance = runtime.submit(parking, {"fail": {"b": "raise"}})
    with pytest.raises(InstanceParked):
        instance.result(timeout=20)
    assert instance.cancel("give it up") == "cancelled"
    result = instance.result(timeout=20)
    assert (result.error, undone(instance.id)) == ("cancelled: give it up", ["a"])
    assert [q.dead for q in runtime.queues("stageflow.parking.stage1")] == [0]


parking = Workflow("parking", on_failure="park").add_stage(does("a"), **before).add_stage(does("b"), id="b")


def test_cancelling_a_compensating_instance_returns_that_status_and_it_goes_on(
    runtime: Runtime, gate: Path, eventually: Any
) -> None:
    instance = runtime.submit(plain, {"fail": {"c": "raise", "undo-b": str(gate)}})
    eventually(lambda: undone(instance.id) == ["b"], "it is being undone")
    assert instance.status() == "compensating"
    assert instance.cancel() == "compensating"
    gate.touch()
    result = instance.result(timeout=20)
    assert (result.status, result.error, undone(instance.id)) == ("compensated", "ValueError: boom failed", ["b", "a"])
    assert instance.cancel() == "compensated"


@pytest.mark.parametrize("end", ["completed", "compensated"])
def test_cancelling_a_finished_instance_returns_its_end(runtime: Runtime, end: str) -> None:
    instance = runtime.submit(plain, {} if end == "completed" else {"fail": {"c": "raise"}})
    instance.result(timeout=20)
    assert instance.cancel() == end
    assert runtime.instance(instance.id).cancel() == end
    assert runtime.instance(instance.id).status() == end


def test_cancelling_twice_changes_nothing(runtime: Runtime, eventually: Any) -> None:
    instance = runtime.submit(delayed, {})
    eventually(lambda: instance.status() == "waiting", "it waits")
    assert (instance.cancel("first"), instance.cancel("second")) == ("cancelled", "cancelled")
    assert instance.result().error == "cancelled: first"
    assert undone(instance.id) == ["a"]


def test_a_compensation_that_fails_while_cancelling_is_reported(runtime: Runtime, eventually: Any) -> None:
    instance = runtime.submit(delayed, {"fail": {"undo-a": "raise"}})
    eventually(lambda: instance.status() == "waiting", "it waits")
    assert instance.cancel() == "compensation_failed"


def test_an_unknown_instance_cannot_be_cancelled(runtime: Runtime) -> None:
    with pytest.raises(InstanceNotFound):
        runtime.instance("nobody")


def test_a_cancelled_instance_keeps_its_id(runtime: Runtime, eventually: Any) -> None:
    instance = runtime.submit(delayed, {}, instance_id="cancelled-one")
    eventually(lambda: instance.status() == "waiting", "it waits")
    instance.cancel()
    again = runtime.submit(delayed, {}, instance_id="cancelled-one")
    assert again.result(timeout=20).status == "cancelled"


# workflows that run out of time


def limited(name: str, seconds: float) -> Workflow[dict[str, Any]]:
    return (
        Workflow(name, timeout=seconds)
        .add_stage(does("a"), **before)
        .add_stage(does("b"), id="b", compensation=undoes("b"))
        .add_signal("s", timeout=3600)
    )


hurried = limited("hurried", 0.3)
leisurely = limited("leisurely", 3600)
first_waits = Workflow("first-waits", timeout=0.1).add_signal("s").add_stage(does("after"), id="after")


@pytest.mark.parametrize("where", ["in work", "waiting"])
def test_a_workflow_that_runs_for_longer_than_it_may_is_cancelled(runtime: Runtime, where: str) -> None:
    result = runtime.execute(hurried, {"fail": {"b": "hang"}} if where == "in work" else {}, timeout=20)
    assert result.status == "cancelled"
    assert result.error == "StageTimeout: the workflow ran longer than its timeout of 0.3 s"
    assert undone(result.instance_id) == (["a"] if where == "in work" else ["b", "a"])


def test_a_workflow_in_time_is_not_touched(runtime: Runtime) -> None:
    instance = runtime.submit(leisurely, {})
    instance.signal("s", 1)
    assert instance.result(timeout=20).status == "completed"


def test_time_runs_out_for_a_workflow_whose_first_stage_waits(runtime: Runtime) -> None:
    result = runtime.execute(first_waits, {}, timeout=20)
    assert (result.status, done(result.instance_id)) == ("cancelled", [])


def test_a_workflow_with_a_timeout_runs_in_this_process() -> None:
    assert run(leisurely, {}, signals={"s": 1}).success
    failed = run(leisurely, {})
    assert (failed.status, failed.error) == ("compensated", "StageTimeout: no signal 's' came within 3600 s")


def test_a_run_that_is_retried_has_its_time_again(runtime: Runtime) -> None:
    result = runtime.execute(short_of_time, {"fail": {"b": "raise"}}, timeout=20)
    assert result.status == "failed"
    again = runtime.instance(result.instance_id).retry(context={}).result(timeout=20)
    assert (again.status, again.error) == (
        "cancelled",
        "StageTimeout: the workflow ran longer than its timeout of 0.3 s",
    )


short_of_time = Workflow("short-of-time", timeout=0.3).add_stage(does("b"), id="b").add_signal("s", timeout=3600)


# behind busy workers


@pytest.mark.parametrize("kind", ["stage", "branch", "item"])
def test_what_waits_behind_a_busy_worker_is_cancelled_without_it(
    runtime: Runtime, gate: Path, eventually: Any, kind: str
) -> None:
    workflow = {"stage": busy_stage, "branch": busy_branch, "item": busy_item}[kind]
    first = runtime.submit(workflow, {"gate": str(gate)})
    eventually(at_work(first, "slow"), "the only worker is busy")
    waiting = runtime.submit(workflow, {"gate": str(gate)})
    if kind != "stage":
        eventually(lambda: undone_if_over(waiting), "the other branch, or the map, has done its part")
    assert waiting.cancel("enough") == "cancelled"
    assert done(waiting.id).count("slow") == 0
    assert undone(waiting.id) == ([] if kind == "stage" else ["a"])
    assert (first.status(), done(first.id).count("slow")) == ("running", 1), "it goes on"
    gate.touch()
    assert first.result(timeout=20).status == "completed"


def undone_if_over(instance: Instance[Any]) -> bool:
    """Whether the stage before is over: it is what there is to be undone."""
    return "a" in done(instance.id)


def slow(context: dict[str, Any], ctx: StageContext) -> None:
    note(ctx.instance_id, "did", "slow", ctx.attempt)
    wait_for_file(context["gate"])


busy_stage = Workflow("busy-stage").add_stage(slow, id="slow").add_stage(does("after"), id="after")
busy_branch = (
    Workflow("busy-branch")
    .add_stage(does("a"), **before)
    .add_parallel("p", [Stage(slow, id="slow"), Stage(does("quick"), id="quick")])
)
busy_item = (
    Workflow("busy-item").add_stage(does("a"), **before).add_map("m", slow, over=lambda context: [context, context])
)


def test_what_was_published_to_be_parked_is_passed_through_when_it_is_cancelled_before_that() -> None:
    naming = Naming()
    plan = compile_plan(parking, naming)
    program, planned = next(pair for pair in stage_codes(parking, plan) if pair[1].id == "b")
    environment = ExecutorEnvironment(
        naming=naming, services={}, slot=in_process._NullSlot(), step_store=lambda item: pytest.fail("it is kept")
    )
    work = EXECUTORS[planned.kind](program, plan, environment)
    body = encode(Envelope("parking", 1, "b", Raw(encode({})), EMPTY_TRAIL, 0.0, attempts=-1))
    settled = work(DeliveryItem(7, 1, len(body), "one", 1, DeliveryExtra(cancelled="enough", epoch_now=2)), body)
    assert isinstance(settled, Settlement)
    assert settled.item.outcome == ACK
    assert [target.label for target, _ in settled.publishes] == [":cancelled"]
