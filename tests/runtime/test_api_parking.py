"""`on_failure="park"`: a failed instance waits as a dead letter, and requeueing resumes it at its failed stage."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from effect_log import note, noted

from stageflow_actors import Config, InstanceParked, Runtime, StageContext, Workflow, WorkflowStatus


def prepare(context: dict[str, Any], ctx: StageContext) -> dict[str, int]:
    note("prepared", ctx.instance_id)
    context["prepared"] = True
    return {"n": 1}


def undo(context: dict[str, Any], ctx: StageContext) -> None:
    note("undone", ctx.instance_id)


def send(context: dict[str, Any], ctx: StageContext) -> int:
    note("sent", ctx.instance_id, ctx.attempt, sorted(context), ctx.results["prepare"]["n"], ctx.previous_failure)
    ctx.step("first-half", note, "half", ctx.instance_id)
    context["spoilt"] = True
    if not Path(context["switch"]).exists():
        if context.get("die"):
            os._exit(4)
        raise ConnectionError("no line")
    return ctx.attempt


def optional(context: dict[str, Any]) -> None:
    raise ValueError("not needed")


parking = (
    Workflow("parking", on_failure="park")
    .add_stage(prepare, compensation=undo)
    .add_stage(optional, required=False)
    .add_stage(send)
)
needy = Workflow("needy", on_failure="park").add_stage(optional, required=False).add_stage(prepare, after=["optional"])
QUEUE = "stageflow.parking.stage2"


@pytest.fixture(scope="module")
def runtime(serve: Any) -> Runtime:
    return serve(parking, needy, config=Config(max_stage_retries=2))


@pytest.fixture
def switch(tmp_path: Path) -> Path:
    return tmp_path / "on"


def dead_letters(runtime: Runtime, instance_id: str) -> list[dict[str, Any]]:
    return [
        m for m in runtime._session.ask(lambda admin: admin.peek(f"dlq.{QUEUE}", 0, 1000)) if m["group"] == instance_id
    ]


def requeue(runtime: Runtime, instance_id: str) -> None:
    [letter] = dead_letters(runtime, instance_id)
    runtime._session.ask(lambda admin: admin.requeue(f"dlq.{QUEUE}", [letter["id"]]))


def test_a_parked_instance_names_its_dead_letter_and_the_reason(runtime: Runtime, switch: Path) -> None:
    instance = runtime.submit(parking, {"switch": str(switch)}, instance_id="where")
    with pytest.raises(InstanceParked) as parked:
        instance.result(timeout=20)
    assert parked.value.queue == f"dlq.{QUEUE}"
    assert parked.value.reason == "ConnectionError: no line"
    assert f"dlq.{QUEUE}" in str(parked.value)
    assert instance.status() == WorkflowStatus.parked
    assert not instance.done()
    assert [len(dead_letters(runtime, "where")), noted("undone", "where")] == [1, []]
    with pytest.raises(InstanceParked):
        runtime.execute(parking, {"switch": str(switch)}, instance_id="where", timeout=20)
    with pytest.raises(InstanceParked):
        asyncio.run(asyncio.wait_for(_awaiting(runtime.instance("where")), 20))
    assert "where" in [i.id for i in runtime.instances(status="parked")]


async def _awaiting(instance: Any) -> Any:
    return await instance


@pytest.mark.parametrize("die", [False, True])
def test_requeueing_resumes_at_the_failed_stage_with_the_context_before_it(
    runtime: Runtime, switch: Path, die: bool
) -> None:
    instance_id = f"resumed-{die}"
    instance = runtime.submit(parking, {"switch": str(switch), "die": die}, instance_id=instance_id)
    with pytest.raises(InstanceParked) as parked:
        instance.result(timeout=20)
    assert (parked.value.reason or "").startswith("WorkerDied: " if die else "ConnectionError: ")
    switch.touch()
    requeue(runtime, instance_id)
    result = instance.result(timeout=20)
    assert result.success
    assert (result.error, result.failed_stage) == (None, None)
    assert result.context == {"switch": str(switch), "die": die, "prepared": True, "spoilt": True}
    assert noted("prepared", instance_id) == [()], "earlier stages do not run again"
    assert noted("half", instance_id) == [()], "completed steps neither"
    runs = noted("sent", instance_id)
    assert len(runs) == (3 if die else 2)
    assert {context for _, context, *_ in runs} == {"['die', 'prepared', 'switch']"}
    assert [(s.stage_id, str(s.status)) for s in result.stages] == [
        ("prepare", "completed"),
        ("optional", "failed"),
        ("send", "completed"),
    ]
    assert not dead_letters(runtime, instance_id)


def test_an_instance_parked_twice_can_be_requeued_twice(runtime: Runtime, switch: Path) -> None:
    instance = runtime.submit(parking, {"switch": str(switch), "die": True}, instance_id="twice")
    for _ in range(2):
        with pytest.raises(InstanceParked):
            instance.result(timeout=20)
        requeue(runtime, "twice")
    with pytest.raises(InstanceParked):
        instance.result(timeout=20)
    assert len(noted("sent", "twice")) == 6, "each requeue grants the deaths anew"
    switch.touch()
    requeue(runtime, "twice")
    assert instance.result(timeout=20).success


def test_a_parked_instance_keeps_its_id(runtime: Runtime, switch: Path) -> None:
    first = runtime.submit(parking, {"switch": str(switch)}, instance_id="kept")
    with pytest.raises(InstanceParked):
        first.result(timeout=20)
    again = runtime.submit(parking, {"switch": str(switch)}, instance_id="kept")
    assert again.status() == "parked"
    assert noted("prepared", "kept") == [()]


def test_map_yields_a_parked_instance_as_a_result(runtime: Runtime, switch: Path, tmp_path: Path) -> None:
    on = tmp_path / "there"
    on.touch()
    contexts = [{"switch": str(on if n % 3 else switch), "n": n} for n in range(12)]
    results = list(runtime.map(parking, contexts))
    assert [str(r.status) for r in results] == ["completed" if n % 3 else "parked" for n in range(12)]
    parked = results[3]
    assert (parked.success, parked.failed_stage, parked.error) == (False, "send", "ConnectionError: no line")
    assert parked.context == {"switch": str(switch), "n": 3, "prepared": True}
    assert [s.stage_id for s in parked.stages][:2] == ["prepare", "optional"]
    assert parked.started_at <= parked.finished_at
    unordered = list(runtime.map_unordered(parking, contexts))
    assert sorted(str(r.status) for r in unordered) == ["completed"] * 8 + ["parked"] * 4


def test_a_keyed_map_that_meets_parked_instances_again_yields_them_again(runtime: Runtime, switch: Path) -> None:
    contexts = [{"switch": str(switch), "key": f"again-{n}"} for n in range(3)]
    for _ in range(2):
        results = list(runtime.map(parking, contexts, key="key"))
        assert [str(r.status) for r in results] == ["parked"] * 3
    assert all(noted("prepared", f"again-{n}") == [()] for n in range(3))


def test_as_completed_gives_parked_instances_too(runtime: Runtime, switch: Path) -> None:
    instances = runtime.submit_many(parking, [{"switch": str(switch)}] * 3)
    assert set(runtime.as_completed(instances, timeout=20)) == set(instances)
    assert {str(i.status()) for i in instances} == {"parked"}


def test_drain_does_not_wait_for_what_is_parked(runtime: Runtime, switch: Path) -> None:
    instance = runtime.submit(parking, {"switch": str(switch)})
    runtime.drain(timeout=20)
    assert instance.status() == "parked"


def test_an_unmet_after_parks(runtime: Runtime) -> None:
    with pytest.raises(InstanceParked, match="needs 'optional' to have completed"):
        runtime.execute(needy, {}, timeout=20)
