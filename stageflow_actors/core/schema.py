"""The shape of a context: what of its type can be told to a client that does not have the class.

A shape is plain JSON and travels with the plan. A client makes a class of its own of it, which refuses at the door
what the first worker would: missing, unknown and wrongly typed fields. What only code can tell, as `validate()`, types
of the user's own and bounds of numbers, passes. This module runs none of the user's code.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any, Literal

import msgspec
from msgspec import inspect as looks

from stageflow_actors.core.codec import ContextCodec

__all__ = ["ContextSchema", "SchemaCodec", "derive_schema"]

ContextSchema = str | list[Any]
"""A word of `_PLAIN`, or ["list", shape], ["dict", shape of values], ["or", shape, …], ["one of", value, …] or
["object", name, [field, shape, whether it must be there], …]."""

_PLAIN: dict[str, Any] = {"any": Any, "none": None, "bool": bool, "int": int, "float": float, "str": str}
_KINDS: dict[type[Any], str] = {
    looks.NoneType: "none",
    looks.BoolType: "bool",
    looks.IntType: "int",
    looks.FloatType: "float",
    looks.StrType: "str",
}
_LISTS = (looks.ListType, looks.VarTupleType, looks.SetType, looks.FrozenSetType)


def derive_schema(context: type[Any]) -> ContextSchema | None:
    """The shape of a dataclass or Struct; None for other types, and for those of which nothing can be told."""
    try:
        info = looks.type_info(context)
    except Exception:  # noqa: BLE001 - annotations that cannot be evaluated raise whatever they like
        return None
    shape = _shape(info, ())
    return shape if shape[0] == "object" else None


def _shape(info: Any, around: tuple[type[Any], ...]) -> ContextSchema:
    kind = _KINDS.get(type(info))
    if kind is not None:
        return kind
    if isinstance(info, _LISTS):
        return ["list", _shape(info.item_type, around)]
    if isinstance(info, looks.DictType):
        return ["dict", _shape(info.value_type, around)] if isinstance(info.key_type, looks.StrType) else "any"
    if isinstance(info, looks.LiteralType):
        return ["one of", *info.values]
    if isinstance(info, looks.UnionType):
        return _union([_shape(each, around) for each in info.types])
    if isinstance(info, (looks.DataclassType, looks.StructType)) and info.cls not in around:
        if isinstance(info, looks.StructType) and (info.array_like or info.tag is not None):
            return "any"
        inside = (*around, info.cls)
        fields = [[field.encode_name, _shape(field.type, inside), field.required] for field in info.fields]
        return ["object", info.cls.__name__, *fields]
    return "any"


def _union(members: list[ContextSchema]) -> ContextSchema:
    """Of several kinds that look alike from outside nobody knows which is meant."""
    alike = [member[0] for member in members if not isinstance(member, str)]
    mapped = sum(kind in ("object", "dict") for kind in alike)
    if "any" in members or mapped > 1 or alike.count("list") > 1 or "one of" in alike:
        return "any"
    return ["or", *members]


def _type_of(shape: ContextSchema) -> Any:
    if isinstance(shape, str):
        return _PLAIN.get(shape, Any)  # a word of a later release
    kind, *rest = shape
    if kind == "list":
        return list[_type_of(rest[0])]  # type: ignore[misc]
    if kind == "dict":
        return dict[str, _type_of(rest[0])]  # type: ignore[misc]
    if kind == "one of":
        return Literal[tuple(rest)]
    if kind == "or":
        return reduce(or_, (type(None) if member == "none" else _type_of(member) for member in rest))
    if kind == "object":
        return _class_of(rest[0], rest[1:])
    return Any


def _class_of(name: str, fields: list[Any]) -> Any:
    made: list[Any] = []
    for at, (_, shape, required) in enumerate(fields):
        kind = _type_of(shape)
        made.append((f"field_{at}", kind) if required else (f"field_{at}", kind | msgspec.UnsetType, msgspec.UNSET))
    return msgspec.defstruct(
        name, made, kw_only=True, rename={f"field_{at}": given for at, (given, _, _) in enumerate(fields)}
    )


class SchemaCodec(ContextCodec[Any]):
    """Contexts as dicts, for a workflow whose own class is not at hand: they must fit its shape."""

    def __init__(self, shape: ContextSchema) -> None:
        super().__init__(dict)
        self._door: ContextCodec[Any] = ContextCodec(_type_of(shape))

    def prepare(self, context: Any, *, strict: bool = True) -> bytes:
        """As of `ContextCodec`; raises `InvalidContext` for a dict that does not fit."""
        if type(context) is dict:
            self._door._convert(context, strict)
        return super().prepare(context, strict=strict)
