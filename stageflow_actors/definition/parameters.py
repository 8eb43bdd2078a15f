"""Parameters of user functions as a caller can fill them: those of wrapped functions and base constructors included.

A decorator that takes `*args` or `**kwargs` passes them to the function that it wraps (`__wrapped__`), and a
constructor passes its `**kwargs` to the next one of its class. This module calls no function.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

__all__ = ["POSITIONAL", "VARIADIC", "constructor_parameters", "parameters_of"]

Parameters = list[inspect.Parameter]

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def parameters_of(function: Callable[..., Any], leading: int = 1) -> Parameters | None:
    """Return the parameters that a caller of `function` can fill, or None if it has no readable signature.

    Args:
        function: A function, method, `partial` or object with `__call__`, decorated or not.
        leading: Number of positional parameters that a wrapper passes on in its own: the context.

    Returns:
        The parameters in order. One that only the `**kwargs` of a wrapper can take is keyword-only, one that only its
        `*args` can take is positional-only. Arguments that a `partial` holds are left out.
    """
    if isinstance(function, functools.partial):
        return _partial_parameters(function, leading)
    if isinstance(function, MethodType):
        found = parameters_of(function.__func__, leading + 1)
        return None if found is None else _without_first(found)
    wrapped = getattr(function, "__wrapped__", None)
    try:
        # The wrapper's own parameters count: it may fill in parameters of the function that it wraps.
        own = list(inspect.signature(function, follow_wrapped=False).parameters.values())
    except (ValueError, TypeError):
        return parameters_of(wrapped, leading) if callable(wrapped) else None
    if callable(wrapped) and any(p.kind in VARIADIC for p in own):
        inner = parameters_of(wrapped, leading)
        return own if inner is None else _passed_through(own, inner, leading)
    return own


def constructor_parameters(kind: type[Any]) -> Parameters:
    """Return the parameters of the constructor of a class."""
    if isinstance(kind.__init__, FunctionType) and "__signature__" not in kind.__dict__:
        return _init_parameters([each.__dict__["__init__"] for each in kind.__mro__ if "__init__" in each.__dict__])
    try:
        return list(inspect.signature(kind).parameters.values())
    except (ValueError, TypeError):
        return []


def _init_parameters(constructors: list[Any]) -> Parameters:
    own = parameters_of(constructors[0]) if isinstance(constructors[0], FunctionType) else None
    if own is None:
        return []
    own = _without_first(own)
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own):
        return own
    names = {p.name for p in own}
    inherited = [p for p in _init_parameters(constructors[1:]) if p.name not in names and p.kind not in VARIADIC]
    return own + [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for p in inherited
        if p.kind is not inspect.Parameter.POSITIONAL_ONLY
    ]


def _partial_parameters(function: functools.partial[Any], leading: int) -> Parameters | None:
    found = parameters_of(function.func, leading + len(function.args))
    if found is None:
        return None
    for _ in function.args:
        found = _without_first(found)
    kept: Parameters = []
    behind = False  # a parameter behind one that is bound by keyword can only be filled by keyword
    for parameter in found:
        if parameter.name in function.keywords and parameter.kind not in VARIADIC:
            behind = behind or parameter.kind in POSITIONAL
        elif behind and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            kept.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        else:
            kept.append(parameter)
    return kept


def _without_first(parameters: Parameters) -> Parameters:
    if parameters and parameters[0].kind in POSITIONAL:
        return parameters[1:]
    return parameters


def _passed_through(own: Parameters, inner: Parameters, leading: int) -> Parameters:
    """Return the parameters of a wrapper, and those that its `*args` and `**kwargs` pass to the wrapped function."""
    takes_args = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in own)
    takes_keywords = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own)
    named = [p for p in own if p.kind not in VARIADIC]
    names = {p.name for p in named}
    before = sum(p.kind in POSITIONAL for p in named)
    added: Parameters = []
    for index, parameter in enumerate(p for p in inner if p.kind in POSITIONAL):
        if (index < leading and index < before) or (index >= leading and parameter.name in names):
            continue
        if index < leading:
            if takes_args:
                added.append(parameter)
        elif takes_keywords and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY:
            both = takes_args and before + len(added) == index and before <= leading
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if both else inspect.Parameter.KEYWORD_ONLY
            added.append(parameter.replace(kind=kind))
        elif takes_args:
            added.append(parameter.replace(kind=inspect.Parameter.POSITIONAL_ONLY))
    rest = [p for p in inner if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in names and takes_keywords]
    variadic = [
        p
        for p in inner
        if (p.kind is inspect.Parameter.VAR_POSITIONAL and takes_args)
        or (p.kind is inspect.Parameter.VAR_KEYWORD and takes_keywords)
    ]
    ordered = sorted((*named, *added, *rest), key=lambda p: p.kind is inspect.Parameter.KEYWORD_ONLY)
    return ordered + variadic
