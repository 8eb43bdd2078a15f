"""User functions that are not handlers: predicates, selectors, `over`, `merge`, `on_reply`, service factories.

They are called with a fixed number of values, and with the `StageContext` where they have a parameter `ctx`; their
result is not awaited. `check_function` rejects a function
that does not fit when the workflow is defined, and not when the first instance reaches it. It calls no function.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from stageflow_actors.definition.parameters import POSITIONAL, VARIADIC, parameters_of
from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["asks_for_ctx", "check_function", "name_of", "with_ctx"]


def check_function(
    given: Any,
    what: str,
    takes: tuple[str, ...] = ("context",),
    *,
    also: str = "",
    yields: bool = False,
    ctx: bool = True,
) -> Callable[..., Any]:
    """Return `given` if it can be called with as many values as `takes` names.

    A function without a readable signature, as some builtins have, is accepted.

    Args:
        given: The function to check.
        what: Name of the function in errors, as "when of stage 'x'".
        takes: Names of the values that it is called with.
        also: Other accepted values, for the text of the error.
        yields: True if a generator function is accepted.
        ctx: True if it may have a parameter `ctx` behind the values: see `with_ctx`.

    Returns:
        The function.

    Raises:
        WorkflowDefinitionError: If it cannot be called in this way.
    """
    shape = "the context" if takes == ("context",) else f"({', '.join(takes)})" if takes else "no arguments"
    if not callable(given):
        quotes = ": give the function itself, not its name" if isinstance(given, str) else ""
        raise WorkflowDefinitionError(f"{what} must be{also} a function of {shape}, not {given!r}{quotes}")
    function: Callable[..., Any] = given
    plain = _plain(given)
    if inspect.iscoroutinefunction(plain) or inspect.isasyncgenfunction(plain):
        raise WorkflowDefinitionError(
            f"{what} is the async function {name_of(given)}, and its result is not awaited: "
            f"use a plain function of {shape}"
        )
    if inspect.isgeneratorfunction(plain) and not yields:
        raise WorkflowDefinitionError(
            f"{what} is the generator {name_of(given)}, and calling it would run nothing: return a value instead of "
            "yielding it"
        )
    try:
        # The signature of the decorated function counts: the decorator may fill in parameters of the inner function.
        signature = inspect.signature(given, follow_wrapped=False)
    except (ValueError, TypeError):
        return function
    _check_arity(signature, f"{what}, {name_of(given)},", takes, _place_of_ctx(given, len(takes)) if ctx else "")
    return function


def asks_for_ctx(function: Callable[..., Any] | None, values: int) -> bool:
    """Return True if a function of so many values has a parameter `ctx` behind them."""
    return function is not None and _place_of_ctx(function, values) != ""


def with_ctx(function: Callable[..., Any], values: int) -> Callable[..., Any]:
    """Return a function of `values` values and the `StageContext`, which is passed on where it is asked for."""
    place = _place_of_ctx(function, values)
    if place == "positional":
        return function
    if place == "keyword":
        return lambda *given: function(*given[:-1], ctx=given[-1])
    if values == 1:
        return lambda context, ctx: function(context)
    return lambda *given: function(*given[:-1])


def _place_of_ctx(function: Callable[..., Any], values: int) -> str:
    """Return "positional" or "keyword" if the function has a parameter `ctx` behind its values, else ""."""
    found = parameters_of(function, values) or []
    positional = [p.name for p in found if p.kind in POSITIONAL]
    if positional[values : values + 1] == ["ctx"]:
        return "positional"
    named = any(p.name == "ctx" and p.kind not in VARIADIC for p in found)
    return "keyword" if named and "ctx" not in positional[:values] else ""


def name_of(function: Any) -> str:
    """Return the name of a function in the source code."""
    while isinstance(function, functools.partial):
        function = function.func
    named = getattr(function, "__qualname__", None) or type(function).__qualname__
    return str(named).rpartition("<locals>.")[2]


def _plain(given: Any) -> Any:
    """Return the function that runs when `given` is called."""
    while isinstance(given, functools.partial):
        given = given.func
    return given if inspect.isroutine(given) or inspect.isclass(given) else given.__call__


def _check_arity(signature: inspect.Signature, what: str, takes: tuple[str, ...], ctx: str) -> None:
    called = f"it is called with {' and '.join(takes) or 'nothing'}"
    count = 0
    for parameter in signature.parameters.values():
        if parameter.kind in POSITIONAL:
            count += 1
            if 1 < count <= len(takes) and parameter.name == "ctx":
                raise WorkflowDefinitionError(
                    f"{what} has ctx where it receives the {takes[count - 1]}: write ({', '.join(takes)}, ctx)"
                )
            if count <= len(takes):
                continue
        if ctx and parameter.name == "ctx":
            continue
        if parameter.name == "ctx" and parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            raise WorkflowDefinitionError(f"{what} asks for ctx, and only handlers receive a StageContext: {called}")
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            raise WorkflowDefinitionError(
                f"{what} asks for {parameter.name!r} by keyword, and only handlers receive services: {called}"
            )
    try:
        given = ("ctx",) if ctx == "positional" else ()
        signature.bind(*takes, *given, **({"ctx": "ctx"} if ctx == "keyword" else {}))
    except TypeError:
        stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        own = ", ".join(stars.get(p.kind, "") + p.name for p in signature.parameters.values())
        has = f"its parameters are ({own})" if own else "it has no parameters"
        raise WorkflowDefinitionError(
            f"{what} does not fit: {called}, and {has}: write it with ({', '.join(takes)})"
        ) from None
