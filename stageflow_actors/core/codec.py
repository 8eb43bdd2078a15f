"""`ContextCodec`: contexts and results as msgpack, without silent loss.

Rule: a value is equal after decoding, or the encoder rejects it with its stage and field. To enforce the rule, each
encoding is decoded and compared, in value and type. Only if the fast comparison fails, the slower functions of
`roundtrip` look for the reason; they find no difference if the reason is NaN, which equals nothing. `extensions` keeps
zones, `fold`, paths, and numbers of numpy.

This module must not pickle, and must not know about stages beyond the id that an error names.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import PurePath
from typing import Any, Generic, NoReturn, TypeVar
from uuid import UUID

import msgspec
from msgspec import Raw

from stageflow_actors.core import extensions
from stageflow_actors.core.exact_types import (
    SCALAR_TYPES,
    field_checker,
    has_only_scalars,
    is_exact,
    is_plain,
    needs_extensions,
)
from stageflow_actors.core.input_digest import default_fields, input_digest
from stageflow_actors.core.pydantic_codec import PydanticCodec, explain_validation, is_model
from stageflow_actors.core.roundtrip import RoundTripFault, field_items, find_difference, find_unencodable, too_deep
from stageflow_actors.definition.guesses import closest
from stageflow_actors.definition.pickling import export_types, import_types, reachable_types
from stageflow_actors.definition.type_names import distinct_names
from stageflow_actors.errors import InvalidContext, WorkflowDefinitionError, find_place

__all__ = [
    "ContextCodec",
    "decode_value",
    "encode_value",
    "export_types",
    "import_types",
    "is_kept",
    "json_view",
    "reword_error",
]

C = TypeVar("C")

_encode = extensions.encode
_decode_any = extensions.decode_any
_encode_sorted = msgspec.msgpack.Encoder(order="deterministic", enc_hook=extensions.enc_hook).encode
_NIL = b"\xc0"


class ContextCodec(Generic[C]):
    """Encodes and decodes contexts of one type: dict, a dataclass, a msgspec Struct or a pydantic model.

    The constructor raises `WorkflowDefinitionError` for a type whose annotations cannot be resolved.
    """

    __slots__ = (
        "_decode",
        "_fields",
        "_is_kept",
        "_model",
        "_typed",
        "context_type",
        "encode_unchecked",
        "result_codecs",
        "result_types",
    )

    encode_unchecked: Callable[[C], bytes]
    """`encode` without the check: the context may differ after decoding."""

    result_types: Mapping[str, Any]
    """The annotated types of the workflow's results, by stage id."""

    def __init__(self, context_type: type[C], result_types: Mapping[str, Any] | None = None) -> None:
        self.context_type = context_type
        self.result_types = result_types or {}
        self.result_codecs: dict[str, Any] = {}
        self._typed = context_type is not dict
        self._model = PydanticCodec(context_type) if is_model(context_type) else None
        self._decode: Callable[[bytes | Raw], C]
        self._is_kept: Callable[[bytes, Any], bool]
        self._fields: frozenset[str] = frozenset()
        if self._model is not None:
            model = self._model
            self.encode_unchecked, self._decode = model.encode, model.decode
            self._is_kept = lambda data, context: model.is_equal(model.decode(data), context)
        elif context_type is dict:
            self.encode_unchecked, self._decode = _encode, _decoder(context_type)
            self._is_kept = _is_dict_kept
        else:
            self._decode = _decoder(context_type)
            extended = needs_extensions(context_type)
            if extended:
                self._decode = lambda data: extensions.convert(_decode_any(data), context_type)
            self.encode_unchecked = _encode_extended if extended else _encode
            self._is_kept = _comparison(context_type, self._decode)
            self._fields = _encoded_names(context_type)

    @property
    def is_model(self) -> bool:
        """True if the contexts are pydantic models."""
        return self._model is not None

    def encode(self, context: C, *, stage: str | None = None) -> bytes:
        """Return `context` as msgpack.

        Raises `InvalidContext`, with `stage` and the field, if the context would not be equal after decoding.
        """
        try:
            data = self.encode_unchecked(context)
            if self._is_kept(data, context):
                return data
        except Exception:  # noqa: BLE001 - the slow path below repeats the call and explains the error
            pass
        return self._encode_slowly(context, stage)

    def decode(self, data: bytes | Raw) -> C:
        """Return the context in `data`. Raises `InvalidContext` for a missing or wrongly typed field."""
        try:
            return self._decode(data)
        except Exception as error:  # noqa: BLE001 - a `__post_init__` may raise any exception
            self._refuse_decoding(error, None)

    def prepare(self, context: Any, *, strict: bool = True) -> bytes:
        """Convert, validate and encode a context that is submitted.

        A dict is converted to the context type. With `strict=False` strings are converted to the types of the fields
        ("99.5" to a float), for input from CSV. Raises `InvalidContext` for a wrong context; if `validate()` raised,
        with its message.
        """
        context = self._convert(context, strict)
        has_own = self._typed if self._model is None else self._model.has_validate
        validate = getattr(context, "validate", None) if has_own else None
        if callable(validate):
            try:
                validate()
            except InvalidContext:
                raise
            except Exception as error:
                if isinstance(error, (TypeError, AttributeError)):
                    self.encode(context)  # if a field has a wrong type, its message is the better explanation
                message = str(error) or f"{self.context_type.__name__}.validate() raised {type(error).__name__}"
                raise InvalidContext(message) from error
        return self.encode(context)

    def digest(self, data: bytes | Raw, scope: str = "") -> bytes:
        """Return 16 bytes that are the same for equal contexts (see `input_digest`).

        `scope` separates equal inputs that must differ, such as those of two workflows.
        """
        context = self.decode(data)
        return (
            input_digest(context, scope)
            if self._model is None
            else input_digest(context, scope, self._model.encode_sorted)
        )

    def earlier_digests(self, data: bytes | Raw, scope: str = "") -> Iterator[bytes]:
        """Yield the digests that release 0.1 may have written for the context in `data`.

        First the digest of the context as it is, then without fields that equal their default: they may have been
        added since.
        """
        context: Any = self.decode(data)
        encode, encode_sorted = _encode, _encode_sorted
        defaults = default_fields(context)
        if dataclasses.is_dataclass(context) and hasattr(context, "__dict__"):
            # msgspec leaves plain defaults to the class: release 0.1 did not encode them if the input was a dict.
            own: dict[str, Any] = vars(context)
            unset = [name for name in defaults if name not in own or name in vars(type(context))]
            names = [f.name for f in dataclasses.fields(context)]
            filled = {name: getattr(context, name) for name in names if hasattr(context, name)}
            own.clear()
            own.update(filled)
        else:
            unset = []
        if self._model is not None:
            context = self._model.dump(context)
            encode, encode_sorted = self._model.encode_dumped, self._model.encode_sorted
        try:
            canonical = encode_sorted(context)
        except (TypeError, ValueError):
            yield _hash(scope, encode(_canonical(context, encode)))
            return
        yield _hash(scope, canonical)
        if not self._typed or canonical[0] & 0xF0 == 0x90 or canonical[0] in (0xDC, 0xDD):
            return
        fields = _decode_fields(canonical)
        tails = [set(unset), *(set(defaults[-count:]) for count in range(1, len(defaults) + 1))]
        for left_out in [*tails, *({name} for name in defaults[:-1])]:
            yield _hash(scope, _encode({name: part for name, part in fields.items() if name not in left_out}))

    def canonical(self, data: bytes | Raw) -> Raw | None:
        """Return the context in `data` encoded again, each set in the order of its elements.

        Return None if the elements of a set have no order, such as those of mixed types.
        """
        context: Any = self.decode(data)
        try:
            if self._model is not None:
                return Raw(self._model.encode_sorted(self._model.dump(context)))
            return Raw(_encode_sorted(context))
        except (TypeError, ValueError):
            return None

    def field_name(self, field: Any) -> str:
        """Return the name of an encoded field; a Struct that is encoded as an array has indexes in place of names."""
        kind: Any = self.context_type
        if not self._typed or not issubclass(kind, msgspec.Struct) or not kind.__struct_config__.array_like:
            return str(field)
        tag = kind.__struct_config__.tag_field
        return str([*([tag] if tag else []), *kind.__struct_fields__][field])

    def __reduce__(self) -> tuple[Any, ...]:
        return ContextCodec, (self.context_type, dict(self.result_types))

    def __repr__(self) -> str:
        return f"ContextCodec({self.context_type.__name__})"

    def _convert(self, context: Any, strict: bool) -> Any:
        wanted: Any = self.context_type
        if type(context) is wanted:
            return context
        if not isinstance(context, Mapping):
            name, kind = distinct_names(wanted, type(context))
            expected = f"{name} or a dict with its fields" if self._typed else "a dict"
            if isinstance(context, wanted):
                raise InvalidContext(
                    f"the context must be {expected}, not its subclass {kind}: the fields that {kind} adds would be "
                    f"lost; use {kind} as the context type of the workflow{_place()}"
                )
            several = "; submit_many and map take more" if isinstance(context, (list, tuple)) else ""
            raise InvalidContext(f"the context must be {expected}, not {kind}: {context!r:.80}{several}{_place()}")
        given = dict(context)
        if not self._typed:
            return given
        if self._model is not None:
            try:
                return self._model.from_input(given, strict)
            except Exception as error:  # noqa: BLE001 - a validator may raise any exception
                self._refuse_decoding(error, None, _place())
        unknown = [key for key in given if key not in self._fields]
        if unknown:
            meant = closest(unknown[0], self._fields) if isinstance(unknown[0], str) else None
            raise InvalidContext(
                f"context.{unknown[0]}: {wanted.__name__} has no such field"
                + (f" (did you mean {meant!r}?)" if meant else "")
                + f"; it has {', '.join(sorted(self._fields))}{_place()}",
                field=str(unknown[0]),
            )
        try:
            return extensions.convert(given, wanted, strict=strict)
        except Exception as error:  # noqa: BLE001 - a `__post_init__` may raise any exception
            self._refuse_decoding(error, None, _place())

    def _encode_slowly(self, context: C, stage: str | None) -> bytes:
        if not isinstance(context, self.context_type):
            name, given = distinct_names(self.context_type, type(context))
            raise InvalidContext(
                f"{_prefix(stage)}the context must be {name}, not {given}",
                stage=stage,
            )
        return _encode_or_explain(
            context,
            root="context",
            prefix=_prefix(stage),
            stage=stage,
            decode=self._decode,
            refuse=lambda error: self._refuse_decoding(error, stage, "" if stage else _place()),
            model=self._model,
        )

    def _refuse_decoding(self, error: Exception, stage: str | None, place: str = "") -> NoReturn:
        name = self.context_type.__name__
        message, field = explain_validation(error, name) or reword_error(str(error) or type(error).__name__, name)
        # A ValidationError of msgspec without a cause says the same as this error.
        told = isinstance(error, msgspec.ValidationError) and error.__cause__ is None
        raise InvalidContext(_prefix(stage) + message + place, stage=stage, field=field) from None if told else error


def encode_value(value: Any, *, what: str) -> bytes:
    """Return the result of a stage or the value of a step as msgpack, under the rule of this module.

    `what` is the subject of the error: "the result of stage 'pay'". Raises `InvalidContext` for a value that would
    not be equal after decoding. That includes dataclasses, tuples, sets, Decimals and datetimes: the value has no
    annotation that the decoder could use.
    """
    if value is None:
        return _NIL
    try:
        data = _encode(value)
        if is_kept(data, value):
            return data
    except Exception:  # noqa: BLE001 - the slow path below repeats the call and explains the error
        pass

    def refuse(error: Exception) -> NoReturn:
        raise InvalidContext(f"{what}: {error}") from error

    return _encode_or_explain(value, root="value", prefix=f"{what}: ", stage=None, decode=_decode_any, refuse=refuse)


def decode_value(data: bytes | Raw) -> Any:
    """Return the value that `encode_value` encoded."""
    return _decode_any(data)


def json_view(data: bytes | Raw) -> Any:
    """Return msgpack `data` as plain values that every JSON encoder accepts, for display and export.

    The conversion loses types: bytes become base64 text, NaN and the infinities "NaN", "Infinity" and "-Infinity",
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
        message = f"{prefix}{fault.path} {fault.problem}; {fault.advice}{'' if stage else _place()}"
        raise InvalidContext(message, stage=stage, field=field) from None

    try:
        data = _encode_extended(value) if model is None else model.encode(value)
    except Exception as error:  # noqa: BLE001 - an object of user code may raise any exception
        fault = find_unencodable(value, root) if model is None else model.find_unencodable(value)
        if fault is None:
            refuse(error)
        refuse_for(fault)
    try:
        copy = decode(data)
    except RecursionError:
        refuse_for(too_deep(root))
    except Exception as error:  # noqa: BLE001 - a `__post_init__` may raise any exception
        refuse(error)
    fault = find_difference(value, copy, root)
    if fault is not None:
        refuse_for(fault)
    return data


def _decoder(context_type: type[Any]) -> Callable[[bytes | Raw], Any]:
    try:
        try:
            return _typed_decoder(context_type)
        except NameError:
            # The annotations are strings with names that are not globals of the module: the class is local to a
            # function, or was sent to this process by value.
            import_types(context_type, export_types(context_type))
            return _typed_decoder(context_type)
    except (NameError, TypeError) as error:
        raise WorkflowDefinitionError(
            f"{context_type.__name__} cannot be a context: {error}; annotate its fields with types that its module "
            "defines and msgspec supports"
        ) from error


def _encoded_names(context_type: type[Any]) -> frozenset[str]:
    if context_type is dict:
        return frozenset()
    if issubclass(context_type, msgspec.Struct):
        tag = context_type.__struct_config__.tag_field
        return frozenset((*context_type.__struct_encode_fields__, *((tag,) if tag else ())))
    return frozenset(f.name for f in dataclasses.fields(context_type))


def _typed_decoder(kind: Any) -> Callable[[bytes | Raw], Any]:
    return msgspec.msgpack.Decoder(kind, dec_hook=extensions.dec_hook, ext_hook=extensions.ext_hook).decode


def _encode_extended(value: Any) -> bytes:
    return _encode(extensions.to_wire(value))


def _is_dict_kept(data: bytes, context: Any) -> bool:
    return type(context) is dict and (is_plain(context) or is_kept(data, context))


def is_kept(data: bytes, value: Any) -> bool:
    """Return True if the untyped `value` in `data` is surely equal after decoding, in value and type."""
    return is_plain(value) or (is_exact(value) and bool(_decode_any(data) == value))


def _comparison(context_type: type[Any], decode: Callable[[bytes | Raw], Any]) -> Callable[[bytes, Any], bool]:
    """Return the fastest function (data, context) that is never true for a context that changes."""
    for nested in reachable_types(context_type):
        if nested is not context_type and not _has_plain_equality(nested):
            return _never
    exact = field_checker(context_type)
    if issubclass(context_type, msgspec.Struct):
        return _comparison_of_fields(context_type, context_type.__struct_fields__, decode, exact)
    if any("__slots__" in owner.__dict__ for owner in context_type.__mro__[:-1]):
        names = tuple(f.name for f in dataclasses.fields(context_type))
        return _comparison_of_fields(context_type, names, decode, exact)

    # Compare `__dict__`, not the objects: an `__eq__` of the class or `compare=False` must not hide a change, and
    # attributes that are not fields must be noticed.
    def is_context_kept(data: bytes, context: Any) -> bool:
        return type(context) is context_type and decode(data).__dict__ == context.__dict__ and exact(context)

    if has_only_scalars(context_type):
        return _remember_types(is_context_kept, context_type, decode)
    return is_context_kept


def _remember_types(
    is_context_kept: Callable[[bytes, Any], bool], context_type: type[Any], decode: Callable[[bytes | Raw], Any]
) -> Callable[[bytes, Any], bool]:
    """Return `is_context_kept`, without decoding where fields of the same scalar types were equal after decoding."""
    known: set[tuple[Any, ...]] = set()

    def is_kept_or_known(data: bytes, context: Any) -> bool:
        fields = context.__dict__
        types_ = (*fields, *map(type, fields.values()))
        if types_ in known:
            return type(context) is context_type
        if not is_context_kept(data, context):
            return False
        if SCALAR_TYPES.issuperset(types_[len(fields) :]):
            copy = decode(data).__dict__
            if all(type(copy[name]) is type(value) for name, value in fields.items()):
                known.add(types_)
        return True

    return is_kept_or_known


def _comparison_of_fields(
    context_type: type[Any],
    names: tuple[str, ...],
    decode: Callable[[bytes | Raw], Any],
    exact: Callable[[Any], bool],
) -> Callable[[bytes, Any], bool]:
    if not names:
        return lambda data, context: type(context) is context_type
    fields = operator.attrgetter(*names)
    return lambda data, context: (
        type(context) is context_type and fields(decode(data)) == fields(context) and exact(context)
    )


def _never(data: bytes, context: Any) -> bool:
    return False


def _has_plain_equality(kind: type[Any]) -> bool:
    """Return True if `==` on instances compares all their fields."""
    if issubclass(kind, msgspec.Struct):
        return bool(kind.__struct_config__.eq) and kind.__eq__ is msgspec.Struct.__eq__
    if dataclasses.is_dataclass(kind):
        code = getattr(kind.__eq__, "__code__", None)
        # The code of a method in a source file names the file; dataclasses generates its own from a string.
        generated = code is not None and code.co_filename == "<string>"
        return generated and all(f.compare for f in dataclasses.fields(kind))
    return True


_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<key>key` in `)?\$(?P<path>[^`]*)`)?$", re.DOTALL)
_TYPES = re.compile(r"^Expected `(?P<due>[^`]*)`, got `(?P<given>[^`]*)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<name>[^`]*)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>[^`]*)`$")
_WORDS = {"object": "dict", "array": "list", "null": "None"}


def reword_error(message: str, type_name: str) -> tuple[str, str | None]:
    """Return the message of a msgspec error in the words of this package, and the field."""
    match = _AT.match(message)
    what, path = (match["what"], match["path"] or "") if match else (message, "")
    missing = _MISSING.match(what)
    if missing:
        field = f"{path}.{missing['name']}".removeprefix(".")
        return f"context.{field} is missing: {type_name} requires it", field
    unknown = _UNKNOWN.match(what)
    if unknown:
        field = f"{path}.{unknown['name']}".removeprefix(".")
        return f"context.{field} is not known: {type_name} has no such field", field
    field = path.removeprefix(".")
    place = f"context{path}"
    if match and match["key"]:
        place = f"a key of {place}"
    types_ = _TYPES.match(what)
    if types_:
        due, given = (" or ".join(_WORDS.get(t, t) for t in types_[g].split(" | ")) for g in ("due", "given"))
        return f"{place} must be {due}, not {given}", field or None
    return f"{place}: {what}", field or None


_decode_fields = msgspec.msgpack.Decoder(dict[str, Raw]).decode


def _hash(scope: str, canonical: bytes) -> bytes:
    return hashlib.blake2b(scope.encode() + b"\0" + canonical, digest_size=16).digest()


def _place() -> str:
    """Return the line of the program that gave a wrong context, in parentheses, or ""."""
    place = find_place()
    return f" ({place})" if place else ""


def _prefix(stage: str | None) -> str:
    return "" if stage is None else f"stage {stage!r}: "


def _canonical(value: Any, encode: Callable[[Any], bytes] = _encode) -> Any:
    """Return `value` with each dict and set as a list that is sorted by the encoded elements."""
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
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    if isinstance(value, (date, Decimal, UUID, PurePath)) and not isinstance(value, datetime):
        return str(value)
    if isinstance(value, timedelta):
        return msgspec.to_builtins(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode()
    if isinstance(value, (datetime, time)):
        return value.isoformat()
    if isinstance(value, msgspec.msgpack.Ext):
        return base64.b64encode(value.data).decode()
    return value


def _plain_key(key: Any) -> str:
    plain = _plain(key)
    return plain if isinstance(plain, str) else "null" if plain is None else str(plain)
