"""`ValueCodec`: single values (results, payloads, items) of an annotated type as msgpack."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw

from stageflow_actors.core.codec import decode_value, encode_value
from stageflow_actors.core.roundtrip import find_difference
from stageflow_actors.errors import InvalidContext

__all__ = ["ValueCodec"]

_encode = msgspec.msgpack.Encoder().encode


class ValueCodec:
    """Encodes and decodes values of the annotated type `kind`.

    For `Any`, and for a type that msgspec does not support, only plain values are accepted. A plain value is also
    accepted in place of a typed one, and decoded as the type if it matches: a dict for a dataclass.
    """

    __slots__ = ("_decode",)

    def __init__(self, kind: Any = Any) -> None:
        self._decode: Any = None
        if kind is not Any:
            try:
                self._decode = msgspec.msgpack.Decoder(kind).decode
            except (TypeError, NameError):
                pass  # msgspec does not support the type: only plain values

    def encode(self, value: Any, *, what: str) -> bytes:
        """Return `value` as msgpack; `what` is the subject of the error, as in "the result of stage 'pay'".

        Raises `InvalidContext` if the value would not be equal after decoding.
        """
        if self._decode is None:
            return encode_value(value, what=what)
        try:
            data = _encode(value)
            copy = self._decode(data)
        except Exception:  # noqa: BLE001 - not a value of the type: encode it as a plain value, or explain why not
            return encode_value(value, what=what)
        if type(copy) is type(value):
            fault = find_difference(value, copy, "value")
            if fault is not None:
                raise InvalidContext(f"{what}: {fault.path} {fault.problem}; {fault.advice}")
            return data
        return encode_value(value, what=what)

    def decode(self, data: bytes | Raw) -> Any:
        """Return the value that `encode` encoded; a plain value if it does not match the type."""
        if self._decode is None:
            return decode_value(data)
        try:
            return self._decode(data)
        except msgspec.ValidationError:
            return decode_value(data)
