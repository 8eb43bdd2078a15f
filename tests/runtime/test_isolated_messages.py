"""Each message is handled in a copy of the context variables that the initializer left, and of decimal's context."""

from __future__ import annotations

import asyncio
import contextvars
import decimal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest
from effect_log import note, noted

from stageflow_actors import Retry, Runtime, Stage, StageContext, Workflow
from stageflow_actors.runtime.worker.base_context import BaseContext
from stageflow_actors.testing import run

Context = dict[str, Any]

current: ContextVar[str | None] = ContextVar("current", default=None)
tenant: ContextVar[str] = ContextVar("tenant", default="nobody")
bound: ContextVar[dict[str, Any] | None] = ContextVar("bound", default=None)
"""As structlog's `bind_contextvars`: each binding is another dict."""

PRECISION = decimal.getcontext().prec
"""Read here, so that the context of a worker holds decimal's context from its start."""


def touch(place: str) -> list[Any]:
    """Note what a message sees at this place, and leave something of its own behind."""
    seen = [current.get(), bound.get(), decimal.getcontext().prec, decimal.getcontext().traps[decimal.Inexact]]
    current.set(place)
    bound.set({**(bound.get() or {}), place: True})
    decimal.getcontext().prec = 5
    decimal.getcontext().traps[decimal.Inexact] = True
    note("seen", place, seen == CLEAN, tenant.get(), decimal.getcontext().rounding, seen)
    return seen


def initialize() -> None:
    """What each message in workers sees."""
    tenant.set("of the initializer")
    decimal.getcontext().rounding = decimal.ROUND_UP


def make_service() -> str:
    """A factory that sets what no message may see."""
    made = f"made for {tenant.get()}"
    tenant.set("of a service")
    current.set("of a service")
    decimal.getcontext().prec = 9
    return made


INITIAL = ("of the initializer", decimal.ROUND_UP)


CLEAN = [None, None, PRECISION, False]


def nothing(context: Any) -> None:
    pass


def plain(context: Context) -> None:
    touch("plain")


def in_a_thread(context: Context) -> None:
    touch("in a thread")


async def coroutine(context: Context) -> None:
    await asyncio.sleep(0)
    touch("coroutine")
    await asyncio.sleep(0.01)
    assert current.get() == "coroutine"
    assert decimal.getcontext().prec == 5
    await asyncio.gather(*(asyncio.create_task(inherits()) for _ in range(2)))


async def inherits() -> None:
    assert current.get() == "coroutine"


async def awaited(place: str) -> None:
    await asyncio.sleep(0)
    touch(place)


def with_service(context: Context, service: str) -> str:
    touch("service")
    return service


class Handler:
    """Constructed in the worker; what its constructor sets is seen by no message."""

    def __init__(self) -> None:
        current.set("constructor")

    def execute(self, context: Context) -> None:
        touch("class")

    def compensate(self, context: Context) -> None:
        touch("compensate of a class")


def endpoint(command: Any) -> str:
    touch("endpoint")
    return "answered"


async def async_endpoint(command: Any) -> str:
    touch("async endpoint")
    return "answered"


def asking(name: str) -> Callable[..., Any]:
    return lambda context, ctx: ctx.request(name, 1)


def again(attempt: int, error: Exception) -> float | None:
    touch("policy")
    return None


class Again:
    """A policy of one's own."""

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        return again(attempt, error)


def fail(context: Any) -> None:
    raise ValueError("no")


def attempts(context: Context, ctx: StageContext) -> None:
    touch("attempts")
    if ctx.attempt == 1:
        raise ValueError("again")


def touching(place: str, result: Any = None) -> Callable[..., Any]:
    """Return a function of any values that touches the context and returns `result`."""
    return lambda *values: result if touch(place) else None


def undone(place: str, compensation: Any) -> Workflow[Any]:
    return Workflow(place.replace(" ", "-")).add_stage(nothing, id="s", compensation=compensation).add_stage(fail)


FLOWS: dict[str, Workflow[Any]] = {
    "plain": Workflow("plain").add_stage(plain),
    "in a thread": Workflow("threads").add_stage(in_a_thread, concurrency=3),
    "coroutine": Workflow("coroutine").add_stage(coroutine, concurrency=3),
    "one coroutine": Workflow("one-coroutine").add_stage(lambda context: awaited("one coroutine"), id="s"),
    "coroutine of a thread": Workflow("coroutine-of-a-thread").add_stage(
        lambda context: awaited("coroutine of a thread"), id="s", concurrency=3
    ),
    "class": Workflow("class").add_stage(Handler, id="s"),
    "service": Workflow("service").add_stage(with_service, id="s"),
    "attempts": Workflow("attempts").add_stage(attempts, retry=Retry.fixed(2, 0)),
    "policy": Workflow("policy").add_stage(fail, retry=Again()),
    "when": Workflow("when").add_stage(nothing, id="s", when=touching("when", True)),
    "when of coroutines": Workflow("when-async").add_stage(
        lambda context: awaited("never"), id="s", when=touching("when of coroutines", False)
    ),
    "selector": Workflow("selector").add_branch("s", touching("selector", "k"), {"k": [Stage(nothing, id="k")]}),
    "over": Workflow("over").add_map("s", nothing, over=touching("over", [1])),
    "item": Workflow("item").add_map("s", touching("item"), over=lambda context: [1, 2, 3]),
    "merge": Workflow("merge").add_parallel(
        "s", [Stage(nothing, id="a"), Stage(nothing, id="b")], merge=touching("merge")
    ),
    "on_signal": Workflow("on-signal").add_signal("s", on_signal=touching("on_signal")),
    "on_timeout": Workflow("on-timeout").add_signal(
        "s", timeout=0.02, on_timeout=lambda context: awaited("on_timeout")
    ),
    "command": Workflow("command").add_remote_stage("s", endpoint="quiet", command=touching("command", 1)),
    "on_reply": Workflow("on-reply").add_remote_stage(
        "s", endpoint="quiet", command=lambda context: 1, on_reply=touching("on_reply")
    ),
    "endpoint": Workflow("endpoint").add_stage(asking("desk"), id="s"),
    "async endpoint": Workflow("async-endpoint").add_stage(asking("async-desk"), id="s"),
    "compensation": undone("compensation", touching("compensation")),
    "async compensation": undone("async compensation", lambda context: awaited("async compensation")),
    "compensate of a class": Workflow("class-undone").add_stage(Handler, id="s").add_stage(fail),
    "compensation of an item": Workflow("items-undone")
    .add_map("s", nothing, over=lambda context: [1, 2, 3], compensation=touching("compensation of an item"))
    .add_stage(fail),
}
globals().update({f"flow_{number}": one for number, one in enumerate(FLOWS.values())})


@pytest.fixture(scope="module")
def runtime(serve: Callable[..., Runtime]) -> Runtime:
    return serve(
        *FLOWS.values(),
        initializer=initialize,
        services={"service": make_service},
        endpoints={"desk": endpoint, "async-desk": (async_endpoint, {"concurrency": 3}), "quiet": lambda command: 1},
    )


INSTANCES = 3


@pytest.fixture(scope="module")
def ended(runtime: Runtime) -> list[Any]:
    """All instances of all workflows have ended: they run beside each other."""
    submitted = [runtime.submit_many(flow, [{} for _ in range(INSTANCES)]) for flow in FLOWS.values()]
    for instance in submitted[list(FLOWS).index("on_signal")]:
        instance.signal("s", 1)
    return [instance.result(60) for instances in submitted for instance in instances]


@pytest.mark.parametrize("place", FLOWS)
def test_no_message_sees_what_another_one_has_set(ended: list[Any], place: str) -> None:
    seen = noted("seen", place)
    assert len(seen) >= INSTANCES
    assert [line for line in seen if line[:3] != ("True", *INITIAL)] == []


@pytest.mark.parametrize("place", FLOWS)
def test_no_message_in_this_process_leaves_anything_behind(place: str) -> None:
    signals = {"s": 1} if place == "on_signal" else None
    endpoints = {"desk": endpoint, "async-desk": async_endpoint, "quiet": lambda command: 1}
    before = len(noted("seen", place))
    for _ in range(2):
        run(FLOWS[place], {}, signals=signals, endpoints=endpoints, services={"service": make_service})
    seen = noted("seen", place)[before:]
    assert len(seen) >= 2
    assert [line for line in seen if line[:2] != ("True", "nobody")] == []
    assert [current.get(), bound.get(), decimal.getcontext().prec] == CLEAN[:3]


def test_a_service_is_made_in_the_context_that_the_initializer_left(ended: list[Any]) -> None:
    made = [result.stages[0].data for result in ended if result.workflow_id == "service"]
    assert made == ["made for of the initializer"] * INSTANCES


# the copy itself


def test_a_copy_holds_what_was_set_before_it_and_no_copy_holds_what_was_set_in_another() -> None:
    def prepare() -> BaseContext:
        current.set("of the initializer")
        decimal.getcontext().prec = 50
        return BaseContext()

    def look() -> tuple[str | None, int]:
        return current.get(), decimal.getcontext().prec

    def change() -> None:
        current.set("changed")
        decimal.getcontext().prec = 3

    base = contextvars.Context().run(prepare)
    for _ in range(3):
        copied = base.copy()
        assert copied.run(look) == ("of the initializer", 50)
        copied.run(change)
        assert copied.run(look) == ("changed", 3)
    with ThreadPoolExecutor(2) as threads:
        assert threads.submit(lambda: base.copy().run(look)).result(10) == ("of the initializer", 50)


def test_without_a_context_of_decimal_each_copy_gets_a_new_one() -> None:
    def change() -> int:
        before = decimal.getcontext().prec
        decimal.getcontext().prec = 3
        return before

    base = contextvars.Context().run(BaseContext)
    expected = decimal.DefaultContext.prec
    assert [base.copy().run(change) for _ in range(3)] == [expected] * 3


def test_what_code_does_after_the_copy_was_taken_is_not_in_it() -> None:
    def prepare() -> tuple[BaseContext, contextvars.Context]:
        decimal.getcontext().prec = 50
        base = BaseContext()
        decimal.getcontext().prec = 7
        current.set("later")
        return base, base.copy()

    _, copied = contextvars.Context().run(prepare)
    assert copied.run(lambda: (current.get(), decimal.getcontext().prec)) == (None, 50)
