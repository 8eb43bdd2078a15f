"""Services in workers: every form of them is made, and closed whichever way the worker ends."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from effect_log import note, noted

from stageflow_actors import Runtime, Workflow


def record(*words: str) -> None:
    note(os.environ["HANDLER"], os.environ["END"], *words)


def running_loop() -> str:
    """Return whether a loop runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return "no loop"
    return "loop"


class Made:
    """A service without a way to close it; says where it was made."""

    def __init__(self, form: str) -> None:
        self.form = form
        record("made", form, running_loop())

    def closed(self) -> None:
        record("closed", self.form, running_loop())


class Close(Made):
    def __init__(self) -> None:
        super().__init__("close")

    def close(self) -> None:
        self.closed()


class CloseAsync(Made):
    def __init__(self) -> None:
        super().__init__("close_async")

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.closed()


class Aclose(Made):
    def __init__(self) -> None:
        super().__init__("aclose")

    async def aclose(self) -> None:
        self.closed()


class CloseOfOthers(Made):
    """Its `close` is not for the service itself: it takes what to close."""

    def __init__(self) -> None:
        super().__init__("close_of_others")

    def close(self, number: int) -> None:
        record("wrong", "close_of_others")


class Entered(Made):
    """Entered by handlers; at the end it is closed."""

    def __init__(self) -> None:
        super().__init__("entered")

    def __enter__(self) -> Any:
        record("wrong", "entered")
        return self

    def __exit__(self, *error: object) -> None:
        record("wrong", "exited")

    def close(self) -> None:
        self.closed()


def opened(form: str) -> Iterator[Made]:
    made = Made(form)
    try:
        yield made
    finally:
        made.closed()


def generator() -> Iterator[Made]:
    yield from opened("generator")


@contextlib.contextmanager
def manager() -> Iterator[Made]:
    yield from opened("manager")


async def opened_async(form: str) -> AsyncIterator[Made]:
    made = Made(form)
    entered = asyncio.current_task()
    async with asyncio.timeout(None):  # may only be left by the task that has entered it
        yield made
    assert asyncio.current_task() is entered
    made.closed()


async def async_generator() -> AsyncIterator[Made]:
    async for made in opened_async("async_generator"):
        yield made


@contextlib.asynccontextmanager
async def async_manager() -> AsyncIterator[Made]:
    async with contextlib.aclosing(opened_async("async_manager")) as each:  # type: ignore[type-var]
        made = await anext(each)
        yield made
        with contextlib.suppress(StopAsyncIteration):
            await anext(each)


class Closed:
    def __init__(self, made: Made) -> None:
        self._made = made

    def close(self) -> None:
        self._made.closed()


async def coroutine() -> Closed:
    await asyncio.sleep(0)
    return Closed(Made("coroutine"))


class Factory:
    def __init__(self, form: str) -> None:
        self.form = form

    def __call__(self) -> Iterator[Made]:
        yield from opened(self.form)

    def make(self) -> Iterator[Made]:
        yield from opened(self.form)


def over_others(generator: Made, limit: int, *, coroutine: Any, unset: int = 3) -> Iterator[Made]:
    assert (generator.form, limit, unset) == ("generator", 5, 3)
    yield from opened("over_others")


def alias(close: Close) -> Close:
    record("made", "alias", running_loop())
    return close


class Failing(Made):
    def __init__(self) -> None:
        super().__init__("failing")

    def close(self) -> None:
        self.closed()
        raise ConnectionError("gone")


def yields_twice() -> Iterator[Made]:
    made = Made("yields_twice")
    yield made
    made.closed()
    yield made


class Value:
    def close(self) -> None:
        record("wrong", "a value is closed")


FACTORIES: dict[str, Any] = {
    "over_others": over_others,
    "close": Close,
    "close_async": CloseAsync,
    "aclose": Aclose,
    "entered": Entered,
    "generator": generator,
    "manager": manager,
    "async_generator": async_generator,
    "async_manager": async_manager,
    "coroutine": coroutine,
    "partial": functools.partial(opened, "partial"),
    "function_in_a_lambda": lambda: opened("function_in_a_lambda"),
    "callable_object": Factory("callable_object"),
    "method": Factory("method").make,
    "failing": Failing,
    "yields_twice": yields_twice,
}
UNCLOSED: dict[str, Any] = {
    "close_of_others": CloseOfOthers,
    "alias": alias,
    "plain": lambda: Made("plain"),
    "limit": 5,
    "value": Value(),
}


def check(services: dict[str, Any]) -> None:
    assert services["limit"] == 5
    assert services["alias"] is services["close"]
    assert isinstance(services["value"], Value)
    assert services["plain"].form == "plain"
    assert services["over_others"].form == "over_others"
    assert services["async_manager"].form == "async_manager"


def use(
    context: dict[str, Any], over_others: Any, close: Any, close_async: Any, aclose: Any, entered: Any, generator: Any,
    manager: Any, async_generator: Any, async_manager: Any, coroutine: Any, partial: Any, *, function_in_a_lambda: Any,
    callable_object: Any = None, method: Any, failing: Any, yields_twice: Any, close_of_others: Any = None, alias: Any,
    plain: Any, limit: Any = 4, value: Any,
) -> str:  # fmt: skip
    check(locals())
    return running_loop()


@functools.wraps(use)
async def use_async(context: dict[str, Any], **services: Any) -> str:
    check(services)
    loop = asyncio.get_running_loop()
    assert loop is (await asyncio.create_task(asyncio.sleep(0, asyncio.get_running_loop())))
    return running_loop()


def decorated(function: Any) -> Any:
    """A plain decorator: it hides that the function is async."""

    @functools.wraps(function)
    def call(context: dict[str, Any], **services: Any) -> Any:
        assert running_loop() == "no loop"
        return function(context, **services)

    return call


HANDLERS = {"plain": use, "async": use_async, "threads": use, "hidden": decorated(use_async)}
HANDLERS["hidden_in_threads"] = HANDLERS["hidden"]
ENDS = ("stopped", "scaled", "recycled")
CASES = [*((kind, end) for kind in ("plain", "async") for end in ENDS)]
CASES += [(kind, "stopped") for kind in HANDLERS if kind not in ("plain", "async")]
WORKERS = {"stopped": 1, "scaled": 2, "recycled": 2}
"""A recycled worker has a successor, which ends by the stop."""

Log = dict[tuple[str, str], list[tuple[str, ...]]]


@pytest.fixture(scope="module")
def log(serve: Any, eventually: Any) -> Log:
    """The effects of workers, by kind of handler and kind of end."""
    flows = {
        (kind, end): Workflow(f"{kind}-{end}").add_stage(
            HANDLERS[kind],
            id="s",
            concurrency=2 if kind.endswith("threads") else 1,
            actors=2 if end == "scaled" else 1,
            max_tasks=1 if end == "recycled" else None,
            env={"HANDLER": kind, "END": end},
        )
        for kind, end in CASES
    }
    runtime: Runtime = serve(*flows.values(), services={**FACTORIES, **UNCLOSED})
    for (kind, _), flow in flows.items():
        result = runtime.execute(flow, {}, timeout=60)
        assert result.success, result.error
        assert result.stages[0].data == where(kind)

    def count(word: str, form: str, end: str) -> int:
        return sum(effect[:2] == (word, form) for kind in HANDLERS for effect in noted(kind, end))

    eventually(lambda: count("made", "plain", "scaled") == 4, "both workers have started")
    for (_, end), flow in flows.items():
        if end == "scaled":
            runtime.scale(flow, "s", 0)
    eventually(lambda: count("closed", "over_others", "scaled") == 4, "both workers have ended")
    eventually(lambda: count("made", "plain", "recycled") == 4, "the successors have started")
    assert count("closed", "over_others", "recycled") == 2
    assert count("closed", "over_others", "stopped") == 0
    runtime.stop()
    return {(kind, end): noted(kind, end) for kind, end in flows}


def where(kind: str) -> str:
    return "no loop" if kind in ("plain", "threads") else "loop"


MADE_ON_LOOP = {"async_generator", "async_manager", "coroutine"}
CLOSED_ON_LOOP = {"close_async", "aclose", "async_generator", "async_manager"}
"""Where handlers are plain. Of async handlers, all services are made and closed on their loop."""


@pytest.mark.parametrize(("kind", "end"), CASES)
@pytest.mark.parametrize("form", FACTORIES)
def test_a_service_is_made_once_and_closed_once(form: str, kind: str, end: str, log: Log) -> None:
    effects = [effect for effect in log[kind, end] if effect[1] == form]
    made = ("made", form, "loop" if form in MADE_ON_LOOP else where(kind))
    closed = ("closed", form, "loop" if form in CLOSED_ON_LOOP else where(kind))
    assert sorted(effects) == sorted([made, closed] * WORKERS[end])


@pytest.mark.parametrize(("kind", "end"), CASES)
def test_what_is_no_resource_is_left_alone(kind: str, end: str, log: Log) -> None:
    assert [effect for effect in log[kind, end] if effect[0] == "wrong"] == []
    assert {effect[1] for effect in log[kind, end] if effect[0] == "closed"} == set(FACTORIES)


@pytest.mark.parametrize("kind", HANDLERS)
def test_services_are_closed_in_reverse_order(kind: str, log: Log) -> None:
    effects = log[kind, "stopped"]
    made = [effect[1] for effect in effects if effect[0] == "made" and effect[1] in FACTORIES]
    closed = [effect[1] for effect in effects if effect[0] == "closed"]
    assert closed == made[::-1]
    assert made.index("over_others") > max(made.index("generator"), made.index("coroutine"))
