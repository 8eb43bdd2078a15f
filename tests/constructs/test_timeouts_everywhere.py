"""User code never outlives its timeout, wherever it is called: its worker is killed, and its stage fails."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from constructs_fixtures import does, note, noted, undoes, undone

from stageflow_actors import Retry, Runtime, Stage, Workflow
from stageflow_actors.core.plan import MAP, Naming, compile_plan
from stageflow_actors.runtime.worker.executors import map as map_executor
from stageflow_actors.testing import in_process, run

LIMIT = 0.4
ENDPOINTS = {"echo": lambda command: command}


def hang(*given: Any) -> Any:
    threading.Event().wait()


async def hang_later(context: dict[str, Any]) -> None:
    hang()


def without_end(context: dict[str, Any]) -> Iterator[int]:
    for number in itertools.count():
        threading.Event().wait(0.01)
        yield number


def hang_once(context: dict[str, Any]) -> list[int]:
    tries = len(noted(context["id"], "tried"))
    note(context["id"], "tried")
    if not tries:
        hang()
    return [1, 2]


@dataclass
class Trap:
    """Setting the result of a map never ends."""

    undone: list[str] = field(default_factory=list)
    got: list[int] = field(default_factory=list)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "got" and value:
            hang()
        object.__setattr__(self, name, value)


def same(item: int) -> int:
    return item


def note_trap(trap: Trap) -> None:
    note("trap", "undid", "before")


def flow(name: str, **options: Any) -> Workflow[Any]:
    options = {"stage_timeout": LIMIT, **options}
    return Workflow(f"t-{name}", **options).add_stage(does("before"), id="before", compensation=undoes("before"))


FLOWS: dict[str, Workflow[Any]] = {
    "over": flow("over").add_map("x", same, over=hang),
    "over, by the map's own": flow("own", stage_timeout=None).add_map("x", same, over=hang, timeout=LIMIT),
    "over without end": flow("endless").add_map("x", same, over=without_end),
    "when of a map": flow("map-when").add_map("x", same, over=lambda context: [1], when=hang),
    "selector": flow("selector").add_branch("x", hang, {"k": [Stage(does("k"), id="k")]}),
    "merge": flow("merge").add_parallel("x", [Stage(does("a"), id="a"), Stage(does("b"), id="b")], merge=hang),
    "on_signal": flow("on-signal").add_signal("x", on_signal=hang),
    "on_timeout": flow("on-timeout").add_signal("x", timeout=0.05, on_timeout=hang),
    "on_timeout, async": flow("on-timeout-async").add_signal("x", timeout=0.05, on_timeout=hang_later),
    "command": flow("command").add_remote_stage("x", endpoint="echo", command=hang),
    "on_reply": flow("on-reply").add_remote_stage("x", endpoint="echo", command=lambda context: 1, on_reply=hang),
    "request": flow("request").add_http_stage("x", url="http://127.0.0.1:9/", request=hang),
    "url": flow("url").add_http_stage("x", url=hang),
}
globals().update({f"flow_{number}": one for number, one in enumerate(FLOWS.values())})
trapped = (
    Workflow("t-trapped", context=Trap, stage_timeout=LIMIT)
    .add_stage(lambda trap: None, id="before", compensation=note_trap)
    .add_map("x", same, over=lambda trap: [1, 2], into="got")
)
retried = flow("retried").add_map("x", same, over=hang_once, into="got", retry=Retry.fixed(2, 0))
optional = flow("optional").add_map("x", same, over=hang, required=False).add_stage(does("after"), id="after")

TEXT = f"StageTimeout: stage 'x' ran longer than its timeout of {LIMIT:g} s"
BLOCKED = TEXT.replace(
    "'x' ran",
    "'x' blocked its event loop (it needs await asyncio.sleep() or asyncio.to_thread() for blocking calls), ran",
)


@pytest.mark.parametrize("what", FLOWS)
def test_what_hangs_is_killed_at_its_time_and_its_stage_has_failed(runtime: Runtime, what: str) -> None:
    instance = runtime.submit(FLOWS[what], {})
    if what == "on_signal":
        instance.signal("x", 1)
    result = instance.result(timeout=20)
    text = f"{BLOCKED} and did not end when it was cancelled" if what == "on_timeout, async" else TEXT
    assert (result.status, result.failed_stage, result.error) == ("compensated", "x", text)
    assert undone(instance.id)[-1] == "before"


def test_what_sets_the_results_of_a_map_is_killed_at_its_time(runtime: Runtime) -> None:
    result = runtime.execute(trapped, Trap(), timeout=20)
    assert (result.status, result.failed_stage, result.error) == ("compensated", "x", TEXT)
    assert noted("trap", "undid") == [("before",)]


def test_a_policy_decides_about_an_over_that_was_killed(runtime: Runtime) -> None:
    result = runtime.execute(retried, {"id": "retried"}, timeout=20)
    assert (result.status, result.context["got"], len(noted("retried", "tried"))) == ("completed", [1, 2], 2)


def test_an_optional_map_whose_over_was_killed_is_recorded_and_the_workflow_goes_on(runtime: Runtime) -> None:
    result = runtime.execute(optional, {}, timeout=20)
    assert (result.status, [str(stage.status) for stage in result.stages]) == (
        "completed",
        ["completed", "failed", "completed"],
    )


def test_the_time_of_each_place_is_its_own_or_the_workflows() -> None:
    whole = (
        Workflow("whole", stage_timeout=7)
        .add_map("m", same, over=lambda context: [])
        .add_map("n", same, over=lambda context: [], timeout=2)
        .add_parallel("p", [Stage(same, id="a"), Stage(same, id="b", timeout=3)])
        .add_branch("c", lambda context: "k", {"k": []})
        .add_signal("s", timeout=1, on_timeout=lambda context: None)
        .add_signal("t")
        .add_delay("d", 1)
    )
    plan = compile_plan(whole, Naming())
    assert {place.id: place.timeout for place in plan.stages} == {
        "m": 7.0,
        "m[item]": 7.0,
        "n": 2.0,
        "n[item]": 2.0,
        "p": 7.0,
        "a": 7.0,
        "b": 3.0,
        "c": 7.0,
        "s": 7.0,
        "t": None,
        "d": None,
    }
    assert {place.kind for place in plan.stages if place.timeout == 2.0} == {MAP, "item"}


@pytest.mark.parametrize("given", ["list", "generator"])
def test_what_is_done_with_the_items_of_a_list_is_not_taken_from_the_time_of_over(
    monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    limits: list[int] = [0]
    seen: dict[str, int] = {}

    def over(context: dict[str, Any]) -> Any:
        seen["over"] = limits[-1]
        return [1, 2] if given == "list" else iter([1, 2])

    def encode(work: Any, number: int, value: Any) -> Any:
        seen["encoding"] = limits[-1]
        return real(work, number, value)

    real = map_executor.MapExecutor._item
    monkeypatch.setattr(map_executor.MapExecutor, "_item", encode)
    monkeypatch.setattr(in_process._NullSlot, "set_timeout", lambda self, ns, now: limits.append(ns))
    workflow = Workflow("timed").add_map("m", same, over=over, into="got", timeout=1)
    assert run(workflow, {}).context["got"] == [1, 2]
    assert seen == {"over": 10**9, "encoding": 0 if given == "list" else 10**9}
    assert limits[-1] == 0
