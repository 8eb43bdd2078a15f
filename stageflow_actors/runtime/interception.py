"""Interceptors: the user's code around each call of a handler, in the worker, the outermost first.

A handler with interceptors is one function of (context, ctx) like any other, which gives (result, context). Where there
are none nothing here is in the way.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from stageflow_actors.definition.handler import BoundCall
from stageflow_actors.definition.stage import Replace
from stageflow_actors.errors import WorkflowDefinitionError
from stageflow_actors.runtime.context import StageContext

__all__ = ["COMPENSATION", "STAGE", "StageCall", "around_methods", "check_interceptors", "wrap_handler"]

STAGE, COMPENSATION = "around_stage", "around_compensation"
"""The methods that an interceptor may have."""

Next = Callable[["StageCall"], Any]


class StageCall:
    """One attempt of one handler, as an interceptor sees it.

    `kind` is `stage`, `item` (of a map stage), `endpoint` or `compensation`. `context` is what the handler is given:
    the workflow's context, the item, or the command. Another one in its place before `next(call)` is what the handler
    gets; behind it, `call.context` is as the handler left it, and what it is in the end goes on to the next stage.
    `ctx` is the handler's `StageContext`.
    """

    __slots__ = ("attempt", "context", "ctx", "instance_id", "kind", "stage_id", "workflow_id")

    def __init__(self, kind: str, context: Any, ctx: StageContext) -> None:
        self.kind = kind
        self.workflow_id = ctx.workflow_id
        self.instance_id = ctx.instance_id
        self.stage_id = ctx.stage_id
        self.attempt = ctx.attempt
        self.context = context
        self.ctx = ctx

    def __repr__(self) -> str:
        return f"StageCall({self.kind} {self.workflow_id}/{self.instance_id}/{self.stage_id}, attempt {self.attempt})"


def check_interceptors(given: Sequence[Any]) -> tuple[Any, ...]:
    """`given` if each of them has something to be called. Raises `WorkflowDefinitionError`."""
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise WorkflowDefinitionError(f"interceptors is a list of objects, not {given!r}")
    for one in given:
        if inspect.isclass(one):
            raise WorkflowDefinitionError(f"interceptor {one.__name__} is a class: give an instance of it")
        if not callable(getattr(one, STAGE, None)) and not callable(getattr(one, COMPENSATION, None)):
            raise WorkflowDefinitionError(
                f"interceptor {one!r} has neither around_stage(call, next) nor around_compensation(call, next)"
            )
    return tuple(given)


def around_methods(interceptors: Sequence[Any], method: str) -> list[Callable[..., Any]]:
    """Those methods of that name which there are, the outermost first."""
    found = (getattr(one, method, None) for one in interceptors)
    return [around for around in found if callable(around)]


def wrap_handler(
    bound: BoundCall,
    arounds: Sequence[Callable[..., Any]],
    *,
    kind: str,
    is_async: bool,
    context_type: type[Any] | None,
) -> tuple[BoundCall, bool]:
    """`bound` inside of `arounds`, as a function of (context, ctx) that gives (result, context); and whether it gives
    an awaitable of that, because the handler or one of the interceptors is async.

    `context_type` is that of the workflow, None where a result never stands for a new context.
    """

    def take(call: StageCall, value: Any) -> Any:
        if context_type is not None:
            if type(value) is Replace:
                call.context = value.value
                return None
            if context_type is not dict and isinstance(value, context_type):
                call.context = value
                return None
        return value

    def called(call: StageCall) -> Any:
        return take(call, bound(call.context, call.ctx))

    async def awaited(call: StageCall) -> Any:
        return take(call, await bound(call.context, call.ctx))

    inner: Next = awaited if is_async else called
    for around in reversed(arounds):
        if inspect.iscoroutinefunction(around) and not is_async:
            inner, is_async = _as_async(inner), True
        inner = _within(around, inner)
    outermost = inner

    def run(context: Any, ctx: StageContext) -> tuple[Any, Any]:
        call = StageCall(kind, context, ctx)
        value = outermost(call)
        return value, call.context

    async def run_async(context: Any, ctx: StageContext) -> tuple[Any, Any]:
        call = StageCall(kind, context, ctx)
        value = outermost(call)
        if inspect.isawaitable(value):  # one that is not async may have given a result instead of calling on
            value = await value
        return value, call.context

    return (run_async if is_async else run), is_async


def _within(around: Callable[..., Any], inner: Next) -> Next:
    return lambda call: around(call, inner)


def _as_async(inner: Next) -> Callable[[StageCall], Awaitable[Any]]:
    """`inner` for an async interceptor, which awaits what `next` gives."""

    async def called(call: StageCall) -> Any:
        return inner(call)

    return called
