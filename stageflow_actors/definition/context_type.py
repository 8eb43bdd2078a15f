"""Context types: which classes are accepted, and their fields. This module does not import pydantic."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import msgspec

from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["check_context_type", "fields_of"]


def check_context_type(context: Any, what: str) -> type[Any]:
    """Return `context` if it is a valid context type; `what` names the workflow in the error."""
    if isinstance(context, type) and (
        context is dict
        or dataclasses.is_dataclass(context)
        or issubclass(context, msgspec.Struct)
        or _is_pydantic_model(context)
    ):
        return context
    if isinstance(context, type):
        named = f"the class {context.__name__}"
    else:
        named = f"{context!r} (use the type, not an instance)" if not callable(context) else repr(context)
    raise WorkflowDefinitionError(
        f"the context of {what} must be dict, a dataclass, a msgspec Struct or a pydantic model, not {named}"
    )


def _is_pydantic_model(kind: type[Any]) -> bool:
    """Return True if it is a pydantic model with fields; a `RootModel` has none."""
    fields = getattr(kind, "__pydantic_fields__", None)
    return isinstance(fields, dict) and "root" not in fields


def fields_of(context: type[Any]) -> list[str]:
    """Return the name of the type, followed by the names of its fields."""
    if context is dict:
        return ["dict"]
    if dataclasses.is_dataclass(context):
        return [context.__name__, *(f.name for f in dataclasses.fields(context))]
    if _is_pydantic_model(context):
        return [context.__name__, *cast(Any, context).__pydantic_fields__]
    return [context.__name__, *cast(type[msgspec.Struct], context).__struct_fields__]
