"""`HandlerSpec`: how a handler is called, found out once by `inspect_handler`.

It holds the function to call, whether the handler takes the `StageContext`, and which services it takes.
`HandlerSpec.bind` fills in the services and returns a function of (context, ctx). This module never calls a handler.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stageflow_actors.definition.callables import name_of
from stageflow_actors.definition.parameters import POSITIONAL, VARIADIC, constructor_parameters, parameters_of
from stageflow_actors.errors import WorkflowDefinitionError

__all__ = [
    "BoundCall",
    "HandlerSpec",
    "check_methods",
    "default_id",
    "has_options",
    "inspect_compensation",
    "inspect_handler",
]

BoundCall = Callable[[Any, Any], Any]
"""A handler with its services filled in: a function of the context and the `StageContext`."""


@dataclass(frozen=True, slots=True)
class ServiceParameter:
    """A parameter that receives the service of its name.

    `required`: it has no default. `positional`: it cannot be passed by keyword; `default` is passed in its place where
    an optional service is not provided and another argument follows.
    """

    name: str
    required: bool
    positional: bool = False
    default: Any = None


class HandlerSpec:
    """How a handler or a compensation is called.

    Attributes:
        kind: `function`, `object` (its method is called) or `class` (constructed in the worker, then an object).
        target: The function, object or class itself.
        function: The function that is called; for a class its plain method.
        method: The name of the method, `execute` or `compensate`.
        wants_ctx: True if it takes the `StageContext`.
        before_context: The number of parameters of `function` before the context: 1 for the plain method of a class.
        parameters: The parameters behind the context that receive services.
        constructor: The parameters of the constructor of a class, which receive services too.
        is_async: True for `async def`: the bound function returns a coroutine.
        compensate: The spec of the object's own method `compensate`, if it has one.
    """

    __slots__ = (
        "_ctx_by_keyword",
        "before_context",
        "compensate",
        "constructor",
        "function",
        "is_async",
        "kind",
        "method",
        "parameters",
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
        parameters: tuple[ServiceParameter, ...] = (),
        constructor: tuple[ServiceParameter, ...] = (),
        is_async: bool = False,
        method: str = "execute",
        compensate: HandlerSpec | None = None,
        before_context: int = 0,
    ) -> None:
        self.before_context = before_context
        self.kind = kind
        self.target = target
        self.function = function
        self.wants_ctx = wants_ctx
        self._ctx_by_keyword = ctx_by_keyword
        self.parameters = parameters
        self.constructor = constructor
        self.is_async = is_async
        self.method = method
        self.compensate = compensate

    @property
    def services(self) -> tuple[str, ...]:
        """The names of the services that it and its constructor take and have no default for."""
        return tuple(p.name for p in (*self.parameters, *self.constructor) if p.required)

    @property
    def all_services(self) -> frozenset[str]:
        """The services without a default, those of its method `compensate` included."""
        own = frozenset(self.services)
        return own | self.compensate.all_services if self.compensate else own

    def is_constructed_with(self, name: str) -> bool:
        """Return True if the constructor of a class takes the service `name`."""
        return any(p.name == name for p in self.constructor)

    def services_among(self, provided: Collection[str]) -> frozenset[str]:
        """Return the services that it takes: those without a default, and of the others those that are provided."""
        taken = (*self.parameters, *self.constructor)
        return frozenset(p.name for p in taken if p.required or p.name in provided)

    def bind(self, services: Mapping[str, Any]) -> BoundCall:
        """Return the handler as a function of (context, ctx), with its services filled in.

        Constructs the object of a class handler. Raises `WorkflowDefinitionError` if a service is missing.
        """
        missing = [name for name in self.services if name not in services]
        if missing:
            raise WorkflowDefinitionError(
                f"the service {missing[0]!r} is not provided: add services={{{missing[0]!r}: factory}} to the Runtime"
            )
        function = self.function
        if self.kind == "class":
            ahead, named = _arguments(self.constructor, services)
            function = getattr(self.target(*ahead, **named), self.method)
        ahead, named = _arguments(self.parameters, services)
        if named:
            function = functools.partial(function, **named)
        if ahead:
            if self.wants_ctx and not self._ctx_by_keyword:
                return lambda context, ctx: function(context, ctx, *ahead)
            if self.wants_ctx:
                return lambda context, ctx: function(context, *ahead, ctx=ctx)
            return lambda context, ctx: function(context, *ahead)
        if not self.wants_ctx:
            return lambda context, ctx: function(context)
        if self._ctx_by_keyword:
            return lambda context, ctx: function(context, ctx=ctx)
        # Taking the same two arguments in the same order, the function is its own bound form.
        return function


def _arguments(parameters: Sequence[ServiceParameter], services: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Return the services for `parameters` as positional and keyword arguments."""
    named = {p.name: services[p.name] for p in parameters if not p.positional and p.name in services}
    ahead = [p for p in parameters if p.positional]
    while ahead and ahead[-1].name not in services:
        ahead.pop()
    return [services.get(p.name, p.default) for p in ahead], named


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
        raise WorkflowDefinitionError(f"{what} has {_shown(handler)} as its handler: {_advice(handler)}")
    return _call("function", handler, handler, what)


def inspect_compensation(given: Any, what: str) -> HandlerSpec:
    """Return the `HandlerSpec` for a compensation: as for a handler, with `compensate` in preference to `execute`."""
    if inspect.isclass(given):
        if callable(getattr(given, "compensate", None)):
            constructor = _service_parameters(constructor_parameters(given))
            return _class_method(given, "compensate", f"compensate of {what}", constructor)
        if not callable(getattr(given, "execute", None)):
            raise WorkflowDefinitionError(
                f"{what} is the class {given.__name__}, which has neither compensate(context) nor execute(context)"
            )
    elif not inspect.isroutine(given) and callable(method := getattr(given, "compensate", None)):
        return _call("object", given, method, f"compensate of {what}", method="compensate")
    spec = inspect_handler(given, what)
    spec.compensate = None
    return spec


def check_methods(handler: Any, what: str) -> None:
    """Refuse a handler class or object whose method `compensation` would never be called."""
    method = inspect.getattr_static(handler, "compensation", None)
    if inspect.isfunction(method) and not callable(getattr(handler, "compensate", None)):
        kind = handler if isinstance(handler, type) else type(handler)
        raise WorkflowDefinitionError(
            f"{what}: {kind.__name__} has a method 'compensation', which is not called: the method that undoes a "
            "stage is compensate(context)"
        )


def has_options(handler: Any) -> bool:
    """Return True if plain attributes of the handler are options of its stage: of classes and objects with methods."""
    if inspect.isclass(handler):
        return True
    if inspect.isroutine(handler) or isinstance(handler, functools.partial):
        return False
    return any(callable(getattr(type(handler), name, None)) for name in ("execute", "compensate"))


def _class_advice(kind: type[Any]) -> str:
    if callable(getattr(kind, "add_stage", None)):
        return f": {_advice(kind)}"
    for name in ("run", "__call__", "handle", "process", "call"):
        if name in kind.__dict__ and callable(getattr(kind, name)):
            return (
                f": rename its method {name!r} to 'execute', or give the method of an object, {kind.__name__}().{name}"
            )
    return ""


def _shown(handler: Any) -> str:
    """Return something that is no handler, with the names of the functions in it."""
    if not isinstance(handler, (list, tuple, set)):
        return f"{handler!r:.120}"
    names = [name_of(each) if callable(each) else f"{each!r:.40}" for each in handler]
    more = f", and {len(names) - 5} more" if len(names) > 5 else ""
    return (
        f"the {type(handler).__name__} of {', '.join(names[:5])}{more}"
        if names
        else f"an empty {type(handler).__name__}"
    )


def _advice(handler: Any) -> str:
    """Return what to write instead of something that is no handler."""
    if callable(getattr(handler, "add_stage", None)):
        return (
            "a workflow cannot be a stage of another: add its stages here, or start it from a handler with "
            "Runtime.connect(data_dir).submit(...)"
        )
    if isinstance(handler, (list, tuple, set)):
        named = [name_of(each) if callable(each) and name_of(each).isidentifier() else "handler" for each in handler]
        first = named[0] if named else "handler"
        return (
            f"call add_stage({first}) and so on for each, or add_parallel('checks', [{', '.join(named[:5])}]) to run "
            "them at the same time"
        )
    if inspect.iscoroutine(handler):
        handler.close()
        return "give the async function itself, without calling it"
    if handler is None:
        return "give the function itself, without calling it"
    if isinstance(handler, str):
        return f"a string is no handler, write add_stage(function, id={handler!r})"
    return "use a function, or an object with execute(context)"


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
        raise WorkflowDefinitionError(
            f"{what} has the class {handler.__name__}, which has no execute(context) method{_class_advice(handler)}"
        )
    if inspect.isabstract(handler):
        missing = ", ".join(sorted(handler.__abstractmethods__))
        raise WorkflowDefinitionError(
            f"{what} has the abstract class {handler.__name__}, which cannot be constructed: "
            f"it does not define {missing}"
        )
    constructor = _service_parameters(constructor_parameters(handler))
    undo = None
    if callable(getattr(handler, "compensate", None)):
        undo = _class_method(handler, "compensate", f"compensate of {what}", constructor)
    return _class_method(handler, "execute", f"execute of {what}", constructor, undo)


def _class_method(
    handler: type[Any],
    method: str,
    what: str,
    constructor: tuple[ServiceParameter, ...],
    compensate: HandlerSpec | None = None,
) -> HandlerSpec:
    return _call(
        "class",
        handler,
        getattr(handler, method),
        what,
        method=method,
        constructor=constructor,
        compensate=compensate,
        bound=_is_bound(handler, method),
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
    constructor: tuple[ServiceParameter, ...] = (),
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
    found = parameters_of(function, 1 if bound else 2)
    if found is None:
        # Some builtins have no readable signature; they are called with the context only.
        found = [inspect.Parameter("context", inspect.Parameter.POSITIONAL_ONLY)]
    elif not bound:
        found = found[1:]
    wants_ctx, by_keyword = _check_parameters(found, what, kind, function)
    first = next((p for p in found if p.kind in POSITIONAL), None)
    services = _service_parameters([p for p in found if p is not first and p.name != "ctx"])
    return HandlerSpec(
        kind=kind,
        target=target,
        function=function,
        wants_ctx=wants_ctx,
        ctx_by_keyword=by_keyword,
        parameters=services,
        constructor=constructor,
        is_async=inspect.iscoroutinefunction(plain),
        method=method,
        compensate=compensate,
        before_context=0 if bound else 1,
    )


def _check_parameters(
    parameters: list[inspect.Parameter], what: str, kind: str, function: Callable[..., Any]
) -> tuple[bool, bool]:
    """Return whether the handler takes the ctx, and whether it takes it by keyword."""
    positional = [p for p in parameters if p.kind in POSITIONAL]
    takes_rest = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    if positional and positional[0].name == "self" and kind == "function" and inspect.isfunction(function):
        owner = function.__qualname__.rpartition(".")[0].rpartition(".")[2] or "Handler"
        raise WorkflowDefinitionError(
            f"{what} has the method {function.__qualname__} without its object, so that `self` would be the context: "
            f"write {owner}().{function.__name__}, or give the class {owner} with a method execute(self, context)"
        )
    if positional and positional[0].name == "ctx":
        raise WorkflowDefinitionError(
            f"{what} takes no context: its first parameter is `ctx`, which is the StageContext. "
            "Write the workflow's context first, as in `def handler(order, ctx)`"
        )
    if not positional and not takes_rest:
        raise WorkflowDefinitionError(
            f"{what} takes no context: its first parameter must be the workflow's context, as in `def handler(order)`"
        )
    ctx = next((p for p in parameters if p.name == "ctx" and p.kind not in VARIADIC), None)
    if ctx is None:
        return False, False
    second = len(positional) > 1 and positional[1].name == "ctx"
    if ctx.kind is inspect.Parameter.POSITIONAL_ONLY and not second:
        raise WorkflowDefinitionError(f"{what} must have the positional-only `ctx` as its second parameter")
    return True, not second


def _service_parameters(parameters: list[inspect.Parameter]) -> tuple[ServiceParameter, ...]:
    """Return the parameters that receive a service: all but `*args` and `**kwargs`."""
    named = [p for p in parameters if p.kind not in VARIADIC]
    last = max((n for n, p in enumerate(named) if p.kind is inspect.Parameter.POSITIONAL_ONLY), default=-1)
    return tuple(
        ServiceParameter(
            p.name,
            p.default is p.empty,
            n <= last and p.kind in POSITIONAL,
            None if p.default is p.empty or n > last else p.default,
        )
        for n, p in enumerate(named)
    )
