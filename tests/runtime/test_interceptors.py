"""Interceptors: user code around each handler, in the worker and in `testing.run`."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from effect_log import note, noted

from stageflow_actors import (
    Replace,
    Runtime,
    StageCall,
    StageContext,
    StageError,
    Workflow,
    WorkflowDefinitionError,
    WorkflowResult,
    WorkflowStatus,
)
from stageflow_actors.testing import run

Context = dict[str, Any]
Next = Callable[[StageCall], Any]


class Noting:
    """Says of each call when it begins and ends."""

    def __init__(self, name: str) -> None:
        self.name = name

    def around_stage(self, call: StageCall, next: Next) -> Any:
        note(call.instance_id, self.name, "before", call.kind, call.workflow_id, call.stage_id, call.attempt)
        value = next(call)
        note(call.instance_id, self.name, "after", call.stage_id)
        return value

    def around_compensation(self, call: StageCall, next: Next) -> Any:
        note(call.instance_id, self.name, "before", call.kind, call.workflow_id, call.stage_id, call.attempt)
        value = next(call)
        note(call.instance_id, self.name, "after", call.stage_id)
        return value


class Sealing:
    """What lies in the queues is sealed; handlers see it open."""

    def around_stage(self, call: StageCall, next: Next) -> Any:
        if "sealed" in call.context:
            call.context = {key: value[::-1] for key, value in call.context["sealed"].items()}
        value = next(call)
        call.context = {"sealed": {key: value[::-1] for key, value in call.context.items()}}
        return value


class Refusing:
    def around_stage(self, call: StageCall, next: Next) -> Any:
        if call.stage_id == "forbidden":
            raise StageError("nobody may do that")
        return next(call)


class Caching:
    """Does not call on where the answer is known."""

    def around_stage(self, call: StageCall, next: Next) -> Any:
        return "from the cache" if call.context.get("cached") else next(call)


class Measuring:
    """Async: awaits what follows, whatever it is."""

    async def around_stage(self, call: StageCall, next: Next) -> Any:
        began = time.perf_counter()
        await asyncio.sleep(0)
        value = await next(call)
        note(call.instance_id, "measured", call.stage_id, time.perf_counter() - began > 0)
        return value

    async def around_compensation(self, call: StageCall, next: Next) -> Any:
        value = await next(call)
        note(call.instance_id, "measured undoing", call.stage_id)
        return value


@dataclass
class Order:
    total: float
    lines: list[str] = field(default_factory=list)


def price(order: Order) -> Order:
    return Order(order.total * 2, order.lines)


class Watching:
    """Sees the context as the stage leaves it, also where it was replaced."""

    def around_stage(self, call: StageCall, next: Next) -> Any:
        value = next(call)
        note(call.instance_id, "left behind", call.stage_id, call.context, value)
        return value


def first(context: Context, ctx: StageContext) -> str:
    context["first"] = "done"
    return "one"


async def second(context: Context) -> str:
    await asyncio.sleep(0)
    context["second"] = "done"
    return "two"


def undo_first(context: Context, ctx: StageContext) -> None:
    context["undone"] = ctx.results["first"]


async def undo_second(context: Context) -> Any:
    await asyncio.sleep(0)
    return Replace({**context, "undone too": True})


def broken(context: Context) -> None:
    if context.get("break"):
        raise ValueError("broken")


def item(value: int) -> int:
    return value + 1


plain = Workflow("plain").add_stage(first).add_stage(second).add_map("items", item, over=lambda c: [1, 2], into="items")
saga = (
    Workflow("saga")
    .add_stage(first, compensation=undo_first)
    .add_stage(second, compensation=undo_second)
    .add_stage(broken)
)
sealed = Workflow("sealed").add_stage(lambda c: c.update(b="xyz"), id="a").add_stage(lambda c: c["a"] + c["b"], id="b")
forbidden = Workflow("forbidden").add_stage(first).add_stage(lambda c: note("never"), id="forbidden")
cached = Workflow("cached").add_stage(first).add_stage(second)
typed = Workflow("typed", context=Order).add_stage(price)
measured = (
    Workflow("measured")
    .add_stage(first, concurrency=2, compensation=undo_first)
    .add_stage(second, compensation=undo_second)
    .add_stage(broken)
)
asking = Workflow("asking").add_remote_stage(
    "ask", endpoint="adder", command=lambda context: context["n"], on_reply=lambda context, reply: reply
)

Execute = Callable[..., WorkflowResult[Any]]


@pytest.fixture(params=["cluster", "in process"])
def execute(request: pytest.FixtureRequest, serve: Callable[..., Runtime]) -> Execute:
    """Runs a workflow with interceptors: through processes, and in this one."""

    def through_processes(workflow: Workflow[Any], context: Any, interceptors: list[Any]) -> WorkflowResult[Any]:
        key = (workflow.id, tuple(type(one) for one in interceptors))
        if key not in clusters:
            clusters[key] = serve(workflow, interceptors=interceptors)
        return clusters[key].execute(workflow, context, timeout=20)

    def here(workflow: Workflow[Any], context: Any, interceptors: list[Any]) -> WorkflowResult[Any]:
        return run(workflow, context, interceptors=interceptors)

    return through_processes if request.param == "cluster" else here


clusters: dict[Any, Runtime] = {}


def test_the_first_interceptor_is_outermost_around_each_attempt_of_stages_and_items(execute: Execute) -> None:
    result = execute(plain, {}, [Noting("outer"), Noting("inner")])
    assert result.status == WorkflowStatus.completed
    assert result.context == {"first": "done", "second": "done", "items": [2, 3]}
    assert [stage.data for stage in result.stages[:2]] == ["one", "two"]
    seen = noted(result.instance_id)
    assert seen[:4] == [
        ("outer", "before", "stage", "plain", "first", "1"),
        ("inner", "before", "stage", "plain", "first", "1"),
        ("inner", "after", "first"),
        ("outer", "after", "first"),
    ]
    assert [words[3] for words in seen if words[:2] == ("outer", "before")] == ["plain"] * 4
    assert [words[2] for words in seen if words[:2] == ("outer", "before")] == ["stage", "stage", "item", "item"]


def test_compensations_are_intercepted_by_their_own_method(execute: Execute) -> None:
    result = execute(saga, {"break": True}, [Noting("only"), Refusing()])
    assert result.status == WorkflowStatus.compensated
    assert result.context == {
        "break": True,
        "first": "done",
        "second": "done",
        "undone": "one",
        "undone too": True,
    }
    undone = [words for words in noted(result.instance_id) if "compensation" in words]
    assert [words[4] for words in undone] == ["second", "first"]


def test_an_interceptor_may_give_the_handler_another_context_and_hand_on_another(execute: Execute) -> None:
    result = execute(sealed, {"a": "abc"}, [Sealing()])
    assert result.context == {"sealed": {"a": "cba", "b": "zyx"}}
    assert result.stages[1].data == "abcxyz"


def test_an_interceptor_may_refuse(execute: Execute) -> None:
    result = execute(forbidden, {}, [Refusing()])
    assert (result.status, result.failed_stage) == (WorkflowStatus.failed, "forbidden")
    assert result.error == "StageError: nobody may do that"
    assert noted("never") == []


def test_an_interceptor_may_answer_in_place_of_the_handler_be_it_async_or_not(execute: Execute) -> None:
    result = execute(cached, {"cached": True}, [Caching()])
    assert [stage.data for stage in result.stages] == ["from the cache", "from the cache"]
    assert result.context == {"cached": True}


def test_a_context_that_the_handler_replaced_is_seen_behind_next(execute: Execute) -> None:
    result = execute(typed, Order(2.0), [Watching()])
    assert result.context == Order(4.0)
    assert result.stages[0].data is None
    assert noted(result.instance_id, "left behind") == [("price", str(Order(4.0)), "None")]


def test_async_interceptors_go_around_handlers_of_any_kind(execute: Execute) -> None:
    result = execute(measured, {"break": True}, [Watching(), Measuring(), Noting("inner")])
    assert result.status == WorkflowStatus.compensated
    assert result.context["undone"] == "one"
    assert result.context["undone too"] is True
    assert noted(result.instance_id, "measured") == [("first", "True"), ("second", "True")]
    assert noted(result.instance_id, "measured undoing") == [("second",), ("first",)]


def test_endpoints_are_intercepted_too(serve: Callable[..., Runtime]) -> None:
    runtime = serve(asking, interceptors=[Noting("around")])
    runtime.endpoint("adder", lambda command: command + 1)
    result = runtime.execute(asking, {"n": 1}, timeout=20)
    assert result.stages[0].data == 2
    seen = noted(result.instance_id, "around", "before")
    assert [words[:1] + words[2:3] for words in seen] == [("stage", "ask"), ("endpoint", "adder")]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([object()], "neither around_stage"),
        ([Noting], "is a class: give an instance"),
        (Noting("alone"), "is a list of objects"),
        ("text", "is a list of objects"),
    ],
)
def test_what_is_no_interceptor_is_refused_at_once(wrong: Any, words: str) -> None:
    with pytest.raises(WorkflowDefinitionError, match=words):
        Runtime(plain, interceptors=wrong)
    with pytest.raises(WorkflowDefinitionError, match=words):
        run(plain, {}, interceptors=wrong)


def test_one_that_cannot_travel_is_refused_before_any_process_starts(tmp_path: Path) -> None:
    holding = Noting("holding")
    holding.name = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(WorkflowDefinitionError, match="cannot be sent to worker processes"):
        Runtime(plain, interceptors=[holding], data_dir=tmp_path).start()
