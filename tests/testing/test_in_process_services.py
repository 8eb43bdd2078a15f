"""Services of `testing.run`: made before the instance starts, closed at the end of the run, as in a worker."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from stageflow_actors import StageFlowError, Workflow
from stageflow_actors.definition.handler import inspect_handler
from stageflow_actors.definition.services import inspect_services
from stageflow_actors.runtime.worker.services import services_on_loop
from stageflow_actors.testing import run

LOG: list[str] = []


@pytest.fixture(autouse=True)
def log() -> list[str]:
    LOG.clear()
    return LOG


class Closing:
    def __init__(self, name: str = "closing") -> None:
        self.name = name
        LOG.append(f"made {name}")

    def close(self) -> None:
        LOG.append(f"closed {self.name}")


def generator() -> Iterator[Closing]:
    yield Closing("generator")
    LOG.append("closed generator")


@contextlib.asynccontextmanager
async def client(generator: Closing) -> AsyncIterator[Any]:
    asyncio.get_running_loop()
    LOG.append("made client")
    yield generator
    LOG.append("closed client")


def plain(context: dict[str, Any], closing: Any, client: Any) -> None:
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()
    LOG.append(f"handled {client.name}")


async def asynchronous(context: dict[str, Any], closing: Any, client: Any) -> None:
    await asyncio.sleep(0)
    LOG.append(f"handled {client.name}")


def failing(context: dict[str, Any], closing: Any, client: Any) -> None:
    LOG.append(f"handled {client.name}")
    raise ValueError("boom")


@pytest.mark.parametrize("handler", [plain, asynchronous, failing])
def test_services_are_closed_in_reverse_order_at_the_end_of_the_run(handler: Any) -> None:
    services = {"closing": Closing, "client": client, "generator": generator, "unneeded": Closing}
    run(Workflow("flow").add_stage(handler), {}, services=services)
    assert LOG == [
        "made closing",
        "made generator",
        "made client",
        "handled generator",
        "closed client",
        "closed generator",
        "closed closing",
    ]


def test_services_that_were_made_before_one_fails_are_closed() -> None:
    def broken(closing: Any) -> Any:
        raise ConnectionError("no database")

    with pytest.raises(ConnectionError, match="no database") as raised:
        run(Workflow("flow").add_stage(lambda order, broken: None), {}, services={"broken": broken, "closing": Closing})
    assert LOG == ["made closing", "closed closing"]
    assert raised.value.__notes__ == ["(raised while service 'broken' was made)"]


def test_a_close_that_fails_is_logged_once_and_the_others_are_closed(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ConnectionError("gone")

    flow = Workflow("flow").add_stage(lambda order, closing, broken: None)
    with caplog.at_level(logging.WARNING):
        assert run(flow, {}, services={"closing": Closing, "broken": broken}).success
    assert [record.getMessage() for record in caplog.records] == [
        "service 'broken' could not be closed: ConnectionError('gone')"
    ]
    assert caplog.records[0].exc_info is not None
    assert LOG == ["made closing", "closed closing"]


def test_a_generator_that_yields_nothing_is_named() -> None:
    def nothing() -> Iterator[int]:
        yield from ()

    with pytest.raises(RuntimeError, match="didn't yield") as raised:
        run(Workflow("flow").add_stage(lambda order, nothing: None), {}, services={"nothing": nothing})
    assert raised.value.__notes__ == ["(raised while service 'nothing' was made)"]


@pytest.mark.parametrize("value", [5, None, "text", Closing("value")])
def test_a_value_is_passed_as_it_is_and_not_closed(value: Any) -> None:
    LOG.clear()
    found = []
    run(Workflow("flow").add_stage(lambda order, value: found.append(value)), {}, services={"value": value})
    assert found == [value]
    assert LOG == []


def test_a_service_that_is_another_one_is_closed_once() -> None:
    flow = Workflow("flow").add_stage(lambda order, closing, alias, value: None)
    given = Closing("given")
    LOG.clear()
    services = {"closing": Closing, "alias": lambda closing: closing, "given": given, "value": lambda given: given}
    run(flow, {}, services=services)
    assert LOG == ["made closing", "closed closing"]


def test_async_services_inside_a_running_loop_are_refused_with_advice() -> None:
    async def test() -> None:
        services = {"client": client, "generator": generator}
        run(Workflow("flow").add_stage(lambda order, client: None), {}, services=services)

    with pytest.raises(StageFlowError, match="call it in a thread") as raised:
        asyncio.run(test())
    assert raised.value.__notes__ == ["(raised while service 'client' was made)"]
    assert LOG == ["made generator", "closed generator"]


def wrapper(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        return function(*args, **options)

    return call


class Callable:
    async def __call__(self, context: dict[str, Any], client: Any) -> None: ...


class Executes:
    async def execute(self, context: dict[str, Any], client: Any) -> None: ...


@pytest.mark.parametrize(
    ("handler", "on_loop"),
    [
        (plain, set()),
        (asynchronous, {"closing", "client", "generator"}),
        (wrapper(asynchronous), {"closing", "client", "generator"}),
        (wrapper(wrapper(asynchronous)), {"closing", "client", "generator"}),
        (functools.partial(wrapper(asynchronous), closing=1), {"client", "generator"}),
        (Callable(), {"client", "generator"}),
        (Executes(), {"client", "generator"}),
        (Executes, {"client", "generator"}),
        (wrapper(plain), set()),
    ],
)
def test_services_of_handlers_that_are_declared_async_are_made_on_their_loop(handler: Any, on_loop: set[str]) -> None:
    sources = inspect_services({"closing": Closing, "client": client, "generator": generator, "other": Closing})
    assert services_on_loop([inspect_handler(handler, "stage 's'")], sources) == on_loop
