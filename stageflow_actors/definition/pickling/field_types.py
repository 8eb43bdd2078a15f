"""Annotations of context types as strings: resolved in the program, set again on the classes in a child process.

A class that is pickled by value loses the module in which the names of its annotations are defined.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Iterator
from typing import Any

import msgspec

from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["export_types", "import_types", "reachable_types"]


def export_types(context_type: type[Any]) -> dict[str, dict[str, Any]]:
    """Return the resolved annotations of the classes reachable from `context_type`, by class and field.

    Only classes with annotations that are strings are included. Raises `WorkflowDefinitionError` if a name cannot be
    resolved.
    """
    found: dict[str, dict[str, Any]] = {}
    for kind in reachable_types(context_type):
        for owner in kind.__mro__:
            own = inspect.get_annotations(owner)
            if any(isinstance(annotation, str) for annotation in own.values()):
                hints = _hints(owner)
                found[_key(owner)] = {name: hints[name] for name in own}
    return found


def import_types(context_type: type[Any], types: dict[str, dict[str, Any]]) -> None:
    """Set the annotations that `export_types` resolved on the classes reachable from `context_type`."""
    todo: list[Any] = [context_type]
    seen: set[int] = set()
    while todo:
        kind = todo.pop()
        if id(kind) in seen:
            continue
        seen.add(id(kind))
        for owner in getattr(kind, "__mro__", ()):
            resolved = types.get(_key(owner))
            if resolved is not None:
                owner.__annotations__ = {**inspect.get_annotations(owner), **resolved}
            todo.extend(_classes_in(inspect.get_annotations(owner).values()))


def reachable_types(context_type: type[Any]) -> list[type[Any]]:
    """Return the classes with annotated fields that a context can hold, the context type first."""
    found: dict[int, type[Any]] = {}
    todo: list[Any] = [context_type]
    while todo:
        kind = todo.pop()
        if id(kind) in found:
            continue
        if not _has_fields(kind):
            continue
        found[id(kind)] = kind
        todo.extend(_classes_in(_hints(kind).values()))
    return list(found.values())


def _has_fields(kind: type[Any]) -> bool:
    return (
        dataclasses.is_dataclass(kind)
        or issubclass(kind, msgspec.Struct)
        or typing.is_typeddict(kind)
        or (issubclass(kind, tuple) and hasattr(kind, "_fields"))
        or hasattr(kind, "__attrs_attrs__")
    )


def _hints(kind: type[Any]) -> dict[str, Any]:
    module = sys.modules.get(kind.__module__)
    names = {kind.__name__: kind}
    try:
        return typing.get_type_hints(kind, {**vars(module), **names} if module else names, names, include_extras=True)
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        raise WorkflowDefinitionError(
            f"the annotations of {kind.__qualname__} cannot be resolved: {error}. "
            "Define the types that it names at the top level of its module"
        ) from error


def _classes_in(annotations: Any) -> Iterator[type[Any]]:
    for annotation in annotations:
        arguments = typing.get_args(annotation)
        if arguments:
            yield from _classes_in(arguments)
        elif isinstance(annotation, type) and annotation.__module__ != "builtins":
            yield annotation


def _key(kind: type[Any]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"
