"""`PydanticCodec`: contexts that are pydantic models, encoded as plain data and decoded by `model_validate`.

Validators run at each decoding, so an invalid context is rejected in the stage that made it. If the validators cannot
read the output of a serialiser, the context is not equal after decoding, and `ContextCodec` rejects it.

This module must not import pydantic before a context is a model: pydantic is optional, and slow to import.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
from msgspec import Raw

from stageflow_actors.core import extensions
from stageflow_actors.core.exact_types import is_exact
from stageflow_actors.core.roundtrip import RoundTripFault, find_difference, find_unencodable

__all__ = ["PydanticCodec", "explain_validation", "is_model"]

_decode = extensions.decode_any
_PYDANTIC = "pydantic"


def is_model(kind: type[Any]) -> bool:
    """Return True if instances of this class are pydantic models."""
    pydantic = sys.modules.get(_PYDANTIC)
    return pydantic is not None and issubclass(kind, pydantic.BaseModel)


class PydanticCodec:
    """Encodes and decodes the instances of one model class."""

    __slots__ = ("_kind", "encode_dumped", "encode_sorted", "has_validate")

    def __init__(self, kind: type[Any]) -> None:
        self._kind: Any = kind
        self.encode_dumped = msgspec.msgpack.Encoder(enc_hook=_plain).encode
        self.encode_sorted = msgspec.msgpack.Encoder(enc_hook=_plain, order="deterministic").encode
        # BaseModel has a deprecated `validate`, which is not the `validate()` of a context.
        self.has_validate = kind.validate is not None and not _is_of_pydantic(kind, "validate")

    def encode(self, model: Any) -> bytes:
        """Return the model as msgpack. Exceptions of its serialisers and fields pass through."""
        dumped = self.dump(model)
        return self.encode_dumped(dumped if is_exact(dumped) else extensions.with_extensions(dumped))

    def decode(self, data: bytes | Raw) -> Any:
        """Return the model in `data`. Raises `ValidationError`."""
        # Not strict, even if the model is: msgpack has a Decimal as text and a set as a list.
        return self._kind.model_validate(_decode(data), strict=False, by_name=True, by_alias=False)

    def from_input(self, given: Mapping[str, Any], strict: bool) -> Any:
        """Return a model with the fields `given` by a user; `strict=False` overrides the setting of the model."""
        return self._kind.model_validate(dict(given), strict=None if strict else False)

    def find_unencodable(self, model: Any) -> RoundTripFault | None:
        """Return the fault of the first part of `model` that cannot be encoded, or None."""
        try:
            dumped = self.dump(model)
        except Exception as error:  # noqa: BLE001 - a serialiser may raise any exception
            return RoundTripFault(
                "context", f"cannot be serialised ({error})", "check its serialisers and the types of its values"
            )
        for name, value in dumped.items():
            try:
                self.encode_dumped(value)
            except Exception as error:  # noqa: BLE001 - an object of user code may raise any exception
                path = f"context.{name}"
                fault = find_unencodable(value, path)
                return fault or RoundTripFault(path, f"cannot be serialised ({error})", "store plain data in it")
        return None

    def is_equal(self, copy: Any, model: Any) -> bool:
        """Return True if the decoded copy equals the model; never for a changed copy."""
        if type(model) is not self._kind or copy != model:
            return False
        return is_exact(model.__dict__) or find_difference(model, copy, "context") is None

    @staticmethod
    def dump(model: Any) -> dict[str, Any]:
        """Return the data to encode: fields by name, sets still as sets."""
        dumped: dict[str, Any] = model.model_dump(mode="python", round_trip=True, by_alias=False, warnings=False)
        return dumped


def explain_validation(error: Exception, type_name: str) -> tuple[str, str | None] | None:
    """Return the message and field of the first fault in a pydantic `ValidationError`; None for other errors."""
    errors: Callable[..., list[dict[str, Any]]] | None = getattr(error, "errors", None)
    if type(error).__name__ != "ValidationError" or not callable(errors):
        return None
    found = errors(include_url=False, include_context=False, include_input=False)
    if not found:
        return None
    first = found[0]
    field = "".join(_path(first["loc"])).removeprefix(".")
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    place = f"context.{field}" if field else "context"
    if first["type"] == "missing":
        return f"{place} is missing: {type_name} requires it{more}", field
    text = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{place}: {text}{more}", field or None


def _path(location: tuple[int | str, ...]) -> Iterator[str]:
    for part in location:
        if isinstance(part, int):
            yield f"[{part}]"
        else:
            yield f".{part}" if part.isidentifier() else f"[{part!r}]"


def _is_of_pydantic(kind: type[Any], name: str) -> bool:
    owner = next(owner for owner in kind.__mro__ if name in owner.__dict__)
    return owner.__module__.partition(".")[0] == _PYDANTIC


def _plain(value: Any) -> Any:
    """Convert types that pydantic can serialise and msgpack cannot, such as paths, URLs and addresses."""
    secret = getattr(value, "get_secret_value", None)
    if callable(secret):
        return secret()
    import pydantic_core

    try:
        return pydantic_core.to_jsonable_python(value)
    except pydantic_core.PydanticSerializationError:
        raise TypeError(f"{type(value).__name__} cannot be converted to plain data") from None
