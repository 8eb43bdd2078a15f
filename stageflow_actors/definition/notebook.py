"""Definitions of notebook cells and interactive sessions, which replace earlier ones of the same name."""

from __future__ import annotations

import functools
import inspect
import re
from types import CodeType
from typing import Any

__all__ = ["is_defined_again"]

_CELL = re.compile(r"ipykernel|ipython-input|^<stdin>$|^<python-input|__marimo__cell|^<command-")
"""The file names that IPython, Jupyter, marimo, Databricks and the interactive interpreter give to their code."""


def is_defined_again(earlier: Any, later: Any) -> bool:
    """Return True if both are functions or classes of one name, and a cell that ran later defines the second one.

    A name that one run of a cell defines twice is a mistake of its author, and no replacement.
    """
    before, after = _code_of(earlier), _code_of(later)
    if before is None or after is None or before is after:
        return False
    if _name_of(earlier) != _name_of(later) or not (
        _CELL.search(before.co_filename) and _CELL.search(after.co_filename)
    ):
        return False
    return before.co_filename != after.co_filename or before.co_firstlineno == after.co_firstlineno


def _plain(handler: Any) -> Any:
    while isinstance(handler, functools.partial):
        handler = handler.func
    return inspect.unwrap(handler) if callable(handler) else handler


def _name_of(handler: Any) -> str:
    plain = _plain(handler)
    return str(getattr(plain, "__qualname__", type(plain).__qualname__))


def _code_of(handler: Any) -> CodeType | None:
    plain = _plain(handler)
    if not inspect.isroutine(plain):
        methods = (getattr(plain, name, None) for name in ("execute", "compensate", "__call__"))
        plain = next((method for method in methods if hasattr(method, "__code__")), None)
    code = getattr(plain, "__code__", None)
    return code if isinstance(code, CodeType) else None
