"""`ValueCodec`: single values (results, payloads, items) of an annotated type as msgpack.

A value of the builtin types is encoded as it is. Of an annotated type, each part that msgpack alone would not restore
(a Decimal, a tuple, a set, a datetime) is an extension that describes itself, so that a reader without the annotation
restores it too; an object is a map of its fields, which only the annotation makes an object again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_args, get_origin

import msgspec
from msgspec import Raw
from msgspec.msgpack import Ext

from stageflow_actors.core import extensions
from stageflow_actors.core.codec import ContextCodec, decode_value, encode_value, is_kept, reword_error
from stageflow_actors.core.exact_types import is_plain
from stageflow_actors.core.extensions import (
    PLAIN_EXT,
    REPLY_EXT,
    decode_any,
    describe,
    encode,
    keep_as_plain,
    loose_form,
    plain_form,
    read_reply,
)
from stageflow_actors.core.roundtrip import find_difference, find_unencodable
from stageflow_actors.definition.type_hints import needs_type
from stageflow_actors.errors import InvalidContext, WorkflowDefinitionError

__all__ = [
    "UNTYPED",
    "UndecodableData",
    "ValueCodec",
    "decode_context",
    "decode_payload",
    "decode_result",
    "encode_message",
    "find_undecodable",
    "reply_place",
    "result_codec",
    "tag_reply",
]

_OPEN_DICTS = (dict[str, Any], dict[str, object])
_STR = frozenset({str})
_BUILTIN = (bool, int, float, str, bytes, list, dict)


_NIL = b"\xc0"


class UndecodableData(InvalidContext):
    """Data that was written under another definition of its type, and that the present code cannot decode.

    This is a mistake of a deploy and not a failure of the stage: the message is parked. `result_of` is the stage whose
    result it is, or None for other data.
    """

    def __init__(self, message: str, *, field: str | None = None, result_of: str | None = None) -> None:
        super().__init__(message, field=field)
        self.result_of = result_of


class ValueCodec:
    """Encodes and decodes values of the annotated type `kind`; `Any` is no annotation."""

    __slots__ = ("_context", "_element", "_kind", "_needed", "_supported")

    def __init__(self, kind: Any = Any) -> None:
        self._kind = kind
        self._needed = needs_type(kind)
        self._context: ContextCodec[Any] | None = None
        self._element: ValueCodec | None = None
        self._supported = kind is not Any
        if kind is Any:
            return
        try:
            if isinstance(kind, type) and _is_object_type(kind):
                self._context = ContextCodec(kind)
            else:
                msgspec.msgpack.Decoder(kind)
        except (TypeError, NameError, WorkflowDefinitionError):
            self._supported = False
        if get_origin(kind) is list:
            (element,) = get_args(kind) or (Any,)
            self._element = ValueCodec(element)

    @property
    def element(self) -> ValueCodec:
        """The codec of the elements of a list; untyped for other types."""
        return UNTYPED if self._element is None else self._element

    def encode(self, value: Any, *, what: str) -> bytes:
        """Return `value` as msgpack; `what` is the subject of the error, as in "the result of stage 'pay'".

        A plain value is accepted in place of a typed one, and decoded as the type if it matches: a dict for a
        dataclass. One that does not match is marked as plain. Raises `InvalidContext` if the value would not be equal
        after decoding.
        """
        if self._kind is not Any:
            data = self._encode_typed(value)
            if data is not None:
                return data
        data = encode_value(value, what=what)
        return data if self._matches(data) else encode(keep_as_plain(value))

    def keep(self, value: Any, *, what: str) -> tuple[bytes, str | None]:
        """Return `value` as msgpack, and a warning if it does not fit the annotation and is kept as plain data.

        An object without an annotation is kept as the dict of its fields, without a warning; a tuple, Decimal, Path and
        the like as plain data, with one. Raises `InvalidContext` for a value that cannot be kept at all.
        """
        if value is None:
            return encode_value(None, what=what), None
        if self._kind is Any:
            try:
                data = encode(value)
                if is_plain(value):
                    return data, None
            except Exception:  # noqa: BLE001 - the slow path below explains the error
                pass
            return _keep_untyped(_as_deep_as_possible(_objects_as_dicts, value), what)
        typed = self._encode_typed(value)
        if typed is not None:
            return typed, None
        try:
            kept = keep_as_plain(value) if self._needed else plain_form(value)
            data = encode(kept)
            decode_any(data)
        except Exception:  # noqa: BLE001 - the call below explains which part cannot be encoded
            return encode_value(value, what=what), None
        return data, (
            f"{what} is {_describe_type(value)}, which does not fit its annotation {_describe_hint(self._kind)}: it is "
            "kept as plain data; return a value of the annotated type, or change the annotation"
        )

    def decode(self, data: bytes | Raw) -> Any:
        """Return the value that `encode` or `keep` encoded; a plain value if it does not match the type."""
        if not self._supported or not self._needed or _is_marked_plain(data):
            return decode_value(data)
        try:
            return self._restore(data)
        except (msgspec.MsgspecError, InvalidContext):
            plain = decode_value(data)
            if self._element is not None and type(plain) is list:
                return [self._element.decode(part) for part in _decode_parts(data)]
            return plain

    def decode_stored(self, data: bytes | Raw, *, what: str, result_of: str | None = None) -> Any:
        """Return the value that `encode` or `keep` encoded, perhaps under an earlier definition of the type.

        `what` is the subject of the error. Raises `UndecodableData` for a value that does not match the type and is not
        marked as plain: it matched the type when it was encoded.
        """
        if not self._supported or not self._needed or bytes(data) == _NIL or _is_marked_plain(data):
            return decode_value(data)
        try:
            return self._restore(data)
        except Exception as error:
            if self._element is not None and _is_list(data):
                parts = enumerate(_decode_parts(data))
                return [
                    self._element.decode_stored(part, what=f"{what}[{at}]", result_of=result_of) for at, part in parts
                ]
            raise self._undecodable(error, what, result_of) from error

    def _matches(self, data: bytes) -> bool:
        if not self._supported or not self._needed or data == _NIL:
            return True
        try:
            self._restore(data)
        except Exception:  # noqa: BLE001 - a `__post_init__` may raise any exception
            return False
        return True

    def _undecodable(self, error: Exception, what: str, result_of: str | None) -> UndecodableData:
        field = error.field if isinstance(error, InvalidContext) else None
        text = str(error) or type(error).__name__
        if not isinstance(error, InvalidContext):
            text, field = reword_error(text, _describe_hint(self._kind))
        return UndecodableData(f"{what}: {text.removeprefix('context').lstrip('. ')}", field=field, result_of=result_of)

    def _restore(self, data: bytes | Raw) -> Any:
        """Return a value of the type. Raises `ValidationError` or `InvalidContext`."""
        if self._context is None:
            return extensions.convert(decode_any(data), self._kind) if self._supported else decode_any(data)
        try:
            return self._context.decode(data)
        except InvalidContext:
            if self._context.is_model:
                raise
            return extensions.convert(decode_any(data), self._kind)  # a message describes its values itself

    def decode_input(self, data: bytes | Raw) -> Any:
        """Return a value that another program has sent, perhaps from JSON: keys are converted to the annotated type."""
        value = self.decode(data)
        if not self._supported or self._context is not None:
            return value
        try:
            return extensions.convert(value, self._kind, json_keys=True)
        except (msgspec.MsgspecError, TypeError):
            return value

    def _encode_typed(self, value: Any) -> bytes | None:
        """Return a value of the type as msgpack, or None if it is none."""
        try:
            if not self._needed:
                data = encode(value)
                if not is_kept(data, value):
                    data = encode(extensions.to_wire(value))
                    if find_difference(value, decode_any(data), "value") is not None:
                        return None
                return data if self._fits(value) else None
            if self._context is not None:
                return self._context.encode(value) if type(value) is self._kind else None
            data = encode(describe(value))
            if find_difference(value, self._restore(data), "value") is None:
                return data
        except Exception:  # noqa: BLE001 - not a value of the type
            pass
        return None

    def _fits(self, value: Any) -> bool:
        kind = self._kind
        if kind in _BUILTIN:
            return isinstance(value, kind) or (kind is float and type(value) is int)
        if kind in _OPEN_DICTS:
            return isinstance(value, dict) and _STR.issuperset(map(type, value))
        if not self._supported:
            return True
        try:
            msgspec.convert(value, kind)
        except (msgspec.ValidationError, TypeError):
            return False
        return True


UNTYPED = ValueCodec()
"""The codec of values without an annotation."""


def result_codec(codec: ContextCodec[Any], stage_id: str) -> ValueCodec:
    """Return the codec of the results of a stage, by the types that the codec of its workflow knows."""
    known: ValueCodec | None = codec.result_codecs.get(stage_id)
    if known is None:
        kind = codec.result_types.get(stage_id, Any)
        known = codec.result_codecs[stage_id] = UNTYPED if kind is Any else ValueCodec(kind)
    return known


def decode_result(codec: ContextCodec[Any], stage_id: str, data: bytes | Raw) -> Any:
    """Return the result of a stage, of its annotated type."""
    return result_codec(codec, stage_id).decode(data)


def reply_place(endpoint: str) -> str:
    """Return the name under which a codec knows the type of an endpoint's replies. No stage id contains a colon."""
    return f"endpoint:{endpoint}"


def tag_reply(codec: ContextCodec[Any], endpoint: str, data: Raw) -> Raw:
    """Return a reply with the name of its endpoint, if the codec knows its type, for `decode_payload`."""
    if reply_place(endpoint) not in codec.result_types or bytes(data) == _NIL:
        return data
    return Raw(encode(Ext(REPLY_EXT, encode((endpoint, Raw(data))))))


def decode_payload(codec: ContextCodec[Any], data: Raw) -> Any:
    """Return the payload of a stage: a reply of the annotated type of its endpoint, if it is known."""
    endpoint, reply = read_reply(data)
    return decode_value(reply) if endpoint is None else decode_result(codec, reply_place(endpoint), reply)


def decode_context(codec: ContextCodec[Any], data: bytes | Raw) -> Any:
    """Return the context of a message, perhaps encoded by an earlier definition. Raises `UndecodableData`."""
    try:
        return codec.decode(data)
    except InvalidContext as error:
        raise UndecodableData(str(error), field=error.field) from error


def find_undecodable(error: BaseException | None) -> UndecodableData | None:
    """Return the `UndecodableData` that an exception of user code was raised from or groups, or None."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop()
        if isinstance(one, UndecodableData):
            return one
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        waiting += [one.__cause__, None if one.__suppress_context__ else one.__context__]
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
    return None


_OR_A_FIELD = ", or store it in a field annotated with its type"


def _keep_untyped(value: Any, what: str) -> tuple[bytes, str | None]:
    """Return a value without an annotation as msgpack, and a warning if it is decoded as plain data of another type."""
    try:
        return encode_value(value, what=what), None
    except InvalidContext:
        try:
            plain = loose_form(value)
            fault = find_difference(value, plain, "value")
            assert fault is not None
        except Exception:  # noqa: BLE001 - the error below explains which part cannot be encoded
            plain = fault = None
        if fault is None:
            raise
    data = encode_value(plain, what=what)
    return data, (
        f"{what}: {fault.path} {fault.problem}, because no return annotation names its type: annotate what the "
        f"function returns, or {fault.advice.replace(_OR_A_FIELD, '')}"
    )


def encode_message(value: Any, *, what: str) -> bytes:
    """Return a command, reply or payload as msgpack; its receiver has the annotation.

    Objects are encoded as their fields. Raises `InvalidContext` for a value that cannot be kept.
    """
    try:
        data = encode(value)
        if is_kept(data, value):
            return data
    except Exception:  # noqa: BLE001 - the slow path below explains the error
        pass
    encode_value(_as_deep_as_possible(_without_objects, value), what=what)  # outside of objects no type is written down
    given = _objects_as_dicts(value, typed=True)
    fault = find_unencodable(given, "value")
    if fault is None:
        data = encode(describe(given))
        fault = find_difference(given, decode_any(data), "value")
        if fault is None:
            return data
    raise InvalidContext(f"{what}: {fault.path} {fault.problem}; {fault.advice}")


def _as_deep_as_possible(change: Callable[[Any], Any], value: Any) -> Any:
    """Return `change(value)`; a value that is nested too deep, or in itself, as it is: the encoder explains that."""
    try:
        return change(value)
    except RecursionError:
        return value


def _without_objects(value: Any) -> Any:
    """Return `value` with None in place of each object in its dicts and lists."""
    kind: Any = type(value)
    if kind is dict:
        return {key: _without_objects(part) for key, part in value.items()}
    if kind is list:
        return [_without_objects(part) for part in value]
    return None if _is_object_type(kind) else value


def _objects_as_dicts(value: Any, *, typed: bool = False) -> Any:
    """Return `value` with a dict in place of each object in it; with `typed`, Decimals and dates in it stay."""
    kind: Any = type(value)
    if kind is dict:
        return {key: _objects_as_dicts(part, typed=typed) for key, part in value.items()}
    if kind is list:
        return [_objects_as_dicts(part, typed=typed) for part in value]
    if not _is_object_type(kind):
        return value
    try:
        return describe(value, bare=True) if typed else plain_form(value)
    except Exception:  # noqa: BLE001 - the encoder explains which part cannot be encoded
        return value


def _is_object_type(kind: type[Any]) -> bool:
    return dataclasses.is_dataclass(kind) or issubclass(kind, msgspec.Struct) or hasattr(kind, "__pydantic_fields__")


_decode_parts = msgspec.msgpack.Decoder(list[Raw]).decode


def _is_list(data: bytes | Raw) -> bool:
    head = bytes(memoryview(data)[:1])
    return bool(head) and (head[0] & 0xF0 == 0x90 or head[0] in (0xDC, 0xDD))


_EXT_CODE_AT = {0xD4: 1, 0xD5: 1, 0xD6: 1, 0xD7: 1, 0xD8: 1, 0xC7: 2, 0xC8: 3, 0xC9: 5}


def _is_marked_plain(data: bytes | Raw) -> bool:
    head = bytes(memoryview(data)[:6])
    at = _EXT_CODE_AT.get(head[0]) if head else None
    return at is not None and head[at] == PLAIN_EXT


def _describe_type(value: Any) -> str:
    kind = type(value)
    return f"a {kind.__qualname__}" if kind.__module__ == "builtins" else f"a {kind.__module__}.{kind.__qualname__}"


def _describe_hint(hint: Any) -> str:
    return hint.__qualname__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)
