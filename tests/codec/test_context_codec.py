"""Contexts survive a round trip unchanged, or are refused with stage and field."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import pickle
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stageflow_actors.core.codec import ContextCodec, decode_value, encode_value, json_view
from stageflow_actors.errors import InvalidContext, WorkflowDefinitionError


class Color(enum.Enum):
    red = "red"
    blue = "blue"


class Point(NamedTuple):
    x: int
    y: int


@dataclass
class Item:
    sku: str
    count: int
    price: Decimal = Decimal(0)


@dataclass
class Order:
    order_id: str
    total: float
    items: list[Item] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    pair: tuple[int, str] = (0, "")
    placed: datetime | None = None
    key: UUID | None = None
    color: Color = Color.red
    extra: Any = None

    def validate(self) -> None:
        if not self.order_id:
            raise ValueError("order_id is required")


class Parcel(msgspec.Struct):
    weight: float
    stops: list[str] = []


@dataclass
class Unequal:
    """Compares equal to anything, so that only its fields show a difference."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@dataclass
class Holder:
    inner: Unequal


@dataclass(slots=True)
class SlottedBase:
    a: Any


@dataclass
class OnSlots(SlottedBase):
    b: int = 0


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(0, 99), inner, max_size=4),
    max_leaves=15,
)


def exactly(value: Any) -> Any:
    """`value` with its types spelt out, so that 1, 1.0 and True differ."""
    if isinstance(value, dict):
        return {(type(k), k): exactly(v) for k, v in value.items()}
    if isinstance(value, list):
        return [exactly(v) for v in value]
    return (type(value), repr(value))


@given(st.dictionaries(st.text(), plain, max_size=5))
def test_a_dict_of_plain_values_comes_back_with_the_same_values_and_types(context: dict[str, Any]) -> None:
    codec = ContextCodec(dict)
    assert exactly(codec.decode(codec.encode(context))) == exactly(context)


@given(
    st.builds(
        Order,
        order_id=st.text(min_size=1),
        total=st.floats(allow_nan=False),
        items=st.lists(
            st.builds(Item, sku=st.text(), count=st.integers(0, 9), price=st.decimals(allow_nan=False)), max_size=3
        ),
        tags=st.sets(st.text(), max_size=4),
        pair=st.tuples(st.integers(0, 9), st.text()),
        placed=st.none() | st.datetimes(timezones=st.just(UTC)),
        key=st.none() | st.uuids(),
        color=st.sampled_from(Color),
        extra=plain,
    )
)
def test_a_typed_context_restores_the_types_of_its_annotations(order: Order) -> None:
    codec = ContextCodec(Order)
    data = codec.prepare(order)
    back = codec.decode(data)
    assert back == order
    assert type(back.tags) is set
    assert type(back.pair) is tuple
    assert codec.digest(data) == codec.digest(codec.encode(back))


@pytest.mark.parametrize("value", [math.inf, -math.inf, -0.0, b"\x00\xff", 2**64 - 1, -(2**63), 5e-324])
def test_extreme_values_survive_exactly(value: Any) -> None:
    codec = ContextCodec(dict)
    back = codec.decode(codec.encode({"v": [value]}))["v"][0]
    assert repr(back) == repr(value)


def test_nan_survives_wherever_it_stands() -> None:
    codec = ContextCodec(dict)
    back = codec.decode(codec.encode({"v": [1.0, float("nan"), {"w": float("nan")}], "o": {"n": math.nan}}))
    assert math.isnan(back["v"][1])
    assert math.isnan(back["v"][2]["w"])
    assert math.isnan(back["o"]["n"])


def test_nan_survives_in_a_typed_context() -> None:
    codec = ContextCodec(Order)
    back = codec.decode(codec.encode(Order("a", math.nan, items=[Item("s", 1, Decimal("NaN"))])))
    assert math.isnan(back.total)
    assert back.items[0].price.is_nan()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({1, 2}, "a set"),
        ((1, 2), "a tuple"),
        (Point(1, 2), "Point"),
        (frozenset({1}), "a frozenset"),
        (datetime(2026, 1, 1), "datetime.datetime"),  # noqa: DTZ001 - naive on purpose
        (timedelta(seconds=1), "datetime.timedelta"),
        (Decimal("1.5"), "decimal.Decimal"),
        (UUID(int=1), "uuid.UUID"),
        (Color.red, "Color"),
        (Item("a", 1), "Item"),
        (Parcel(1.0), "Parcel"),
        (object(), "an object"),
        (len, "builtin_function_or_method"),
        (functools.partial(len), "functools.partial"),
        (1j, "a complex"),
        (2**64, "beyond 64 bits"),
        (-(2**63) - 1, "beyond 64 bits"),
        ("\ud800", "surrogate"),
        (type("Text", (str,), {})("a"), "Text"),
    ],
)
def test_a_dict_refuses_what_would_come_back_as_something_else(value: Any, says: str) -> None:
    with pytest.raises(InvalidContext) as caught:
        ContextCodec(dict).encode({"items": [0, {"thing": value}]}, stage="price")
    message = str(caught.value)
    assert "stage 'price': context.items[1].thing" in message
    assert says in message
    assert caught.value.stage == "price"
    assert caught.value.field == "items[1].thing"


@pytest.mark.parametrize("key", [(1, "a"), None, 1.5, b"x", True, 7])
def test_keys_that_come_back_equal_are_taken(key: Any) -> None:
    codec = ContextCodec(dict)
    assert codec.decode(codec.encode({"m": {key: 1}})) == {"m": {key: 1}}


@pytest.mark.parametrize("key", [Color.red, Decimal(1), frozenset({1}), math.nan])
def test_keys_that_would_change_are_refused(key: Any) -> None:
    with pytest.raises(InvalidContext, match=r"context\.m "):
        ContextCodec(dict).encode({"m": {key: 1}})


def test_a_context_that_contains_itself_is_refused_where_it_does() -> None:
    context: dict[str, Any] = {"a": {"b": []}}
    context["a"]["b"].append(context["a"])
    with pytest.raises(InvalidContext, match=r"context\.a\.b\[0\] refers to itself"):
        ContextCodec(dict).encode(context)


def test_a_context_that_is_nested_too_deeply_is_refused_in_words() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    try:
        with pytest.raises(InvalidContext, match="nested too deeply"):
            ContextCodec(dict).encode({"deep": deep})
    finally:
        while deep:  # freed level by level: the destructor of the nest is recursive too
            deep = deep.pop()


def test_the_same_object_twice_is_no_cycle() -> None:
    shared = [1]
    codec = ContextCodec(dict)
    assert codec.decode(codec.encode({"a": shared, "b": shared, "n": math.inf})) == {"a": [1], "b": [1], "n": math.inf}


def test_a_wrong_type_of_context_is_refused_at_a_stage() -> None:
    with pytest.raises(InvalidContext, match=r"stage 'pay': the context must be Order, not list"):
        ContextCodec(Order).encode([1], stage="pay")  # type: ignore[arg-type]


def test_an_untyped_field_of_a_typed_context_follows_the_rule_of_dicts() -> None:
    with pytest.raises(InvalidContext, match=r"stage 's': context\.extra\.when is a datetime\.date"):
        ContextCodec(Order).encode(Order("a", 1.0, extra={"when": datetime(2026, 1, 1, tzinfo=UTC).date()}), stage="s")


def test_a_tuple_in_a_field_annotated_as_list_is_refused() -> None:
    with pytest.raises(InvalidContext, match=r"context\.items is a tuple and is decoded as a list"):
        ContextCodec(Order).encode(Order("a", 1.0, items=(Item("a", 1),)))  # type: ignore[arg-type]


def test_an_attribute_that_is_no_field_is_refused_instead_of_lost() -> None:
    order = Order("a", 1.0)
    order.discount = 5  # type: ignore[attr-defined]
    with pytest.raises(InvalidContext, match=r"context\.discount is not a field of Order"):
        ContextCodec(Order).encode(order)


def test_a_cached_property_is_no_stray_attribute() -> None:
    @dataclass
    class Priced:
        price: int

        @functools.cached_property
        def doubled(self) -> int:
            return self.price * 2

    context = Priced(2)
    assert context.doubled == 4
    codec = ContextCodec(Priced)
    assert codec.decode(codec.encode(context)).price == 2


def test_an_eq_that_lies_does_not_hide_a_loss() -> None:
    with pytest.raises(InvalidContext, match=r"context\.value is a tuple"):
        ContextCodec(Unequal).encode(Unequal((1,)))
    with pytest.raises(InvalidContext, match=r"context\.inner\.value is a tuple"):
        ContextCodec(Holder).encode(Holder(Unequal((1,))))


def test_fields_of_a_slotted_base_are_compared_too() -> None:
    codec = ContextCodec(OnSlots)
    assert codec.decode(codec.encode(OnSlots([1], 2))) == OnSlots([1], 2)
    with pytest.raises(InvalidContext, match=r"context\.a is a tuple"):
        codec.encode(OnSlots((1,), 2))


def test_a_field_left_out_of_comparison_is_not_left_out_of_the_check() -> None:
    made = dataclasses.make_dataclass("Made", [("a", Any, field(compare=False))])
    with pytest.raises(InvalidContext, match=r"context\.a is a set"):
        ContextCodec(made).encode(made({1}))


@pytest.mark.parametrize(
    ("given_context", "message", "field_name"),
    [
        ({"order_id": "a"}, "context.total is missing: Order requires it", "total"),
        ({"order_id": "a", "total": "x"}, "context.total must be float, not str", "total"),
        ({"order_id": "a", "total": None}, "context.total must be float, not None", "total"),
        (
            {"order_id": "a", "total": 1, "itmes": []},
            "context.itmes: Order has no such field (did you mean 'items'?); it has",
            "itmes",
        ),
        (
            {"order_id": "a", "total": 1, "items": [{"sku": "a", "count": 1}, {"sku": "b", "count": "2"}]},
            "context.items[1].count must be int, not str",
            "items[1].count",
        ),
        ({"order_id": "a", "total": 1, "items": [{"sku": "a"}]}, "context.items[0].count is missing", "items[0].count"),
        (Order("a", "x"), "context.total must be float, not str", "total"),  # type: ignore[arg-type]
        (Order("a", 1.0, items=[Item("s", None)]), "context.items[0].count must be int, not None", "items[0].count"),  # type: ignore[arg-type]
    ],
)
def test_a_missing_or_wrongly_typed_field_is_refused_by_name(given_context: Any, message: str, field_name: str) -> None:
    with pytest.raises(InvalidContext) as caught:
        ContextCodec(Order).prepare(given_context)
    assert message in str(caught.value)
    assert caught.value.field == field_name


@pytest.mark.parametrize(
    "wrong",
    [
        {"order_id": "a", "totl": 1},
        {"order_id": "a"},
        {"total": "x", "order_id": "a"},
        5,
        Order("a", "x"),
        Order("a", {1}),
    ],  # type: ignore[arg-type]
)
def test_a_context_that_is_refused_names_the_line_of_the_program_once(wrong: Any) -> None:
    with pytest.raises(InvalidContext, match=r"test_context_codec\.py, line \d+\)$") as caught:
        ContextCodec(Order).prepare(wrong)
    assert str(caught.value).count("test_context_codec.py") == 1


def test_a_class_of_the_same_name_is_told_apart_by_its_module() -> None:
    other = dataclasses.make_dataclass("Order", [("order_id", str)], namespace={"__module__": "shop.models"})
    own = f"{Order.__module__}.Order"
    with pytest.raises(InvalidContext, match=rf"must be {own} or a dict with its fields, not shop\.models\.Order"):
        ContextCodec(Order).prepare(other("a"))
    with pytest.raises(InvalidContext, match=rf"stage 'pay': the context must be {own}, not shop\.models\.Order"):
        ContextCodec(Order).encode(other("a"), stage="pay")


def test_a_class_that_was_defined_twice_is_named_as_such() -> None:
    def define() -> Any:
        part = dataclasses.make_dataclass("Part", [("n", int)], namespace={"__module__": "shop"})
        return part, dataclasses.make_dataclass("Whole", [("part", part)], namespace={"__module__": "shop"})

    (_, whole), (part, whole_again) = define(), define()
    with pytest.raises(InvalidContext, match=r"not another class shop\.Whole \(the code that defines it was run twice"):
        ContextCodec(whole).prepare(whole_again(part(1)))
    with pytest.raises(
        InvalidContext, match=r"context\.part is an instance of another class Part than that of the field"
    ):
        ContextCodec(whole).prepare(whole(part(1)))


def test_a_dict_where_a_field_has_a_class_is_refused_with_the_call_to_write() -> None:
    whole = dataclasses.make_dataclass("Whole", [("item", Item)])
    with pytest.raises(InvalidContext, match=r"context\.item is a dict, .*Item; use Item\(\*\*x\)"):
        ContextCodec(whole).prepare(whole({"sku": "a", "count": 1}))


@pytest.mark.parametrize("wrong", [5, None, "text", [1], Item("a", 1)])
def test_a_context_of_another_type_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidContext, match="the context must be Order or a dict with its fields"):
        ContextCodec(Order).prepare(wrong)
    with pytest.raises(InvalidContext, match="the context must be a dict"):
        ContextCodec(dict).prepare(wrong)


def test_an_instance_of_a_subclass_is_refused_because_it_would_lose_itself() -> None:
    @dataclass
    class Rush(Order):
        hours: int = 1

    with pytest.raises(InvalidContext, match="not its subclass Rush"):
        ContextCodec(Order).prepare(Rush("a", 1.0))


def test_validate_refuses_with_its_own_message() -> None:
    with pytest.raises(InvalidContext, match=r"^order_id is required$") as caught:
        ContextCodec(Order).prepare(Order("", 1.0))
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(InvalidContext, match=r"^order_id is required$"):
        ContextCodec(Order).prepare({"order_id": "", "total": 1})


def test_a_wrong_type_that_trips_validate_is_reported_as_the_wrong_type() -> None:
    @dataclass
    class Sum:
        amount: float

        def validate(self) -> None:
            if self.amount < 0:
                raise ValueError("amount must not be negative")

    with pytest.raises(InvalidContext, match=r"context\.amount must be float, not str"):
        ContextCodec(Sum).prepare(Sum("1"))  # type: ignore[arg-type]


def test_a_dict_is_converted_to_the_typed_context() -> None:
    codec = ContextCodec(Order)
    data = codec.prepare(
        {"order_id": "a", "total": 3, "tags": ["x"], "placed": "2026-01-01T00:00:00Z", "color": "blue"}
    )
    back = codec.decode(data)
    assert back == Order("a", 3.0, tags={"x"}, placed=datetime(2026, 1, 1, tzinfo=UTC), color=Color.blue)


def test_strings_of_a_csv_are_read_as_the_fields_need_them_where_asked() -> None:
    codec = ContextCodec(Parcel)
    assert codec.decode(codec.prepare({"weight": "1.5"}, strict=False)) == Parcel(1.5)
    with pytest.raises(InvalidContext, match=r"context\.weight must be float, not str"):
        codec.prepare({"weight": "1.5"})


def test_damaged_or_foreign_bytes_are_refused_on_decoding() -> None:
    with pytest.raises(InvalidContext, match="must be dict, not int"):
        ContextCodec(dict).decode(b"\x01")
    with pytest.raises(InvalidContext):
        ContextCodec(Order).decode(b"\xc1")


def test_raw_is_decoded_like_bytes() -> None:
    codec = ContextCodec(dict)
    assert codec.decode(msgspec.Raw(codec.encode({"a": 1}))) == {"a": 1}


def test_the_digest_knows_contents_and_not_order() -> None:
    codec = ContextCodec(dict)

    def digest(context: dict[Any, Any]) -> bytes:
        return codec.digest(codec.encode(context))

    assert len(digest({})) == 16
    assert digest({"a": 1, "b": {"c": 1, "d": 2}}) == digest({"b": {"d": 2, "c": 1}, "a": 1})
    assert digest({1: "x", "a": 2}) == digest({"a": 2, 1: "x"})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest({1: "x"}) != digest({"1": "x"})
    assert digest({"a": [1, 2]}) != digest({"a": [2, 1]})


def test_the_digest_of_a_set_does_not_depend_on_its_order() -> None:
    @dataclass
    class Bag:
        things: set[int | str]

    codec = ContextCodec(Bag)
    encode = msgspec.msgpack.encode
    assert codec.digest(encode({"things": [1, "a", 2]})) == codec.digest(encode({"things": ["a", 2, 1]}))


def test_a_view_for_json_holds_nothing_that_json_lacks() -> None:
    data = encode_value(
        {
            "b": b"\x00\x01",
            "n": [math.nan, math.inf, -math.inf],
            1: {None: True},
            "t": datetime(2026, 1, 1, tzinfo=UTC),
        },
        what="it",
    )
    view = json_view(data)
    assert orjson.loads(orjson.dumps(view)) == {
        "b": "AAE=",
        "n": ["NaN", "Infinity", "-Infinity"],
        "1": {"null": True},
        "t": "2026-01-01T00:00:00+00:00",
    }


def test_a_codec_survives_pickling() -> None:
    codec = pickle.loads(pickle.dumps(ContextCodec(Order)))
    assert codec.decode(codec.encode(Order("a", 1.0))) == Order("a", 1.0)


def test_a_type_with_a_name_that_nothing_defines_cannot_be_a_context() -> None:
    made = dataclasses.make_dataclass("Made", [("a", "Nowhere")])
    with pytest.raises(WorkflowDefinitionError, match=r"Made.*'Nowhere' is not defined"):
        ContextCodec(made)


def test_a_class_local_to_a_function_can_refer_to_itself() -> None:
    @dataclass
    class Node:
        name: str
        children: list[Node] = field(default_factory=list)

    codec = ContextCodec(Node)
    assert codec.decode(codec.encode(Node("a", [Node("b")]))) == Node("a", [Node("b")])


@given(plain)
def test_a_plain_result_comes_back_with_the_same_values_and_types(value: Any) -> None:
    assert exactly(decode_value(encode_value(value, what="it"))) == exactly(value)


@pytest.mark.parametrize("value", [Item("a", 1), (1, 2), {"ids": {1}}, Decimal(1), Parcel(1.0), [object()]])
def test_a_result_that_would_change_is_refused_by_what_it_is(value: Any) -> None:
    with pytest.raises(InvalidContext, match=r"^the result of stage 'pay': value.* (is|cannot) ") as caught:
        encode_value(value, what="the result of stage 'pay'")
    assert "; " in str(caught.value)
