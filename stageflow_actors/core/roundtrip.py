"""`RoundTripFault`: where and why a value would change when it is encoded as msgpack and decoded.

The codec encodes, decodes and compares; it calls this module only after the comparison failed, so speed does not
matter here. The functions must not change a value and must not raise.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

__all__ = ["RoundTripFault", "field_items", "find_difference", "find_unencodable", "too_deep"]

_LIMIT_LOW, _LIMIT_HIGH = -(2**63), 2**64 - 1
_PLAIN = frozenset({type(None), bool, float, bytes})
_BUILTIN = frozenset({*_PLAIN, int, str, list, tuple, dict, set, frozenset})

_encode = msgspec.msgpack.Encoder().encode


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
        base = next((b for b in (bool, int, float, str, bytes, list, dict) if isinstance(value, b)), None)
        if base is not None:
            advice = f"convert it with {base.__name__}(...)"
        elif callable(value):
            advice = "store its name, or make it a service"
        else:
            advice = "store plain data from which it can be rebuilt, or make it a service (Runtime(services=...))"
        what = _a(type(value))
        detail = "" if isinstance(error, TypeError) else f" ({error})"
        return RoundTripFault(path, f"is {what}, which cannot be serialised{detail}", advice)
    return None


def _difference(value: Any, copy: Any, path: str) -> RoundTripFault | None:
    kind, kind_of_copy = type(value), type(copy)
    # A subclass of dict or list is decoded as the plain form: compare the contents.
    if kind_of_copy is dict and isinstance(value, dict):
        return _difference_in_dict(value, copy, path)
    if kind_of_copy is list and isinstance(value, list):
        return _difference_in_sequence(value, copy, path)
    if kind is kind_of_copy:
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
    if _equal(value, copy):
        return None
    return _changed(value, copy, path)


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
                "use strings or integers as keys",
            )
        fault = _difference(part, part_copy, _at_key(path, key))
        if fault is not None:
            return fault
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
    return RoundTripFault(path, f"is {_a(kind)} and is decoded as {_a(other)}", _advice(value))


def _advice(value: Any) -> str:
    """Return the advice for a value whose type changed."""
    annotated = "or store it in a dataclass context, in a field annotated with its type"
    if isinstance(value, (set, frozenset)):
        return f"use a sorted list, {annotated}"
    if isinstance(value, tuple):
        return f"use a list, {annotated}"
    if isinstance(value, enum.Enum):
        return f"use its .value, {annotated}"
    if isinstance(value, (datetime, date, time)):
        return f"use .isoformat(), {annotated}"
    if isinstance(value, timedelta):
        return f"use .total_seconds(), {annotated}"
    if isinstance(value, (Decimal, UUID)):
        return f"use str(...), {annotated}"
    if dataclasses.is_dataclass(value):
        return f"use dataclasses.asdict(...), {annotated}"
    if isinstance(value, msgspec.Struct):
        return f"use msgspec.to_builtins(...), {annotated}"
    if isinstance(value, list):
        return "annotate the field as a list, or store a value of its annotated type"
    return "store plain data: None, bool, int, float, str, bytes, list, dict"


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
