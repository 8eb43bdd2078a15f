"""`advise`: the expression to write in place of a value that cannot be kept, by the kind of value.

Classes of numpy, pandas, polars, pyarrow and PIL are recognised by their methods: this module must not import them.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import functools
import inspect
import io
import numbers
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import PurePath
from typing import Any
from uuid import UUID

import msgspec

__all__ = ["advise"]

LARGE_BYTES = 1 << 20
"""From this size on, the advice for an array is a file."""

_TYPED = "or store it in a field annotated with its type"
_SERVICE = "store plain data from which it can be rebuilt, or make it a service (Runtime(services=...))"


def advise(value: Any) -> str:
    """Return what to write in place of `value`, such as "use x.tolist()"."""
    try:
        if isinstance(value, type):
            return "store its name"
        return _of_library(value) or _of_builtin(value) or _of_structure(value) or _of_other(value)
    except Exception:  # noqa: BLE001 - a value of user code may raise at any attribute
        return _SERVICE


def _of_library(value: Any) -> str | None:
    kind = type(value)
    library, name = kind.__module__.partition(".")[0], kind.__name__
    if name in ("NaTType", "NAType"):
        return "use None"
    if isinstance(value, datetime) and hasattr(value, "to_pydatetime"):
        return "use x.to_pydatetime() in a field annotated as datetime, or x.isoformat()"
    if isinstance(value, timedelta) and hasattr(value, "to_pytimedelta"):
        return "use x.total_seconds(), or x.to_pytimedelta() in a field annotated as timedelta"
    if library == "PIL":
        return "save it to a file and store str(path), or store its bytes"
    for method, call in (("to_dicts", "x.to_dicts()"), ("to_pylist", "x.to_pylist()")):
        if _has_method(value, method):
            return f"use {call}, or write it to a file and store str(path)"
    if library == "pandas" and _has_method(value, "to_dict") and getattr(value, "ndim", 0) == 2:
        return 'use x.to_dict("records"), or write it to a file and store str(path)'
    if isinstance(value, (str, bytes)):
        return None
    if library == "numpy" and getattr(value, "ndim", None) == 0:
        return _of_numpy_scalar(value)
    for method in ("tolist", "to_list"):
        if _has_method(value, method) and not isinstance(value, memoryview):
            size = getattr(value, "nbytes", 0)
            if isinstance(size, int) and size >= LARGE_BYTES:
                return f"write it to a file and store str(path): x.{method}() would be {size} bytes or more"
            return f"use x.{method}()"
    return None


def _of_numpy_scalar(value: Any) -> str:
    item = value.item()
    if isinstance(item, (datetime, date)):
        return "use x.item().isoformat()"
    if isinstance(item, timedelta):
        return "use x.item().total_seconds()"
    if isinstance(item, complex):
        return "use [float(x.real), float(x.imag)]"
    if isinstance(item, (bool, int, float, str, bytes, list, tuple, dict, type(None))):
        return "use x.item()"
    return "use float(x)" if hasattr(value, "__float__") else "use str(x)"


def _of_builtin(value: Any) -> str | None:
    if isinstance(value, enum.Enum):
        return f"use x.value, {_TYPED}"
    if isinstance(value, PurePath):
        return f"use str(path), {_TYPED}"
    if isinstance(value, (datetime, date, time)):
        return f"use x.isoformat(), {_TYPED}"
    if isinstance(value, timedelta):
        return f"use x.total_seconds(), {_TYPED}"
    if isinstance(value, (Decimal, UUID)):
        return f"use str(x), {_TYPED}"
    for base in (bool, int, float, str, bytes):
        if isinstance(value, base):
            return f"use {base.__name__}(x)"
    if isinstance(value, (bytearray, memoryview)):
        return "use bytes(x)"
    if isinstance(value, complex):
        return "use [x.real, x.imag]"
    if isinstance(value, numbers.Number):
        return "use float(x) or str(x)"
    return None


def _of_structure(value: Any) -> str | None:
    if dataclasses.is_dataclass(value):
        return f"use dataclasses.asdict(x), {_TYPED}"
    if isinstance(value, msgspec.Struct):
        return f"use msgspec.to_builtins(x), {_TYPED}"
    if hasattr(type(value), "__pydantic_fields__"):
        return f"use x.model_dump(), {_TYPED}"
    if isinstance(value, tuple):
        return f"use x._asdict(), {_TYPED}" if hasattr(value, "_fields") else f"use list(x), {_TYPED}"
    if isinstance(value, (set, frozenset)):
        return f"use sorted(x), {_TYPED}"
    if isinstance(value, collections.abc.Mapping):
        return "use dict(x)"
    if isinstance(value, collections.abc.Iterator) and not isinstance(value, io.IOBase):
        return "use list(x)"
    if isinstance(value, (collections.abc.Collection, collections.abc.MappingView)):
        return "use list(x)"
    return None


def _of_other(value: Any) -> str:
    if isinstance(value, BaseException):
        return "use str(x), or raise it"
    if isinstance(value, io.IOBase):
        return "close it and store its name or its content, or make it a service (Runtime(services=...))"
    if inspect.isroutine(value) or isinstance(value, functools.partial):
        return "store its name, or make it a service (Runtime(services=...))"
    return _SERVICE


def _has_method(value: Any, name: str) -> bool:
    method: Callable[..., Any] | None = getattr(type(value), name, None)
    return callable(method)
