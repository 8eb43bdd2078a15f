"""Whether a call is async is decided by what comes back, whatever wraps the `async def`."""

from __future__ import annotations

import asyncio
import functools
import os
import time
import types
from collections.abc import Callable, Generator
from typing import Any

import pytest
from effect_log import note, noted

from stageflow_actors import Retry, Runtime, StageContext, Workflow
from stageflow_actors.testing import run

Context = dict[str, Any]


def has_loop() -> bool:
    """Whether an event loop runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def work(context: Any, *, on: str = "the worker's loop") -> Any:
    """The async part of every form; notes the loop that runs it."""
    await asyncio.sleep(0)
    note(on, os.getpid(), id(asyncio.get_running_loop()))
    return "worked"


async def declared(context: Context) -> Any:
    return await work(context)


class Async:
    """An object with an async method, an async `__call__` and a service."""

    async def method(self, context: Context) -> Any:
        return await work(context)

    async def __call__(self, context: Context) -> Any:
        return await work(context)

    @staticmethod
    async def static(context: Context) -> Any:
        return await work(context)

    @classmethod
    async def of_class(cls, context: Context) -> Any:
        return await work(context)


class AsyncObject:
    async def execute(self, context: Context, ctx: StageContext) -> Any:
        return await work(context)


class PlainObject:
    def execute(self, context: Context) -> Any:
        assert not has_loop()
        return work(context)


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """A plain decorator, as for timing or tracing."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        assert not has_loop(), "not declared async"
        return function(*args, **kwargs)

    return wrapper


@wrapped
async def decorated(context: Context) -> Any:
    return await work(context)


@wrapped
@wrapped
async def decorated_twice(context: Context, ctx: StageContext) -> Any:
    assert ctx.attempt == 1
    return await work(context)


def bare(context: Context) -> Any:
    assert not has_loop()
    return work(context)


@types.coroutine
def by_generator(context: Context) -> Generator[Any, None, Any]:
    yield from work(context).__await__()
    return "worked"


class Awaitable:
    """An awaitable that is no coroutine."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def __await__(self) -> Generator[Any, None, Any]:
        return work(self.context).__await__()


def awaitable(context: Context) -> Any:
    return Awaitable(context)


async def awaitable_of_awaitable(context: Context) -> Any:
    return work(context)


def runs_its_own(context: Context) -> Any:
    return asyncio.run(work(context, on="a loop of its own"))


def legacy_loop(context: Context) -> Any:
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(work(context, on="a loop of its own"))
    finally:
        loop.close()


FORMS: dict[str, Any] = {
    "async def": declared,
    "method": Async().method,
    "call": Async(),
    "static": Async.static,
    "class-method": Async.of_class,
    "object": AsyncObject(),
    "class": AsyncObject,
    "partial": functools.partial(declared),
    "partial of a method": functools.partial(Async().method),
    "partial of a partial": functools.partial(functools.partial(declared)),
    "decorated": decorated,
    "decorated twice": decorated_twice,
    "partial of a decorated": functools.partial(decorated),
    "bare": bare,
    "plain object": PlainObject(),
    "plain class": PlainObject,
    "lambda": lambda context: work(context),
    "lambda of a decorated": lambda context: decorated(context),
    "generator-based": lambda context: by_generator(context),
    "awaitable": awaitable,
    "awaitable of an awaitable": awaitable_of_awaitable,
    "asyncio.run": runs_its_own,
    "a loop of its own": legacy_loop,
}


def flow_of(form: str, concurrency: int) -> Workflow[Any]:
    name = f"{form.replace(' ', '-').replace('.', '-')}-{concurrency}"
    handler = FORMS[form]

    def fail(context: Any) -> None:
        raise ValueError("no")

    return (
        Workflow(name)
        .add_stage(handler, id="s", concurrency=concurrency)
        .add_map("m", handler, over=lambda context: [{}], concurrency=concurrency)
        .add_stage(lambda context: None, id="undone", compensation=handler)
        .add_stage(fail, id="fails")
    )


@pytest.mark.parametrize("form", FORMS)
def test_each_form_runs_in_this_process(form: str) -> None:
    result = run(flow_of(form, 1), {})
    assert (str(result.status), result.error) == ("compensated", "ValueError: no")
    assert (result.stages[0].data, result.stages[1].data) == ("worked", ["worked"])


SPREAD = {f"{form}, {concurrency}": flow_of(form, concurrency) for form in FORMS for concurrency in (1, 3)}
globals().update({f"flow_{number}": one for number, one in enumerate(SPREAD.values())})

CLUSTER = {name: flow for name, flow in SPREAD.items() if name.partition(",")[0] in (
    "async def", "call", "class", "partial", "decorated", "decorated twice", "lambda", "awaitable", "asyncio.run",
    "plain object",
)}  # fmt: skip
"""Those that run in workers too: each takes four processes."""


# blocking the loop

TIMEOUT = 1.5


async def waits(context: Context, ctx: StageContext) -> int:
    note("began", ctx.workflow_id, context["n"])
    if context["n"] == 0:
        await asyncio.sleep(0.05)
        await BLOCKS[ctx.workflow_id](context)
    await asyncio.sleep(0.3)
    return ctx.attempt


async def block(context: Context) -> None:
    time.sleep(30)  # noqa: ASYNC251 - what this is about


async def block_in_a_task(context: Context) -> None:
    await asyncio.gather(asyncio.create_task(block(context)), asyncio.sleep(20))


async def block_in_a_group(context: Context) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.wait_for(block(context), 20))


async def compute(context: Context) -> None:
    while True:
        sum(range(1_000))


async def die(context: Context) -> None:
    if len(noted("began", "die", 0)) == 1:
        os._exit(3)


BLOCKS = {"block": block, "task": block_in_a_task, "group": block_in_a_group, "compute": compute, "die": die}
BLOCKED = {name: Workflow(name).add_stage(waits, id="s", concurrency=6, timeout=TIMEOUT) for name in BLOCKS}
globals().update({f"blocked_{name}": flow for name, flow in BLOCKED.items()})

NEIGHBOURS = 5


async def hangs(context: Context, ctx: StageContext) -> Any:
    if context["n"] == 2:
        await asyncio.sleep(60)
    await asyncio.sleep(0.4)
    return [os.getpid(), ctx.attempt]


hanging = Workflow("hanging").add_stage(hangs, id="s", concurrency=NEIGHBOURS, timeout=TIMEOUT)


@wrapped
async def hangs_undeclared(context: Context, ctx: StageContext) -> Any:
    return await hangs(context, ctx)


undeclared = Workflow("undeclared").add_stage(hangs_undeclared, id="s", concurrency=NEIGHBOURS, timeout=TIMEOUT)


@pytest.fixture(scope="module")
def runtime(serve: Callable[..., Runtime]) -> Runtime:
    return serve(*CLUSTER.values(), *BLOCKED.values(), hanging, undeclared)


@pytest.fixture(scope="module")
def results(runtime: Runtime) -> dict[str, list[Any]]:
    """What became of all instances: they run beside each other."""
    instances = {name: runtime.submit_many(flow, [{}] * 3) for name, flow in CLUSTER.items()}
    for name, flow in {**BLOCKED, "hanging": hanging, "undeclared": undeclared}.items():
        instances[name] = runtime.submit_many(flow, [{"n": n} for n in range(NEIGHBOURS)])
    return {name: [instance.result(60) for instance in those] for name, those in instances.items()}


@pytest.mark.parametrize("name", CLUSTER)
def test_each_form_runs_in_workers(results: dict[str, list[Any]], name: str) -> None:
    for result in results[name]:
        assert (str(result.status), result.error) == ("compensated", "ValueError: no")
        assert (result.stages[0].data, result.stages[1].data) == ("worked", ["worked"])


def test_all_messages_of_a_worker_are_awaited_on_one_loop(results: dict[str, list[Any]]) -> None:
    assert results
    lines = [line for line in noted("the worker's loop") if line[0] != str(os.getpid())]
    assert len(lines) > 100
    assert len({(pid, loop) for pid, loop in lines}) == len({pid for pid, _ in lines})


@pytest.mark.parametrize("name", ["block", "task", "group", "compute"])
def test_a_coroutine_that_blocks_the_loop_is_charged_alone(results: dict[str, list[Any]], name: str) -> None:
    first, *others = results[name]
    assert (str(first.status), first.stages[0].attempts) == ("failed", 1)
    assert "StageTimeout: stage 's' blocked its event loop" in first.error
    assert [(str(one.status), one.stages[0].attempts, one.stages[0].data) for one in others] == [
        ("completed", 1, 1)
    ] * (NEIGHBOURS - 1)


def test_a_coroutine_that_ends_its_worker_is_charged_alone(results: dict[str, list[Any]]) -> None:
    assert [one.stages[0].data for one in results["die"]] == [2, *[1] * (NEIGHBOURS - 1)]


@pytest.mark.parametrize("name", ["hanging", "undeclared"])
def test_one_of_many_is_cancelled_at_its_timeout_and_the_worker_lives_on(
    results: dict[str, list[Any]], name: str
) -> None:
    states = [str(one.status) for one in results[name]]
    assert states == ["completed", "completed", "failed", "completed", "completed"]
    assert results[name][2].error == "StageTimeout: stage 's' ran longer than its timeout of 1.5 s"
    data = [one.stages[0].data for one in results[name] if str(one.status) == "completed"]
    assert ([attempt for _, attempt in data], len({pid for pid, _ in data})) == ([1] * 4, 1)


# steps


async def draw(number: int = 7) -> int:
    await asyncio.sleep(0)
    note("drawn", number)
    return number


class Draw:
    async def __call__(self) -> int:
        return await draw()


@functools.wraps(draw)
def wrapped_anywhere(*args: Any) -> Any:
    return draw(*args)


STEPS: dict[str, Any] = {
    "async def": draw,
    "lambda": lambda: draw(),
    "partial": functools.partial(draw, 7),
    "decorated": functools.partial(wrapped_anywhere, 7),
    "object": Draw(),
    "awaitable": lambda: Awaited(),
}


class Awaited:
    def __await__(self) -> Generator[Any, None, int]:
        return draw().__await__()


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_each_form_is_awaited_and_runs_once(name: str) -> None:
    before = len(noted("drawn"))

    async def pay(context: Context, ctx: StageContext) -> Any:
        first = await ctx.step("draw", STEPS[name])
        plain = ctx.step("plain", lambda: "plain")
        assert ctx.is_step_completed("draw")
        if ctx.attempt == 1:
            raise OSError("after the steps")
        return [first, plain, ctx.get_step_result("draw"), ctx.attempt]

    result = run(Workflow("flow").add_stage(pay, retry=Retry.fixed(2, 0)), {})
    assert result.stages[0].data == [7, "plain", 7, 2]
    assert len(noted("drawn")) == before + 1


def test_steps_of_one_handler_are_awaited_together() -> None:
    async def pay(context: Context, ctx: StageContext) -> Any:
        return await asyncio.gather(*(ctx.step(f"draw-{n}", lambda n=n: draw(n)) for n in range(3)))

    assert run(Workflow("flow").add_stage(pay), {}).stages[0].data == [0, 1, 2]


@pytest.mark.parametrize("function", [draw, lambda: draw(), Draw()])
@pytest.mark.parametrize("is_async", [True, False])
def test_a_step_that_is_not_awaited_fails_its_stage_and_runs_nothing(function: Any, is_async: bool) -> None:
    def pay(context: Context, ctx: StageContext) -> None:
        ctx.step("draw", function)

    async def pay_async(context: Context, ctx: StageContext) -> None:
        ctx.step("draw", function)

    before = len(noted("drawn"))
    result = run(Workflow("flow").add_stage(pay_async if is_async else pay, id="pay", retry=Retry.fixed(3, 0)), {})
    assert (str(result.status), result.stages[0].attempts, len(noted("drawn"))) == ("failed", 1, before)
    assert "stage 'pay' called ctx.step('draw', ...) with an async function and did not await it" in str(result.error)


def test_a_plain_handler_may_return_the_awaitable_of_a_step() -> None:
    def pay(context: Context, ctx: StageContext) -> Any:
        return ctx.step("draw", lambda: draw(3))

    assert run(Workflow("flow").add_stage(pay), {}).stages[0].data == 3


def test_a_step_that_raised_after_its_first_await_may_be_tried_again() -> None:
    calls: list[int] = []

    async def flaky() -> int:
        await asyncio.sleep(0)
        calls.append(1)
        if len(calls) < 2:
            raise OSError("busy")
        return len(calls)

    async def pay(context: Context, ctx: StageContext) -> Any:
        try:
            return await ctx.step("draw", lambda: flaky())
        except OSError:
            return await ctx.step("draw", lambda: flaky())

    assert run(Workflow("flow").add_stage(pay), {}).stages[0].data == 2


# what is not awaited


@pytest.mark.parametrize(
    ("place", "flow"),
    [
        ("when of stage 's'", Workflow("f").add_stage(lambda c: None, id="s", when=lambda c: work(c))),
        ("when of stage 's'", Workflow("f").add_map("s", lambda c: None, over=lambda c: [1], when=lambda c: work(c))),
        ("over of map stage 's'", Workflow("f").add_map("s", lambda c: None, over=lambda c: work(c))),
        ("the selector of branch 's'", Workflow("f").add_branch("s", lambda c: work(c), {"k": [draw]})),
    ],
)
def test_a_function_that_is_not_awaited_and_returns_an_awaitable_fails_its_stage(place: str, flow: Any) -> None:
    result = run(flow, {})
    assert str(result.status) == "failed"
    assert result.error == (
        f"StageError: {place} returned the awaitable coroutine, and its result is not awaited: return the value "
        "itself, and do async work in a handler"
    )


def test_an_awaitable_inside_a_running_loop_says_how_to_call_the_test_runner() -> None:
    async def inside() -> Any:
        return run(Workflow("flow").add_stage(bare_anywhere), {})

    result = asyncio.run(inside())
    assert "await asyncio.to_thread(run, workflow, context)" in result.error


def bare_anywhere(context: Context) -> Any:
    return work(context)
