"""The accidents of an older implementation, one named test each.

Where another module shows that one cannot happen, it is named here and not shown twice.

=====================================================  ==============================================================
a compensation picks the wrong stage after an          here, and `runtime/test_api_failures`: "after a failed optional
optional failure or a skip                             stage exactly the completed ones are compensated",
                                                       `core/test_routing`: "compensation by index would undo …",
                                                       `test_choices`: "a skipped stage is not undone"
a required failure both compensates and redelivers     here
a required stage with unmet dependencies vanishes      `runtime/test_api_failures`: "an unmet required after fails the
                                                       instance and compensates"; `test_api_parking`: "… parks"
a failed compensation reported as `compensated`        `runtime/test_api_failures`: "a compensation that fails, hangs
                                                       or dies does not stop the others"; here, for a map
step checkpoints lost on a crash                       `runtime/test_api_stage_context`: "a step runs once whatever
                                                       befalls the attempt"; here, for a crash of everything
a reordered definition runs the wrong stage            here
state changed by a failed attempt leaks                `runtime/test_api_retry`: "what a failed attempt did to its
                                                       context is gone"; here, for branches and items
retries hold their message and actor while they wait   `runtime/test_api_retry`: "while a retry waits its actor is
                                                       free for others"
a breaker stuck half-open                              `brokers/test_breaker`
a redriven dead letter runs a compensated workflow     `runtime/test_api_failures`: "a death at the limit is a dead
again                                                  letter as evidence that cannot be requeued"; here
dead letters dropped for want of a queue               here
duplicate starts treated as errors                     `runtime/test_api_instances`: "the same id with the same input
                                                       gives the … instance and starts nothing"
=====================================================  ==============================================================
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from constructs_fixtures import does, done, note, noted, trouble, undoes, undone, wait_for_file

from stageflow_actors import Config, InstanceParked, Retry, Runtime, Stage, StageContext, StageFlowError, Workflow

FAST = Config(durability="write")


def stage(name: str, **options: Any) -> Stage:
    return Stage(does(name), id=name, compensation=undoes(name), **options)


mixed = (
    Workflow("mixed")
    .add_stage(stage("a"))
    .add_stage(stage("fails", required=False))
    .add_stage(stage("skipped", when=lambda context: False))
    .add_parallel("p", [stage("b"), stage("lost", required=False)])
    .add_branch("choice", lambda context: "left", {"left": [stage("c")], "right": [stage("d")]})
    .add_stage(stage("e"))
)


def test_a_compensation_is_that_of_its_stage_whatever_failed_or_was_skipped_before(execute: Any) -> None:
    result = execute(mixed, {"fail": {"fails": "raise", "lost": "raise", "e": "raise"}})
    assert result.status == "compensated"
    assert undone(result.instance_id) == ["c", "b", "a"]


retried = Workflow("retried").add_stage(stage("a")).add_stage(stage("b", retry=Retry.fixed(3, 0)))


def test_a_required_failure_is_compensated_and_never_delivered_again(runtime: Runtime, eventually: Any) -> None:
    result = runtime.execute(retried, {"fail": {"b": "raise"}}, timeout=20)
    assert result.status == "compensated"
    # Whatever were still to come of it would come before what is started now, in the same queues.
    assert runtime.execute(retried, {}, timeout=20).success
    assert done(result.instance_id) == ["a", "b", "b", "b"]
    assert undone(result.instance_id) == ["a"]
    queues = runtime.queues("stageflow.retried.") + runtime.queues("stageflow.compensation.retried")
    assert [(q.ready, q.leased, q.delayed, q.dead) for q in queues] == [(0, 0, 0, 0)] * 3


def put_back(item: int, ctx: StageContext) -> None:
    raise ConnectionError("nobody takes it")


mapped = (
    Workflow("mapped")
    .add_map("m", lambda item: item, over=lambda context: [1, 2], compensation=put_back)
    .add_stage(stage("after"))
)


def test_a_failed_compensation_is_never_called_compensated(execute: Any) -> None:
    result = execute(mapped, {"fail": {"after": "raise"}})
    assert result.status == "compensation_failed"
    assert [(one.stage_id, str(one.status)) for one in result.compensations] == [("m", "failed")]


def step_by_step(context: dict[str, Any], ctx: StageContext) -> None:
    ctx.step("first", note, ctx.instance_id, "first step")
    note(ctx.instance_id, "between")
    wait_for_file(context["gate"])
    ctx.step("second", note, ctx.instance_id, "second step")


stepping = Workflow("stepping").add_stage(step_by_step)


def test_steps_outlive_a_crash_of_the_whole_cluster(tmp_path: Path, gate: Path, eventually: Any) -> None:
    with stopped_at_once(Runtime(stepping, data_dir=tmp_path / "data", config=FAST)) as runtime:
        instance = runtime.submit(stepping, {"gate": str(gate)})
        eventually(lambda: noted(instance.id, "between"), "the first step is done")
        os.kill(runtime.node_pid, signal.SIGKILL)
        eventually(lambda: len(noted(instance.id, "between")) == 2, "another attempt is under way")
        gate.touch()
        assert instance.result(timeout=20).success
    assert (len(noted(instance.id, "first step")), len(noted(instance.id, "second step"))) == (1, 1)


def leaky(context: dict[str, Any], ctx: StageContext) -> None:
    context["mess"] = ctx.attempt
    if ctx.attempt < 3:
        raise ValueError("boom failed")


def leaky_item(item: list[int], ctx: StageContext) -> list[int]:
    item.append(ctx.attempt)
    if ctx.attempt < 3:
        raise ValueError("boom failed")
    return item


leaking = (
    Workflow("leaking", retry=Retry.fixed(3, 0))
    .add_parallel("p", [Stage(leaky, id="left"), stage("right")])
    .add_map("m", leaky_item, over=lambda context: [[], [0]], into="items")
)


def test_what_a_failed_attempt_of_a_branch_or_an_item_changed_is_gone(execute: Any) -> None:
    result = execute(leaking, {})
    assert (result.status, result.context) == ("completed", {"mess": 3, "items": [[3], [0, 3]]})


dying = Workflow("dying").add_stage(stage("a")).add_stage(stage("b"))


def test_a_dead_letter_of_a_compensated_instance_runs_nothing_again(runtime: Runtime) -> None:
    instance = runtime.submit(dying, {"fail": {"b": "die"}})
    assert instance.result(timeout=20).status == "compensated"
    (queue,) = [q for q in runtime.queues("stageflow.dying.") if q.dead]
    with pytest.raises(StageFlowError, match="evidence"):
        (letter,) = runtime._session.ask(lambda admin: admin.peek(f"dlq.{queue.name}", 0, 10))
        runtime._session.ask(lambda admin: admin.requeue(f"dlq.{queue.name}", [letter["id"]]))
    assert runtime._session.ask(lambda admin: admin.requeue(f"dlq.{queue.name}", []))["requeued"] == 0
    assert runtime.execute(dying, {}, timeout=20).success
    assert done(instance.id) == ["a", "b", "b", "b"]


def test_a_dead_letter_needs_no_queue_that_somebody_made_and_outlives_restarts(tmp_path: Path) -> None:
    def runtime() -> Runtime:
        flow = Workflow("fresh", on_failure="park").add_stage(does("x"), id="x")
        return Runtime(flow, data_dir=tmp_path / "data", config=FAST)

    with runtime() as first:
        instance = first.submit("fresh", {"fail": {"x": ["raise"]}})
        with pytest.raises(InstanceParked, match=r"dlq\.stageflow\.fresh\.stage0"):
            instance.result(timeout=20)
    with runtime() as second:
        assert [q.dead for q in second.queues("stageflow.fresh.stage0")] == [1]
        with pytest.raises(InstanceParked, match="boom failed"):
            second.instance(instance.id).result(timeout=20)
        assert second.instance(instance.id).retry(context={}).result(timeout=20).success


@contextmanager
def stopped_at_once(runtime: Runtime) -> Iterator[Runtime]:
    """A runtime whose stages in work are killed when it is left, however that is."""
    runtime.start()
    try:
        yield runtime
    finally:
        runtime.stop(grace=0)


def reordered(*order: str) -> Workflow[dict[str, Any]]:
    """The same stages under the same version, in another order."""
    flow = Workflow("reordered")
    for name in order:
        if name == "both":
            flow.add_parallel("both", [Stage(does(one), id=one, actors=2) for one in ("left", "right")])
        elif name == "items":
            flow.add_map("items", held_item, over=lambda context: [1, 2, 3], into="got")
        else:
            flow.add_stage(does(name), id=name, actors=2)
    return flow.add_stage(step_twice, id="steps", retry=Retry.fixed(9, 0))


def held_item(item: int, ctx: StageContext) -> int:
    note(ctx.instance_id, "item", item)
    if item == 3 and ctx.attempt == 1:
        wait_for_file(noted("gate")[0][0])
    return item


def step_twice(context: dict[str, Any], ctx: StageContext) -> None:
    ctx.step("once", note, ctx.instance_id, "stepped")
    note(ctx.instance_id, "did", "steps", ctx.attempt)
    if trouble(context, "steps", 1):
        wait_for_file(trouble(context, "steps", 1))


def test_a_reordered_definition_runs_the_right_stages_for_what_is_in_flight(
    tmp_path: Path, gate: Path, eventually: Any
) -> None:
    note("gate", gate)
    data = tmp_path / "data"
    with stopped_at_once(Runtime(reordered("a", "both", "items", "z"), data_dir=data, config=FAST)) as first:
        at_a = first.submit("reordered", {"fail": {"a": str(gate)}})
        eventually(lambda: "a" in done(at_a.id), "one is at its first stage")
        in_branch = first.submit("reordered", {"fail": {"right": str(gate)}})
        eventually(lambda: {"left", "right"} <= set(done(in_branch.id)), "one is in its branches")
        in_map = first.submit("reordered", {})
        eventually(lambda: len(noted(in_map.id, "item")) == 3, "one is in its map")
    assert noted(in_map.id, "stepped") == []
    gate.touch()
    with stopped_at_once(Runtime(reordered("z", "items", "a", "both"), data_dir=data, config=FAST)) as second:
        ends = [second.instance(one.id).result(timeout=20) for one in (at_a, in_branch, in_map)]
    assert [str(one.status) for one in ends] == ["completed"] * 3
    # Each goes on behind the stage it was at, in the order that is defined now; none is taken for another.
    assert sorted(set(done(at_a.id))) == ["a", "left", "right", "steps"]
    assert sorted(set(done(in_branch.id))) == ["a", "left", "right", "steps"]
    assert {"left", "right", "a", "steps"} == set(done(in_map.id))
    assert ends[2].context["got"] == [1, 2, 3], "what items gave before and after is joined"
    assert [one.stage_id for one in ends[1].stages if one.stage_id in ("left", "right")] == ["left", "right"]


def test_what_is_forwarded_keeps_its_steps(tmp_path: Path, gate: Path, eventually: Any) -> None:
    data = tmp_path / "data"
    with stopped_at_once(Runtime(reordered(), data_dir=data, config=FAST)) as first:
        instance = first.submit("reordered", {"fail": {"steps": str(gate)}})
        eventually(lambda: done(instance.id), "its only stage is at work")
    gate.touch()
    with stopped_at_once(Runtime(reordered("a"), data_dir=data, config=FAST)) as second:
        assert second.instance(instance.id).result(timeout=20).success
    assert done(instance.id) == ["steps", "steps"]
    assert len(noted(instance.id, "stepped")) == 1
