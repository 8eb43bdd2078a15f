"""Retry from the failed stage, restart from the first, and the reruns that are refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from constructs_fixtures import does, done, note, noted, statuses, undoes, undone

from stageflow_actors import (
    Instance,
    InstanceConflict,
    InstanceParked,
    InvalidContext,
    Retry,
    Runtime,
    Stage,
    StageContext,
    StageFlowError,
    Workflow,
)


def parked(instance: Instance[Any]) -> str:
    """Waits until it is parked; why."""
    with pytest.raises(InstanceParked) as told:
        instance.result(timeout=20)
    return str(told.value)


bare = (
    Workflow("bare")
    .add_stage(does("a"), id="a")
    .add_stage(does("b"), id="b", retry=Retry.fixed(2, 0))
    .add_stage(does("c"), id="c", compensation=undoes("c"))
)
saga = (
    Workflow("saga")
    .add_stage(does("a"), id="a", compensation=undoes("a"))
    .add_stage(does("b"), id="b", compensation=undoes("b"))
    .add_stage(does("c"), id="c")
)
parking = (
    Workflow("parking", on_failure="park")
    .add_stage(does("a"), id="a", compensation=undoes("a"))
    .add_stage(does("b"), id="b", retry=Retry.fixed(2, 0))
    .add_stage(does("c"), id="c")
)


# retry


def test_what_failed_with_nothing_compensated_is_retried_from_the_failed_stage(runtime: Runtime) -> None:
    instance = runtime.submit(bare, {"fail": {"b": "raise"}, "set": {"a": {"x": 1}}})
    failed = instance.result(timeout=20)
    assert (failed.status, failed.context["x"]) == ("failed", 1)
    again = instance.retry(context={**failed.context, "fail": {}})
    assert again == instance
    result = again.result(timeout=20)
    assert (result.status, result.context["x"], result.error) == ("completed", 1, None)
    assert done(instance.id) == ["a", "b", "b", "b", "c"]
    assert statuses(result) == {"a": "completed", "b": "completed", "c": "completed"}
    assert {stage.stage_id: stage.attempts for stage in result.stages}["b"] == 1, "attempts are counted anew"
    assert runtime.instance(instance.id).status() == "completed"


def test_a_retry_without_a_context_goes_on_with_the_one_that_failed(runtime: Runtime, tmp_path: Path) -> None:
    switch = tmp_path / "switch"
    instance = runtime.submit(switched, {"switch": str(switch)})
    assert instance.result(timeout=20).status == "failed"
    switch.touch()
    assert instance.retry().result(timeout=20).context == {"switch": str(switch), "on": True}


def check_switch(context: dict[str, Any]) -> None:
    if not Path(context["switch"]).exists():
        raise FileNotFoundError("off")
    context["on"] = True


switched = Workflow("switched").add_stage(check_switch)


def test_a_retry_may_fail_again_and_be_retried_again(runtime: Runtime) -> None:
    instance = runtime.submit(bare, {"fail": {"b": "raise"}})
    for _ in range(2):
        assert instance.result(timeout=20).status == "failed"
        instance.retry()
    assert instance.result(timeout=20).status == "failed"
    result = instance.retry(context={"fail": {"c": "raise"}}).result(timeout=20)
    assert (result.status, result.failed_stage) == ("failed", "c")
    assert instance.retry(context={}).result(timeout=20).status == "completed"
    assert undone(instance.id) == []


def test_a_retried_run_is_compensated_for_all_that_completed_in_it_and_before(runtime: Runtime) -> None:
    late = {"fail": {"d": "raise"}}
    instance = runtime.submit(mixed, {"fail": {"b": "raise"}})
    assert instance.result(timeout=20).status == "failed"
    result = instance.retry(context=late).result(timeout=20)
    assert (result.status, undone(instance.id)) == ("compensated", ["b"])


mixed = (
    Workflow("mixed")
    .add_stage(does("a"), id="a")
    .add_stage(does("b"), id="b", compensation=undoes("b"))
    .add_stage(does("d"), id="d")
)


def test_a_parked_instance_is_retried_where_it_was_parked(runtime: Runtime) -> None:
    instance = runtime.submit(parking, {"fail": {"b": "raise"}, "n": 1})
    assert "boom failed" in parked(instance)
    result = instance.retry(context={"n": 2}).result(timeout=20)
    assert (result.status, result.context) == ("completed", {"n": 2})
    assert done(instance.id) == ["a", "b", "b", "b", "c"]


def test_a_failed_branch_is_retried_and_those_that_completed_are_kept(runtime: Runtime) -> None:
    instance = runtime.submit(parallel, {"fail": {"right": "raise"}, "set": {"left": {"l": 1}}})
    assert instance.result(timeout=20).failed_stage == "right"
    result = instance.retry(context={"set": {"left": {"l": 2}, "right": {"r": 1}}}).result(timeout=20)
    assert (result.status, result.context["l"], result.context["r"]) == ("completed", 1, 1)
    assert sorted(done(instance.id)) == ["left", "right", "right", "start"]
    assert statuses(result) == {"start": "completed", "both": "completed", "left": "completed", "right": "completed"}


parallel = (
    Workflow("parallel")
    .add_stage(does("start"), id="start")
    .add_parallel("both", [Stage(does("left"), id="left"), Stage(does("right"), id="right")])
)


def test_a_branch_is_retried_on_the_context_before_its_parallel_stage(runtime: Runtime, tmp_path: Path) -> None:
    instance = runtime.submit(branches, {"switch": str(tmp_path / "switch"), "seen": ["before"]})
    first = instance.result(timeout=20)
    assert (first.status, first.failed_stage, first.context["left"]) == ("failed", "right", 1)
    (tmp_path / "switch").touch()
    result = instance.retry().result(timeout=20)
    assert (result.status, result.error) == ("completed", None)
    assert (result.context["left"], result.context["right"], result.context["third"]) == (1, "saw no left", "once more")
    assert sorted(words[0] for words in noted(instance.id, "ran")) == ["left", "right", "right", "third", "third"]
    data = {stage.stage_id: stage.data for stage in result.stages}
    assert (data["left"], data["right"]) == ("left's result", None)
    assert len(noted(instance.id, "charged")) == 1, "a step of the branch that failed does not run again"
    assert len(set(noted(instance.id, "key of right"))) == 1


def left_branch(context: dict[str, Any], ctx: StageContext) -> str:
    note(ctx.instance_id, "ran", "left")
    context["left"] = 1
    return "left's result"


def right_branch(context: dict[str, Any], ctx: StageContext) -> None:
    note(ctx.instance_id, "ran", "right")
    note(ctx.instance_id, "key of right", ctx.idempotency_key)
    ctx.step("charge", note, ctx.instance_id, "charged")
    check_switch(context)
    context["right"] = "saw left" if "left" in context else "saw no left"


def third_branch(context: dict[str, Any], ctx: StageContext) -> None:
    note(ctx.instance_id, "ran", "third")
    check_switch(context)
    context["third"] = "once more"


branches = Workflow("branches").add_parallel(
    "three",
    [
        Stage(left_branch, id="left"),
        Stage(right_branch, id="right"),
        Stage(third_branch, id="third", required=False),
    ],
)


def test_a_join_that_failed_is_retried_without_its_branches(runtime: Runtime, tmp_path: Path) -> None:
    instance = runtime.submit(joined, {"switch": str(tmp_path / "switch")})
    assert instance.result(timeout=20).failed_stage == "both"
    (tmp_path / "switch").touch()
    result = instance.retry().result(timeout=20)
    assert (result.status, result.context["merged"], done(instance.id).count("left")) == ("completed", True, 1)
    assert sorted(done(instance.id)) == ["left", "right"]


def merge_switched(base: dict[str, Any], branches: dict[str, Any]) -> None:
    check_switch(base)
    base["merged"] = sorted(branches) == ["left", "right"]


joined = Workflow("joined").add_parallel(
    "both", [Stage(does("left"), id="left"), Stage(does("right"), id="right")], merge=merge_switched
)


@pytest.mark.parametrize("how", ["fails", "dies"])
def test_steps_that_have_completed_do_not_run_again_in_a_retry_and_the_key_stays(
    runtime: Runtime, tmp_path: Path, how: str
) -> None:
    instance = runtime.submit(stepwise, {"switch": str(tmp_path / "switch"), "how": how})
    for _ in range(2):
        assert instance.result(timeout=20).status == "failed"
        instance.retry()
    assert instance.result(timeout=20).status == "failed"
    (tmp_path / "switch").touch()
    result = instance.retry().result(timeout=20)
    assert (result.status, result.stages[1].data) == ("completed", {"reply": "asked 7", "charge": 1})
    assert noted(instance.id, "charged") == [()]
    assert {words[0] for words in noted(instance.id, "key")} == {f"stepwise:{instance.id}:charge"}
    instance.restart().result(timeout=20)
    assert len(noted(instance.id, "charged")) == 2
    assert len({words[0] for words in noted(instance.id, "key")}) == 2


def charge(context: dict[str, Any], ctx: StageContext) -> dict[str, Any]:
    def pay() -> int:
        note(ctx.instance_id, "charged")
        return len(noted(ctx.instance_id, "charged"))

    note(ctx.instance_id, "key", ctx.idempotency_key)
    paid = ctx.step("charge", pay)
    if context["how"] == "dies" and not Path(context["switch"]).exists():
        os._exit(3)
    check_switch(context)
    return {"reply": ctx.payload, "charge": paid}


ENDPOINTS = {"answer": lambda command: f"asked {command}"}
stepwise = (
    Workflow("stepwise")
    .add_stage(lambda context, ctx: ctx.request("answer", 7), id="ask")
    .add_stage(charge, id="charge")
)


def test_steps_before_a_request_that_failed_do_not_run_again_in_a_retry(runtime: Runtime, tmp_path: Path) -> None:
    instance = runtime.submit(prepared, {"switch": str(tmp_path / "switch")})
    assert instance.result(timeout=20).status == "failed"
    (tmp_path / "switch").touch()
    assert instance.retry().result(timeout=20).status == "completed"
    assert noted(instance.id, "prepared") == [()]


def prepare(context: dict[str, Any], ctx: StageContext) -> Any:
    ctx.step("prepare", note, ctx.instance_id, "prepared")
    served = Path(context["switch"]).exists()
    return ctx.request("answer" if served else "nobody", 1, timeout=10 if served else 0.1)


prepared = Workflow("prepared").add_stage(prepare)


def test_items_have_the_same_keys_in_a_retry(runtime: Runtime, tmp_path: Path) -> None:
    instance = runtime.submit(keyed, {"switch": str(tmp_path / "switch")})
    assert instance.result(timeout=20).status == "failed"
    (tmp_path / "switch").touch()
    assert instance.retry().result(timeout=20).status == "completed"
    seen = noted(instance.id, "item key")
    assert len(seen) == 4
    assert set(seen) == {(f"keyed:{instance.id}:m[{number}]",) for number in range(2)}


def key_of(item: dict[str, Any], ctx: StageContext) -> None:
    note(ctx.instance_id, "item key", ctx.idempotency_key)
    check_switch(item)


keyed = Workflow("keyed").add_map("m", key_of, over=lambda context: [context, context])


def test_another_context_for_a_parked_branch_is_of_that_branch_alone(runtime: Runtime) -> None:
    instance = runtime.submit(parked_branches, {"fail": {"right": ["raise"]}, "set": {"left": {"x": 1}}})
    parked(instance)
    instance.retry(context={"x": 2, "set": {"left": {"x": 1}}})
    assert "changed the field 'x' differently" in parked(instance)
    assert instance.restart(context={}).result(timeout=20).status == "completed"


def test_a_dead_letter_that_cannot_be_read_is_reported(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = runtime.submit(parking, {"fail": {"b": "raise"}})
    parked(instance)
    group = runtime._session.ask(lambda admin: admin.inspect([instance.id]))[instance.id]
    runtime._session.ask(
        lambda admin: admin.replace(f"dlq.{group['messages'][0]['queue']}", group["messages"][0]["id"], b"\x93nothing")
    )
    for again in (instance.retry, instance.restart):
        with pytest.raises(
            StageFlowError, match=r"dead letter \d+ in dlq\.stageflow\.parking\.stage1 cannot be decoded"
        ):
            again()
    runtime._session.ask(lambda admin: admin.purge("dlq.stageflow.parking.stage1", []))


def test_every_branch_that_is_parked_is_retried(runtime: Runtime) -> None:
    instance = runtime.submit(parked_branches, {"fail": {"left": ["raise"], "right": ["raise"]}})
    parked(instance)
    assert len([q for q in runtime.queues("stageflow.parked-branches.stage0") if q.dead]) == 2
    result = instance.retry(context={}).result(timeout=20)
    assert result.status == "completed"
    assert sorted(done(instance.id)) == ["end", "left", "left", "right", "right"]


parked_branches = (
    Workflow("parked-branches", on_failure="park")
    .add_parallel("both", [Stage(does("left"), id="left"), Stage(does("right"), id="right")])
    .add_stage(does("end"), id="end")
)


def test_a_failed_map_is_retried_whole(runtime: Runtime, tmp_path: Path) -> None:
    instance = runtime.submit(mapped, {"items": ["a", "raise"]})
    assert instance.result(timeout=20).failed_stage == "m"
    result = instance.retry(context={"items": ["c", "d"]}).result(timeout=20)
    assert (result.status, result.context["got"]) == ("completed", ["c", "d"])


def give(item: str) -> str:
    if item == "raise":
        raise ValueError("boom failed")
    return item


mapped = Workflow("mapped").add_map("m", give, over=lambda context: context["items"], into="got")


def test_a_failed_signal_stage_waits_again(runtime: Runtime, eventually: Any) -> None:
    instance = runtime.submit(signalled, {})
    assert "no signal" in str(instance.result(timeout=20).error)
    instance.retry()
    instance.signal("s", 5)
    result = instance.result(timeout=20)
    assert (result.status, result.stages[0].data) == ("completed", 5)


signalled = Workflow("signalled").add_signal("s", timeout=0.5)


# restart


@pytest.mark.parametrize("end", ["completed", "compensated", "cancelled"])
def test_whatever_has_ended_can_be_restarted_from_the_first_stage(
    runtime: Runtime, gate: Path, eventually: Any, end: str
) -> None:
    fail = {"completed": {}, "compensated": {"c": "raise"}, "cancelled": {"b": "hang"}}[end]
    instance = runtime.submit(saga, {"fail": fail})
    if end == "cancelled":
        eventually(lambda: "b" in done(instance.id), "b is at work")
        instance.cancel()
    assert instance.result(timeout=20).status == end
    before = len(done(instance.id))
    result = instance.restart(context={"fail": {}}).result(timeout=20)
    assert (result.status, result.error, result.compensations) == ("completed", None, [])
    assert done(instance.id)[before:] == ["a", "b", "c"]
    assert statuses(result) == {"a": "completed", "b": "completed", "c": "completed"}


def test_a_restart_without_a_context_begins_with_what_the_last_run_left(runtime: Runtime) -> None:
    instance = runtime.submit(saga, {"set": {"a": {"seen": 1}}})
    instance.result(timeout=20)
    result = instance.restart().result(timeout=20)
    assert (result.status, result.context["seen"]) == ("completed", 1)


def test_a_parked_instance_is_restarted_with_clean_gathers(runtime: Runtime) -> None:
    instance = runtime.submit(gathering, {"items": [1, 2], "fail": {"end": "raise"}})
    parked(instance)
    instance.restart(context={"items": [3, 4], "set": {"left": {"l": 2}}})
    result = instance.result(timeout=20)
    assert (result.status, result.context["got"], result.context["l"]) == ("completed", [30, 40], 2)
    assert [stage.stage_id for stage in result.stages] == ["both", "left", "right", "m", "s", "end"]


def test_a_parked_instance_of_which_something_is_in_work_is_not_restarted(
    runtime: Runtime, gate: Path, eventually: Any
) -> None:
    instance = runtime.submit(gathering, {"items": [], "fail": {"left": "raise", "right": str(gate)}})
    eventually(lambda: instance.status() == "parked", "left is parked")
    with pytest.raises(StageFlowError, match=r"in work in stageflow\.gathering\.stage0\.right"):
        instance.restart()
    gate.touch()
    parked(instance)
    instance.restart(context={"items": []})
    assert instance.result(timeout=20).status == "completed"


def end(context: dict[str, Any], ctx: StageContext) -> None:
    note(ctx.instance_id, "did", "end", ctx.attempt, ctx.idempotency_key)
    if context.get("fail", {}).get("end"):
        raise ValueError("boom failed")


gathering = (
    Workflow("gathering", on_failure="park")
    .add_parallel("both", [Stage(does("left"), id="left"), Stage(does("right"), id="right")])
    .add_map("m", lambda item: item * 10, over=lambda context: context["items"], into="got")
    .add_signal("s", timeout=0.01, on_timeout=lambda context: "went on")
    .add_stage(end, id="end")
)


def test_a_signal_that_no_stage_has_consumed_outlives_a_restart(runtime: Runtime) -> None:
    instance = runtime.submit(early, {"fail": {"a": "raise"}})
    parked(instance)
    instance.signal("s", "kept")
    result = instance.restart(context={}).result(timeout=20)
    assert (result.status, result.stages[-1].data) == ("completed", "kept")


early = Workflow("early", on_failure="park").add_stage(does("a"), id="a").add_signal("s", timeout=20)


# keys, priorities, ids


def test_each_run_has_idempotency_keys_of_its_own_and_each_attempt_and_retry_of_it_the_same(runtime: Runtime) -> None:
    instance = runtime.submit(keys, {"fail": 1})
    assert instance.result(timeout=20).status == "failed"
    instance.retry(context={"fail": 3}).result(timeout=20)
    instance.restart(context={}).result(timeout=20)
    seen = [words[0] for words in noted(instance.id, "key")]
    first, anew = seen[0], seen[4]
    assert seen == [first, first, first, first, anew]
    assert anew != first
    assert first == f"keys:{instance.id}:key"


def key(context: dict[str, Any], ctx: StageContext) -> None:
    note(ctx.instance_id, "key", ctx.idempotency_key)
    if context.get("fail"):
        raise ValueError("boom failed")


keys = Workflow("keys").add_stage(key, retry=Retry.fixed(2, 0))


def test_a_parked_and_requeued_stage_keeps_its_key(runtime: Runtime) -> None:
    instance = runtime.submit(gathering, {"items": [], "fail": {"end": "raise"}})
    parked(instance)
    instance.retry()
    parked(instance)
    assert len({words[1] for words in noted(instance.id, "did", "end")}) == 1
    instance.restart(context={"items": []}).result(timeout=20)
    assert len({words[1] for words in noted(instance.id, "did", "end")}) == 2


def test_a_run_again_keeps_the_id_and_its_input(runtime: Runtime) -> None:
    instance = runtime.submit(saga, {"n": 1}, instance_id="run-again")
    instance.result(timeout=20)
    instance.restart(context={"n": 2}).result(timeout=20)
    again = runtime.submit(saga, {"n": 1}, instance_id="run-again")
    assert again.result(timeout=20).context["n"] == 2
    with pytest.raises(InstanceConflict):
        runtime.submit(saga, {"n": 2}, instance_id="run-again")


def test_the_priority_of_an_instance_outlives_joins_maps_signals_and_retries(
    runtime: Runtime, gate: Path, eventually: Any
) -> None:
    holder = runtime.submit(ordered, {"fail": {"last": str(gate)}})
    eventually(lambda: "last" in done(holder.id), "the last stage is busy")
    later = [runtime.submit(ordered, {"n": n}, priority=priority) for n, priority in enumerate((1, 0, 5, -5, 9))]
    eventually(lambda: runtime.queues("stageflow.ordered.stage4")[0].ready == 5, "all wait for it")
    gate.touch()
    for each in later:
        assert each.result(timeout=20).success
    ran = [words[0] for words in noted("last")]
    assert [ran.index(each.id) for each in later] == [ran.index(holder.id) + n for n in (3, 4, 2, 5, 1)]


def last(context: dict[str, Any], ctx: StageContext) -> None:
    note("last", ctx.instance_id)
    does("last")(context, ctx)


ordered = (
    Workflow("ordered")
    .add_stage(does("first"), id="first")
    .add_parallel("both", [Stage(does("left"), id="left"), Stage(does("right"), id="right")])
    .add_map("m", lambda item: item, over=lambda context: [1, 2])
    .add_signal("s", timeout=0.01, on_timeout=lambda context: None)
    .add_stage(last)
)


# what is not possible


def test_what_still_runs_can_be_neither_retried_nor_restarted(runtime: Runtime, gate: Path, eventually: Any) -> None:
    instance = runtime.submit(saga, {"fail": {"a": str(gate)}})
    eventually(lambda: done(instance.id), "it is at work")
    for again in (instance.retry, instance.restart):
        with pytest.raises(StageFlowError, match=r"is running: wait for its end, or cancel\(\) it first"):
            again()
    gate.touch()
    assert instance.result(timeout=20).status == "completed"
    assert done(instance.id) == ["a", "b", "c"]


@pytest.mark.parametrize("end", ["completed", "compensated", "cancelled"])
def test_only_what_failed_with_nothing_compensated_can_be_retried(runtime: Runtime, eventually: Any, end: str) -> None:
    fail = {"completed": {}, "compensated": {"c": "raise"}, "cancelled": {"a": "hang"}}[end]
    instance = runtime.submit(saga, {"fail": fail})
    if end == "cancelled":
        eventually(lambda: done(instance.id), "it is at work")
        instance.cancel()
    assert instance.result(timeout=20).status == end
    with pytest.raises(StageFlowError, match=rf"is {end}: only an instance that is parked.*restart\(\) runs it"):
        instance.retry()
    assert runtime.instance(instance.id).status() == end


def test_a_context_that_is_refused_changes_nothing(runtime: Runtime) -> None:
    instance = runtime.submit(bare, {"fail": {"b": "raise"}})
    assert instance.result(timeout=20).status == "failed"
    for again in (instance.retry, instance.restart):
        with pytest.raises(InvalidContext):
            again(context={"set": {1, 2}})
    assert instance.status() == "failed"
    waiting = runtime.submit(parking, {"fail": {"b": "raise"}})
    parked(waiting)
    with pytest.raises(InvalidContext):
        waiting.retry(context={"set": {1, 2}})
    assert waiting.status() == "parked"
    assert waiting.retry(context={}).result(timeout=20).success
