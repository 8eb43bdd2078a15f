"""Parallel stages: concurrent branches, one join, and the merge of their contexts and failures."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from constructs_fixtures import does, done, note, noted, stage_of, statuses, trouble, undoes, undone, wait_for_file

from stageflow_actors import (
    InstanceParked,
    Replace,
    Retry,
    Runtime,
    Stage,
    StageContext,
    Workflow,
    WorkflowDefinitionError,
)
from stageflow_actors.testing import run
from stageflow_brokers.api import Arrival


def branch(name: str, **options: Any) -> Stage:
    return Stage(does(name), id=name, compensation=undoes(name), **options)


trips = (
    Workflow("trips")
    .add_stage(does("before"), id="before", compensation=undoes("before"))
    .add_parallel(
        "bookings",
        [
            branch("flight", retry=Retry.fixed(3, 0), after=["before"]),
            branch("hotel", timeout=2),
            branch("car", required=False, when=lambda context: "car" not in context.get("without", ())),
        ],
    )
    .add_stage(does("after"), id="after", compensation=undoes("after"), after=["bookings", "flight"])
)


def test_branches_are_joined_and_what_each_changed_is_merged_by_field(execute: Any) -> None:
    result = execute(trips, {"set": {"flight": {"seat": "1A"}, "hotel": {"room": 7}, "after": {"end": True}}, "n": 1})
    assert result.status == "completed"
    assert (result.context["seat"], result.context["room"], result.context["end"], result.context["n"]) == (
        "1A",
        7,
        1,
        1,
    )
    stages = ["before", "bookings", "flight", "hotel", "car", "after"]
    assert statuses(result) == dict.fromkeys(stages, "completed")
    assert [stage.stage_id for stage in result.stages] == stages, "in order of definition"
    assert stage_of(result, "flight").data == {"by": "flight"}
    called = done(result.instance_id)
    assert (called[0], sorted(called[1:4]), called[4]) == ("before", ["car", "flight", "hotel"], "after")


def test_each_branch_keeps_its_own_options(execute: Any) -> None:
    result = execute(trips, {"fail": {"flight": ["raise", "raise"]}})
    assert result.status == "completed"
    assert {stage.stage_id: stage.attempts for stage in result.stages}["flight"] == 3
    assert done(result.instance_id).count("flight") == 3
    assert done(result.instance_id).count("hotel") == 1


def test_a_timeout_is_that_of_the_branch(runtime: Runtime) -> None:
    result = runtime.execute(trips, {"fail": {"hotel": "hang"}}, timeout=30)
    assert (result.status, result.failed_stage) == ("compensated", "hotel")
    assert result.error == "StageTimeout: stage 'hotel' ran longer than its timeout of 2 s"


def test_a_branch_whose_condition_does_not_hold_is_skipped(execute: Any) -> None:
    result = execute(trips, {"without": ["car"], "set": {"car": {"wheels": 4}}})
    assert (result.status, statuses(result)["car"]) == ("completed", "skipped")
    assert "wheels" not in result.context
    assert "car" not in done(result.instance_id)


def test_an_optional_branch_may_fail_and_leaves_no_trace_in_the_context(execute: Any) -> None:
    result = execute(trips, {"fail": {"car": "raise"}, "set": {"car": {"wheels": 4}, "hotel": {"room": 7}}})
    assert (result.status, result.error) == ("completed", None)
    assert statuses(result)["car"] == "failed"
    assert "wheels" not in result.context
    assert result.context["room"] == 7
    assert undone(result.instance_id) == []


def test_a_required_branch_that_fails_has_the_others_and_what_came_before_undone(execute: Any) -> None:
    result = execute(trips, {"fail": {"flight": "raise"}, "set": {"hotel": {"room": 7}}})
    assert (result.status, result.failed_stage, result.error) == ("compensated", "flight", "ValueError: boom failed")
    assert "after" not in done(result.instance_id)
    calls = undone(result.instance_id)
    assert (sorted(calls[:-1]), calls[-1]) == (["car", "hotel"], "before")
    assert [one.stage_id for one in result.compensations] == calls
    assert statuses(result) == {
        "before": "compensated",
        "bookings": "failed",
        "flight": "failed",
        "hotel": "compensated",
        "car": "compensated",
        "after": "pending",
    }
    assert stage_of(result, "bookings").error == "ValueError: boom failed"
    assert result.context["room"] == 7, "compensations see what the branches that they undo have changed"


def test_several_required_branches_may_fail(execute: Any) -> None:
    result = execute(trips, {"fail": {"flight": "raise", "hotel": "raise", "car": "raise"}})
    assert result.status == "compensated"
    assert result.failed_stage in ("flight", "hotel")
    assert undone(result.instance_id) == ["before"]
    failed = dict.fromkeys(("bookings", "flight", "hotel", "car"), "failed")
    assert statuses(result) == {"before": "compensated", **failed, "after": "pending"}


def test_a_failure_behind_the_join_undoes_the_branches_in_reverse_order_of_completion(
    runtime: Runtime, gate: Path, eventually: Any
) -> None:
    instance = runtime.submit(trips, {"fail": {"flight": str(gate), "after": "raise"}})
    eventually(lambda: {"flight", "hotel", "car"} <= set(done(instance.id)), "all branches are at work at once")

    def settled(name: str) -> bool:
        queue = next(q for q in runtime.queues(f"stageflow.trips.stage1.{name}") if q.name.endswith(name))
        return queue.ready + queue.leased == 0

    eventually(lambda: settled("hotel") and settled("car"), "the others have ended")
    gate.touch()
    result = instance.result(timeout=30)
    assert result.status == "compensated"
    calls = undone(instance.id)
    assert (calls[0], sorted(calls[1:3]), calls[3]) == ("flight", ["car", "hotel"], "before")


def test_branches_that_have_begun_finish_before_anything_is_undone(
    runtime: Runtime, gate: Path, eventually: Any
) -> None:
    instance = runtime.submit(trips, {"fail": {"flight": "raise", "hotel": str(gate), "car": str(gate)}})
    eventually(lambda: {"flight", "hotel", "car"} <= set(done(instance.id)), "all branches are at work")
    eventually(lambda: runtime.instance(instance.id).status() == "running", "the failure waits at the join")
    assert undone(instance.id) == []
    gate.touch()
    result = instance.result(timeout=30)
    assert result.status == "compensated"
    assert sorted(undone(instance.id)[:2]) == ["car", "hotel"]


def test_branches_run_in_processes_of_their_own_at_the_same_time(runtime: Runtime, eventually: Any) -> None:
    result = runtime.execute(meeting, {}, timeout=30)
    assert (result.status, result.context) == ("completed", {"met": 2})


def meet(name: str, other: str) -> Any:
    def handle(context: dict[str, Any], ctx: StageContext) -> int:
        note(ctx.instance_id, "here", name)
        while not noted(ctx.instance_id, "here", other):
            wait_for_file("/")
        context["met"] = 2
        return os.getpid()

    return handle


meeting = Workflow("meeting").add_parallel(
    "both", [Stage(meet("a", "b"), id="a", timeout=20), Stage(meet("b", "a"), id="b", timeout=20)]
)


def test_a_duplicate_arrival_counts_once(runtime: Runtime, gate: Path, eventually: Any) -> None:
    instance = runtime.submit(trips, {"fail": {"hotel": str(gate)}, "set": {"flight": {"seat": "1A"}}})
    eventually(lambda: at_join(runtime, instance.id) == 2, "two of the branches have arrived")
    for slot in ("flight", "car"):
        again = Arrival("bookings", slot, 9, instance.id, 1)
        runtime._session.broker().publish([], [], [b"something"], arrivals=[again]).result(20)
    assert at_join(runtime, instance.id) == 2
    gate.touch()
    result = instance.result(timeout=20)
    assert (result.status, result.context["seat"]) == ("completed", "1A")


def at_join(runtime: Runtime, instance_id: str) -> int:
    group = runtime._session.lookup([instance_id])[instance_id]
    return sum(gather["arrived"] for gather in group["gathers"] if gather["key"] == "bookings")


# merging


def test_two_branches_that_change_a_field_differently_are_an_error_that_names_field_and_both(execute: Any) -> None:
    result = execute(trips, {"set": {"flight": {"price": 1, "seat": "1A"}, "hotel": {"price": 2}}})
    assert (result.status, result.failed_stage) == ("compensated", "bookings")
    assert result.error.startswith("StageError: branches ")
    for word in ("'flight'", "'hotel'", "'bookings'", "'price'", "merge="):
        assert word in result.error
    calls = undone(result.instance_id)
    assert (sorted(calls[:-1]), calls[-1]) == (["car", "flight", "hotel"], "before")
    assert result.context["seat"] == "1A", "compensations see what the branches changed that nobody disputes"


def test_the_same_change_by_two_branches_is_no_contradiction(execute: Any) -> None:
    result = execute(trips, {"set": {"flight": {"price": 2}, "hotel": {"price": 2}}})
    assert (result.status, result.context["price"]) == ("completed", 2)


def removes(field: str) -> Any:
    def handle(context: dict[str, Any]) -> Any:
        new = {key: value for key, value in context.items() if key != field}
        return Replace(new)

    return handle


removing = Workflow("removing").add_parallel(
    "both", [Stage(removes("a"), id="no-a"), Stage(removes("b"), id="no-b"), Stage(does("c"), id="c")]
)


def test_a_field_that_a_branch_removed_is_gone(execute: Any) -> None:
    result = execute(removing, {"a": 1, "b": 2, "c": float("nan"), "set": {"c": {"new": None}}})
    assert result.status == "completed"
    assert sorted(result.context) == ["c", "new", "set"]


def add_up(base: dict[str, Any], branches: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    note("merged", os.getpid())
    if base.get("merge") == "raise":
        raise RuntimeError("cannot be merged")
    if base.get("merge") == "mutate":
        base["names"] = sorted(branches)
        return None
    return {"sum": base["n"] + sum(one["n"] for one in branches.values()), "names": sorted(branches)}


def count(by: int) -> Any:
    def handle(context: dict[str, Any], ctx: StageContext) -> None:
        context["n"] = by
        if trouble(context, str(by), ctx.attempt):
            raise ValueError("no")

    return handle


counting = Workflow("counting").add_parallel(
    "sums",
    [
        Stage(count(10), id="ten", compensation=undoes("ten")),
        Stage(count(20), id="twenty", required=False),
    ],
    merge=add_up,
)


def test_merge_decides_what_the_context_becomes(execute: Any) -> None:
    result = execute(counting, {"n": 1})
    assert (result.status, result.context) == ("completed", {"sum": 31, "names": ["ten", "twenty"]})


def test_merge_is_given_the_branches_that_completed(execute: Any) -> None:
    result = execute(counting, {"n": 1, "fail": {"20": "raise"}})
    assert result.context == {"sum": 11, "names": ["ten"]}


def test_merge_may_change_the_base_in_place(execute: Any) -> None:
    result = execute(counting, {"n": 1, "merge": "mutate"})
    assert result.context == {"n": 1, "merge": "mutate", "names": ["ten", "twenty"]}


def test_a_merge_that_raises_fails_the_parallel_stage_and_the_branches_are_undone(execute: Any) -> None:
    result = execute(counting, {"n": 1, "merge": "raise"})
    assert (result.status, result.failed_stage, result.error) == (
        "compensated",
        "sums",
        "RuntimeError: cannot be merged",
    )
    assert undone(result.instance_id) == ["ten"]
    assert statuses(result) == {"sums": "failed", "ten": "compensated", "twenty": "completed"}


def test_merge_runs_in_a_worker(runtime: Runtime) -> None:
    before = len(noted("merged"))
    assert runtime.execute(counting, {"n": 1}, timeout=30).success
    (pid,) = noted("merged")[before:][0]
    assert int(pid) != os.getpid()


@dataclass
class Trip:
    name: str
    price: Decimal = Decimal(0)
    seats: set[str] = field(default_factory=set)
    nights: int = 0


def buy(trip: Trip) -> None:
    trip.price = Decimal("10.50")
    trip.seats = {"1A", "1B"}


def sleep_over(trip: Trip) -> Trip:
    return Trip(trip.name, trip.price, trip.seats, trip.nights + 2)


typed = Workflow("typed", context=Trip).add_parallel("both", [buy, sleep_over])


def test_typed_contexts_are_merged_with_their_types(execute: Any) -> None:
    result = execute(typed, Trip("rome"))
    assert result.context == Trip("rome", Decimal("10.50"), {"1A", "1B"}, 2)


# first and last


edges = (
    Workflow("edges")
    .add_parallel("first", [does("alone")])
    .add_parallel("last", [Stage(does("one"), id="one"), Stage(does("two"), id="two", required=False)])
)


def test_a_parallel_stage_may_be_the_first_the_last_and_of_one_branch(execute: Any) -> None:
    result = execute(edges, {"fail": {"two": "raise"}})
    assert result.status == "completed"
    assert statuses(result) == {
        "first": "completed",
        "handle": "completed",
        "last": "completed",
        "one": "completed",
        "two": "failed",
    }


def test_what_no_branch_can_have_is_refused_when_it_is_written() -> None:
    with pytest.raises(WorkflowDefinitionError, match="'none' has no branches"):
        Workflow("w").add_parallel("none", [])
    with pytest.raises(WorkflowDefinitionError, match="already"):
        Workflow("w").add_stage(does("x"), id="x").add_parallel("p", [Stage(does("x"), id="x")])
    with pytest.raises(WorkflowDefinitionError, match="'a' in after, which runs later"):
        Workflow("w").add_parallel("p", [Stage(does("a"), id="a"), Stage(does("b"), id="b", after=["a"])]).validate()


# deaths and parking


def test_a_branch_that_kills_its_workers_has_failed(runtime: Runtime) -> None:
    result = runtime.execute(trips, {"fail": {"hotel": "die"}}, timeout=30)
    assert (result.status, result.failed_stage) == ("compensated", "hotel")
    assert "WorkerDied" in result.error
    assert done(result.instance_id).count("hotel") == 3
    calls = undone(result.instance_id)
    assert (sorted(calls[:-1]), calls[-1]) == (["car", "flight"], "before")


def test_an_optional_branch_that_kills_its_workers_is_gone_without(runtime: Runtime) -> None:
    result = runtime.execute(trips, {"fail": {"car": "die"}}, timeout=30)
    assert (result.status, statuses(result)["car"]) == ("completed", "failed")


parking = (
    Workflow("parking", on_failure="park")
    .add_parallel("both", [Stage(does("left"), id="left"), Stage(does("right"), id="right")])
    .add_stage(does("end"), id="end")
)


@pytest.mark.parametrize("last", ["the one that fails", "the other one"])
def test_a_parked_branch_is_reported_when_nothing_else_is_in_work_and_resumes(
    runtime: Runtime, gate: Path, tmp_path: Path, eventually: Any, last: str
) -> None:
    switch = tmp_path / "switch"
    switch.touch()
    slow = str(gate)
    plan = {"left": [f"raise after {slow}"], "right": []} if last == "the one that fails" else {}
    plan = plan or {"left": ["raise"], "right": [slow]}
    instance = runtime.submit(parking, {"fail": plan, "set": {"left": {"l": 1}, "right": {"r": 1}}})
    eventually(lambda: {"left", "right"} <= set(done(instance.id)), "both are at work")
    gate.touch()
    with pytest.raises(InstanceParked, match=r"dlq\.stageflow\.parking\.stage0\.left"):
        instance.result(timeout=20)
    assert instance.status() == "parked"
    instance.retry(context={"set": {"left": {"l": 1}}})
    result = instance.result(timeout=20)
    assert (result.status, result.context["l"], result.context["r"]) == ("completed", 1, 1)
    assert done(instance.id).count("right") == 1


def test_a_contradiction_may_be_parked_and_be_resolved_by_another_context(runtime: Runtime) -> None:
    instance = runtime.submit(parking, {"set": {"left": {"x": 1}, "right": {"x": 2}}})
    with pytest.raises(InstanceParked, match="changed the field 'x' differently"):
        instance.result(timeout=20)
    instance.restart(context={"set": {"left": {"x": 1}, "right": {"y": 2}}})
    result = instance.result(timeout=20)
    assert (result.status, result.context["x"], result.context["y"]) == ("completed", 1, 2)


def test_a_contradiction_that_is_parked_is_a_result_here() -> None:
    result = run(parking, {"set": {"left": {"x": 1}, "right": {"x": 2}}})
    assert (result.status, result.failed_stage) == ("parked", "both")
    assert "'x'" in str(result.error)
