"""Retry policies that hang or end their worker: the failure they were asked about becomes final.

A policy has the time of one attempt, and no second worker asks a policy that ended the first.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import Any

import pytest
from constructs_fixtures import does, note, noted, undoes, undone

from stageflow_actors import Compensation, Retry, Runtime, Stage, StageContext, Workflow, WorkflowResult

LIMIT = 0.4
LATE = f"(and its retry policy ran longer than the timeout of {LIMIT:g} s)"
BOOM = f"ValueError: boom {LATE}"


class Hanging:
    """Notes that it is asked, and never answers."""

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        note("asked", attempt, str(error))
        threading.Event().wait()
        return None


class Deadly:
    """Ends the worker that asks."""

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        note("asked", attempt, str(error))
        os._exit(3)


class Leaving:
    """Exit the process: like a policy that raises, it means no retry."""

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        raise SystemExit(4)


class Slow:
    """Takes most of the time of an attempt before it answers."""

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        time.sleep(0.75 * LIMIT)
        return 0.0 if attempt < 2 else None


def hangs(error: Exception) -> bool:
    threading.Event().wait()
    return False


def boom(*given: Any) -> Any:
    print("about to fail")
    raise ValueError("boom")


async def boom_later(context: dict[str, Any]) -> None:
    if not context.get("hang"):
        await asyncio.sleep(0)
        raise ValueError("boom")
    note(context["id"], "waits")
    await asyncio.sleep(0.05)


def hang(context: dict[str, Any]) -> None:
    threading.Event().wait()


def boom_or_not(context: dict[str, Any]) -> None:
    note(context["id"], "called")
    if context["fails"]:
        raise ValueError("boom")


def take_most(context: dict[str, Any]) -> None:
    note(context["id"], "called")
    time.sleep(0.75 * LIMIT)
    raise ValueError("boom")


def die(context: dict[str, Any]) -> None:
    os._exit(5)


def before(name: str, **options: Any) -> Workflow[Any]:
    return Workflow(name, **options).add_stage(does("before"), id="before", compensation=undoes("before"))


STUCK: dict[str, Any] = {"timeout": LIMIT, "retry": Hanging()}
ENDPOINTS = {"failing": (boom, STUCK), "echo": lambda command: command}

failing = {
    "handler": before("h-handler").add_stage(boom, id="x", **STUCK),
    "abort_on": before("h-abort").add_stage(boom, id="x", timeout=LIMIT, retry=Retry.fixed(5, 0, abort_on=hangs)),
    "retry_on": before("h-retry").add_stage(boom, id="x", timeout=LIMIT, retry=Retry.fixed(5, 0, retry_on=hangs)),
    "item": before("h-item").add_map("x", boom, over=lambda context: [1], **STUCK),
    "parallel": before("h-parallel").add_parallel("both", [Stage(boom, id="x", **STUCK), Stage(does("a"), id="a")]),
    "threads": before("h-threads").add_stage(boom, id="x", concurrency=4, **STUCK),
    "async": before("h-async").add_stage(boom_later, id="x", concurrency=4, **STUCK),
    "on_reply": before("h-reply", stage_timeout=LIMIT).add_remote_stage(
        "x", endpoint="echo", command=lambda context: 1, on_reply=boom, retry=Hanging()
    ),
}
silent = before("silent", stage_timeout=LIMIT).add_remote_stage(
    "x", endpoint="nobody", command=lambda context: 1, timeout=0.05, retry=Hanging()
)
asking = before("asking").add_remote_stage("x", endpoint="failing", command=lambda context: 1)
hanging_twice = before("hanging-twice").add_stage(hang, id="x", **STUCK)
dying_first = before("dying-first").add_stage(die, id="x", **STUCK)
deadly = before("deadly").add_stage(boom, id="x", retry=Deadly())
leaving = before("leaving").add_stage(boom, id="x", retry=Leaving())
slow = before("slow").add_stage(take_most, id="x", timeout=LIMIT, retry=Slow())
parking = before("parking", on_failure="park").add_stage(boom_or_not, id="x", **STUCK)
lanes = Workflow("lanes").add_stage(boom_later, id="x", concurrency=4, **STUCK)
globals().update({f"failing_{number}": flow for number, flow in enumerate(failing.values())})


def shown(result: WorkflowResult[Any]) -> tuple[str, str | None, str | None]:
    error = None if result.error is None else result.error.partition("; the last on its stderr")[0]
    return str(result.status), result.failed_stage, error


@pytest.mark.parametrize("what", failing)
def test_a_policy_that_hangs_has_given_up_on_what_it_was_asked_about(runtime: Runtime, what: str) -> None:
    result = runtime.execute(failing[what], {}, timeout=20)
    if what == "item":
        error = f"StageError: 1 of 1 items of 'x' failed, more than max_failures=0; the first was item 0: {BOOM}"
        assert shown(result) == ("compensated", "x", error)
    else:
        assert shown(result) == ("compensated", "x", BOOM)
    assert "before" in undone(result.instance_id)


def test_what_has_not_come_in_time_is_final_too_where_the_policy_hangs(runtime: Runtime) -> None:
    result = runtime.execute(silent, {}, timeout=20)
    late = "StageTimeout: endpoint 'nobody' did not answer within 0.05 s"
    assert shown(result) == ("compensated", "x", f"{late} {LATE}")


def test_an_endpoint_whose_policy_hangs_answers_with_what_it_was_asked_about(runtime: Runtime) -> None:
    result = runtime.execute(asking, {}, timeout=20)
    assert shown(result) == ("compensated", "x", f"StageError: endpoint 'failing' answered with an error: {BOOM}")


def test_a_policy_that_hangs_over_a_timeout_or_a_death_is_not_asked_about_the_next_one(runtime: Runtime) -> None:
    result = runtime.execute(hanging_twice, {}, timeout=20)
    text = f"StageTimeout: stage 'x' ran longer than its timeout of {LIMIT:g} s {LATE}"
    assert shown(result) == ("compensated", "x", text)
    result = runtime.execute(dying_first, {}, timeout=20)
    text = f"WorkerDied: the worker died while running stage 'x': exit code 5 {LATE}"
    assert shown(result) == ("compensated", "x", text)


def test_a_policy_that_ends_its_worker_is_asked_once(runtime: Runtime) -> None:
    asked = len(noted("asked"))
    result = runtime.execute(deadly, {}, timeout=20)
    text = "ValueError: boom (and its retry policy ended the worker: exit code 3)"
    assert shown(result) == ("compensated", "x", text)
    assert len(noted("asked")) == asked + 1


def test_a_policy_that_leaves_has_failed_like_one_that_raises(execute: Any) -> None:
    result = execute(leaving, {})
    text = "ValueError: boom (and its retry policy failed: SystemExit: 4)"
    assert shown(result) == ("compensated", "x", text)


def test_a_policy_has_as_much_time_as_an_attempt_whatever_the_handler_took(runtime: Runtime) -> None:
    result = runtime.execute(slow, {"id": "slow"}, timeout=20)
    assert shown(result) == ("compensated", "x", "ValueError: boom")
    assert len(noted("slow", "called")) == 2


def test_what_was_parked_for_its_policy_runs_its_handler_once_it_is_requeued(runtime: Runtime) -> None:
    instance = runtime.submit(parking, {"id": "parked", "fails": True})
    with pytest.raises(Exception, match="ran longer than the timeout"):
        instance.result(timeout=20)
    result = instance.retry({"id": "parked", "fails": False}).result(timeout=20)
    assert result.status == "completed"
    assert len(noted("parked", "called")) == 2


def test_others_on_the_event_loop_that_a_policy_holds_up_are_not_charged(runtime: Runtime) -> None:
    contexts = [{"id": "lanes", "hang": number != 3} for number in range(6)]
    results = list(runtime.map(lanes, contexts))
    assert [shown(result)[2] for result in results] == [None] * 3 + [BOOM] + [None] * 2


# compensations


def undo_item(item: int, ctx: StageContext) -> None:
    note(ctx.instance_id, "undid", item)
    if item == 2:
        raise ValueError("boom")


async def undo_later(context: dict[str, Any], ctx: StageContext) -> None:
    note(ctx.instance_id, "undid", "x")
    raise ValueError("boom")


def undo_badly(context: dict[str, Any], ctx: StageContext) -> None:
    note(ctx.instance_id, "undid", "x")
    raise ValueError("boom")


def undone_by(name: str, function: Any, policy: Any) -> Workflow[Any]:
    undo = Compensation(function, timeout=LIMIT, retry=policy)
    return before(name).add_stage(does("x"), id="x", compensation=undo).add_stage(boom, id="last")


compensating = {
    "hangs": (undone_by("u-hangs", undo_badly, Hanging()), BOOM),
    "hangs, async": (undone_by("u-async", undo_later, Hanging()), BOOM),
    "dies": (
        undone_by("u-dies", undo_badly, Deadly()),
        "ValueError: boom (and its retry policy ended the worker: exit code 3)",
    ),
    "leaves": (
        undone_by("u-leaves", undo_badly, Leaving()),
        "ValueError: boom (and its retry policy failed: SystemExit: 4)",
    ),
}
globals().update({f"compensating_{number}": flow for number, (flow, _) in enumerate(compensating.values())})
undoing_items = (
    before("undoing-items")
    .add_map(
        "x",
        lambda item: item,
        over=lambda context: [1, 2, 3],
        compensation=Compensation(undo_item, timeout=LIMIT, retry=Hanging()),
    )
    .add_stage(boom, id="last")
)


@pytest.mark.parametrize("how", compensating)
def test_a_compensation_whose_policy_does_not_answer_has_failed_and_the_rest_go_on(runtime: Runtime, how: str) -> None:
    flow, error = compensating[how]
    result = runtime.execute(flow, {}, timeout=20)
    assert result.status == "compensation_failed"
    told = [(c.stage_id, str(c.status), (c.error or "").partition("; the last")[0]) for c in result.compensations]
    assert told == [("x", "failed", error), ("before", "completed", "")]
    assert undone(result.instance_id) == ["x", "before"]


def test_items_whose_policy_does_not_answer_are_not_undone_once_more(runtime: Runtime) -> None:
    result = runtime.execute(undoing_items, {}, timeout=20)
    first, second = result.compensations
    assert (first.error or "").partition("; the last")[0] == (
        f"1 of 3 items of 'x' could not be undone; the first was item 1: {BOOM}"
    )
    assert (result.status, second.status) == ("compensation_failed", "completed")
    assert undone(result.instance_id) == ["3", "2", "1", "before"]
