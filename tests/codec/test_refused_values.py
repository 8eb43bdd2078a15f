"""Values that cannot be kept are refused, with advice that fits their kind; numbers of numpy count as Python's."""

from __future__ import annotations

import collections
import enum
import io
import sys
import threading
import types
import uuid
from array import array
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import pytest

from stageflow_actors import InvalidContext
from stageflow_actors.core.codec import ContextCodec, encode_value


class State(enum.StrEnum):
    paid = "paid"


class Level(enum.IntEnum):
    low = 1


class Name(str):
    __slots__ = ()


class Amount(int):
    pass


class Ratio(float):
    pass


class Rows(list[Any]):
    pass


class Pair(NamedTuple):
    a: int


@dataclass
class Item:
    sku: str


class Timestamp(datetime):
    """Like that of pandas."""

    def to_pydatetime(self) -> datetime:
        return datetime(self.year, self.month, self.day, tzinfo=UTC)


class Array:
    """Like those of numpy: too large for a message with `nbytes`."""

    def __init__(self, nbytes: int = 24) -> None:
        self.nbytes = nbytes

    def tolist(self) -> list[int]:
        return []


class Frame:
    """Like those of polars."""

    def to_dicts(self) -> list[dict[str, Any]]:
        return []


class NaTType:
    """Like that of pandas."""


class Numbers:
    """The part of numpy that the codec looks at."""

    class number:  # noqa: N801 - as in numpy
        def __init__(self, value: Any) -> None:
            self.value = value

        def item(self) -> Any:
            return self.value

        def __eq__(self, other: object) -> bool:
            return bool(self.value == other)

        def __hash__(self) -> int:
            return hash(self.value)

    class bool_(number):  # noqa: N801 - as in numpy
        pass


Numbers.number.__module__ = Numbers.bool_.__module__ = "numpy"

REFUSED: list[tuple[Any, str]] = [
    (State.paid, "x.value"),
    (Level.low, "x.value"),
    (Name("a"), "str(x)"),
    (Amount(1), "int(x)"),
    (Ratio(1.5), "float(x)"),
    (collections.Counter("a"), "dict(x)"),
    (collections.defaultdict(list, a=[1]), "dict(x)"),
    (collections.OrderedDict(a=1), "dict(x)"),
    (collections.ChainMap({"a": 1}), "dict(x)"),
    (types.MappingProxyType({"a": 1}), "dict(x)"),
    (Rows([1]), "list(x)"),
    (collections.deque([1]), "list(x)"),
    (range(3), "list(x)"),
    ({"a": 1}.values(), "list(x)"),
    (iter([1]), "list(x)"),
    ((1, 2), "list(x)"),
    (Pair(1), "x._asdict()"),
    ({1, 2}, "sorted(x)"),
    (frozenset({1}), "sorted(x)"),
    (Decimal("1.5"), "str(x)"),
    (Fraction(1, 2), "float(x)"),
    (1 + 2j, "[x.real, x.imag]"),
    (uuid.UUID(int=1), "str(x)"),
    (Path("/x"), "str(path)"),
    (datetime(2026, 1, 1), "x.isoformat()"),  # noqa: DTZ001 - a naive one is meant
    (date(2026, 1, 1), "x.isoformat()"),
    (time(1, 2), "x.isoformat()"),
    (timedelta(1), "x.total_seconds()"),
    (Timestamp(2026, 1, 1, tzinfo=UTC), "x.to_pydatetime()"),
    (NaTType(), "None"),
    (Array(), "x.tolist()"),
    (array("d", [1.0]), "x.tolist()"),
    (Array(50_000_000), "write it to a file"),
    (Frame(), "x.to_dicts()"),
    (Item("a"), "dataclasses.asdict(x)"),
    (ValueError("x"), "str(x)"),
    (io.StringIO("x"), "close it"),
    (print, "its name"),
    (int, "its name"),
    (threading.Lock(), "a service"),
    (object(), "a service"),
]


@pytest.mark.parametrize(("value", "advice"), REFUSED, ids=lambda each: type(each).__name__)
def test_a_value_that_would_change_is_refused_with_advice_for_its_kind(value: Any, advice: str) -> None:
    with pytest.raises(InvalidContext) as caught:
        ContextCodec(dict).encode({"rows": [{"v": value}]}, stage="pay")
    text = str(caught.value)
    assert text.startswith("stage 'pay': context.rows[0].v is a")
    assert advice in text.partition("; ")[2]
    assert caught.value.field == "rows[0].v"
    with pytest.raises(InvalidContext, match=r"^the result of stage 'pay': value is a") as caught:
        encode_value(value, what="the result of stage 'pay'")
    assert advice in str(caught.value)


@pytest.mark.parametrize("key", [State.paid, Level.low, (1, Decimal(1)), Decimal(1), date(2026, 1, 1), Path("x")])
def test_a_key_that_would_change_is_refused(key: Any) -> None:
    with pytest.raises(InvalidContext, match=r"context\.m has the key .*use"):
        ContextCodec(dict).encode({"m": {key: 1}})


@pytest.mark.parametrize(
    ("value", "advice"),
    [(collections.Counter(a=1), "dict(x)"), (collections.OrderedDict(a=1), "dict(x)"), (State.paid, "x.value")],
)
def test_a_typed_context_refuses_a_subclass_too(value: Any, advice: str) -> None:
    @dataclass
    class Order:
        counts: dict[str, int] = field(default_factory=dict)
        state: str = "new"
        items: list[Item] = field(default_factory=list)
        anything: Any = None

    codec = ContextCodec(Order)
    name = "state" if isinstance(value, str) else "counts"
    for field_name in (name, "anything"):
        for items in ([], [Item("a")]):
            with pytest.raises(InvalidContext, match=rf"context\.{field_name} is a .* and is decoded as a") as caught:
                codec.encode(Order(items=items, **{field_name: value}))
            assert advice in str(caught.value)
    with pytest.raises(InvalidContext, match=r"context\.items\[0\]\.sku is a .*x\.value"):
        codec.encode(Order(items=[Item(State.paid)]))


def test_a_field_of_the_same_types_does_not_hide_a_later_subclass() -> None:
    @dataclass
    class Order:
        state: str
        total: float

    codec = ContextCodec(Order)
    for _ in range(2):
        assert codec.decode(codec.encode(Order("new", 1.5))) == Order("new", 1.5)
    with pytest.raises(InvalidContext, match=r"context\.state is a .*State"):
        codec.encode(Order(State.paid, 1.5))
    wrong = Order("new", 1.5)
    wrong.note = "x"  # type: ignore[attr-defined]
    with pytest.raises(InvalidContext, match=r"context\.note is not a field"):
        codec.encode(wrong)
    with pytest.raises(InvalidContext, match=r"context\.total must be float, not str"):
        codec.encode(Order("new", "1.5"))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["(a)", "<b>", "a(b\0\0\0\0", "()" * 100])
def test_text_with_brackets_is_no_tuple(text: str) -> None:
    codec = ContextCodec(dict)
    context = {"t": text, "n": [40, 60, 62, -40], "f": [1.5] * 40, "b": text.encode()}
    assert codec.decode(codec.encode(context)) == context
    with pytest.raises(InvalidContext, match=r"context\.x is a tuple"):
        codec.encode({**context, "x": ()})


@pytest.mark.parametrize(
    ("number", "plain"),
    [
        (Numbers.number(1.5), 1.5),
        (Numbers.number(3), 3),
        (Numbers.bool_(True), True),
    ],
)
def test_a_number_of_numpy_counts_as_the_number_it_equals(
    number: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "numpy", Numbers)
    codec = ContextCodec(dict)
    back = codec.decode(codec.encode({"rows": [{"v": number}], "k": {number: 1}}))
    assert back == {"rows": [{"v": plain}], "k": {plain: 1}}
    assert type(back["rows"][0]["v"]) is type(plain)


@pytest.mark.parametrize(
    ("number", "advice"),
    [(Numbers.number(1 + 1j), "x.real"), (Numbers.number(timedelta(1)), "x.item().total_seconds()")],
)
def test_a_number_of_numpy_that_python_lacks_is_refused(
    number: Any, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "numpy", Numbers)
    number.ndim = 0
    with pytest.raises(InvalidContext) as caught:
        ContextCodec(dict).encode({"v": number})
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    "at",
    [
        datetime(2026, 3, 29, 1, tzinfo=timezone(timedelta(hours=5, minutes=30))),
        datetime(2026, 10, 25, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1),
        datetime(2026, 1, 1, tzinfo=UTC),
    ],
)
def test_an_aware_datetime_in_a_dict_keeps_offset_zone_and_fold(at: datetime) -> None:
    codec = ContextCodec(dict)
    back = codec.decode(codec.encode({"at": at}))["at"]
    assert (repr(back), back.fold) == (repr(at), at.fold)


def test_a_timestamp_of_an_earlier_release_is_decoded_in_utc() -> None:
    @dataclass
    class Job:
        at: datetime

    data = b"\x81\xa2at\xd6\xff\x69\x00\x00\x00"
    assert ContextCodec(Job).decode(data) == Job(datetime.fromtimestamp(0x69000000, UTC))
    assert ContextCodec(dict).decode(data) == {"at": datetime.fromtimestamp(0x69000000, UTC)}
    assert ContextCodec(Job).decode(b"\x81\xa2at\xb92026-01-01T00:00:00+02:00") == Job(
        datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=2)))
    )
