"""A retry policy decides wherever user code fails in a stage, not only in its handler."""

from __future__ import annotations

import os
from typing import Any

import pytest
from constructs_fixtures import does, note, noted, stage_of, undoes, undone

from stageflow_actors import Retry, Runtime, Stage, StageError, StageFlowError, WorkerDied, Workflow, WorkflowResult

ENDPOINTS = {"echo": lambda command: command}
TWICE = Retry.fixed(3, 0)


def stumbles(context: dict[str, Any], *more: Any) -> None:
    """Fails as often as the context says, in the way it says."""
    tries = len(noted(context["id"], "tried"))
    note(context["id"], "tried")
    if tries < context["times"]:
        if context["how"] == "die":
            os._exit(3)
        raise ConnectionError("not yet")


def tries(context: dict[str, Any]) -> int:
    return len(noted(context["id"], "tried"))


def over(context: dict[str, Any]) -> list[int]:
    stumbles(context)
    return [1, 2]


def select(context: dict[str, Any]) -> str:
    stumbles(context)
    return "k"


def merge(base: dict[str, Any], branches: Any) -> None:
    stumbles(base)


def on_signal(context: dict[str, Any], payload: Any) -> None:
    stumbles(context)


def parallel(name: str, **options: Any) -> Workflow[Any]:
    branches = [Stage(does(one), id=one, compensation=undoes(one)) for one in ("a", "b")]
    return Workflow(name, **options).add_parallel("x", branches, merge=merge)


FLOWS = {
    "over": Workflow("over").add_map("x", lambda item: item, over=over, retry=TWICE),
    "over by default": Workflow("over-by-default", retry=TWICE).add_map("x", lambda item: item, over=over),
    "selector": Workflow("selector", retry=TWICE).add_branch("x", select, {"k": [Stage(does("k"), id="k")]}),
    "merge": parallel("merge", retry=TWICE),
    "on_signal": Workflow("on-signal", retry=TWICE).add_signal("x", on_signal=on_signal),
    "on_timeout": Workflow("on-timeout", retry=TWICE).add_signal("x", name="never", timeout=0.01, on_timeout=stumbles),
    "on_reply": Workflow("on-reply").add_remote_stage(
        "x", endpoint="echo", command=lambda context: 1, on_reply=stumbles, retry=TWICE
    ),
}
globals().update({f"flow_{number}": flow for number, flow in enumerate(FLOWS.values())})


def given(flow: Workflow[Any], how: str, times: int, test: Any) -> dict[str, Any]:
    return {"id": f"{flow.id}-{how}-{times}-{test.node.name}", "how": how, "times": times}


def signals(flow: Workflow[Any]) -> dict[str, Any]:
    return {"x": 1} if flow.id == "on-signal" else {}


@pytest.mark.parametrize("what", FLOWS)
def test_what_raises_twice_is_tried_a_third_time(execute: Any, what: str, request: Any) -> None:
    flow = FLOWS[what]
    context = given(flow, "raise", 2, request)
    result = execute(flow, context, signals=signals(flow))
    assert (result.status, tries(context)) == ("completed", 3)
    assert stage_of(result, "x").attempts == 3


@pytest.mark.parametrize("what", FLOWS)
def test_what_raises_thrice_has_failed(execute: Any, what: str, request: Any) -> None:
    flow = FLOWS[what]
    context = given(flow, "raise", 9, request)
    result = execute(flow, context, signals=signals(flow))
    assert (result.failed_stage, result.error, tries(context)) == ("x", "ConnectionError: not yet", 3)
    assert result.status == ("compensated" if what == "merge" else "failed")


NEVER = Retry.fixed(5, 0, abort_on=WorkerDied)
ABORTING = {
    "over": Workflow("aborting-over").add_map("x", lambda item: item, over=over, retry=NEVER),
    "merge": parallel("aborting-merge", retry=NEVER),
    "on_signal": Workflow("on-signal-2", retry=NEVER).add_signal("x", on_signal=on_signal),
    "on_timeout": Workflow("aborting-late", retry=NEVER).add_signal("x", timeout=0.01, on_timeout=stumbles),
    "on_reply": Workflow("aborting-reply").add_remote_stage(
        "x", endpoint="echo", command=lambda context: 1, on_reply=stumbles, retry=NEVER
    ),
}
globals().update({f"aborting_{number}": flow for number, flow in enumerate(ABORTING.values())})


@pytest.mark.parametrize("what", ABORTING)
def test_a_policy_that_does_not_want_deaths_ends_at_the_first(runtime: Runtime, what: str, request: Any) -> None:
    flow = ABORTING[what]
    context = given(flow, "die", 9, request)
    instance = runtime.submit(flow, context)
    if what == "on_signal":
        instance.signal("x", 1)
    result = instance.result(timeout=30)
    assert (result.failed_stage, result.error) == (
        "x",
        "WorkerDied: the worker died while running stage 'x': exit code 3",
    )
    assert tries(context) == 1
    assert sorted(undone(result.instance_id)) == (["a", "b"] if what == "merge" else [])


@pytest.mark.parametrize("what", ["on_reply", "merge"])
def test_what_was_gathered_outlives_the_deaths_that_a_policy_forgives(
    runtime: Runtime, what: str, request: Any
) -> None:
    context = given(FLOWS[what], "die", 2, request)
    result = runtime.execute(FLOWS[what], context, timeout=30)
    assert (result.status, tries(context)) == ("completed", 3)
    assert stage_of(result, "x").attempts == 3


class Stubborn:
    """Retries whatever it is asked about."""

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        assert isinstance(error, (StageError, StageFlowError, Exception))
        return 0.0 if attempt < 50 else None


late = Workflow("late", retry=Stubborn()).add_signal("s", timeout=0.01, on_signal=on_signal)
late_bare = Workflow("late-bare", retry=Stubborn()).add_signal("s", timeout=0.01)
failing_items = Workflow("failing-items", retry=Stubborn()).add_map(
    "s", lambda item: 1 / item, over=lambda context: [0, 1], retry=Retry.fixed(1, 0)
)


@pytest.mark.parametrize("flow", [late, late_bare], ids=lambda flow: flow.id)
def test_no_policy_waits_once_more_for_a_signal_that_did_not_come(execute: Any, flow: Workflow[Any]) -> None:
    result: WorkflowResult[Any] = execute(flow, {})
    assert (result.status, result.error) == ("failed", "StageTimeout: no signal 's' came within 0.01 s")
    assert [one.attempts for one in result.stages] == [1]


def test_no_policy_joins_once_more_what_too_many_items_failed_in(execute: Any) -> None:
    result = execute(failing_items, {})
    assert (result.status, [one.attempts for one in result.stages]) == ("failed", [1])
