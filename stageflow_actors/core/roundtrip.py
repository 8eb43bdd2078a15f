"""`RoundTripFault`: where and why a value would change when it is encoded as msgpack and decoded.

The codec encodes, decodes and compares; it calls this module only after the comparison failed, so speed does not
matter here. The functions must not change a value and must not raise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from datetime import datetime, time
from decimal import Decimal
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import msgspec

from stageflow_actors.core import extensions
from stageflow_actors.core.advice import advise
from stageflow_actors.core.extensions import number_of

__all__ = ["RoundTripFault", "field_items", "find_difference", "find_unencodable", "too_deep"]

_LIMIT_LOW, _LIMIT_HIGH = -(2**63), 2**64 - 1
_PLAIN = frozenset({type(None), bool, float, bytes})
_BUILTIN = frozenset({*_PLAIN, int, str, list, tuple, dict, set, frozenset})

_encode = extensions.encode


class RoundTripFault(NamedTuple):
    """One fault: the path of the value from the root, the problem, and the advice what to write instead."""

    path: str
    problem: str
    advice: str


def find_unencodable(value: Any, path: str) -> RoundTripFault | None:
    """Return the fault of the first part of `value` that msgpack cannot encode, or None."""
    try:
        return _unencodable(value, path, set())
    except RecursionError:
        return too_deep(path)


def find_difference(value: Any, copy: Any, path: str) -> RoundTripFault | None:
    """Return the fault of the first part of `value` that differs in its decoded `copy`, or None.

    NaN counts as equal to NaN here, although `==` is false.
    """
    try:
        return _difference(value, copy, path)
    except RecursionError:
        return too_deep(path)


def field_items(value: Any) -> Iterator[tuple[str, Any]] | None:
    """Return (name, value) for the fields of a dataclass, Struct or pydantic instance; None for other values."""
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        return ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if hasattr(value, f.name))
    if isinstance(value, msgspec.Struct):
        return ((name, getattr(value, name)) for name in value.__struct_fields__ if hasattr(value, name))
    if hasattr(type(value), "__pydantic_fields__"):
        hidden = getattr(value, "__pydantic_private__", None), getattr(value, "__pydantic_extra__", None)
        return iter([*vars(value).items(), *(pair for held in hidden if held for pair in held.items())])
    return None


def _unencodable(value: Any, path: str, above: set[int]) -> RoundTripFault | None:
    kind = type(value)
    if kind in _PLAIN or value is msgspec.UNSET:
        return None
    if kind is int:
        return None if _LIMIT_LOW <= value <= _LIMIT_HIGH else _too_large(path)
    if kind is str:
        return None if _is_text(value) else _not_text(path)
    parts = _parts(value, path)
    if parts is None:
        return _opaque(value, path)
    if id(value) in above:
        return RoundTripFault(path, "refers to itself", "store an id or an index in place of the object")
    above.add(id(value))
    for part, part_path in parts:
        fault = _unencodable(part, part_path, above)
        if fault is not None:
            return fault
    above.remove(id(value))
    return None


def _parts(value: Any, path: str) -> Iterator[tuple[Any, str]] | None:
    """Return the values inside a container with their paths; None for a value that is not a container."""
    if isinstance(value, dict):
        return _dict_parts(value, path)
    if isinstance(value, (list, tuple)):
        return ((part, f"{path}[{index}]") for index, part in enumerate(value))
    if isinstance(value, (set, frozenset)):
        return ((part, f"{path} (element {part!r})") for part in value)
    fields = field_items(value)
    return None if fields is None else ((part, f"{path}.{name}") for name, part in fields)


def _dict_parts(value: dict[Any, Any], path: str) -> Iterator[tuple[Any, str]]:
    for key, part in value.items():
        yield key, f"{path} (key {key!r})"
        yield part, _at_key(path, key)


def _opaque(value: Any, path: str) -> RoundTripFault | None:
    """Return the fault of a leaf value that the encoder rejects, or None."""
    try:
        _encode(value)
    except RecursionError:
        return too_deep(path)
    except Exception as error:  # noqa: BLE001 - an object of user code may raise any exception
        what = _a(type(value))
        detail = "" if isinstance(error, TypeError) else f" ({error})"
        return RoundTripFault(path, f"is {what}, which cannot be serialised{detail}", advise(value))
    return None


def _difference(value: Any, copy: Any, path: str) -> RoundTripFault | None:
    kind, kind_of_copy = type(value), type(copy)
    if kind is kind_of_copy:
        if kind is dict:
            return _difference_in_dict(value, copy, path)
        if kind is list:
            return _difference_in_sequence(value, copy, path)
        if kind is datetime or kind is time:
            return None if _is_same_moment(value, copy) else _changed(value, copy, path)
        if kind is float or kind is Decimal:
            same = value == copy or (value != value and copy != copy)
            return None if same else _changed(value, copy, path)
        if kind is tuple:
            return _difference_in_sequence(value, copy, path)
        if kind is set or kind is frozenset:
            # NaN does not equal NaN, and a set has no order that could pair them.
            same = {v for v in value if v == v} == {v for v in copy if v == v} and len(value) == len(copy)
            return None if same else _changed(value, copy, path)
        if field_items(value) is not None:
            return _difference_in_fields(value, copy, path)
    elif not _may_become(value, copy):
        return _changed(value, copy, path)
    if _equal(value, copy) or (value != value and copy != copy):
        return None
    return _changed(value, copy, path)


def _may_become(value: Any, copy: Any) -> bool:
    """Return True if the decoded copy may have another type than the value: a number, bytes, or a field's own type.

    An int in a field annotated as float is decoded as a float, and a number of numpy as the Python number.
    """
    kind, other = type(value), type(copy)
    if other is float and kind is int:
        return True
    if number_of(value) is not None:
        return other in (bool, int, float) or number_of(copy) is not None
    return other is bytes and kind in (bytearray, memoryview)


def _is_same_moment(value: Any, copy: Any) -> bool:
    """Return True if date, time, offset, `fold` and zone name are the same."""
    name = value.tzinfo.key if isinstance(value.tzinfo, ZoneInfo) else None
    name_of_copy = copy.tzinfo.key if isinstance(copy.tzinfo, ZoneInfo) else None
    return bool(
        value.replace(tzinfo=None) == copy.replace(tzinfo=None)
        and value.fold == copy.fold
        and value.utcoffset() == copy.utcoffset()
        and name == name_of_copy
    )


def _difference_in_sequence(value: Any, copy: Any, path: str) -> RoundTripFault | None:
    if len(value) != len(copy):
        return RoundTripFault(
            path, f"has {len(value)} elements and is decoded with {len(copy)}", "check its type annotation"
        )
    for index, (part, part_copy) in enumerate(zip(value, copy, strict=True)):
        fault = _difference(part, part_copy, f"{path}[{index}]")
        if fault is not None:
            return fault
    return None


def _difference_in_dict(value: dict[Any, Any], copy: dict[Any, Any], path: str) -> RoundTripFault | None:
    missing = object()
    for key, part in value.items():
        part_copy = copy.get(key, missing)
        if part_copy is missing:
            if key != key:
                return RoundTripFault(
                    path, "has NaN as a key, which no lookup finds", "use strings or integers as keys"
                )
            return RoundTripFault(
                path,
                f"has the key {key!r} ({_a(type(key))}), which is decoded as another key",
                f"use strings or integers as keys ({advise(key)})",
            )
        fault = _difference(part, part_copy, _at_key(path, key))
        if fault is not None:
            return fault
    for key, key_of_copy in zip(value, copy, strict=False):
        if type(key) is not type(key_of_copy) and _difference(key, key_of_copy, path) is not None:
            return RoundTripFault(
                path,
                f"has the key {key!r} ({_a(type(key))}), which is decoded as {_a(type(key_of_copy))}",
                advise(key),
            )
    return None if len(value) == len(copy) else _changed(value, copy, path)


def _difference_in_fields(value: Any, copy: Any, path: str) -> RoundTripFault | None:
    for name, part in field_items(value) or ():
        fault = _difference(part, getattr(copy, name, None), f"{path}.{name}")
        if fault is not None:
            return fault
    # Attributes that `__post_init__` or a cached property sets exist in the copy, too. An attribute that a handler
    # added to the object is not a field, and would be lost without an error.
    fields = {name for name, _ in field_items(value) or ()}
    for name in getattr(value, "__dict__", ()):
        if name not in fields and not hasattr(type(value), name) and not hasattr(copy, name):
            return RoundTripFault(
                f"{path}.{name}",
                f"is not a field of {type(value).__name__} and would be lost",
                f"declare it as a field of {type(value).__name__}",
            )
    return None


def _equal(value: Any, copy: Any) -> bool:
    try:
        return bool(value == copy)
    except Exception:  # noqa: BLE001 - an __eq__ of user code may raise any exception
        return False


def _changed(value: Any, copy: Any, path: str) -> RoundTripFault:
    kind, other = type(value), type(copy)
    if kind is other:
        return RoundTripFault(
            path, f"is {value!r:.80} and is decoded as {copy!r:.80}", "check its __post_init__ and validators"
        )
    if _a(kind) == _a(other):
        return RoundTripFault(
            path,
            f"is an instance of another class {kind.__name__} than that of the field",
            "the code that defines it was run twice: run the definition of the workflow again, too",
        )
    if kind is dict and field_items(copy) is not None:
        return RoundTripFault(path, f"is a dict, and the field has {_a(other)}", f"use {other.__name__}(**x)")
    return RoundTripFault(path, f"is {_a(kind)} and is decoded as {_a(other)}", advise(value))


def _at_key(path: str, key: Any) -> str:
    return f"{path}.{key}" if isinstance(key, str) and key.isidentifier() else f"{path}[{key!r}]"


def _a(kind: type[Any]) -> str:
    name = (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )
    if kind in _BUILTIN and kind is not type(None):
        name = kind.__name__
    if kind is type(None):
        return "None"
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _not_text(path: str) -> RoundTripFault:
    return RoundTripFault(
        path, "is a str with a lone surrogate, which UTF-8 cannot encode", "use bytes, or replace the surrogate"
    )


def _too_large(path: str) -> RoundTripFault:
    return RoundTripFault(path, "is an integer beyond 64 bits (-2**63 to 2**64-1)", "store it as a str, bytes or float")


def too_deep(path: str) -> RoundTripFault:
    """Return the fault of a value that exceeds the recursion limit."""
    return RoundTripFault(
        path, "is nested too deeply", "flatten it: keep the objects in one list, and refer to them by index"
    )
