"""A client without the class of a context refuses what the class would refuse."""

from __future__ import annotations

import datetime
import enum
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import pytest

from stageflow_actors.core.codec import ContextCodec
from stageflow_actors.core.schema import SchemaCodec, derive_schema
from stageflow_actors.errors import InvalidContext


class Kind(enum.Enum):
    near = "near"


@dataclass
class Line:
    sku: str
    count: int = 1


@dataclass
class Order:
    order_id: str
    total: float
    lines: list[Line] = field(default_factory=list)
    paid: bool = False
    note: str | None = None
    notes: dict[str, int] = field(default_factory=dict)
    speed: Literal["fast", "slow"] = "slow"
    kind: Kind = Kind.near
    at: datetime.datetime | None = None
    either: int | list[str] | Line | None = None
    parent: Order | None = None


class Named(msgspec.Struct, rename="camel"):
    order_id: str
    first: int = 1


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"order_id": 5, "total": 1},
        {"order_id": "A", "total": "x"},
        {"order_id": "A"},
        {"order_id": "A", "total": None},
        {"order_id": "A", "total": 1, "lines": [{"count": 1}]},
        {"order_id": "A", "total": 1, "lines": [{"sku": "T", "count": "2"}]},
        {"order_id": "A", "total": 1, "lines": {}},
        {"order_id": "A", "total": 1, "paid": 1},
        {"order_id": "A", "total": 1, "note": 7},
        {"order_id": "A", "total": 1, "notes": {"a": "b"}},
        {"order_id": "A", "total": 1, "speed": "slower"},
        {"order_id": "A", "total": 1, "either": "x"},
        {"order_id": "A", "total": 1, "either": {"sku": 1}},
        {"order_id": "A", "total": 1, "tottal": 1},
        {"order_id": "A", "total": 1},
        {"order_id": "A", "total": 1.5, "lines": [{"sku": "T"}], "paid": True, "note": "n", "notes": {"a": 1}},
        {"order_id": "A", "total": 1, "speed": "fast", "kind": "near", "at": "2026-01-01T00:00:00Z"},
        {"order_id": "A", "total": 1, "either": {"sku": "T"}, "parent": {"order_id": "B", "total": 2}},
        {"order_id": "A", "total": 1, "either": ["a"], "at": None},
    ],
)
def test_what_the_class_refuses_is_refused_with_the_same_words_and_nothing_else(given: dict[str, Any]) -> None:
    shape = msgspec.json.decode(msgspec.json.encode(derive_schema(Order)))  # as it travels
    assert rejection(SchemaCodec(shape), given) == rejection(ContextCodec(Order), given)


def rejection(codec: ContextCodec[Any], given: dict[str, Any]) -> tuple[str, str | None] | None:
    """What is wrong with it, and with which field."""
    try:
        codec.prepare(given)
    except InvalidContext as error:
        return str(error), error.field
    return None


def test_what_fits_is_sent_as_it_is_given() -> None:
    given = {"order_id": "A", "total": 1}
    shaped = SchemaCodec(derive_schema(Order) or "any")
    assert shaped.decode(shaped.prepare(given)) == given


def test_names_as_they_are_encoded_count() -> None:
    shaped = SchemaCodec(derive_schema(Named) or "any")
    shaped.prepare({"orderId": "A"})
    for given in ({"order_id": "A"}, {"orderId": 1}):
        with pytest.raises(InvalidContext):
            shaped.prepare(given)


class Listed(msgspec.Struct, array_like=True):
    a: int


@dataclass
class Odd:
    a: Nonsense  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize("context", [dict, Listed, Odd])
def test_other_contexts_have_no_schema(context: Any) -> None:
    assert derive_schema(context) is None
