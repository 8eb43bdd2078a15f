"""Type annotations of user code: the type of an item, and the element type of a field.

They tell the codec which type to decode. An annotation whose type msgpack restores without help counts as `Any`.
"""

from __future__ import annotations

import asyncio
import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["classes_in", "element_type", "first_parameter_type", "needs_type", "return_type"]

_PLAIN = frozenset({Any, object, None, type(None), bool, int, float, str, bytes, dict, list})
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_AWAITABLES = frozenset({collections.abc.Awaitable, collections.abc.Coroutine, asyncio.Future, asyncio.Task})
_SEQUENCES = frozenset({list, tuple, collections.abc.Sequence, collections.abc.MutableSequence})


def first_parameter_type(function: Callable[..., Any], before: int = 0, *, needed: bool = True) -> Any:
    """Return the annotation of the first parameter behind `before` others.

    With `needed`, `Any` if the codec does not need it.
    """
    try:
        names = [p.name for p in inspect.signature(function).parameters.values() if p.kind in _POSITIONAL]
    except (ValueError, TypeError):
        return Any
    hint = _hint(function, names[before]) if before < len(names) else Any
    return hint if needs_type(hint) or (not needed and not isinstance(hint, (str, typing.TypeVar))) else Any


def return_type(function: Callable[..., Any]) -> Any:
    """Return the type of the result that `function` is annotated with; `Any` without an annotation.

    An annotation that cannot be resolved counts as none. An awaitable counts as its result.
    """
    hint = _hint(function, "return")
    while typing.get_origin(hint) in _AWAITABLES and typing.get_args(hint):
        hint = typing.get_args(hint)[-1]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [each for each in typing.get_args(hint) if not _is_no_result(each)]
        hint = typing.Union[tuple(members)] if members else Any  # noqa: UP007 - made from a list
    if hint in (None, type(None), object) or isinstance(hint, (str, typing.TypeVar)) or _is_no_result(hint):
        return Any
    return Any if hint in (typing.NoReturn, typing.Never) else hint


def _is_no_result(hint: Any) -> bool:
    """Return True for `Replace` and `Request`: a handler returns them to the runtime."""
    owner = typing.get_origin(hint) or hint
    return getattr(owner, "__module__", "").startswith("stageflow_actors.") and getattr(owner, "__name__", "") in (
        "Replace",
        "Request",
    )


def element_type(kind: type[Any], field: str) -> Any:
    """Return the element type of a field, as `X` of `list[X]`; `Any` if the codec does not need it."""
    try:
        hint = typing.get_type_hints(kind, include_extras=True).get(field, Any)
    except (TypeError, NameError, AttributeError, SyntaxError):
        return Any
    arguments = [each for each in typing.get_args(hint) if each is not Ellipsis]
    if typing.get_origin(hint) not in _SEQUENCES or len(arguments) != 1:
        return Any
    return arguments[0] if needs_type(arguments[0]) else Any


def classes_in(hint: Any) -> Iterator[type[Any]]:
    """Return the classes in an annotation, those of builtins excepted."""
    for each in typing.get_args(hint) or (hint,):
        if each is not hint:
            yield from classes_in(each)
        elif isinstance(each, type) and each.__module__ != "builtins":
            yield each


def _hint(function: Callable[..., Any], name: str) -> Any:
    """Return the resolved annotation of a parameter, or of the return value; `Any` if there is none."""
    plain: Any = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    if isinstance(plain, type):
        return Any
    if not inspect.isroutine(plain):
        plain = type(plain).__call__
    try:
        return typing.get_type_hints(plain, include_extras=True).get(name, Any)
    except Exception:  # noqa: BLE001 - evaluating an annotation may raise any exception
        pass
    # Another annotation cannot be resolved: try this one alone.
    wrapped = inspect.unwrap(plain)
    given = getattr(wrapped, "__annotations__", {}).get(name, Any)
    alone = types.SimpleNamespace(__annotations__={name: given})
    try:
        hints: dict[str, Any] = typing.get_type_hints(alone, getattr(wrapped, "__globals__", {}), include_extras=True)
    except Exception:  # noqa: BLE001 - see above
        return Any
    return hints.get(name, Any)


def needs_type(hint: Any) -> bool:
    """Return True if decoding needs the type: msgpack alone restores another one."""
    if isinstance(hint, (typing.TypeVar, str)):
        return False
    arguments = typing.get_args(hint)
    if not arguments:
        return hint not in _PLAIN
    origin = typing.get_origin(hint)
    if origin in (list, dict, typing.Union, types.UnionType):
        return any(needs_type(each) for each in arguments)
    return origin is not typing.Literal
