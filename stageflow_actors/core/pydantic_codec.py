"""Contexts that are pydantic models: as plain data on their way, through `model_validate` when they arrive.

pydantic is never imported before there is a model. Validators run on each arrival, so what they refuse is refused where
it happens; a serialiser that its validators do not understand makes a context that would not come back equal, and is
refused by the codec like any other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
from msgspec import Raw

from stageflow_actors.core.roundtrip import RoundTripFault, find_unencodable

__all__ = ["PydanticCodec", "explain_validation", "is_model"]

_decode = msgspec.msgpack.Decoder().decode
_PYDANTIC = "pydantic"


def is_model(kind: type[Any]) -> bool:
    """Whether instances of this class are pydantic models."""
    pydantic = sys.modules.get(_PYDANTIC)
    return pydantic is not None and issubclass(kind, pydantic.BaseModel)


class PydanticCodec:
    """One model class as bytes and back."""

    __slots__ = ("_kind", "encode_dumped", "encode_sorted", "validates")

    def __init__(self, kind: type[Any]) -> None:
        self._kind: Any = kind
        self.encode_dumped = msgspec.msgpack.Encoder(enc_hook=_plain).encode
        self.encode_sorted = msgspec.msgpack.Encoder(enc_hook=_plain, order="deterministic").encode
        # BaseModel has a `validate` of its own, which is something else than ours.
        self.validates = kind.validate is not None and not _is_of_pydantic(kind, "validate")

    def encode(self, model: Any) -> bytes:
        """The model as msgpack; raises whatever its parts raise."""
        return self.encode_dumped(self.dump(model))

    def decode(self, data: bytes | Raw) -> Any:
        """The model in `data`; raises `ValidationError`."""
        # Lax, whatever the model says: on the way a Decimal is text and a set is a list.
        return self._kind.model_validate(_decode(data), strict=False, by_name=True, by_alias=False)

    def read(self, given: Mapping[str, Any], strict: bool) -> Any:
        """A model from what a user gave; how strictly is up to the model, unless `strict` is False."""
        return self._kind.model_validate(dict(given), strict=None if strict else False)

    def find_unencodable(self, model: Any) -> RoundTripFault | None:
        """The first part that has no form."""
        try:
            dumped = self.dump(model)
        except Exception as error:  # noqa: BLE001 - a serialiser may raise whatever it likes
            return RoundTripFault(
                "context", f"cannot be serialised ({error})", "check its serialisers and what is in its fields"
            )
        for name, value in dumped.items():
            try:
                self.encode_dumped(value)
            except Exception as error:  # noqa: BLE001 - a foreign object may raise whatever it likes
                path = f"context.{name}"
                known = find_unencodable(value, path)
                return known or RoundTripFault(path, f"cannot be serialised ({error})", "store plain data in it")
        return None

    def same(self, copy: Any, model: Any) -> bool:
        """Never true of a changed copy."""
        return type(model) is self._kind and bool(copy == model)

    @staticmethod
    def dump(model: Any) -> dict[str, Any]:
        """What is encoded: fields by name, with sets still sets."""
        dumped: dict[str, Any] = model.model_dump(mode="python", round_trip=True, by_alias=False, warnings=False)
        return dumped


def explain_validation(error: Exception, type_name: str) -> tuple[str, str | None] | None:
    """The first complaint of a pydantic `ValidationError` in our words, and its field; None for any other error."""
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
    """Paths, urls, addresses and the like, which msgpack does not know and pydantic does."""
    secret = getattr(value, "get_secret_value", None)
    if callable(secret):
        return secret()
    import pydantic_core

    try:
        return pydantic_core.to_jsonable_python(value)
    except pydantic_core.PydanticSerializationError:
        raise TypeError(f"{type(value).__name__} has no plain form") from None
