"""Services as they are provided: which ones a factory takes, in which order they are made, and what is refused."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from stageflow_actors import Runtime, Workflow, WorkflowDefinitionError
from stageflow_actors.definition.services import inspect_services, select_services
from stageflow_actors.testing import run


def plain(url: str, pool: Any = None) -> Any: ...
def by_position(url: str, /, *, token: str) -> Any: ...
def rest(*args: Any, **options: Any) -> Any: ...
def none() -> Any: ...


def generator(url: str) -> Iterator[Any]:
    yield url


@contextmanager
def manager(url: str) -> Iterator[Any]:
    yield url


async def coroutine(url: str) -> Any: ...


@functools.wraps(plain)
def decorated(*args: Any, **options: Any) -> Any:
    return plain(*args, **options)


class Bank:
    def __init__(self, url: str, retries: int = 3) -> None: ...

    def make(self, token: str) -> Any: ...


class Factory:
    def __call__(self, url: str) -> Any: ...


TAKEN: dict[str, tuple[Any, tuple[str, ...]]] = {
    "plain": (plain, ("url",)),
    "by position": (by_position, ("url", "token")),
    "rest": (rest, ()),
    "none": (none, ()),
    "generator": (generator, ("url",)),
    "manager": (manager, ("url",)),
    "coroutine": (coroutine, ("url",)),
    "decorated": (decorated, ("url",)),
    "class": (Bank, ("url",)),
    "method": (Bank("u").make, ("token",)),
    "object with __call__": (Factory(), ("url",)),
    "lambda": (lambda url, retries=3: None, ("url",)),
    "partial": (functools.partial(plain, "u"), ()),
    "partial by keyword": (functools.partial(by_position, token="t"), ("url",)),
    "builtin class": (dict, ()),
}


@pytest.mark.parametrize("form", TAKEN)
def test_the_parameters_of_a_factory_without_a_default_are_services(form: str) -> None:
    factory, names = TAKEN[form]
    assert inspect_services({"bank": factory})["bank"].takes == names


@pytest.mark.parametrize("value", [5, "text", None, {"a": 1}, [1], object()])
def test_what_cannot_be_called_is_a_value(value: Any) -> None:
    source = inspect_services({"limit": value})["limit"]
    assert source.is_value
    assert source.given is value


def test_each_service_comes_behind_those_that_its_factory_takes() -> None:
    sources = inspect_services({"c": lambda b, a: None, "b": lambda a: None, "other": dict, "a": 1})
    assert list(select_services(["c"], sources)) == ["a", "b", "c"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"bank": plain}, "service 'bank', plain, has the parameter 'url', and no service of that name"),
    "missing below": (
        {"bank": plain, "url": Bank("u").make},
        "service 'url', Bank.make, has the parameter 'token', and no service",
    ),
    "itself": ({"bank": lambda bank: None}, "service 'bank' needs itself: 'bank' takes 'bank'"),
    "circle": (
        {"bank": lambda url: None, "url": lambda bank: None},
        "service 'bank' needs itself: 'bank' takes 'url', 'url' takes 'bank'",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_factory_that_cannot_be_called_is_refused_by_start_before_any_process(mistake: str, tmp_path: Any) -> None:
    services, words = REFUSED[mistake]
    flow = Workflow("flow").add_stage(lambda order, bank: None, id="pay")
    runtime = Runtime(flow, data_dir=tmp_path / "data", services=services)
    with pytest.raises(WorkflowDefinitionError, match=words):
        runtime.start()
    assert not (tmp_path / "data").exists()
    with pytest.raises(WorkflowDefinitionError, match=words):
        run(flow, {}, services=services)


@pytest.mark.parametrize("given", [["bank"], "bank", dict, 5])
def test_services_that_are_no_mapping_are_refused(given: Any) -> None:
    flow = Workflow("flow").add_stage(lambda order: None)
    words = r'services are factories or values by name, as in services={"bank": Bank}, not'
    with pytest.raises(WorkflowDefinitionError, match=words):
        Runtime(flow, services=given)
    with pytest.raises(WorkflowDefinitionError, match=words):
        run(flow, {}, services=given)


class Client:
    def __init__(self) -> None:
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (threading.Lock(), r"service 'bank' \(_thread.lock\)"),
        (Client(), r"service 'bank'.lock \(_thread.lock\)"),
        ({"a": [threading.Lock()]}, r"service 'bank'\['a'\]\[0\] \(_thread.lock\)"),
    ],
)
def test_a_value_that_cannot_be_sent_is_refused_by_start_with_advice(value: Any, named: str, tmp_path: Any) -> None:
    flow = Workflow("flow").add_stage(lambda order, bank: None, id="pay")
    advice = r'Give a factory in place of the value, Runtime\(services={"bank": factory}\)'
    with pytest.raises(WorkflowDefinitionError, match=f"^stage 'pay' of workflow 'flow': {named} cannot .*{advice}"):
        Runtime(flow, data_dir=tmp_path / "data", services={"bank": value}).start()
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("factory", [lambda ctx: None, lambda ctx=None: None])
def test_a_factory_that_asks_for_ctx_is_refused(factory: Any) -> None:
    with pytest.raises(WorkflowDefinitionError, match=r"service 'bank', .* asks for ctx, and only handlers"):
        Runtime(Workflow("flow").add_stage(lambda order: None), services={"bank": factory})
