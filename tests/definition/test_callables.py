"""Functions other than handlers are inspected where the workflow is defined."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest

from stageflow_actors import Compensation, Retry, Runtime, Stage, Workflow, WorkflowDefinitionError
from stageflow_actors.definition.callables import check_function
from stageflow_actors.testing import run

DO = Stage(lambda order: None, id="do")
TWO = [DO, Stage(lambda order: None, id="too")]


def retried(policy: Any) -> Workflow[Any]:
    return flow().add_stage(Stage(lambda order: None, id="x", retry=policy))


class Policy:
    def __init__(self, next_delay: Any) -> None:
        self.next_delay = next_delay


def flow() -> Workflow[Any]:
    return Workflow("flow")


PLACES: dict[str, tuple[int, str, Callable[[Any], Any]]] = {
    "when": (1, "when of stage 'do'", lambda f: Stage(lambda order: None, id="do", when=f)),
    "add_conditional": (1, "when of stage 'do'", lambda f: flow().add_conditional(lambda order: None, id="do", when=f)),
    "add_conditional of a stage": (1, "when of stage 'do'", lambda f: flow().add_conditional(DO, when=f)),
    "selector": (1, "the selector of branch 'b'", lambda f: flow().add_branch("b", f, {"a": [DO]})),
    "over": (1, "over of map stage 'm'", lambda f: flow().add_map("m", lambda item: item, over=f)),
    "merge": (2, "merge of 'p'", lambda f: flow().add_parallel("p", TWO, merge=f)),
    "on_signal": (2, "on_signal of signal stage 's'", lambda f: flow().add_signal("s", on_signal=f)),
    "command": (1, "command of remote stage 'r'", lambda f: flow().add_remote_stage("r", endpoint="e", command=f)),
    "on_reply": (
        2,
        "on_reply of remote stage 'r'",
        lambda f: flow().add_remote_stage("r", endpoint="e", command=len, on_reply=f),
    ),
    "url": (1, "url of HTTP stage 'h'", lambda f: flow().add_http_stage("h", url=f)),
    "request": (1, "request of HTTP stage 'h'", lambda f: flow().add_http_stage("h", url="http://x/", request=f)),
    "headers": (1, "headers of HTTP stage 'h'", lambda f: flow().add_http_stage("h", url="http://x/", headers=f)),
    "on_response": (
        2,
        "on_response of HTTP stage 'h'",
        lambda f: flow().add_http_stage("h", url="http://x/", on_response=f),
    ),
    "compensation": (
        1,
        "request of the compensation POST http://x/",
        lambda f: Compensation.http("http://x/", request=f),
    ),
    "retry_on": (1, "a predicate in retry_on of Retry.fixed", lambda f: Retry.fixed(2, 0, retry_on=f)),
    "abort_on": (1, "a predicate in abort_on of Retry.fixed", lambda f: Retry.fixed(2, 0, abort_on=(ValueError, f))),
    "next_delay": (2, "next_delay of the retry of stage 'x'", lambda f: retried(Policy(f))),
    "initializer": (0, "initializer", lambda f: Runtime(flow().add_stage(DO), initializer=f)),
}

WITHOUT_CTX = ("retry_on", "abort_on", "next_delay", "initializer")
"""The places whose functions never receive a StageContext."""

CLASHES: dict[str, tuple[str, str, str]] = {
    # the callable, with ARGS for its expected arguments; the message
    "async": ("async def given(ARGS): return False", "given", "its result is not awaited: use a plain function of "),
    "async generator": ("async def given(ARGS): yield 1", "given", "its result is not awaited"),
    "generator": ("def given(ARGS): yield 1", "given", "calling it would run nothing"),
    "async method": (
        "class Given:\n  async def __call__(self, ARGS): pass\ngiven = Given()",
        "Given",
        "its result is not awaited",
    ),
    "partial of async": (
        "async def plain(ARGS, last): pass\ngiven = functools.partial(plain, last=1)",
        "plain",
        "its result is not awaited",
    ),
    "too many": ("def given(ARGS, more): pass", "given", "does not fit: it is called with .*more"),
    "ctx": ("def given(ARGS, ctx): pass", "given", "asks for ctx, and only handlers receive a StageContext"),
    "ctx with a default": ("def given(ARGS, ctx=None): pass", "given", "asks for ctx, and only handlers"),
    "service": (
        "def given(ARGS, *, bank): pass",
        "given",
        "asks for 'bank' by keyword, and only handlers receive se",
    ),
}


def arguments(number: int) -> str:
    return ", ".join(f"a{at}" for at in range(number))


def made(code: str, takes: int) -> Any:
    names: dict[str, Any] = {"functools": functools}
    exec(code.replace("ARGS, " if not takes else "ARGS", arguments(takes)), names)
    return names["given"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("clash", CLASHES)
def test_what_could_not_work_is_refused_where_it_is_defined(place: str, clash: str) -> None:
    takes, what, define = PLACES[place]
    code, name, said = CLASHES[clash]
    if clash.startswith("ctx") and place not in WITHOUT_CTX:
        define(made(code, takes))  # it receives the StageContext
        return
    if (place, clash) == ("over", "generator"):
        return  # it is iterated over, which runs it
    if not takes:
        code = code.replace("self, ARGS", "self").replace("(ARGS)", "()")
    with pytest.raises(WorkflowDefinitionError, match=f"{what}.*{name}.*{said}"):
        define(made(code, takes))


@pytest.mark.parametrize("place", [place for place, (takes, _, _) in PLACES.items() if takes == 2])
def test_ctx_in_the_place_of_a_value_is_refused_with_the_signature_to_write(place: str) -> None:
    if place in WITHOUT_CTX:
        return
    with pytest.raises(WorkflowDefinitionError, match=r"has ctx where it receives the \w+: write \(\w+, \w+, ctx\)"):
        PLACES[place][2](lambda order, ctx: None)


@pytest.mark.parametrize("place", [place for place, (takes, _, _) in PLACES.items() if takes])
def test_a_function_of_too_few_is_refused(place: str) -> None:
    takes, what, define = PLACES[place]
    said = f"{what}, <lambda>, does not fit: .*(it has no parameters|its parameters are)"
    with pytest.raises(WorkflowDefinitionError, match=said):
        define(made(f"given = lambda {arguments(takes - 1)}: None", takes))


class Chooses:
    def __call__(self, order: Any) -> str:
        return "a"

    def method(self, order: Any) -> str:
        return "a"


def given_more(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(order: Any) -> Any:
        return function(order, "a")

    return wrapper


@given_more
def decorated(order: Any, more: str) -> str:
    return more


def yields(order: Any) -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    "given",
    [
        lambda order: "a",
        lambda *order: "a",
        lambda order, key="a", *, other=1: key,
        lambda ctx: "a",
        functools.partial(lambda key, order: key, "a"),
        Chooses(),
        Chooses().method,
        decorated,
        operator.itemgetter("kind"),
        {"a": 1}.get,
        str,
        bool,
        len,
        Mock(return_value="a"),
    ],
)
def test_whatever_can_be_called_with_it_is_taken(given: Any) -> None:
    assert check_function(given, "the selector") is given


def test_over_may_yield_the_items() -> None:
    assert run(flow().add_map("m", lambda item: item, over=yields, into="all"), {}).context["all"] == [1]


@pytest.mark.parametrize("given", [dict, type("Bank", (), {}), lambda: 1, Mock()])
def test_an_initializer_takes_nothing(given: Any) -> None:
    Runtime(flow().add_stage(DO), initializer=given)


def test_what_is_done_when_no_signal_came_is_given_the_context_alone_and_may_be_async() -> None:
    def with_ctx(order: Any, ctx: Any) -> None: ...

    def with_service(order: Any, *, bank: Any) -> None: ...

    class WithService:
        def __init__(self, *, bank: Any) -> None: ...

        def execute(self, order: Any) -> None: ...

    async def late(order: Any) -> None:
        order["late"] = True

    flow().add_signal("s", timeout=1, on_timeout=with_ctx)  # type: ignore[arg-type]
    for given, said in (
        (with_service, "asks for the service 'bank', and receives only the context"),
        (WithService, "asks for the service 'bank'"),
        (yields, "is a generator"),
        (lambda: None, "takes no context"),
    ):
        with pytest.raises(WorkflowDefinitionError, match=f"on_timeout of signal stage 's' .*{said}"):
            flow().add_signal("s", timeout=1, on_timeout=given)  # type: ignore[arg-type]
    assert run(flow().add_signal("s", timeout=1, on_timeout=late), {}).context == {"late": True}
