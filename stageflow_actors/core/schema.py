"""`ContextSchema`: the fields of a context type, for a client that does not have the class.

A schema is plain JSON and is sent with the plan. The client generates a class from it, and so rejects at submit what
the first worker would reject: missing fields, unknown fields and wrong types. It cannot check what only code defines:
`validate()`, types of user code and bounds of numbers. This module must not run user code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any, Literal, cast

import msgspec
from msgspec import inspect

from stageflow_actors.core.codec import ContextCodec

__all__ = ["ContextSchema", "SchemaCodec", "derive_schema", "key_reader", "with_typed_keys"]

ContextSchema = str | list[Any]
"""A key of `_PLAIN`, or one of ["list", schema], ["dict", schema of the values], ["keyed", key of
`_KEYS`, schema of the values], ["or", schema, …],
["one of", value, …] and ["object", name, [field, schema, is it required], …]."""

_PLAIN: dict[str, Any] = {"any": Any, "none": None, "bool": bool, "int": int, "float": float, "str": str}
_KINDS: dict[type[Any], str] = {
    inspect.NoneType: "none",
    inspect.BoolType: "bool",
    inspect.IntType: "int",
    inspect.FloatType: "float",
    inspect.StrType: "str",
}
_KEYS: dict[str, Callable[[str], Any]] = {"int": int, "float": float}
"""Types of keys that JSON has as strings, and that are not decoded from strings."""

_LISTS = (inspect.ListType, inspect.VarTupleType, inspect.SetType, inspect.FrozenSetType)


def derive_schema(context: type[Any]) -> ContextSchema | None:
    """Return the schema of a dataclass or Struct; None for other types, and if msgspec cannot inspect the type."""
    try:
        info = inspect.type_info(context)
    except Exception:  # noqa: BLE001 - evaluating an annotation may raise any exception
        return None
    schema = _schema(info, ())
    return schema if schema[0] == "object" else None


def _schema(info: Any, around: tuple[type[Any], ...]) -> ContextSchema:
    kind = _KINDS.get(type(info))
    if kind is not None:
        return kind
    if isinstance(info, _LISTS):
        return ["list", _schema(info.item_type, around)]
    if isinstance(info, inspect.DictType):
        if isinstance(info.key_type, inspect.StrType):
            return ["dict", _schema(info.value_type, around)]
        key = _KINDS.get(type(info.key_type))
        return ["keyed", key, _schema(info.value_type, around)] if key in _KEYS else "any"
    if isinstance(info, inspect.LiteralType):
        return ["one of", *info.values]
    if isinstance(info, inspect.UnionType):
        return _union([_schema(each, around) for each in info.types])
    if isinstance(info, (inspect.DataclassType, inspect.StructType)) and info.cls not in around:
        if isinstance(info, inspect.StructType) and (info.array_like or info.tag is not None):
            return "any"
        inside = (*around, info.cls)
        fields = [[field.encode_name, _schema(field.type, inside), field.required] for field in info.fields]
        return ["object", info.cls.__name__, *fields]
    return "any"


def _union(members: list[ContextSchema]) -> ContextSchema:
    """Return the schema of a union; "any" if two members look alike when encoded, such as two objects."""
    alike = [member[0] for member in members if not isinstance(member, str)]
    mapped = sum(kind in ("object", "dict", "keyed") for kind in alike)
    if "any" in members or mapped > 1 or alike.count("list") > 1 or "one of" in alike:
        return "any"
    return ["or", *members]


def _type_of(schema: ContextSchema) -> Any:
    if isinstance(schema, str):
        return _PLAIN.get(schema, Any)  # a later release may define more keys
    kind, *rest = schema
    if kind == "list":
        return list[_type_of(rest[0])]  # type: ignore[misc]
    if kind == "dict":
        return dict[str, _type_of(rest[0])]  # type: ignore[misc]
    if kind == "keyed":
        return dict[_type_of(rest[0]), _type_of(rest[1])]  # type: ignore[misc]
    if kind == "one of":
        return Literal[tuple(rest)]
    if kind == "or":
        return reduce(or_, (type(None) if member == "none" else _type_of(member) for member in rest))
    if kind == "object":
        return _class_of(rest[0], rest[1:])
    return Any


def _class_of(name: str, fields: list[Any]) -> Any:
    made: list[Any] = []
    for at, (_, schema, required) in enumerate(fields):
        kind = _type_of(schema)
        made.append((f"field_{at}", kind) if required else (f"field_{at}", kind | msgspec.UnsetType, msgspec.UNSET))
    return msgspec.defstruct(
        name, made, kw_only=True, rename={f"field_{at}": given for at, (given, _, _) in enumerate(fields)}
    )


def with_typed_keys(schema: ContextSchema, value: Any) -> Any:
    """Return `value`, from JSON, with numbers in place of strings as the keys where the schema has numbers.

    A key that is no number stays, and the check of the context names it.
    """
    if isinstance(schema, str) or not isinstance(value, (dict, list)):
        return value
    kind, *rest = schema
    if kind == "or":
        alike = ("list",) if isinstance(value, list) else ("object", "dict", "keyed")
        return next(
            (with_typed_keys(each, value) for each in rest if not isinstance(each, str) and each[0] in alike), value
        )
    if isinstance(value, list):
        return [with_typed_keys(rest[0], part) for part in value] if kind == "list" else value
    if kind == "dict":
        return {key: with_typed_keys(rest[0], part) for key, part in value.items()}
    if kind == "keyed":
        return {_typed_key(rest[0], key): with_typed_keys(rest[1], part) for key, part in value.items()}
    if kind == "object":
        fields = {name: field for name, field, _ in rest[1:]}
        return {key: with_typed_keys(fields.get(key, "any"), part) for key, part in value.items()}
    return value


def key_reader(context: type[Any]) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """Return the function that gives JSON contexts of this type their keys; None if all keys are strings."""
    schema = derive_schema(context)
    if schema is None or not _has_keys(schema):
        return None
    return lambda given: cast("dict[str, Any]", with_typed_keys(schema, given))


def _has_keys(schema: Any) -> bool:
    return isinstance(schema, list) and (schema[:1] == ["keyed"] or any(_has_keys(part) for part in schema))


def _typed_key(kind: str, key: Any) -> Any:
    if not isinstance(key, str):
        return key
    try:
        return _KEYS[kind](key)
    except ValueError:
        return key


class SchemaCodec(ContextCodec[Any]):
    """Encodes dicts that match a schema, for a workflow whose context class cannot be imported here."""

    def __init__(self, schema: ContextSchema) -> None:
        super().__init__(dict)
        self._schema = schema
        self._checker: ContextCodec[Any] = ContextCodec(_type_of(schema))

    def prepare(self, context: Any, *, strict: bool = True) -> bytes:
        """Validate and encode, as `ContextCodec.prepare`. Raises `InvalidContext` for a dict that does not match."""
        if type(context) is dict:
            context = with_typed_keys(self._schema, context)
            self._checker._convert(context, strict)
        return super().prepare(context, strict=strict)
