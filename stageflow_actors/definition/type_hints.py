"""Type annotations of user code: the type of an item, and the element type of a field.

They tell the codec which type to decode. An annotation whose type msgpack restores without help counts as `Any`.
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
_SEQUENCES = frozenset({list, tuple, collections.abc.Sequence, collections.abc.MutableSequence})


def first_parameter_type(function: Callable[..., Any], before: int = 0) -> Any:
    """Return the annotation of the first parameter behind `before` others; `Any` if the codec does not need it."""
    try:
        first = list(inspect.signature(function).parameters)[before]
        hint = _hints(function).get(first, Any)
    except (IndexError, ValueError, TypeError, NameError, AttributeError, SyntaxError):
        return Any
    return hint if _is_needed(hint) else Any


def element_type(kind: type[Any], field: str) -> Any:
    """Return the element type of a field, as `X` of `list[X]`; `Any` if the codec does not need it."""
    try:
        hint = typing.get_type_hints(kind, include_extras=True).get(field, Any)
    except (TypeError, NameError, AttributeError, SyntaxError):
        return Any
    arguments = [each for each in typing.get_args(hint) if each is not Ellipsis]
    if typing.get_origin(hint) not in _SEQUENCES or len(arguments) != 1:
        return Any
    return arguments[0] if _is_needed(arguments[0]) else Any


def classes_in(hint: Any) -> Iterator[type[Any]]:
    """Return the classes in an annotation, those of builtins excepted."""
    for each in typing.get_args(hint) or (hint,):
        if each is not hint:
            yield from classes_in(each)
        elif isinstance(each, type) and each.__module__ != "builtins":
            yield each


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    plain: Any = function if inspect.isroutine(function) else type(function).__call__
    return typing.get_type_hints(plain, include_extras=True)


def _is_needed(hint: Any) -> bool:
    """Return True if decoding needs the type: msgpack alone restores another one."""
    if isinstance(hint, typing.TypeVar):
        return False
    arguments = typing.get_args(hint)
    if not arguments:
        return hint not in _PLAIN
    origin = typing.get_origin(hint)
    if origin in (list, dict, typing.Union, types.UnionType):
        return any(_is_needed(each) for each in arguments)
    return origin is not typing.Literal
