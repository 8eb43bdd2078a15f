"""The cells of a CSV file as values: a CSV file holds strings, and the context type determines their types."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import msgspec

from stageflow_actors.core.codec import ContextCodec
from stageflow_actors.core.extensions import enc_hook
from stageflow_actors.core.pydantic_codec import is_model

__all__ = ["row_reader"]


def row_reader(codec: ContextCodec[Any]) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """Return a function from a row of strings to typed context fields; None for a dict context, which has no types.

    An empty cell is None if the field allows None. The function raises for a row that does not fit.
    """
    if codec.context_type is dict:
        return None
    optional = _optional_fields(codec.context_type)
    model = is_model(codec.context_type)

    def read(row: dict[str, Any]) -> dict[str, Any]:
        given = {name: None if cell == "" and name in optional else cell for name, cell in row.items()}
        typed = codec.decode(codec.prepare(given, strict=False))
        plain: dict[str, Any] = (
            typed.model_dump(round_trip=True, by_alias=True) if model else msgspec.to_builtins(typed, enc_hook=enc_hook)
        )
        return plain

    return read


def _optional_fields(context_type: type[Any]) -> frozenset[str]:
    """Return the fields that may be None, under each name that a row may use for them."""
    if is_model(context_type):
        fields: dict[str, Any] = context_type.model_fields
        return frozenset(
            key
            for name, field in fields.items()
            if type(None) in typing.get_args(field.annotation)
            for key in (name, field.alias, field.validation_alias)
            if isinstance(key, str)
        )
    # Not typing.get_type_hints: the type may be local to a function, whose names only the codec found.
    known: Any = msgspec.inspect.type_info(context_type)
    return frozenset(
        field.encode_name
        for field in known.fields
        if isinstance(field.type, msgspec.inspect.UnionType) and field.type.includes_none
    )
