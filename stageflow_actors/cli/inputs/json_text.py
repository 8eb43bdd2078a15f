"""One JSON object as a context, or the reason why it is none."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

__all__ = ["NotAContext", "kind_of", "loads", "not_utf8", "read_context"]

LEAST, MOST = -(2**63), 2**64 - 1
"""Range of integers that a context can hold."""

_MAYBE_WIDE = re.compile(rb"\d{19}")
_NO_JSON_NUMBER = re.compile(rb"NaN|Infinity")
"""Floats that `json.dumps` writes although JSON has no word for them."""


class NotAContext(ValueError):
    """A text that is no context, and why."""


def loads(text: bytes) -> Any:
    """Return the value of a JSON text, in which floats may be NaN and the infinities. Raises `NotAContext`."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        wrong = not_utf8(text)
        if wrong:
            raise NotAContext(wrong) from None
        value = _with_nan(text)
    # The parser makes floats of integers that are too wide: two ids would become one.
    if _MAYBE_WIDE.search(text):
        _refuse_wide_integers(text)
    return value


def read_context(text: bytes) -> dict[str, Any]:
    """Return the object of a JSON text as a context. Raises `NotAContext`."""
    value = loads(text)
    if not isinstance(value, dict):
        raise NotAContext(f"must be a JSON object, not {kind_of(value)}")
    # The parser takes the last of two values of one name. Names are counted first: this runs for each line.
    names = text.count(b'":')
    if names > len(value) and names > _names_in(value):
        _refuse_repeated_names(text)
    return value


def kind_of(value: Any) -> str:
    """Return what a JSON value is, in words."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")


def not_utf8(text: bytes) -> str:
    """Return the place where a line is not UTF-8; empty for a valid line."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        place = f"byte 0x{text[error.start]:02x} at column {error.start + 1}"
        return f"not valid UTF-8: {place}; is it in another encoding?"
    return ""


def _with_nan(text: bytes) -> Any:
    if _MAYBE_WIDE.search(text):
        _refuse_wide_integers(text)
    if _NO_JSON_NUMBER.search(text):
        try:
            return json.loads(text)
        except RecursionError:
            raise NotAContext("is nested too deeply") from None
        except ValueError:
            pass  # the other parser says why, as for all other lines
    try:
        return orjson.loads(text.strip())
    except orjson.JSONDecodeError as error:
        reason = str(error).replace(": line 1 column", " at column").partition(" (char")[0]
        raise NotAContext(f"not valid JSON: {reason}") from None


class _Wide(str):
    """The digits of an integer that no context can hold."""

    __slots__ = ()


def _integer(digits: str) -> int | _Wide:
    if len(digits) > 20:
        return _Wide(digits)
    number = int(digits)
    return number if LEAST <= number <= MOST else _Wide(digits)


def _refuse_wide_integers(text: bytes) -> None:
    try:
        found: list[tuple[str, Any]] = [("", json.loads(text, parse_int=_integer))]
    except RecursionError:
        raise NotAContext("is nested too deeply") from None
    except ValueError:
        return  # it is not valid for another reason
    while found:
        path, value = found.pop()
        if isinstance(value, dict):
            found.extend((f"{path}.{name}" if path else name, each) for name, each in value.items())
        elif isinstance(value, list):
            found.extend((f"{path}[{at}]", each) for at, each in enumerate(value))
        elif isinstance(value, _Wide):
            shown = value if len(value) <= 40 else f"{value[:40]}…"
            name = f"{path} is {shown}, which" if path else f"{shown}"
            raise NotAContext(f"{name} does not fit in 64 bits: write it as a string")


def _names_in(value: Any) -> int:
    number, found = 0, [value]
    while found:
        each = found.pop()
        if isinstance(each, dict):
            number += len(each)
            found.extend(each.values())
        elif isinstance(each, list):
            found.extend(each)
    return number


def _refuse_repeated_names(text: bytes) -> None:
    def paired(pairs: list[tuple[str, Any]]) -> None:
        seen = set()
        for name, _ in pairs:
            if name in seen:
                raise NotAContext(f"names {name!r} more than once")
            seen.add(name)

    try:
        json.loads(text, object_pairs_hook=paired, parse_int=str)
    except RecursionError:
        raise NotAContext("is nested too deeply") from None
