"""Interceptors: user code around each call of a handler, in the worker, the outermost first.

An interceptor is an object with `around_stage(call, next)`, `around_compensation(call, next)`, or both; they may be
`async def`. `wrap_handler` returns a handler with interceptors as one function of (context, ctx) that returns (result,
context). A handler without interceptors never passes through this module.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from stageflow_actors.definition.handler import BoundCall
from stageflow_actors.definition.stage import Replace
from stageflow_actors.errors import WorkflowDefinitionError
from stageflow_actors.runtime.worker.awaitables import call_without_loop, is_awaitable
from stageflow_actors.runtime.worker.awaitables import finish as finish_here
from stageflow_actors.runtime.worker.stage_context import StageContext

__all__ = ["AROUND_COMPENSATION", "AROUND_STAGE", "StageCall", "around_methods", "check_interceptors", "wrap_handler"]

AROUND_STAGE, AROUND_COMPENSATION = "around_stage", "around_compensation"
"""The names of the methods of an interceptor."""

Next = Callable[["StageCall"], Any]


class StageCall:
    """One attempt of one handler, as an interceptor sees it.

    An interceptor is an object with a method `around_stage(call, next)`, a method `around_compensation(call, next)`, or
    both; `Runtime(interceptors=[...])` takes a list of them, the outermost first. `next(call)` runs the handler, or the
    next interceptor, and returns its result; the interceptor returns this or another result. An interceptor that is
    `async def` awaits `next(call)`. If the interceptor raises, the attempt fails.

    Attributes:
        kind: `"stage"`, `"item"` (of a map stage), `"endpoint"` or `"compensation"`.
        workflow_id: The id of the workflow.
        instance_id: The id of the instance.
        stage_id: The id of the stage; in a compensation, of the stage that is undone.
        attempt: The number of this attempt, from 1.
        context: The first argument of the handler: the workflow's context, the item or the command. An interceptor may
            replace it before `next(call)`. After `next(call)` it is the context as the handler left it; the context at
            the end of the outermost interceptor goes to the next stage.
        ctx: The handler's `StageContext`.

    Example:
        >>> from stageflow_actors import StageCall, Workflow
        >>> from stageflow_actors.testing import run
        >>> class Trace:
        ...     def around_stage(self, call: StageCall, next):
        ...         print("begin", call.kind, call.stage_id)
        ...         return next(call)
        >>> flow = Workflow("orders").add_stage(lambda order: "paid", id="pay")
        >>> run(flow, {}, interceptors=[Trace()]).stages[-1].data
        begin stage pay
        'paid'
    """

    __slots__ = {
        "attempt": "The number of this attempt, from 1.",
        "context": "The first argument of the handler; may be replaced.",
        "ctx": "The handler's `StageContext`.",
        "instance_id": "The id of the instance.",
        "kind": "`stage`, `item` (of a map stage), `endpoint` or `compensation`.",
        "stage_id": "The id of the stage; in a compensation, of the stage that is undone.",
        "workflow_id": "The id of the workflow.",
    }

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
    """Return the interceptors as a tuple. Raise `WorkflowDefinitionError` if one has none of the methods."""
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise WorkflowDefinitionError(f"interceptors is a list of objects, not {given!r}")
    for one in given:
        if inspect.isclass(one):
            raise WorkflowDefinitionError(f"interceptor {one.__name__} is a class: give an instance of it")
        if not callable(getattr(one, AROUND_STAGE, None)) and not callable(getattr(one, AROUND_COMPENSATION, None)):
            raise WorkflowDefinitionError(
                f"interceptor {one!r} has neither around_stage(call, next) nor around_compensation(call, next)"
            )
    return tuple(given)


def around_methods(interceptors: Sequence[Any], method: str) -> list[Callable[..., Any]]:
    """Return the methods of this name, the outermost first."""
    found = (getattr(one, method, None) for one in interceptors)
    return [around for around in found if callable(around)]


def wrap_handler(
    bound: BoundCall,
    arounds: Sequence[Callable[..., Any]],
    *,
    kind: str,
    is_async: bool,
    context_type: type[Any] | None,
    resolve: Callable[[Any], Any],
    finish: Callable[[Any], Awaitable[Any]],
) -> BoundCall:
    """Return `bound` inside of `arounds` as one function of (context, ctx) that returns (result, context).

    The function is async if the handler or one of the interceptors is. If the handler is not, it is called without a
    running loop all the same; `resolve` awaits what it returns by blocking, `finish` in a coroutine. `context_type` is
    the type of the workflow's context, or None if a result never replaces the context.
    """

    def apply_result(call: StageCall, value: Any) -> Any:
        if context_type is not None:
            if type(value) is Replace:
                call.context = value.value
                return None
            if context_type is not dict and isinstance(value, context_type):
                call.context = value
                return None
        return value

    def called(call: StageCall) -> Any:
        return apply_result(call, resolve(bound(call.context, call.ctx)))

    def called_in_loop(call: StageCall) -> Any:
        value = call_without_loop(bound, call.context, call.ctx)
        return awaited(call, value) if is_awaitable(value) else apply_result(call, value)

    async def awaited(call: StageCall, value: Any) -> Any:
        return apply_result(call, await finish(value))

    async def called_async(call: StageCall) -> Any:
        return apply_result(call, await finish(bound(call.context, call.ctx)))

    any_async = is_async or any(map(_is_async, arounds))
    inner: Next = called_async if is_async else called_in_loop if any_async else called
    for around in reversed(arounds):
        if _is_async(around) and not is_async:
            inner, is_async = _as_async(inner), True
        inner = _within(around, inner)
    outermost = inner

    def run(context: Any, ctx: StageContext) -> tuple[Any, Any]:
        call = StageCall(kind, context, ctx)
        value = resolve(outermost(call))
        return value, call.context

    async def run_async(context: Any, ctx: StageContext) -> tuple[Any, Any]:
        call = StageCall(kind, context, ctx)
        value = await finish_here(outermost(call))  # a blocking interceptor may return a result without calling `next`
        return value, call.context

    return run_async if any_async else run


def _is_async(around: Callable[..., Any]) -> bool:
    """Return True if an interceptor awaits `next(call)`, also under a plain decorator."""
    return inspect.iscoroutinefunction(around) or inspect.iscoroutinefunction(inspect.unwrap(around))


def _within(around: Callable[..., Any], inner: Next) -> Next:
    return lambda call: around(call, inner)


def _as_async(inner: Next) -> Callable[[StageCall], Awaitable[Any]]:
    """Return `inner` for an async interceptor, which awaits `next(call)`."""

    async def called(call: StageCall) -> Any:
        return await finish_here(inner(call))

    return called
