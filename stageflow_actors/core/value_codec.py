"""`ValueCodec`: values that travel by themselves and come back as the type that somebody wrote down for them."""

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
    """Encodes and decodes values of the annotated type `kind`; of `Any`, or of one msgspec does not know, plain ones.

    A plain value is taken for one of a type, too, if it can be read as one: a dict for a dataclass.
    """

    __slots__ = ("_decode",)

    def __init__(self, kind: Any = Any) -> None:
        self._decode: Any = None
        if kind is not Any:
            try:
                self._decode = msgspec.msgpack.Decoder(kind).decode
            except (TypeError, NameError):
                pass  # a type of which plain values are all that can travel

    def encode(self, value: Any, *, what: str) -> bytes:
        """`value` as msgpack. Raises `InvalidContext` for what would not come back; `what` names it in errors."""
        if self._decode is None:
            return encode_value(value, what=what)
        try:
            data = _encode(value)
            copy = self._decode(data)
        except Exception:  # noqa: BLE001 - no value of the type: the error should say what is wrong with it as it is
            return encode_value(value, what=what)
        if type(copy) is type(value):
            fault = find_difference(value, copy, "value")
            if fault is not None:
                raise InvalidContext(f"{what}: {fault.path} {fault.problem}; {fault.advice}")
            return data
        return encode_value(value, what=what)

    def decode(self, data: bytes | Raw) -> Any:
        """The value that `encode` encoded; as a plain one where it is no value of the type."""
        if self._decode is None:
            return decode_value(data)
        try:
            return self._decode(data)
        except msgspec.ValidationError:
            return decode_value(data)
