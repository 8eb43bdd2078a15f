"""Contexts and results as msgpack, and back, without a loss that nobody is told of.

The rule: what is encoded comes back equal, or is refused by stage and field. It is kept by doing just that on
each encoding: encode, decode, compare. Only when the comparison fails is a slower walk asked for the reason (or
finds that it was NaN, which equals nothing). So a subclass that equals its plain form (`IntEnum`, `OrderedDict`,
`bytearray`, an aware datetime of another zone) passes, and arrives as the plain form.

Nothing here pickles, and nothing here knows what a stage does.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import operator
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Generic, NoReturn, TypeVar

import msgspec
from msgspec import Raw

from stageflow_actors.core.pydantic_codec import PydanticCodec, explain_validation, is_model
from stageflow_actors.core.roundtrip import RoundTripFault, field_items, find_difference, find_unencodable
from stageflow_actors.definition.pickling import export_types, import_types, reachable_types
from stageflow_actors.errors import InvalidContext, WorkflowDefinitionError

__all__ = [
    "ContextCodec",
    "decode_value",
    "encode_value",
    "export_types",
    "import_types",
    "json_view",
]

C = TypeVar("C")

_encode = msgspec.msgpack.Encoder().encode
_decode_any = msgspec.msgpack.Decoder().decode
_encode_sorted = msgspec.msgpack.Encoder(order="deterministic").encode
_NIL = b"\xc0"


class ContextCodec(Generic[C]):
    """Encodes and decodes contexts of one type: dict, a dataclass, a msgspec Struct or a pydantic model.

    Raises `WorkflowDefinitionError` when made for a type whose annotations cannot be resolved.
    """

    __slots__ = ("_decode", "_fields", "_model", "_same", "_typed", "context_type", "encode_unchecked")

    encode_unchecked: Callable[[C], bytes]
    """As `encode` without any check."""

    def __init__(self, context_type: type[C]) -> None:
        self.context_type = context_type
        self._typed = context_type is not dict
        self._model = PydanticCodec(context_type) if is_model(context_type) else None
        self._decode: Callable[[bytes | Raw], C]
        self._same: Callable[[Any, Any], bool]
        if self._model is not None:
            self.encode_unchecked, self._decode, self._same = self._model.encode, self._model.decode, self._model.same
            self._fields: frozenset[str] = frozenset()
        else:
            self.encode_unchecked, self._decode = _encode, _decoder(context_type)
            self._same = _comparison(context_type)
            self._fields = _encoded_names(context_type)

    def encode(self, context: C, *, stage: str | None = None) -> bytes:
        """`context` as msgpack. Raises `InvalidContext`, naming `stage` and field, for what would not come back."""
        try:
            data = self.encode_unchecked(context)
            if self._same(self._decode(data), context):
                return data
        except Exception:  # noqa: BLE001 - whatever it was, the walk below finds it or encodes again
            pass
        return self._encode_slowly(context, stage)

    def decode(self, data: bytes | Raw) -> C:
        """The context in `data`. Raises `InvalidContext` for a missing or wrongly typed field."""
        try:
            return self._decode(data)
        except Exception as error:  # noqa: BLE001 - a `__post_init__` may raise whatever it likes
            self._refuse_decoding(error, None)

    def prepare(self, context: Any, *, strict: bool = True) -> bytes:
        """What submit does with `context`: convert a dict where a typed context is due, validate, encode.

        With `strict=False` strings are read as what the fields need ("99.5" for a float), for input from CSV.
        Raises `InvalidContext` for what is refused, with the message of `validate()` if it was that.
        """
        context = self._convert(context, strict)
        has_own = self._typed if self._model is None else self._model.validates
        validate = getattr(context, "validate", None) if has_own else None
        if callable(validate):
            try:
                validate()
            except InvalidContext:
                raise
            except Exception as error:
                if isinstance(error, (TypeError, AttributeError)):
                    self.encode(context)  # a wrongly typed field explains it better
                message = str(error) or f"{self.context_type.__name__}.validate() raised {type(error).__name__}"
                raise InvalidContext(message) from error
        return self.encode(context)

    def digest(self, data: bytes | Raw, scope: str = "") -> bytes:
        """16 bytes that are the same for equal contexts, whatever the order of keys and of sets in `data`.

        `scope` tells apart what is equal and not the same, such as the input of another workflow.
        """
        context: Any = self.decode(data)
        encode, encode_sorted = _encode, _encode_sorted
        if self._model is not None:
            context = self._model.dump(context)
            encode, encode_sorted = self._model.encode_dumped, self._model.encode_sorted
        try:
            canonical = encode_sorted(context)
        except (TypeError, ValueError):
            canonical = encode(_canonical(context, encode))
        return hashlib.blake2b(scope.encode() + b"\0" + canonical, digest_size=16).digest()

    def canonical(self, data: bytes | Raw) -> Raw | None:
        """The context in `data` once more, with sets in an order that depends on their contents only; None where they
        have none, as those of mixed types."""
        context: Any = self.decode(data)
        try:
            if self._model is not None:
                return Raw(self._model.encode_sorted(self._model.dump(context)))
            return Raw(_encode_sorted(context))
        except (TypeError, ValueError):
            return None

    def field_name(self, field: Any) -> str:
        """The name of a field as it is encoded: of a Struct that travels as an array that is its place."""
        kind: Any = self.context_type
        if not self._typed or not issubclass(kind, msgspec.Struct) or not kind.__struct_config__.array_like:
            return str(field)
        tag = kind.__struct_config__.tag_field
        return str([*([tag] if tag else []), *kind.__struct_fields__][field])

    def __reduce__(self) -> tuple[Any, ...]:
        return ContextCodec, (self.context_type,)

    def __repr__(self) -> str:
        return f"ContextCodec({self.context_type.__name__})"

    def _convert(self, context: Any, strict: bool) -> Any:
        wanted: Any = self.context_type
        if type(context) is wanted:
            return context
        if not isinstance(context, Mapping):
            due = f"{wanted.__name__} or a dict with its fields" if self._typed else "a dict"
            kind = type(context).__name__
            if isinstance(context, wanted):
                raise InvalidContext(
                    f"the context must be {due}, not its subclass {kind}: what {kind} adds would be lost"
                )
            raise InvalidContext(f"the context must be {due}, not {kind}: {context!r:.80}")
        given = dict(context)
        if not self._typed:
            return given
        if self._model is not None:
            try:
                return self._model.read(given, strict)
            except Exception as error:  # noqa: BLE001 - a validator may raise whatever it likes
                self._refuse_decoding(error, None)
        unknown = [key for key in given if key not in self._fields]
        if unknown:
            raise InvalidContext(
                f"context.{unknown[0]}: {wanted.__name__} has no such field; it has {', '.join(sorted(self._fields))}",
                field=str(unknown[0]),
            )
        try:
            return msgspec.convert(given, wanted, strict=strict)
        except Exception as error:  # noqa: BLE001 - a `__post_init__` may raise whatever it likes
            self._refuse_decoding(error, None)

    def _encode_slowly(self, context: C, stage: str | None) -> bytes:
        if not isinstance(context, self.context_type):
            raise InvalidContext(
                f"{_prefix(stage)}the context must be {self.context_type.__name__}, not {type(context).__name__}",
                stage=stage,
            )
        return _encode_or_explain(
            context,
            root="context",
            prefix=_prefix(stage),
            stage=stage,
            decode=self._decode,
            refuse=lambda error: self._refuse_decoding(error, stage),
            model=self._model,
        )

    def _refuse_decoding(self, error: Exception, stage: str | None) -> NoReturn:
        name = self.context_type.__name__
        message, field = explain_validation(error, name) or _reword(str(error) or type(error).__name__, name)
        raise InvalidContext(_prefix(stage) + message, stage=stage, field=field) from error


def encode_value(value: Any, *, what: str) -> bytes:
    """A stage's result or a step's value as msgpack, under the rule of this module.

    `what` names it in errors, as in "the result of stage 'pay'". Raises `InvalidContext` for what would not come
    back equal: a dataclass, tuple, set, Decimal or datetime has no type to come back to here.
    """
    if value is None:
        return _NIL
    try:
        data = _encode(value)
        if _decode_any(data) == value:
            return data
    except Exception:  # noqa: BLE001 - whatever it was, the walk below finds it or encodes again
        pass

    def refuse(error: Exception) -> NoReturn:
        raise InvalidContext(f"{what}: {error}") from error

    return _encode_or_explain(value, root="value", prefix=f"{what}: ", stage=None, decode=_decode_any, refuse=refuse)


def decode_value(data: bytes | Raw) -> Any:
    """The value that `encode_value` encoded."""
    return _decode_any(data)


def json_view(data: bytes | Raw) -> Any:
    """What msgpack `data` holds, as plain values that any JSON writer takes, for people and files.

    Not meant to be read back: bytes become base64 text, NaN and the infinities "NaN", "Infinity" and "-Infinity",
    datetimes ISO text, and keys strings.
    """
    return _plain(_decode_any(data))


def _encode_or_explain(
    value: Any,
    *,
    root: str,
    prefix: str,
    stage: str | None,
    decode: Callable[[bytes | Raw], Any],
    refuse: Callable[[Exception], NoReturn],
    model: PydanticCodec | None = None,
) -> bytes:
    def refuse_for(fault: RoundTripFault) -> NoReturn:
        field = fault.path.removeprefix(root).removeprefix(".") or None
        message = f"{prefix}{fault.path} {fault.problem}; {fault.advice}"
        raise InvalidContext(message, stage=stage, field=field) from None

    try:
        data = _encode(value) if model is None else model.encode(value)
    except Exception as error:  # noqa: BLE001 - a foreign object may raise whatever it likes
        fault = find_unencodable(value, root) if model is None else model.find_unencodable(value)
        if fault is None:
            refuse(error)
        refuse_for(fault)
    try:
        copy = decode(data)
    except RecursionError:
        refuse_for(RoundTripFault(root, "is nested too deeply", "flatten it: keep nested data in a list, with indexes"))
    except Exception as error:  # noqa: BLE001 - a `__post_init__` may raise whatever it likes
        refuse(error)
    fault = find_difference(value, copy, root)
    if fault is not None:
        refuse_for(fault)
    return data


def _decoder(context_type: type[Any]) -> Callable[[bytes | Raw], Any]:
    try:
        try:
            return msgspec.msgpack.Decoder(context_type).decode
        except NameError:
            # Annotations as strings whose names are not globals of the module: of a class that is local to a
            # function, or that came by value to another process.
            import_types(context_type, export_types(context_type))
            return msgspec.msgpack.Decoder(context_type).decode
    except (NameError, TypeError) as error:
        raise WorkflowDefinitionError(f"{context_type.__name__} cannot be a context: {error}") from error


def _encoded_names(context_type: type[Any]) -> frozenset[str]:
    if context_type is dict:
        return frozenset()
    if issubclass(context_type, msgspec.Struct):
        tag = context_type.__struct_config__.tag_field
        return frozenset((*context_type.__struct_encode_fields__, *((tag,) if tag else ())))
    return frozenset(f.name for f in dataclasses.fields(context_type))


def _comparison(context_type: type[Any]) -> Callable[[Any, Any], bool]:
    """The quickest function that never takes a changed copy for the same."""
    if context_type is dict:
        return operator.eq
    for nested in reachable_types(context_type):
        if nested is not context_type and not _has_plain_equality(nested):
            return _never
    if issubclass(context_type, msgspec.Struct):
        return _comparison_of_fields(context_type, context_type.__struct_fields__)
    if any("__slots__" in owner.__dict__ for owner in context_type.__mro__[:-1]):
        return _comparison_of_fields(context_type, tuple(f.name for f in dataclasses.fields(context_type)))
    # Comparing what the objects hold instead of the objects leaves no say to an `__eq__` or `compare=False`, and
    # sees attributes that are no fields.
    return lambda copy, context: type(context) is context_type and copy.__dict__ == context.__dict__


def _comparison_of_fields(context_type: type[Any], names: tuple[str, ...]) -> Callable[[Any, Any], bool]:
    if not names:
        return lambda copy, context: type(context) is context_type
    fields = operator.attrgetter(*names)
    return lambda copy, context: type(context) is context_type and fields(copy) == fields(context)


def _never(copy: Any, context: Any) -> bool:
    return False


def _has_plain_equality(kind: type[Any]) -> bool:
    """Whether `==` on instances compares all their fields."""
    if issubclass(kind, msgspec.Struct):
        return bool(kind.__struct_config__.eq) and kind.__eq__ is msgspec.Struct.__eq__
    if dataclasses.is_dataclass(kind):
        code = getattr(kind.__eq__, "__code__", None)
        # A method written by hand comes from a file; the one dataclasses makes does not.
        made = code is not None and code.co_filename == "<string>"
        return made and all(f.compare for f in dataclasses.fields(kind))
    return True


_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<key>key` in `)?\$(?P<path>[^`]*)`)?$", re.DOTALL)
_TYPES = re.compile(r"^Expected `(?P<due>[^`]*)`, got `(?P<given>[^`]*)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<name>[^`]*)`$")
_WORDS = {"object": "dict", "array": "list", "null": "None"}


def _reword(message: str, type_name: str) -> tuple[str, str | None]:
    """msgspec's message in our words, and the field it is about."""
    match = _AT.match(message)
    what, path = (match["what"], match["path"] or "") if match else (message, "")
    missing = _MISSING.match(what)
    if missing:
        field = f"{path}.{missing['name']}".removeprefix(".")
        return f"context.{field} is missing: {type_name} requires it", field
    field = path.removeprefix(".")
    place = f"context{path}"
    if match and match["key"]:
        place = f"a key of {place}"
    types_ = _TYPES.match(what)
    if types_:
        due, given = (" or ".join(_WORDS.get(t, t) for t in types_[g].split(" | ")) for g in ("due", "given"))
        return f"{place} must be {due}, not {given}", field or None
    return f"{place}: {what}", field or None


def _prefix(stage: str | None) -> str:
    return "" if stage is None else f"stage {stage!r}: "


def _canonical(value: Any, encode: Callable[[Any], bytes] = _encode) -> Any:
    """`value` with dicts and sets in an order that depends on their contents only."""
    if isinstance(value, dict):
        return sorted(([_canonical(k, encode), _canonical(v, encode)] for k, v in value.items()), key=encode)
    if isinstance(value, (set, frozenset)):
        return sorted((_canonical(v, encode) for v in value), key=encode)
    if isinstance(value, (list, tuple)):
        return [_canonical(v, encode) for v in value]
    fields = field_items(value)
    return value if fields is None else _canonical(dict(fields), encode)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain_key(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, msgspec.msgpack.Ext):
        return base64.b64encode(value.data).decode()
    return value


def _plain_key(key: Any) -> str:
    plain = _plain(key)
    return plain if isinstance(plain, str) else "null" if plain is None else str(plain)
