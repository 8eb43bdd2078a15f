"""Data of an earlier definition: what the present one cannot decode is told apart from what never fitted."""

from __future__ import annotations

import enum
from dataclasses import dataclass, make_dataclass
from typing import Any, NamedTuple, TypedDict

import msgspec
import pydantic
import pytest

from stageflow_actors.core.codec import ContextCodec
from stageflow_actors.core.value_codec import UndecodableData, ValueCodec, decode_context, find_undecodable
from stageflow_actors.errors import InvalidContext


class Color(enum.Enum):
    red = "red"
    blue = "blue"


class FewerColors(enum.Enum):
    blue = "blue"


class Tall(TypedDict):
    height: int


class Taller(TypedDict):
    height: int
    width: int


class Loose(pydantic.BaseModel):
    id: str
    amount: int


class Tight(pydantic.BaseModel):
    id: str
    amount: int = pydantic.Field(gt=100)


class Open(msgspec.Struct):
    id: str
    amount: int = 0


class Closed(msgspec.Struct, forbid_unknown_fields=True):
    id: str


def make(**fields: Any) -> Any:
    return make_dataclass("Order", [("id", str), *fields.items()])


CHANGES: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "renamed": (make(amount=int), make(total_cents=int), {"amount": 5}, "context.total_cents is missing"),
    "retyped": (make(amount=int), make(amount=str), {"amount": 5}, "context.amount must be str, not int"),
    "added": (make(), make(customer=str), {}, "context.customer is missing"),
    "nested": (make(box=Tall), make(box=Taller), {"box": {"height": 1}}, "context.box.width is missing"),
    "enum": (make(color=Color), make(color=FewerColors), {"color": "red"}, "context.color: Invalid enum value 'red'"),
    "model": (Loose, Tight, {"amount": 5}, "context.amount: Input should be greater than 100"),
    "forbidden": (Open, Closed, {"amount": 5}, "context.amount is not known: Closed has no such field"),
}
"""Kinds of changes: the context before and after, fields of an instance, and the words that name the field."""


@pytest.mark.parametrize("kind", CHANGES)
def test_a_context_of_an_earlier_definition_is_undecodable_and_its_field_is_named(kind: str) -> None:
    before, now, fields, words = CHANGES[kind]
    data = ContextCodec(before).prepare({"id": "A", **fields})
    with pytest.raises(UndecodableData) as refused:
        decode_context(ContextCodec(now), data)
    assert words in str(refused.value)
    assert str(refused.value.field) in words


def test_a_class_that_was_moved_or_renamed_decodes_what_has_its_fields() -> None:
    data = ContextCodec(make(amount=int)).prepare({"id": "A", "amount": 5})
    moved = make_dataclass("Moved", [("id", str), ("amount", int)])
    assert decode_context(ContextCodec(moved), data) == moved("A", 5)


@dataclass
class Old:
    amount: int


@dataclass
class New:
    total: int


class OldPair(NamedTuple):
    x: int


class NewPair(NamedTuple):
    x: int
    y: int


@pytest.mark.parametrize(
    ("before", "value", "now", "words"),
    [
        (Old, Old(5), New, "the receipt: total is missing: New requires it"),
        (list[Old], [Old(5)], list[New], "the receipt[0]: total is missing: New requires it"),
        (OldPair, OldPair(5), NewPair, "the receipt: "),
        (dict[str, Old], {"a": Old(5)}, dict[str, New], "total is missing"),
        (int, 5, New, "the receipt: must be dict, not int"),
        (Any, {"amount": 5}, New, "the receipt: total is missing"),
    ],
)
def test_a_value_that_fitted_its_annotation_and_fits_no_more_is_undecodable(
    before: Any, value: Any, now: Any, words: str
) -> None:
    codec = ValueCodec(before)
    for data in (codec.encode(value, what="it"), codec.keep(value, what="it")[0]):
        with pytest.raises(UndecodableData) as refused:
            ValueCodec(now).decode_stored(data, what="the receipt")
        assert words in str(refused.value)
        assert codec.decode_stored(data, what="the receipt") == value


@pytest.mark.parametrize("value", [{"no": "total"}, 7, None, ["x"]])
def test_a_value_that_never_fitted_its_annotation_is_plain_data(value: Any) -> None:
    codec = ValueCodec(New)
    for data in (codec.encode(value, what="it"), codec.keep(value, what="it")[0]):
        assert codec.decode_stored(data, what="it") == value
        assert codec.decode(data) == value


def test_a_list_whose_parts_were_kept_as_plain_data_one_by_one_is_no_deploy_mistake() -> None:
    element = ValueCodec(New)
    parts = [element.keep(value, what="it")[0] for value in (New(1), {"odd": 2})]
    data = msgspec.msgpack.encode([msgspec.Raw(part) for part in parts])
    assert ValueCodec(list[New]).decode_stored(data, what="it") == [New(1), {"odd": 2}]


def test_the_error_is_found_behind_the_errors_that_user_code_made_of_it() -> None:
    cause = UndecodableData("the result: total is missing")
    other = ValueError("no")

    def chained(error: BaseException, by: str) -> BaseException:
        try:
            try:
                raise cause
            except InvalidContext as caught:
                if by == "context":
                    raise error  # noqa: B904 - the case to test
                raise error from (caught if by == "cause" else None)
        except BaseException as raised:
            return raised

    assert find_undecodable(cause) is cause
    assert find_undecodable(chained(RuntimeError(), "cause")) is cause
    assert find_undecodable(chained(RuntimeError(), "context")) is cause
    assert find_undecodable(chained(RuntimeError(), "none")) is None, "the author has decided what it means"
    assert find_undecodable(ExceptionGroup("two", [other, chained(KeyError(), "cause")])) is cause  # type: ignore[list-item]
    assert find_undecodable(other) is None
    assert find_undecodable(InvalidContext("a handler's own")) is None
    other.__cause__ = other
    assert find_undecodable(other) is None
