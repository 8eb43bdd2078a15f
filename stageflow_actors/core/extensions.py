"""msgpack extensions: the values that msgspec does not keep on its own, as hooks for encoders and decoders.

`to_wire` returns a copy of a value in which each aware datetime, each time with a zone and each `fold` is an extension
that keeps offset, zone name and fold: msgspec itself converts aware datetimes to UTC. A datetime in UTC stays what
earlier releases wrote. The hooks keep paths, and numbers of numpy as the Python numbers that they equal. This module
must not import numpy or pydantic: values of theirs exist only if the user's code has imported them.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from pathlib import Path, PurePath
from typing import Any, get_origin
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
from msgspec import Raw
from msgspec.msgpack import Ext

__all__ = [
    "BUILTIN_TYPES",
    "PLAIN_EXT",
    "REPLY_EXT",
    "convert",
    "dec_hook",
    "decode_any",
    "describe",
    "enc_hook",
    "encode",
    "ext_hook",
    "keep_as_plain",
    "loose_form",
    "number_of",
    "plain_form",
    "read_reply",
    "to_wire",
    "with_extensions",
]

DATETIME_EXT = 1
TIME_EXT = 2
PLAIN_EXT = 3
"""Plain data in place of a value of the annotated type."""

DECIMAL_EXT, UUID_EXT, DATE_EXT, TIMEDELTA_EXT, TUPLE_EXT, SET_EXT, FROZENSET_EXT, PATH_EXT, PAIRS_EXT = range(4, 13)
"""Values that describe themselves, in results and messages of an annotated type."""

REPLY_EXT = 13
"""A reply with the name of its endpoint, whose annotation decides its type."""

_BYTES = (bytes, bytearray, memoryview)

BUILTIN_TYPES = (datetime, time, *_BYTES)
"""The types that `to_builtins` leaves as they are."""

_DESCRIBED = (datetime, time, date, timedelta, Decimal, UUID, *_BYTES)

_pack = msgspec.msgpack.Encoder().encode
_unpack_moment = msgspec.msgpack.Decoder(tuple[str, int, int | None, str | None]).decode
_unpack_reply = msgspec.msgpack.Decoder(tuple[str, Raw]).decode
_unpack_ext = msgspec.msgpack.Decoder(Ext).decode
_MICROSECOND = timedelta(microseconds=1)


def enc_hook(value: Any) -> Any:
    """Return a value that msgspec encodes in place of `value`. Raises `TypeError` for other types."""
    if isinstance(value, PurePath):
        return str(value)
    number = number_of(value)
    if number is not None:
        return number
    pydantic = sys.modules.get("pydantic")
    if pydantic is not None and isinstance(value, pydantic.BaseModel):
        return value.model_dump(mode="python", round_trip=True, by_alias=False, warnings=False)
    raise TypeError(f"Encoding objects of type {type(value).__name__} is unsupported")


def dec_hook(kind: Any, value: Any) -> Any:
    """Return `value`, as decoded without a type, as an instance of `kind`. Raises `TypeError` if it is none."""
    owner: Any = get_origin(kind) or kind
    if owner is object:
        return value
    if isinstance(owner, type):
        if issubclass(owner, PurePath) and isinstance(value, (str, PurePath)):
            return owner(value)
        if isinstance(value, owner):
            return value
        if _is_numpy_number(owner) and type(value) in (bool, int, float):
            return owner(value)
        pydantic = sys.modules.get("pydantic")
        if pydantic is not None and issubclass(owner, pydantic.BaseModel):
            model: Any = owner
            return model.model_validate(value, strict=False, by_name=True, by_alias=False)
    name = getattr(owner, "__name__", str(owner))
    raise TypeError(f"Expected `{name}`, got `{type(value).__name__}`")


def ext_hook(code: int, data: memoryview) -> Any:
    """Return the value of an extension."""
    if code == PLAIN_EXT:
        return decode_any(bytes(data))
    if code == REPLY_EXT:
        return decode_any(_unpack_reply(data)[1])
    if code == DATETIME_EXT:
        text, fold, offset, name = _unpack_moment(data)
        return datetime.fromisoformat(text).replace(tzinfo=_zone(offset, name), fold=fold)
    if code == TIME_EXT:
        text, fold, offset, name = _unpack_moment(data)
        return time.fromisoformat(text).replace(tzinfo=_zone(offset, name), fold=fold)
    decoder = _DECODERS.get(code)
    return Ext(code, bytes(data)) if decoder is None else decoder(data)


encode = msgspec.msgpack.Encoder(enc_hook=enc_hook).encode
"""Encode a value that has no datetime with another offset than that of UTC: msgspec would convert it to UTC."""

decode_any = msgspec.msgpack.Decoder(ext_hook=ext_hook).decode
"""Decode msgpack without a type."""


def to_wire(value: Any) -> Any:
    """Return a copy of `value` in builtin types and extensions, which `encode` encodes without a loss of offsets.

    Raises `TypeError` for a value that cannot be encoded.
    """
    return with_extensions(msgspec.to_builtins(value, builtin_types=BUILTIN_TYPES, enc_hook=enc_hook))


def convert(value: Any, kind: Any, *, strict: bool = True, json_keys: bool = False) -> Any:
    """Return decoded plain `value` as `kind`. Raises `msgspec.ValidationError`.

    With `json_keys`, keys that are strings are converted to the type of the key.
    """
    return msgspec.convert(value, kind, strict=strict, dec_hook=dec_hook, str_keys=json_keys)


def describe(value: Any, *, bare: bool = False) -> Any:
    """Return a copy of `value` in which each part that msgpack would not restore is an extension.

    An object becomes the dict of its fields; with `bare`, the parts of this dict are left as they are. Raises
    `TypeError` for a value that cannot be encoded.
    """
    kind = type(value)
    if kind is dict:
        return _mapping([(describe(key), describe(part)) for key, part in value.items()])
    if kind is list:
        return [describe(part) for part in value]
    code = _CONTAINERS.get(kind)
    if code is not None:
        return Ext(code, encode([describe(part) for part in value]))
    if isinstance(value, PurePath):
        return Ext(PATH_EXT, str(value).encode())
    if isinstance(value, enum.Enum):
        return describe(value.value)
    built = msgspec.to_builtins(value, builtin_types=_DESCRIBED, enc_hook=enc_hook)
    return built if bare else with_extensions(built, described=True)


def keep_as_plain(value: Any) -> Ext:
    """Return `value` as plain data, marked so that no annotation is applied when it is decoded.

    Raises `TypeError` for a value that has no plain form.
    """
    return Ext(PLAIN_EXT, _pack(plain_form(value)))


def number_of(value: Any) -> bool | int | float | None:
    """Return the Python number that a number of numpy equals; None for other values."""
    if not _is_numpy_number(type(value)):
        return None
    number = value.item()
    if type(number) not in (bool, int, float) or not (number == value or value != value):
        return None
    result: bool | int | float = number
    return result


def _is_numpy_number(kind: Any) -> bool:
    numpy = sys.modules.get("numpy")
    # A partial import of numpy has no such attributes yet.
    kinds = tuple(getattr(numpy, name, ()) for name in ("number", "bool_")) if numpy is not None else ()
    return any(isinstance(each, type) and issubclass(kind, each) for each in kinds)


def with_extensions(value: Any, *, described: bool = False) -> Any:
    """Return `value`, in builtin types, with an extension in place of each datetime and time that needs one.

    With `described`, each datetime, date, timedelta, Decimal and UUID is an extension.
    """
    kind = type(value)
    if kind is dict:
        pairs = [
            (with_extensions(key, described=described), with_extensions(part, described=described))
            for key, part in value.items()
        ]
        return _mapping(pairs)
    if kind is list or kind is set or kind is frozenset:
        return [with_extensions(part, described=described) for part in value]
    if kind is tuple:
        return tuple(with_extensions(part, described=described) for part in value)
    if kind is datetime:
        if value.tzinfo is UTC and not value.fold:
            return value  # a timestamp, as earlier releases wrote it
        if value.tzinfo is None and not value.fold and not described:
            return value.isoformat()
        return _moment(DATETIME_EXT, value.replace(tzinfo=None, fold=0).isoformat(), value)
    if kind is time:
        if value.tzinfo is None and not value.fold and not described:
            return value.isoformat()
        return _moment(TIME_EXT, value.replace(tzinfo=None, fold=0).isoformat(), value)
    if described:
        if kind is Decimal or kind is UUID or kind is date:
            return Ext(_AS_TEXT[kind], str(value).encode())
        if kind is timedelta:
            return Ext(TIMEDELTA_EXT, _pack((value.days, value.seconds, value.microseconds)))
    return value


def _mapping(pairs: list[tuple[Any, Any]]) -> Any:
    """Return a dict of the pairs, or an extension if a key is one: extensions cannot be keys."""
    try:
        return dict(pairs)
    except TypeError:
        return Ext(PAIRS_EXT, encode(pairs))


def _decode_pairs(data: memoryview) -> dict[Any, Any]:
    return {_hashable(key): part for key, part in decode_any(bytes(data))}


def _hashable(key: Any) -> Any:
    return tuple(_hashable(part) for part in key) if type(key) is list else key


_CONTAINERS: dict[Any, int] = {tuple: TUPLE_EXT, set: SET_EXT, frozenset: FROZENSET_EXT}
_AS_TEXT: dict[Any, int] = {Decimal: DECIMAL_EXT, UUID: UUID_EXT, date: DATE_EXT}


def _moment(code: int, text: str, value: datetime | time) -> Ext:
    offset = value.utcoffset()
    name = value.tzinfo.key if isinstance(value.tzinfo, ZoneInfo) else None
    return Ext(code, _pack((text, value.fold, None if offset is None else offset // _MICROSECOND, name)))


def _zone(offset: int | None, name: str | None) -> tzinfo | None:
    if name is not None:
        return ZoneInfo(name)
    if offset is None:
        return None
    return timezone(timedelta(microseconds=offset)) if offset else UTC


def plain_form(value: Any) -> Any:
    """Return `value` as plain data: what it is without its types. Raises `TypeError` if it has no plain form."""

    def hook(part: Any) -> Any:
        base: Any = next((base for base in (bool, int, float, str, bytes) if isinstance(part, base)), None)
        return enc_hook(part) if base is None else base(part)

    return msgspec.to_builtins(value, builtin_types=_BYTES, enc_hook=hook)


def loose_form(value: Any) -> Any:
    """Return `value` with plain data in place of each part that is kept only in an annotated place.

    A tuple or set becomes a list, a Decimal or a date a str. Raises `TypeError` for what has no plain form, and for
    members of subclasses of str, int, dict and the like, which would become members of their bases.
    """
    kind = type(value)
    if kind is dict:
        loose = {loose_form(key): loose_form(part) for key, part in value.items()}
        if len(loose) != len(value):
            raise TypeError("keys that are different would become equal")
        return loose
    if kind is list or isinstance(value, tuple):
        return [loose_form(part) for part in value]
    if kind is set or kind is frozenset:
        parts = [loose_form(part) for part in value]
        try:
            return sorted(parts)
        except TypeError:
            return parts
    if kind is datetime and value.tzinfo is not None:
        return value
    if isinstance(value, enum.Enum) and not isinstance(value, (str, int, float)):
        return loose_form(value.value)
    if kind in _WITH_PLAIN_FORM or isinstance(value, PurePath):
        return plain_form(value)
    return value


_WITH_PLAIN_FORM = frozenset({datetime, date, time, timedelta, Decimal, UUID})


def read_reply(data: Raw) -> tuple[str | None, Raw]:
    """Return the endpoint of a reply and the reply; None for the endpoint of other data."""
    try:
        tagged = _unpack_ext(data)
        return _unpack_reply(tagged.data) if tagged.code == REPLY_EXT else (None, data)
    except msgspec.MsgspecError:
        return None, data


def _decode_text(data: memoryview) -> str:
    return bytes(data).decode()


_DECODERS: dict[int, Callable[[memoryview], Any]] = {
    DECIMAL_EXT: lambda data: Decimal(_decode_text(data)),
    UUID_EXT: lambda data: UUID(_decode_text(data)),
    DATE_EXT: lambda data: date.fromisoformat(_decode_text(data)),
    TIMEDELTA_EXT: lambda data: timedelta(*decode_any(bytes(data))),
    TUPLE_EXT: lambda data: tuple(decode_any(bytes(data))),
    SET_EXT: lambda data: set(map(_hashable, decode_any(bytes(data)))),
    FROZENSET_EXT: lambda data: frozenset(map(_hashable, decode_any(bytes(data)))),
    PATH_EXT: lambda data: Path(_decode_text(data)),
    PAIRS_EXT: _decode_pairs,
}
