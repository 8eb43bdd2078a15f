"""Functions of the user's that are no handlers: predicates, selectors, `over`, `merge`, what takes in a reply.

They are called with so many values and nothing else, and nobody awaits what they return: what does not fit that is
refused where the workflow is defined, not by the first instance that comes by. No function is called here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["check_function", "name_of"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def check_function(
    given: Any, what: str, takes: tuple[str, ...] = ("context",), *, also: str = "", yields: bool = False
) -> Callable[..., Any]:
    """`given` if it can be called with as many values as `takes` names.

    `what` names it in errors, as "when of stage 'x'"; `also` says what else than a function would do; `yields` whether
    a generator function does. What has no signature to read, as some builtins, passes.
    Raises `WorkflowDefinitionError`.
    """
    shape = "the context" if takes == ("context",) else f"({', '.join(takes)})" if takes else "no arguments"
    if not callable(given):
        raise WorkflowDefinitionError(f"{what} must be{also} a function of {shape}, not {given!r}")
    function: Callable[..., Any] = given
    plain = _plain(given)
    if inspect.iscoroutinefunction(plain) or inspect.isasyncgenfunction(plain):
        raise WorkflowDefinitionError(
            f"{what} is the async function {name_of(given)}, and nobody would await it: "
            f"give a plain function of {shape}"
        )
    if inspect.isgeneratorfunction(plain) and not yields:
        raise WorkflowDefinitionError(
            f"{what} is the generator {name_of(given)}, and calling it would run nothing: return a value instead of "
            "yielding it"
        )
    try:
        # Of a decorated function that which is called: the decorator may fill what the function itself asks for.
        signature = inspect.signature(given, follow_wrapped=False)
    except (ValueError, TypeError):
        return function
    _check_arity(signature, f"{what}, {name_of(given)},", takes)
    return function


def name_of(function: Any) -> str:
    """The name under which a user knows a function."""
    while isinstance(function, functools.partial):
        function = function.func
    named = getattr(function, "__qualname__", None) or type(function).__qualname__
    return str(named).rpartition("<locals>.")[2]


def _plain(given: Any) -> Any:
    """What is run when it is called."""
    while isinstance(given, functools.partial):
        given = given.func
    return given if inspect.isroutine(given) or inspect.isclass(given) else given.__call__


def _check_arity(signature: inspect.Signature, what: str, takes: tuple[str, ...]) -> None:
    called = f"it is called with {' and '.join(takes) or 'nothing'}"
    beyond = 0
    for parameter in signature.parameters.values():
        if parameter.kind in _POSITIONAL:
            beyond += 1
            if beyond <= len(takes):
                continue
        if parameter.name == "ctx" and parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            raise WorkflowDefinitionError(f"{what} asks for ctx, and only handlers are given a StageContext: {called}")
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            raise WorkflowDefinitionError(
                f"{what} asks for {parameter.name!r} by keyword, and only handlers are given services: {called}"
            )
    try:
        signature.bind(*takes)
    except TypeError as error:
        raise WorkflowDefinitionError(f"{what} does not fit: {called} ({error})") from None
