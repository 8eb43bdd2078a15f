"""Where and why a value would not survive its way through msgpack, in words.

The codec finds out *that* something is lost by encoding, decoding and comparing; this module is asked only then,
and takes its time. It changes nothing and raises nothing.
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

__all__ = ["RoundTripFault", "field_items", "find_difference", "find_unencodable"]

_LIMIT_LOW, _LIMIT_HIGH = -(2**63), 2**64 - 1
_PLAIN = frozenset({type(None), bool, float, bytes})
_BUILTIN = frozenset({*_PLAIN, int, str, list, tuple, dict, set, frozenset})

_encode = msgspec.msgpack.Encoder().encode


class RoundTripFault(NamedTuple):
    """`path` of the value from the root, what is wrong with it, and what to do."""

    path: str
    problem: str
    advice: str


def find_unencodable(value: Any, path: str) -> RoundTripFault | None:
    """The first part of `value` that msgpack has no form for; None if there is none."""
    try:
        return _unencodable(value, path, set())
    except RecursionError:
        return _too_deep(path)


def find_difference(value: Any, copy: Any, path: str) -> RoundTripFault | None:
    """The first part of `value` that came back as something else in `copy`; None if all is well.

    NaN is taken for equal to NaN, which `==` does not.
    """
    try:
        return _difference(value, copy, path)
    except RecursionError:
        return _too_deep(path)


def field_items(value: Any) -> Iterator[tuple[str, Any]] | None:
    """(name, value) of the fields of a dataclass, Struct or pydantic instance; None for anything else."""
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
    """The values inside a container with their paths; None for what is no container."""
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
    """A fault for a leaf that the encoder refuses."""
    try:
        _encode(value)
    except RecursionError:
        return _too_deep(path)
    except Exception as error:  # noqa: BLE001 - a foreign object may raise whatever it likes
        base = next((b for b in (bool, int, float, str, bytes, list, dict) if isinstance(value, b)), None)
        if base is not None:
            advice = f"convert it with {base.__name__}(...)"
        elif callable(value):
            advice = "store its name, or make it a service"
        else:
            advice = "store the plain data it stands for, or make it a service (Runtime(services=...))"
        what = _a(type(value))
        detail = "" if isinstance(error, TypeError) else f" ({error})"
        return RoundTripFault(path, f"is {what}, which cannot be serialised{detail}", advice)
    return None


def _difference(value: Any, copy: Any, path: str) -> RoundTripFault | None:
    kind, kind_of_copy = type(value), type(copy)
    # A subclass of dict or list arrives as the plain form; whether that equals it is for its contents to say.
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
            # NaN is never equal, not even to itself, and a set has no order to pair them by.
            same = {v for v in value if v == v} == {v for v in copy if v == v} and len(value) == len(copy)
            return None if same else _changed(value, copy, path)
        if field_items(value) is not None:
            return _difference_in_fields(value, copy, path)
    if _equal(value, copy):
        return None
    return _changed(value, copy, path)


def _difference_in_sequence(value: Any, copy: Any, path: str) -> RoundTripFault | None:
    if len(value) != len(copy):
        return RoundTripFault(path, f"has {len(value)} elements and would come back with {len(copy)}", "check its type")
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
                    path, "has NaN as a key, which is never found again", "use strings or integers as keys"
                )
            return RoundTripFault(
                path, f"has the key {key!r} ({_a(type(key))}), which would change", "use strings or integers as keys"
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
    # What `__post_init__` or a cached property makes is made anew on the other side. What a handler hung on the
    # object is not a field, and would be gone without a word.
    fields = {name for name, _ in field_items(value) or ()}
    for name in getattr(value, "__dict__", ()):
        if name not in fields and not hasattr(type(value), name) and not hasattr(copy, name):
            return RoundTripFault(
                f"{path}.{name}",
                f"is no field of {type(value).__name__} and would be lost",
                f"declare it in {type(value).__name__}",
            )
    return None


def _equal(value: Any, copy: Any) -> bool:
    try:
        return bool(value == copy)
    except Exception:  # noqa: BLE001 - a foreign __eq__ may raise whatever it likes
        return False


def _changed(value: Any, copy: Any, path: str) -> RoundTripFault:
    kind, other = type(value), type(copy)
    if kind is other:
        return RoundTripFault(
            path, f"is {value!r:.80} and would come back as {copy!r:.80}", "check what its __post_init__ does"
        )
    return RoundTripFault(path, f"is {_a(kind)}, which would come back as {_a(other)}", _advice(value))


def _advice(value: Any) -> str:
    """What to do about a value that changed its type."""
    annotated = "or annotate the field with its type in a dataclass context"
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
        return "annotate the field as a list, or store what its annotation says"
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
        path, "is a str with a lone surrogate, which has no UTF-8 form", "use bytes, or clean the string"
    )


def _too_large(path: str) -> RoundTripFault:
    return RoundTripFault(path, "is an integer beyond 64 bits (-2**63 to 2**64-1)", "use a str, bytes or a float")


def _too_deep(path: str) -> RoundTripFault:
    return RoundTripFault(path, "is nested too deeply", "flatten it: keep nested data in a list, with indexes")
