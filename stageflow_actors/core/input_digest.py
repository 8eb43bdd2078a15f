"""`input_digest`: recognises the input of a start again, whatever the order of keys and the form of numbers.

Equal inputs have one digest: an int and the float of the same value count as equal (a bool is no number), NaN equals
itself, sets have no order, and fields equal to their default are left out, so that a field added with a default
changes no digest. Of factories only the empty list, dict and set count as a default.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
from msgspec.msgpack import Ext

from stageflow_actors.core.extensions import enc_hook

__all__ = ["default_fields", "input_digest"]

Encode = Callable[[Any], bytes]

_encode: Encode = msgspec.msgpack.Encoder(enc_hook=enc_hook, order="deterministic").encode

_PAIRS, _SET = 5, 6
_MISSING = object()
_EMPTY = (list, dict, set)
_SAME = frozenset({type(None), bool, int, str, bytes})


class _Field(NamedTuple):
    name: str
    encoded_name: str
    default: Any
    may_be_empty: bool


def input_digest(context: Any, scope: str, encode: Encode = _encode) -> bytes:
    """Return 16 bytes that are the same for equal contexts. `scope` separates equal inputs that must differ."""
    return hashlib.blake2b(scope.encode() + b"\1" + encode(_canonical(context, encode)), digest_size=16).digest()


def default_fields(context: Any) -> list[str]:
    """Return the encoded names of the fields that equal their default, in order of definition."""
    kind: Any = type(context)
    fields = _fields_of(kind)
    return [field.encoded_name for field in fields or () if _is_default(field, getattr(context, field.name, _MISSING))]


def _canonical(value: Any, encode: Encode) -> Any:
    kind: Any = type(value)
    if kind in _SAME:
        return value
    if kind is float:
        return _number(value)
    if kind is dict:
        if all(type(key) is str for key in value):
            return {key: _canonical(part, encode) for key, part in value.items()}
        pairs = ((_canonical(key, encode), _canonical(part, encode)) for key, part in value.items())
        return Ext(_PAIRS, encode(sorted(pairs, key=encode)))
    if kind is list or kind is tuple:
        return [_canonical(part, encode) for part in value]
    if kind is set or kind is frozenset:
        return Ext(_SET, encode(sorted((_canonical(part, encode) for part in value), key=encode)))
    if isinstance(value, enum.Enum):
        return value.value
    if kind is Decimal:
        return str(value.normalize()) if value.is_finite() else str(value)
    fields = _fields_of(kind)
    if fields is None:
        return value
    given = ((field, getattr(value, field.name, _MISSING)) for field in fields)
    found = {
        field.encoded_name: _canonical(part, encode)
        for field, part in given
        if part is not _MISSING and part is not msgspec.UNSET and not _is_default(field, part)
    }
    found.update((str(name), _canonical(part, encode)) for name, part in _others(value))
    return found


def _number(value: float) -> int | float:
    if value.is_integer() and -(2.0**63) <= value < 2.0**64:
        return int(value)
    return value if value == value else math.nan


def _others(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what tells instances apart beside their fields: the tag of a Struct, the extra fields of a model."""
    config = getattr(type(value), "__struct_config__", None)
    if config is not None and config.tag_field:
        yield config.tag_field, config.tag
    extra = getattr(value, "__pydantic_extra__", None)
    if extra:
        yield from extra.items()


@lru_cache(maxsize=1024)
def _fields_of(kind: Any) -> tuple[_Field, ...] | None:
    """Return the fields of a class of objects; None for other classes."""
    if dataclasses.is_dataclass(kind):
        return tuple(_field(f.name, f.name, f.default, f.default_factory) for f in dataclasses.fields(kind))
    if issubclass(kind, msgspec.Struct):
        struct: Any = msgspec.structs.fields(kind)
        return tuple(_field(f.name, f.encode_name, f.default, f.default_factory) for f in struct)
    model: Any = getattr(kind, "__pydantic_fields__", None)
    if isinstance(model, dict):
        return tuple(_field(name, name, f.default, f.default_factory) for name, f in model.items())
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        named: Any = kind
        return tuple(_field(name, name, named._field_defaults.get(name, _MISSING), None) for name in named._fields)
    return None


def _field(name: str, encoded_name: str, default: Any, factory: Any) -> _Field:
    absent = (dataclasses.MISSING, msgspec.NODEFAULT)
    missing = any(default is each for each in absent) or type(default).__name__ == "PydanticUndefinedType"
    return _Field(name, encoded_name, _MISSING if missing else default, factory in _EMPTY)


def _is_default(field: _Field, value: Any) -> bool:
    if field.may_be_empty and type(value) in _EMPTY:
        return not value
    default = field.default
    if default is _MISSING:
        return False
    numbers = type(value) in (int, float) and type(default) in (int, float)
    if type(value) is not type(default) and not numbers:
        return False
    try:
        return bool(value == default) or (type(value) is float and value != value and default != default)
    except Exception:  # noqa: BLE001 - an __eq__ of user code may raise any exception
        return False
