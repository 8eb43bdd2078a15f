"""Set one field of a context of any supported type, frozen ones included."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import msgspec

__all__ = ["with_field"]


def with_field(context: Any, name: str, value: Any) -> Any:
    """Return `context` with the field set; a copy if it is frozen. Raises each exception of the assignment."""
    if isinstance(context, dict):
        context[name] = value
        return context
    kind: Any = type(context)
    if isinstance(context, msgspec.Struct) and context.__struct_config__.frozen:
        return msgspec.structs.replace(context, **{name: value})
    if dataclasses.is_dataclass(context) and kind.__dataclass_params__.frozen:
        # Not `dataclasses.replace`: the constructor may require more than the fields.
        changed = copy.copy(context)
        object.__setattr__(changed, name, value)
        return changed
    fields = getattr(kind, "__pydantic_fields__", None)
    if fields is not None and name in fields and (context.model_config.get("frozen") or fields[name].frozen):
        return context.model_copy(update={name: value})
    setattr(context, name, value)
    return context
