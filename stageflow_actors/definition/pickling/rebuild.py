"""What a worker calls to rebuild the objects of `CodePickler`: first `make_…`, then `fill_…` with the rest.

An object with a token is made once per process, however many pieces of code contain it, and filled once.
"""

from __future__ import annotations

import functools
import sys
import typing
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from stageflow_actors.definition.pickling.namespaces import define, is_filled, rebuilt

__all__ = [
    "fill_cell",
    "fill_class",
    "fill_dispatcher",
    "fill_function",
    "fill_module",
    "fill_object",
    "make_cell",
    "make_class",
    "make_dispatcher",
    "make_function",
    "make_named",
    "make_object",
    "open_module",
]

Where = tuple[dict[str, Any], str] | None


def make_function(
    token: str | None, where: Where, code: CodeType, namespace: dict[str, Any], name: str, closure: Any
) -> Any:
    """Return a function whose globals are those of its module."""
    return rebuilt(token, lambda: FunctionType(code, namespace, name, None, closure), where)


def fill_function(function: Any, rest: tuple[str | None, dict[str, Any], dict[str, Any], dict[str, Any]]) -> None:
    """Set attributes and globals of a function."""
    token, state, slots, values = rest
    for name, value in values.items():
        define(function.__globals__, name, value)
    if is_filled(token):
        return
    function.__dict__.update(state)
    slots.pop("_cloudpickle_submodules")
    for name, value in slots.items():
        setattr(function, name, value)


def make_cell() -> CellType:
    """Return an empty cell, which closures share."""
    return CellType()


def fill_cell(cell: CellType, content: tuple[Any, ...]) -> None:
    """Set the content of a cell that has one."""
    if content:
        cell.cell_contents = content[0]


def make_class(token: str, where: Where, qualname: str, make: Any, arguments: tuple[Any, ...]) -> Any:
    """Return a class without its attributes."""

    def make_named_class() -> Any:
        kind = make(*arguments)
        kind.__qualname__ = qualname
        return kind

    return rebuilt(token, make_named_class, where)


def fill_class(
    kind: Any, rest: tuple[str, Any, Any, Any, dict[str, dict[str, Any]], dict[str, Any] | None, dict[str, Any]]
) -> None:
    """Set the attributes of a class, and the globals that its annotations name."""
    token, fill, state, outer, members, namespace, values = rest
    if namespace is not None:
        for name, value in values.items():
            define(namespace, name, value)
    if outer is not None:
        define(vars(sys.modules[outer.__module__]), outer.__name__, outer)
    if not is_filled(token):
        fill(kind, state)
        for name, attributes in members.items():
            vars(kind.__members__[name]).update(attributes)


def make_dispatcher(token: str, where: Where, base: Any) -> Any:
    """Return a function of `functools.singledispatch`."""
    return rebuilt(token, lambda: functools.singledispatch(base), where)


def fill_dispatcher(dispatcher: Any, rest: tuple[str, list[tuple[type[Any], Any]]]) -> None:
    """Register the implementations of a `functools.singledispatch` function."""
    token, others = rest
    if not is_filled(token):
        for kind, function in others:
            dispatcher.register(kind, function)


def make_named(token: str, where: Where, kind: str, *arguments: Any) -> Any:
    """Return a cache or a type variable."""

    def make() -> Any:
        if kind == "cache":
            function, maxsize, typed = arguments
            return functools.lru_cache(maxsize, typed)(function)
        if kind == "TypeAliasType":
            name, value, parameters = arguments
            return getattr(typing, kind)(name, value, type_params=parameters)
        if kind in ("NewType", "TypeVarTuple"):
            return getattr(typing, kind)(*arguments)
        name, constraints, bound, covariant, contravariant = arguments
        return getattr(typing, kind)(name, *constraints, bound=bound, covariant=covariant, contravariant=contravariant)

    return rebuilt(token, make, where)


def make_object(token: str, where: Where, make: Any, arguments: tuple[Any, ...]) -> Any:
    """Return an object that is compared by identity."""
    return rebuilt(token, lambda: make(*arguments), where)


def fill_object(obj: Any, rest: tuple[str, Any]) -> None:
    """Set the state of an object, in the form of `object.__getstate__`."""
    token, state = rest
    if is_filled(token) or state is None:
        return
    if hasattr(obj, "__setstate__"):
        obj.__setstate__(state)
        return
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    for name, value in {**(attributes or {}), **(slots or {})}.items():
        try:
            object.__setattr__(obj, name, value)
        except (AttributeError, TypeError):
            pass  # as `__module__` of a type variable in some versions of Python


def open_module(namespace: dict[str, Any]) -> ModuleType:
    """Return the module with these globals."""
    return sys.modules[namespace["__name__"]]


def fill_module(module: ModuleType, values: dict[str, Any]) -> None:
    """Set the globals of a module."""
    for name, value in values.items():
        define(vars(module), name, value)
