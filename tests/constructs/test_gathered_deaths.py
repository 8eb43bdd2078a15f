"""Workers that die at a gathered message (join, signal, reply, map items) lose nothing.

At its death limit such a message has failed its stage like any other: completed stages are undone, and an optional
stage goes on. Deaths are of real processes; there are none in this one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
from constructs_fixtures import does, done, note, noted, statuses, trouble, undoes, undone

from stageflow_actors import InstanceParked, Runtime, Stage, StageContext, Workflow

ENDPOINTS = {"echo": lambda command: command}

DIED = "WorkerDied: the worker died while running stage {!r}: exit code 5"


def die(*given: Any) -> Any:
    os._exit(5)


def stage(name: str, **options: Any) -> Stage:
    return Stage(does(name), id=name, compensation=undoes(name), **options)


merging = (
    Workflow("merging")
    .add_stage(stage("before"))
    .add_parallel("both", [stage("a"), stage("b"), stage("maybe", required=False)], merge=die)
)


def test_a_merge_that_kills_its_workers_has_the_branches_that_completed_undone(runtime: Runtime) -> None:
    result = runtime.execute(merging, {"fail": {"maybe": "raise"}, "set": {"a": {"x": 1}}}, timeout=30)
    assert (result.status, result.failed_stage, result.error) == ("compensated", "both", DIED.format("both"))
    assert (sorted(undone(result.instance_id)[:2]), undone(result.instance_id)[2:]) == (["a", "b"], ["before"])
    assert statuses(result) == {
        "before": "compensated",
        "both": "failed",
        "a": "compensated",
        "b": "compensated",
        "maybe": "failed",
    }
    assert result.context["x"] == 1, "compensations see what the branches that they undo have changed"


def put_back(item: int, ctx: StageContext) -> None:
    note(ctx.instance_id, "put back", item, ctx.results["all"])


@dataclass
class Trap:
    """Setting what a map makes kills the worker."""

    after: str = ""
    got: list[int] = field(default_factory=list)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "got" and value:
            os._exit(5)
        object.__setattr__(self, name, value)


def tenfold(item: int) -> int:
    if item == 2:
        raise ValueError("no two")
    return item * 10


def trap_map(name: str, **options: Any) -> Workflow[Trap]:
    flow = Workflow(name, context=Trap).add_stage(lambda trap: "first", id="first", compensation=spring)
    return flow.add_map(
        "all", tenfold, over=lambda trap: [1, 2, 3], into="got", max_failures=1, compensation=put_back, **options
    ).add_stage(lambda trap: setattr(trap, "after", "done"), id="after")


def spring(trap: Trap, ctx: StageContext) -> None:
    note(ctx.instance_id, "undid", "first")


trapping = trap_map("trapping")
trapping_optional = trap_map("trapping-optional", required=False)


def test_a_join_of_items_that_kills_its_workers_has_the_items_that_are_done_undone(runtime: Runtime) -> None:
    result = runtime.execute(trapping, Trap(), timeout=30)
    assert (result.status, result.failed_stage, result.error) == ("compensated", "all", DIED.format("all"))
    assert noted(result.instance_id, "put back") == [("3", "30"), ("1", "10")]
    assert undone(result.instance_id) == ["first"]
    assert statuses(result) == {"first": "compensated", "all": "failed", "after": "pending"}


def test_an_optional_map_whose_join_kills_its_workers_is_recorded_and_the_workflow_goes_on(runtime: Runtime) -> None:
    result = runtime.execute(trapping_optional, Trap(), timeout=30)
    assert (result.status, result.context) == ("completed", Trap("done"))
    assert statuses(result) == {"first": "completed", "all": "failed", "after": "completed"}
    assert noted(result.instance_id, "put back") == []


signalled = Workflow("signalled").add_stage(stage("before")).add_signal("s", on_signal=die)


def test_an_on_signal_that_kills_its_workers_fails_its_stage(runtime: Runtime) -> None:
    instance = runtime.submit(signalled, {})
    instance.signal("s", {"some": "payload"})
    result = instance.result(timeout=30)
    assert (result.status, result.failed_stage, result.error) == ("compensated", "s", DIED.format("s"))
    assert undone(result.instance_id) == ["before"]


late = Workflow("late").add_stage(stage("before")).add_signal("s", timeout=0.05, on_timeout=lambda context: die())


def test_an_on_timeout_that_kills_its_workers_fails_its_stage_with_their_deaths(runtime: Runtime) -> None:
    result = runtime.execute(late, {}, timeout=30)
    assert (result.status, result.failed_stage, result.error) == ("compensated", "s", DIED.format("s"))
    assert undone(result.instance_id) == ["before"]


def asking(name: str, **options: Any) -> Workflow[Any]:
    return (
        Workflow(name)
        .add_stage(stage("before"))
        .add_remote_stage("ask", endpoint="echo", command=lambda context: [1], on_reply=die, **options)
        .add_stage(stage("after"))
    )


remote = asking("remote", compensation=undoes("ask"))
remote_optional = asking("remote-optional", required=False)


def test_an_on_reply_that_kills_its_workers_fails_its_stage(runtime: Runtime) -> None:
    result = runtime.execute(remote, {"n": 1}, timeout=30)
    assert (result.status, result.failed_stage, result.error) == ("compensated", "ask", DIED.format("ask"))
    assert undone(result.instance_id) == ["before"]
    assert result.context == {"n": 1, "undone": ["before"]}


def test_an_optional_stage_whose_on_reply_kills_its_workers_is_recorded_and_the_workflow_goes_on(
    runtime: Runtime,
) -> None:
    result = runtime.execute(remote_optional, {"n": 1}, timeout=30)
    assert (result.status, result.context) == ("completed", {"n": 1})
    assert statuses(result) == {"before": "completed", "ask": "failed", "after": "completed"}


plain = {
    "over": Workflow("dying-over").add_stage(stage("before")).add_map("x", tenfold, over=die),
    "selector": Workflow("dying-selector").add_stage(stage("before")).add_branch("x", die, {"k": [stage("arm")]}),
    "when": Workflow("dying-when").add_stage(stage("before")).add_conditional(stage("x"), when=die),
}
dying_over, dying_selector, dying_when = plain.values()


@pytest.mark.parametrize("what", list(plain))
def test_what_kills_its_workers_before_a_stage_begins_fails_the_stage(runtime: Runtime, what: str) -> None:
    result = runtime.execute(plain[what], {}, timeout=30)
    assert (result.status, result.failed_stage, result.error) == ("compensated", "x", DIED.format("x"))
    assert undone(result.instance_id) == ["before"]


def merge_or_die(base: dict[str, Any], branches: Any) -> None:
    if os.path.exists(base["gate"]):
        base["merged"] = sorted(branches)
        return
    os._exit(5)


parking = Workflow("parking", on_failure="park").add_parallel("both", [stage("a"), stage("b")], merge=merge_or_die)


def test_a_join_that_was_parked_for_its_deaths_is_joined_once_it_is_retried(runtime: Runtime, gate: Any) -> None:
    instance = runtime.submit(parking, {"gate": str(gate)})
    with pytest.raises(InstanceParked, match=r"dlq\.stageflow\.parking\.stage0: WorkerDied"):
        instance.result(timeout=30)
    gate.touch()
    result = instance.retry().result(timeout=30)
    assert (result.status, result.context["merged"]) == ("completed", ["a", "b"])
    assert sorted(done(instance.id)) == ["a", "b"], "and the branches are not run again"


def merge_unless_told(base: dict[str, Any], branches: Any) -> None:
    if trouble(base, "merge", 1):
        os._exit(5)


within = (
    Workflow("within")
    .add_stage(stage("before"))
    .add_parallel("both", [stage("a"), stage("b")], merge=merge_unless_told)
    .add_stage(stage("after"))
)


def test_an_instance_whose_join_died_can_be_restarted_once_it_has_ended(runtime: Runtime) -> None:
    instance = runtime.submit(within, {"fail": {"merge": "die"}})
    assert instance.result(timeout=30).status == "compensated"
    assert instance.restart({}).result(timeout=30).status == "completed"
