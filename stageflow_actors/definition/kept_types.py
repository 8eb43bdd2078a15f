"""Types that can be kept between stages: `check_kept` refuses an annotation that names another one.

Without the check, the first result or context of such a type would fail its stage, after the effect of the stage.
This module must not import numpy, pandas or pydantic.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect as python_inspect
import sys
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

import msgspec
from msgspec import inspect

from stageflow_actors.definition.remote import RemoteCall
from stageflow_actors.definition.stage import Stage
from stageflow_actors.definition.steps import MapStage, Signal, Step
from stageflow_actors.definition.type_hints import first_parameter_type, return_type
from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["check_annotations", "check_context_fields", "check_kept", "walk_types"]

_NEVER = (
    collections.abc.Callable,
    collections.abc.Iterator,
    collections.abc.Awaitable,
    collections.abc.AsyncIterable,
)

_WRITE_INSTEAD = (
    ("to_dicts", "x.to_dicts()", "list[dict[str, Any]]"),
    ("to_pylist", "x.to_pylist()", "list[dict[str, Any]]"),
    ("tolist", "x.tolist()", "list"),
    ("to_list", "x.to_list()", "list"),
    ("to_dict", 'x.to_dict("records")', "list[dict[str, Any]]"),
)


def check_annotations(what: str, context: type[Any], stages: Iterable[Stage], steps: Iterable[Step]) -> None:
    """Raise `WorkflowDefinitionError` for an annotation of a workflow that names a type that cannot be kept."""
    check_context_fields(context, what)
    for stage in stages:
        if not isinstance(stage.handler, RemoteCall):
            hint = return_type(stage.spec.function)
            if hint is not context:
                check_kept(hint, f"the return annotation of stage {stage.id!r} of {what}")
    for step in steps:
        if isinstance(step, MapStage):
            spec = step.item.spec
            hint = first_parameter_type(spec.function, spec.before_context)
            check_kept(hint, f"the first parameter of stage {step.id!r} of {what}")
        elif isinstance(step, Signal) and step.on_signal is not None:
            hint = first_parameter_type(step.on_signal, 1)
            check_kept(hint, f"the second parameter of on_signal of stage {step.id!r} of {what}")


def check_kept(hint: Any, where: str) -> None:
    """Raise `WorkflowDefinitionError` if `hint` names a class whose instances cannot be kept.

    `where` is the subject of the error, as in "the return annotation of stage 'load'".
    """
    kind = _find_unkept(hint)
    if kind is not None:
        raise WorkflowDefinitionError(
            f"{where} names {_name(kind)}, which cannot be kept between stages: {_advise(kind)}"
        )


def check_context_fields(context: type[Any], what: str) -> None:
    """Raise `WorkflowDefinitionError` for a field of a context type that cannot be kept; models check themselves."""
    if not dataclasses.is_dataclass(context) and not issubclass(context, msgspec.Struct):
        return
    try:
        fields = inspect.type_info(context).fields  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001 - the codec of the context explains the error
        return
    for field in fields:
        kind = _find_in(field.type)
        if kind is not None:
            raise WorkflowDefinitionError(
                f"the field {field.name!r} of {context.__name__}, the context of {what}, names {_name(kind)}, which "
                f"cannot be kept between stages: {_advise(kind)}"
            )


def walk_types(kind: Any) -> list[Any]:
    """Return what msgspec knows of `kind` and of each type inside it. Raises what `inspect.type_info` raises."""
    return _walk(inspect.type_info(kind))


def _walk(first: Any) -> list[Any]:
    todo: list[Any] = [first]
    found: list[Any] = []
    seen: set[Any] = set()
    while todo:
        info = todo.pop()
        owner = getattr(info, "cls", None)
        if owner is not None and not isinstance(info, inspect.CustomType):
            if owner in seen:
                continue
            seen.add(owner)
        found.append(info)
        for name in ("type", "item_type", "key_type", "value_type"):
            inner = getattr(info, name, None)
            if isinstance(inner, inspect.Type):
                todo.append(inner)
        for name in ("item_types", "types"):
            todo.extend(getattr(info, name, ()))
        todo.extend(field.type for field in getattr(info, "fields", ()))
    return found


def _find_unkept(hint: Any) -> type[Any] | None:
    try:
        return _find_in(inspect.type_info(hint))
    except Exception:  # noqa: BLE001 - what cannot be read counts as no annotation
        return None


def _find_in(info: Any) -> type[Any] | None:
    for each in _walk(info):
        if isinstance(each, inspect.CustomType) and isinstance(each.cls, type) and not _is_kept(each.cls):
            return each.cls
    return None


def _is_kept(kind: type[Any]) -> bool:
    if kind is object or issubclass(kind, PurePath) or hasattr(kind, "__pydantic_fields__"):
        return True
    if any(kind is each for each in _NEVER) or issubclass(kind, collections.abc.Iterator):
        return False
    if getattr(kind, "_is_protocol", False) or python_inspect.isabstract(kind) or kind.__module__ == "collections.abc":
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and issubclass(kind, (numpy.number, numpy.bool_))


def _advise(kind: type[Any]) -> str:
    for method, call, annotation in _WRITE_INSTEAD:
        if callable(getattr(kind, method, None)):
            return f"use {call} and annotate {annotation}, or write it to a file and use its path"
    if issubclass(kind, dict):
        return "use dict(x) and annotate dict"
    if issubclass(kind, (collections.abc.Iterator, collections.abc.Collection)):
        return "use list(x) and annotate list"
    if issubclass(kind, complex):
        return "use [x.real, x.imag] and annotate list[float]"
    return (
        "use plain data, a dataclass, a Struct or a model from which it can be made again, or make it a service "
        "(Runtime(services=...))"
    )


def _name(kind: type[Any]) -> str:
    return (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )
