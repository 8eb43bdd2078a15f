"""Types that users wrote down where values travel one by one: what an item is, what a field holds many of.

An annotation that says no more than msgpack does is as good as none. Nothing is decoded here.
"""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["classes_in", "element_type", "first_parameter_type"]

_PLAIN = frozenset({Any, object, None, type(None), bool, int, float, str, bytes, dict, list})
_MANY = frozenset({list, tuple, collections.abc.Sequence, collections.abc.MutableSequence})


def first_parameter_type(function: Callable[..., Any]) -> Any:
    """The annotation of the first parameter that is given an argument; `Any` where it says nothing of interest."""
    try:
        first = next(iter(inspect.signature(function).parameters))
        hint = _hints(function).get(first, Any)
    except (StopIteration, ValueError, TypeError, NameError, AttributeError, SyntaxError):
        return Any
    return hint if _tells(hint) else Any


def element_type(kind: type[Any], field: str) -> Any:
    """What the field of a class holds many of, as `X` of `list[X]`; `Any` where that is of no interest."""
    try:
        hint = typing.get_type_hints(kind, include_extras=True).get(field, Any)
    except (TypeError, NameError, AttributeError, SyntaxError):
        return Any
    arguments = [each for each in typing.get_args(hint) if each is not Ellipsis]
    if typing.get_origin(hint) not in _MANY or len(arguments) != 1:
        return Any
    return arguments[0] if _tells(arguments[0]) else Any


def classes_in(hint: Any) -> Iterator[type[Any]]:
    """The classes of the user's that an annotation names."""
    for each in typing.get_args(hint) or (hint,):
        if each is not hint:
            yield from classes_in(each)
        elif isinstance(each, type) and each.__module__ != "builtins":
            yield each


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    plain: Any = function if inspect.isroutine(function) else type(function).__call__
    return typing.get_type_hints(plain, include_extras=True)


def _tells(hint: Any) -> bool:
    """Whether a value of this type would not come back as itself without being told."""
    if isinstance(hint, typing.TypeVar):
        return False
    arguments = typing.get_args(hint)
    if not arguments:
        return hint not in _PLAIN
    origin = typing.get_origin(hint)
    if origin in (list, dict, typing.Union, types.UnionType):
        return any(_tells(each) for each in arguments)
    return origin is not typing.Literal
