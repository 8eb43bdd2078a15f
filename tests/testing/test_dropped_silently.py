"""A mistake that would drop work without a word fails the stage, with a message that names the fix."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from stageflow_actors import Retry, StageContext, Workflow
from stageflow_actors.testing import run


def only(handler: Any, **options: Any) -> Workflow[Any]:
    return Workflow("flow").add_stage(handler, id="pay", **options)


def in_a_loop(order: Any, ctx: StageContext) -> Any:
    order["charged"] = [ctx.step("charge", str, number) for number in range(3)]


async def in_an_async_loop(order: Any, ctx: StageContext) -> Any:
    async def charge(number: int) -> int:
        return number

    order["charged"] = [await ctx.step("charge", charge, number) for number in range(3)]


async def at_the_same_time(order: Any, ctx: StageContext) -> Any:
    async def charge(number: int) -> int:
        await asyncio.sleep(0)
        return number

    order["charged"] = await asyncio.gather(*(ctx.step("charge", charge, number) for number in range(3)))


@pytest.mark.parametrize("handler", [in_a_loop, in_an_async_loop, at_the_same_time])
def test_a_step_name_used_twice_in_one_attempt_fails_the_stage_at_once(handler: Any) -> None:
    result = run(only(handler, retry=Retry.fixed(5, 0)), {})
    assert (result.status, result.stages[0].attempts) == ("failed", 1)
    assert "stage 'pay' uses the step 'charge' twice in one attempt" in str(result.error)
    assert "ctx.step(f'charge-{number}', ...)" in str(result.error)


def test_a_step_that_raised_may_be_tried_again_in_the_same_attempt() -> None:
    calls: list[int] = []

    def flaky() -> int:
        calls.append(1)
        if len(calls) < 3:
            raise OSError("busy")
        return len(calls)

    def pay(order: Any, ctx: StageContext) -> Any:
        for _ in range(5):
            try:
                return ctx.step("charge", flaky)
            except OSError:
                continue
        return None

    assert run(only(pay), {}).stages[0].data == 3


def test_each_attempt_uses_the_names_of_its_steps_again() -> None:
    def pay(order: Any, ctx: StageContext) -> Any:
        kept = [ctx.step(f"charge-{number}", str, number) for number in range(3)]
        if ctx.attempt == 1:
            raise OSError("later")
        return kept

    assert run(only(pay, retry=Retry.fixed(2, 0)), {}).stages[0].data == ["0", "1", "2"]


def forgets(order: Any, ctx: StageContext) -> Any:
    ctx.request("stock", {"sku": 1})


async def forgets_in_async(order: Any, ctx: StageContext) -> Any:
    ctx.request("stock", {"sku": 1})
    return "done"


def sends_two(order: Any, ctx: StageContext) -> Any:
    ctx.request("stock", 1)
    return ctx.request("next", 2)


@pytest.mark.parametrize(
    ("handler", "advice"),
    [
        (forgets, "write `return ctx.request(...)`"),
        (forgets_in_async, "write `return ctx.request(...)`"),
        (sends_two, "one request is sent per stage"),
    ],
)
def test_a_request_that_is_made_and_not_returned_fails_the_stage(handler: Any, advice: str) -> None:
    result = run(only(handler, retry=Retry.fixed(3, 0)), {}, endpoints={"stock": lambda command: 1})
    assert (result.status, result.stages[0].attempts) == ("failed", 1)
    assert "stage 'pay' made ctx.request('stock', ...) and did not return it" in str(result.error)
    assert advice in str(result.error)


def test_a_request_of_an_attempt_that_raised_does_not_count_in_the_next_one() -> None:
    def pay(order: Any, ctx: StageContext) -> Any:
        asked = ctx.request("stock", 1)
        if ctx.attempt == 1:
            raise OSError("later")
        return asked

    assert run(only(pay, retry=Retry.fixed(2, 0)), {}, endpoints={"stock": lambda command: 7}).stages[0].data == 7


def endpoint_that_asks(command: Any, ctx: StageContext) -> Any:
    ctx.request("stock", 1)


def test_a_request_made_in_an_endpoint_or_an_item_fails_there() -> None:
    flow = Workflow("flow").add_remote_stage("ask", endpoint="relay", command=lambda order: 1)
    error = str(run(flow, {}, endpoints={"relay": endpoint_that_asks}).error)
    assert "endpoint 'relay' made ctx.request('stock', ...), and the request is not sent" in error
    flow = Workflow("flow").add_map("each", endpoint_that_asks, over=lambda order: [1])
    error = str(run(flow, {}).error)
    assert "an item of 'each' made ctx.request('stock', ...), and the request is not sent" in error


@pytest.mark.parametrize(
    ("given", "shown"),
    [("abc", "the str 'abc'"), (b"abc", "the bytes b'abc'"), (bytearray(b"a"), "the bytearray"), (None, "None")],
)
def test_over_that_returns_a_string_or_none_fails_the_stage(given: Any, shown: str) -> None:
    result = run(Workflow("flow").add_map("each", lambda item: item, over=lambda order: given), {})
    assert result.status == "failed"
    assert f"over of map stage 'each' returned {shown}" in str(result.error)
    assert "return the items as a list" in str(result.error)


@pytest.mark.parametrize("given", [(1, 2), {1: 2}, {3}, range(2), iter([1]), (n for n in [1]), "", []])
def test_over_may_return_any_other_iterable(given: Any) -> None:
    if given == "":
        given = {}.values()
    assert run(Workflow("flow").add_map("each", lambda item: item, over=lambda order: given), {}).success
