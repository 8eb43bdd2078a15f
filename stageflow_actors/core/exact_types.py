"""Exact types: the fast check that a context holds no instance of a subclass, which would be decoded as its base.

`==` does not notice one: a member of a `StrEnum` equals a str, a `Counter` a dict. `marshal` refuses each value that is
not exactly of a builtin type, in C and in less time than decoding takes. The checks here may fail for a context
without fault, which is then compared part by part; they never pass for one with a fault.
"""

from __future__ import annotations

import marshal
import re
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from msgspec import inspect

from stageflow_actors.definition.kept_types import walk_types

__all__ = [
    "SCALAR_TYPES",
    "field_checker",
    "has_only_scalars",
    "is_exact",
    "is_plain",
    "needs_extensions",
]

_VERSION = 2
"""The version of the format without references: the fastest."""

_dumps = marshal.dumps

_CONTAINER = re.compile(rb"[(<>]...\x00", re.DOTALL).search
"""Finds the mark of a tuple, set or frozenset (0x28, 0x3C, 0x3E) with less than 2**24 elements, a larger message than
the broker takes."""

_NAN = b"\xf8\x7f"
"""The end of a NaN, which as a key would never be found again."""

_SCALARS = (
    inspect.NoneType,
    inspect.BoolType,
    inspect.IntType,
    inspect.FloatType,
    inspect.StrType,
    inspect.BytesType,
    inspect.AnyType,
    inspect.LiteralType,
)
_ITERATED = (inspect.ListType, inspect.VarTupleType, inspect.SetType, inspect.FrozenSetType)
_KEPT = (
    inspect.EnumType,
    inspect.DecimalType,
    inspect.UUIDType,
    inspect.DateType,
    inspect.DateTimeType,
    inspect.TimeType,
    inspect.TimeDeltaType,
)
"""Types whose subclasses msgspec does not encode: equal after decoding is exact."""


def is_exact(value: Any) -> bool:
    """Return True if each part of `value` is exactly of a builtin type; tuples and sets count as builtin."""
    try:
        _dumps(value, _VERSION)
    except ValueError:
        return False
    return True


def is_plain(value: Any) -> bool:
    """Return True if `value` consists of exact None, bool, int, float, str, bytes, list and dict, with equal keys.

    May be False for such a value too, if there is NaN in it.
    """
    try:
        image = _dumps(value, _VERSION)
    except ValueError:
        return False
    if 0x28 in image or 0x3C in image or 0x3E in image:
        return _CONTAINER(image) is None and not (0xF8 in image and _NAN in image)
    return not (0xF8 in image and _NAN in image)


def needs_extensions(kind: Any) -> bool:
    """Return True if values of `kind` hold typed datetimes or times, which msgspec alone does not keep."""
    return any(isinstance(info, (inspect.DateTimeType, inspect.TimeType)) for info in walk_types(kind))


SCALAR_TYPES = frozenset({type(None), bool, int, float, str, bytes})

_CONSTRAINTS = ("gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length", "pattern")


def has_only_scalars(kind: type[Any]) -> bool:
    """Return True if only the types of its fields decide whether an instance of `kind` is equal after decoding."""
    try:
        info: Any = inspect.type_info(kind)
    except Exception:  # noqa: BLE001 - evaluating an annotation may raise any exception
        return False
    if not isinstance(info, (inspect.DataclassType, inspect.StructType)) or hasattr(kind, "__post_init__"):
        return False
    kinds = [each for field in info.fields for each in getattr(field.type, "types", (field.type,))]
    return all(
        isinstance(each, _SCALARS)
        and not isinstance(each, inspect.LiteralType)
        and all(getattr(each, name, None) is None for name in _CONSTRAINTS)
        for each in kinds
    )


def field_checker(context_type: type[Any]) -> Callable[[Any], bool]:
    """Return a function that is True for a context of this type only if all of its parts are exact.

    The function assumes that the context equals its decoded copy, so that typed fields have values of their types.
    """
    try:
        builder = _ProjectionBuilder()
        project = builder.build(inspect.type_info(context_type))
    except Exception:  # noqa: BLE001 - evaluating an annotation may raise any exception
        return lambda context: False

    def check(context: Any) -> bool:
        try:
            _dumps(project(context), _VERSION)
        except (ValueError, AttributeError, TypeError, RecursionError):
            return False
        return True

    return check


def _same(value: Any) -> Any:
    return value


class _ProjectionBuilder:
    """Composes a function from an object to the values in it that may be of a subclass."""

    def __init__(self) -> None:
        self._functions: dict[Any, Callable[[Any], Any]] = {}

    def build(self, info: Any) -> Callable[[Any], Any]:
        return self._part(info) or (lambda value: None)

    def _part(self, info: Any) -> Callable[[Any], Any] | None:
        """Return a function to the parts of a value that are to be checked; None if there are none."""
        if isinstance(info, inspect.Metadata):
            return self._part(info.type)
        if isinstance(info, _KEPT):
            return None
        if isinstance(info, _SCALARS):
            return _same
        if isinstance(info, (inspect.DataclassType, inspect.StructType)):
            return self._functions.get(info.cls) or self._fields(info)
        if isinstance(info, inspect.UnionType):
            return self._union(info)
        if isinstance(info, _ITERATED):
            return self._iterated(info)
        if isinstance(info, inspect.DictType):
            return self._dict(info)
        raise TypeError(f"{info} needs the slow check")

    def _fields(self, info: Any) -> Callable[[Any], Any]:
        late: list[Callable[[Any], Any]] = []
        self._functions[info.cls] = lambda value: late[0](value)  # a field may hold an object of the same class
        parts = [(field.name, self._part(field.type)) for field in info.fields]
        scalars = [name for name, part in parts if part is _same]
        nested = [(attrgetter(name), part) for name, part in parts if part is not None and part is not _same]
        plain = attrgetter(*scalars) if scalars else None
        made: Callable[[Any], Any]
        if not nested:
            made = plain or (lambda value: None)
        elif plain is None:
            made = lambda value: [part(get(value)) for get, part in nested]  # noqa: E731
        else:
            made = lambda value: (plain(value), [part(get(value)) for get, part in nested])  # noqa: E731
        late.append(made)
        self._functions[info.cls] = made
        return made

    def _union(self, info: Any) -> Callable[[Any], Any] | None:
        others = [each for each in info.types if not isinstance(each, inspect.NoneType)]
        if all(isinstance(each, _SCALARS) for each in others):
            return _same
        if len(others) != 1:
            raise TypeError("a union of several types needs the slow check")
        inner = self._part(others[0])
        return None if inner is None else lambda value: None if value is None else inner(value)

    def _iterated(self, info: Any) -> Callable[[Any], Any]:
        kind = _ITERATED_TYPES.get(type(info), frozenset)
        if isinstance(info.item_type, _SCALARS):
            return _same
        inner = self._part(info.item_type)
        if inner is None:
            return lambda value: (_exactly(value, kind),)
        return lambda value: (_exactly(value, kind), [inner(item) for item in value])

    def _dict(self, info: Any) -> Callable[[Any], Any]:
        simple = isinstance(info.key_type, _SCALARS)
        if simple and isinstance(info.value_type, _SCALARS):
            return _same
        if not simple and not isinstance(info.key_type, _KEPT):
            raise TypeError("keys that are containers need the slow check")
        inner = self._part(info.value_type)

        def check(value: Any) -> Any:
            _exactly(value, dict)
            keys = [*value] if simple else None
            return keys if inner is None else (keys, [inner(item) for item in value.values()])

        return check


_ITERATED_TYPES: dict[Any, type[Any]] = {inspect.ListType: list, inspect.VarTupleType: tuple, inspect.SetType: set}


def _exactly(value: Any, kind: type[Any]) -> bool:
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} is not exactly {kind.__name__}")
    return True
