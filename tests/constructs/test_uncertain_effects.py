"""`Compensation(when_uncertain=True)` with real workers: killed at a timeout, by a cancel, or by themselves."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import pytest
from effect_log import note, noted

from stageflow_actors import Compensation, InstanceParked, Retry, Runtime, Stage, StageContext, Workflow


def before(context: dict[str, Any]) -> str:
    return "before"


def undo(context: dict[str, Any], ctx: StageContext) -> None:
    note(ctx.instance_id, "undo", ctx.stage_id, ",".join(ctx.results))


UNCERTAIN = Compensation(undo, when_uncertain=True)


def pay(context: dict[str, Any], ctx: StageContext) -> None:
    """Act as the context says in this attempt: hang, die, or raise."""
    act = context["acts"][min(ctx.attempt, len(context["acts"])) - 1]
    note(ctx.instance_id, "began", ctx.attempt)
    if act == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    while act == "hang":
        time.sleep(0.02)
    raise ValueError("no money")


async def pay_async(context: dict[str, Any], ctx: StageContext) -> None:
    note(ctx.instance_id, "began", ctx.attempt)
    await asyncio.sleep(60)


def pick(item: str, ctx: StageContext) -> str:
    note(ctx.instance_id, "began", item)
    while item == "hang":
        time.sleep(0.02)
    return item


def put_back(item: str, ctx: StageContext) -> None:
    note(ctx.instance_id, "undo", item, ctx.results.get("m", "unknown"))


def flow(name: str, handler: Any = pay, **options: Any) -> Workflow[dict[str, Any]]:
    on_failure = options.pop("on_failure", "compensate")
    return (
        Workflow(name, on_failure=on_failure)
        .add_stage(before, id="a", compensation=undo)
        .add_stage(handler, id="pay", compensation=UNCERTAIN, **options)
    )


late = flow("late", timeout=0.3)
late_async = flow("late-async", pay_async, timeout=0.2)
again = flow("again", timeout=0.3, retry=Retry.fixed(2, 0))
slowly = flow("slowly", timeout=0.3, retry=Retry.fixed(2, 60))
deadly = flow("deadly")
parks = flow("parks", timeout=0.3, on_failure="park")
long = flow("long")
long_async = flow("long-async", pay_async)
branches = (
    Workflow("branches")
    .add_stage(before, id="a", compensation=undo)
    .add_parallel(
        "both",
        [Stage(pay, id="pay", compensation=UNCERTAIN), Stage(before, id="other", compensation=undo)],
    )
)
items = Workflow("items").add_map(
    "m", pick, over=lambda context: ["x", "hang"], actors=2, compensation=Compensation(put_back, when_uncertain=True)
)

BOTH = [("pay", "a"), ("a", "a")]


def began(instance: Any, eventually: Any) -> None:
    eventually(lambda: noted(instance.id, "began"), "the attempt to begin")


@pytest.mark.parametrize(
    ("workflow", "acts", "error"),
    [
        (late, ["hang"], "StageTimeout: "),
        (late_async, [], "StageTimeout: "),
        (again, ["hang", "raise"], "ValueError: no money"),
        (again, ["die", "raise"], "ValueError: no money"),
        (deadly, ["die"], "WorkerDied: "),
    ],
    ids=["killed at its timeout", "cancelled at its timeout", "timed out before", "died before", "at its death limit"],
)
def test_an_attempt_that_ended_with_an_unknown_effect_is_undone(
    runtime: Runtime, workflow: Workflow[Any], acts: list[str], error: str
) -> None:
    instance = runtime.submit(workflow, {"acts": acts})
    result = instance.result(timeout=60)
    assert (str(result.status), str(result.error)[: len(error)]) == ("compensated", error)
    assert noted(instance.id, "undo") == BOTH
    assert [one.stage_id for one in result.compensations] == ["pay", "a"]


def test_a_failure_with_a_known_effect_is_not_undone(runtime: Runtime) -> None:
    instance = runtime.submit(late, {"acts": ["raise"]})
    assert str(instance.result(timeout=60).status) == "compensated"
    assert noted(instance.id, "undo") == [("a", "a")]


@pytest.mark.parametrize("workflow", [long, long_async], ids=["killed", "cancelled on the loop"])
def test_a_stage_that_a_cancel_ends_is_undone(runtime: Runtime, workflow: Workflow[Any], eventually: Any) -> None:
    instance = runtime.submit(workflow, {"acts": ["hang"]})
    began(instance, eventually)
    assert str(instance.cancel()) == "cancelled"
    assert noted(instance.id, "undo") == BOTH


def test_a_stage_that_waits_for_a_worker_when_it_is_cancelled_is_not_undone(runtime: Runtime, eventually: Any) -> None:
    first = runtime.submit(long, {"acts": ["hang"]})
    began(first, eventually)
    second = runtime.submit(long, {"acts": ["hang"]})
    eventually(lambda: runtime.queues("stageflow.long.stage1")[0].ready, "its message to wait in the queue")
    assert str(second.cancel()) == "cancelled"
    assert (noted(second.id, "undo"), noted(second.id, "began")) == ([("a", "a")], [])
    assert str(first.cancel()) == "cancelled"


def test_a_stage_that_waits_for_its_next_attempt_when_it_is_cancelled_is_undone(
    runtime: Runtime, eventually: Any
) -> None:
    instance = runtime.submit(slowly, {"acts": ["hang"]})
    eventually(lambda: any(q.delayed for q in runtime.queues("stageflow.slowly.stage1")), "the attempt to wait")
    assert str(instance.cancel()) == "cancelled"
    assert noted(instance.id, "undo") == BOTH


def test_a_parked_stage_is_undone_when_it_is_cancelled(runtime: Runtime) -> None:
    instance = runtime.submit(parks, {"acts": ["hang", "raise"]})
    with pytest.raises(InstanceParked, match="StageTimeout"):
        instance.result(timeout=60)
    assert noted(instance.id, "undo") == []
    assert str(instance.cancel()) == "cancelled"
    assert noted(instance.id, "undo") == BOTH


def test_a_branch_that_a_cancel_ends_is_undone_with_the_others(runtime: Runtime, eventually: Any) -> None:
    instance = runtime.submit(branches, {"acts": ["hang"]})
    began(instance, eventually)
    assert str(instance.cancel()) == "cancelled"
    undone = [words[0] for words in noted(instance.id, "undo")]
    assert (undone[0], undone[-1]) == ("pay", "a")


def test_an_item_that_a_cancel_ends_is_undone_with_the_completed_ones(runtime: Runtime, eventually: Any) -> None:
    instance = runtime.submit(items, {})
    eventually(lambda: len(noted(instance.id, "began")) == 2, "both items to begin")
    eventually(lambda: not runtime.queues("stageflow.items.stage0.m")[0].ready, "both to be delivered")
    assert str(instance.cancel()) == "cancelled"
    assert ("hang", "unknown") in noted(instance.id, "undo")
