"""`HandlerSpec`: how a handler is called, found out once by `inspect_handler`.

It holds the function to call, whether the handler takes the `StageContext`, and which services it takes.
`HandlerSpec.bind` fills in the services and returns a function of (context, ctx). This module never calls a handler.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["BoundCall", "HandlerSpec", "default_id", "inspect_handler"]

BoundCall = Callable[[Any, Any], Any]
"""A handler with its services filled in: a function of the context and the `StageContext`."""

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class HandlerSpec:
    """How a handler or a compensation is called.

    Attributes:
        kind: `function`, `object` (its method is called) or `class` (constructed in the worker, then an object).
        target: The function, object or class itself.
        function: The function that is called; for a class its plain method.
        method: The name of the method, `execute` or `compensate`.
        wants_ctx: True if it takes the `StageContext`.
        services: Names of the services that it takes by keyword.
        constructor_services: Names of the services that the constructor of a class takes.
        is_async: True for `async def`: the bound function returns a coroutine.
        compensate: The spec of the object's own method `compensate`, if it has one.
    """

    __slots__ = (
        "_ctx_by_keyword",
        "compensate",
        "constructor_services",
        "function",
        "is_async",
        "kind",
        "method",
        "services",
        "target",
        "wants_ctx",
    )

    def __init__(
        self,
        *,
        kind: Literal["function", "object", "class"],
        target: Any,
        function: Callable[..., Any],
        wants_ctx: bool,
        ctx_by_keyword: bool = False,
        services: tuple[str, ...] = (),
        constructor_services: tuple[str, ...] = (),
        is_async: bool = False,
        method: str = "execute",
        compensate: HandlerSpec | None = None,
    ) -> None:
        self.kind = kind
        self.target = target
        self.function = function
        self.wants_ctx = wants_ctx
        self._ctx_by_keyword = ctx_by_keyword
        self.services = services
        self.constructor_services = constructor_services
        self.is_async = is_async
        self.method = method
        self.compensate = compensate

    @property
    def all_services(self) -> frozenset[str]:
        """The services of the handler, of its constructor and of its method `compensate`."""
        own = frozenset(self.services) | frozenset(self.constructor_services)
        return own | self.compensate.all_services if self.compensate else own

    def bind(self, services: Mapping[str, Any]) -> BoundCall:
        """Return the handler as a function of (context, ctx), with its services filled in.

        Constructs the object of a class handler. Raises `WorkflowDefinitionError` if a service is missing.
        """
        missing = [name for name in (*self.services, *self.constructor_services) if name not in services]
        if missing:
            raise WorkflowDefinitionError(
                f"the service {missing[0]!r} is not provided: add services={{{missing[0]!r}: factory}} to the Runtime"
            )
        function = self.function
        if self.kind == "class":
            made = self.target(**{name: services[name] for name in self.constructor_services})
            function = getattr(made, self.method)
        if self.services:
            function = functools.partial(function, **{name: services[name] for name in self.services})
        if not self.wants_ctx:
            return lambda context, ctx: function(context)
        if self._ctx_by_keyword:
            return lambda context, ctx: function(context, ctx=ctx)
        # Taking the same two arguments in the same order, the function is its own bound form.
        return function


def inspect_handler(handler: Any, what: str) -> HandlerSpec:
    """Return the `HandlerSpec` for `handler`; `what` names it in errors, as in "stage 'pay'".

    Raises `WorkflowDefinitionError` if it cannot be called with a context.
    """
    if inspect.isclass(handler):
        return _inspect_class(handler, what)
    execute = None if inspect.isroutine(handler) else getattr(handler, "execute", None)
    if callable(execute):
        compensate = getattr(handler, "compensate", None)
        undo = None
        if callable(compensate):
            undo = _call("object", handler, compensate, f"compensate of {what}", method="compensate")
        return _call("object", handler, execute, f"execute of {what}", compensate=undo)
    if not callable(handler):
        raise WorkflowDefinitionError(
            f"{what} has {handler!r} as its handler: use a function, or an object with execute(context)"
        )
    return _call("function", handler, handler, what)


def default_id(handler: Any) -> str:
    """Return the default id of a stage: "" for a lambda, whose id depends on its place in the workflow."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    if inspect.isclass(handler):
        return _kebab(handler.__name__)
    name = getattr(handler, "__name__", None) if inspect.isroutine(handler) else None
    if name is None:
        return _kebab(type(handler).__name__)
    return "" if name == "<lambda>" else name.strip("_").replace("_", "-")


def _kebab(name: str) -> str:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name)
    return words.strip("_").replace("_", "-").lower()


def _inspect_class(handler: type[Any], what: str) -> HandlerSpec:
    execute = getattr(handler, "execute", None)
    if not callable(execute):
        raise WorkflowDefinitionError(f"{what} has the class {handler.__name__}, which has no execute(context) method")
    try:
        parameters = list(inspect.signature(handler).parameters.values())
    except (ValueError, TypeError):
        parameters = []
    for parameter in parameters:
        if parameter.kind in _POSITIONAL and parameter.default is parameter.empty:
            raise WorkflowDefinitionError(
                f"{what}: {handler.__name__} is constructed in the worker, which has no value for {parameter.name!r}: "
                "give it a default, make it keyword-only to receive the service of that name, or pass an instance"
            )
    constructor = _services(parameters)
    compensate = getattr(handler, "compensate", None)
    undo = None
    if callable(compensate):
        undo = _call(
            "class",
            handler,
            compensate,
            f"compensate of {what}",
            method="compensate",
            constructor_services=constructor,
            bound=_is_bound(handler, "compensate"),
        )
    return _call(
        "class",
        handler,
        execute,
        f"execute of {what}",
        constructor_services=constructor,
        compensate=undo,
        bound=_is_bound(handler, "execute"),
    )


def _is_bound(handler: type[Any], name: str) -> bool:
    return isinstance(inspect.getattr_static(handler, name), (staticmethod, classmethod))


def _call(
    kind: Literal["function", "object", "class"],
    target: Any,
    function: Callable[..., Any],
    what: str,
    *,
    method: str = "execute",
    constructor_services: tuple[str, ...] = (),
    compensate: HandlerSpec | None = None,
    bound: bool = True,
) -> HandlerSpec:
    plain: Any = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    if not inspect.isroutine(plain):
        plain = getattr(plain, "__call__", plain)  # noqa: B004 - the method is inspected, not tested for
    if inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
        raise WorkflowDefinitionError(
            f"{what} is a generator: calling it would run nothing. Return a value instead of yielding"
        )
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):
        # Some builtins have no readable signature; they are called with the context only.
        parameters = [inspect.Parameter("context", inspect.Parameter.POSITIONAL_ONLY)]
        bound = True
    if not bound:
        parameters = parameters[1:]
    wants_ctx, by_keyword = _check_parameters(parameters, what)
    return HandlerSpec(
        kind=kind,
        target=target,
        function=function,
        wants_ctx=wants_ctx,
        ctx_by_keyword=by_keyword,
        services=_services(parameters),
        constructor_services=constructor_services,
        is_async=inspect.iscoroutinefunction(plain),
        method=method,
        compensate=compensate,
    )


def _check_parameters(parameters: list[inspect.Parameter], what: str) -> tuple[bool, bool]:
    """Return whether the handler takes the ctx, and whether it takes it by keyword."""
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    takes_rest = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    if positional and positional[0].name == "ctx":
        raise WorkflowDefinitionError(
            f"{what} takes no context: its first parameter is `ctx`, which is the StageContext. "
            "Write the workflow's context first, as in `def handler(order, ctx)`"
        )
    if not positional and not takes_rest:
        raise WorkflowDefinitionError(
            f"{what} takes no context: its first parameter must be the workflow's context, as in `def handler(order)`"
        )
    for parameter in positional[1:]:
        if parameter.name != "ctx" and parameter.default is parameter.empty:
            raise WorkflowDefinitionError(
                f"{what} has a parameter {parameter.name!r} without a value: make it keyword-only for a service "
                f"(`*, {parameter.name}`), or call it `ctx` for the StageContext"
            )
    ctx = next((p for p in parameters if p.name == "ctx" and p.kind not in _VARIADIC), None)
    if ctx is None:
        return False, False
    second = len(positional) > 1 and positional[1].name == "ctx"
    if ctx.kind is inspect.Parameter.POSITIONAL_ONLY and not second:
        raise WorkflowDefinitionError(f"{what} must have the positional-only `ctx` as its second parameter")
    return True, not second


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _services(parameters: list[inspect.Parameter]) -> tuple[str, ...]:
    return tuple(
        p.name
        for p in parameters
        if p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is p.empty and p.name != "ctx"
    )
