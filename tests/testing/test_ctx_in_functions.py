"""Predicates, selectors, `over`, `merge` and the functions of requests and replies receive `ctx` where they ask."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from stageflow_actors import Stage, StageContext, Workflow
from stageflow_actors.testing import run


def seen(ctx: StageContext) -> list[Any]:
    return [ctx.stage_id, ctx.attempt, dict(ctx.results)]


def first(order: Any) -> str:
    return "kept"


def start() -> Workflow[Any]:
    return Workflow("flow").add_stage(first)


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def note(order: Any, ctx: StageContext, value: Any) -> Any:
    order.setdefault("seen", []).append(seen(ctx))
    return value


def when(order: Any, ctx: StageContext) -> bool:
    return note(order, ctx, True)  # type: ignore[no-any-return]


def by_keyword(order: Any, *, ctx: StageContext) -> bool:
    return note(order, ctx, True)  # type: ignore[no-any-return]


def merge(base: Any, branches: Any, ctx: StageContext) -> Any:
    base["seen"] = [[ctx.stage_id, ctx.attempt, {"first": ctx.results["first"]}]]


def on_signal(order: Any, payload: Any, ctx: StageContext) -> None:
    note(order, ctx, None)


def on_timeout(order: Any, ctx: StageContext) -> None:
    note(order, ctx, None)


def on_reply(order: Any, reply: Any, ctx: StageContext) -> None:
    note(order, ctx, None)
    order["reply"] = reply


TWO = [Stage(lambda order: None, id="a"), Stage(lambda order: None, id="b")]
ONE = [Stage(lambda order: None, id="a")]


@pytest.mark.parametrize(
    ("build", "stage"),
    [
        (lambda: start().add_stage(lambda order: None, id="x", when=when), "x"),
        (lambda: start().add_conditional(lambda order: None, id="x", when=by_keyword), "x"),
        (lambda: start().add_stage(lambda order: None, id="x", when=logged(when)), "x"),
        (lambda: start().add_stage(lambda order: None, id="x", when=functools.partial(when)), "x"),
        (lambda: start().add_parallel("x", TWO, merge=merge), "x"),
        (lambda: start().add_signal("x", on_signal=on_signal), "x"),
        (lambda: start().add_signal("y", timeout=1, on_timeout=on_timeout), "y"),
        (lambda: start().add_remote_stage("x", endpoint="e", command=lambda o, ctx: seen(ctx), on_reply=on_reply), "x"),
    ],
)
def test_a_function_that_asks_for_ctx_receives_that_of_its_stage(build: Callable[[], Any], stage: str) -> None:
    signals = {"x": 1} if any(type(step).__name__ == "Signal" and step.id == "x" for step in build().steps) else None
    result = run(build(), {}, endpoints={"e": lambda command: command}, signals=signals)
    assert result.success, result.error
    assert result.context["seen"] == [[stage, 1, {"first": "kept"}]]
    assert result.context.get("reply") in (None, result.context["seen"][0])


def test_selectors_and_over_read_the_results_of_earlier_stages() -> None:
    flow = start().add_branch("x", lambda order, ctx: ctx.results["first"], {"kept": ONE, "other": []})
    assert [stage.stage_id for stage in run(flow, {}).stages] == ["first", "x", "a"]
    flow = start().add_map("x", lambda item: item, over=lambda order, ctx: list(ctx.results["first"]), into="all")
    assert run(flow, {}).context["all"] == ["k", "e", "p", "t"]


@pytest.fixture
def echo() -> Iterator[str]:
    class Echo(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["content-length"])))
            body = json.dumps([self.path, self.headers["X-Stage"], sent]).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_each_function_of_an_http_stage_receives_ctx(echo: str) -> None:
    def keep(order: Any, response: Any, ctx: StageContext) -> None:
        order["got"] = [ctx.stage_id, *response]

    flow = start().add_http_stage(
        "x",
        url=lambda order, ctx: f"{echo}/{ctx.stage_id}",
        request=lambda order, ctx: {"key": ctx.results["first"]},
        headers=lambda order, *, ctx: {"X-Stage": ctx.stage_id},
        on_response=keep,
    )
    assert run(flow, {}).context["got"] == ["x", "/x", "x", {"key": "kept"}]


def test_a_request_made_in_on_reply_is_refused() -> None:
    def ask(order: Any, reply: Any, ctx: StageContext) -> None:
        ctx.request("e", 1)

    flow = start().add_remote_stage("x", endpoint="e", command=lambda order: 1, on_reply=ask)
    error = str(run(flow, {}, endpoints={"e": lambda command: command}).error)
    assert "on_reply of 'x' made ctx.request('e', ...), and the request is not sent" in error
