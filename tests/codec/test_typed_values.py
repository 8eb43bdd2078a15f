"""Results, steps, replies and payloads are typed by annotations; what does not fit is kept as plain data."""

from __future__ import annotations

import enum
import logging
import re
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

import msgspec
import orjson
import pydantic
import pytest

from stageflow_actors import InvalidContext, Replace, Retry, Stage, StageContext, Workflow, WorkflowDefinitionError
from stageflow_actors.core.codec import ContextCodec, decode_value, json_view
from stageflow_actors.core.schema import SchemaCodec, derive_schema, key_reader
from stageflow_actors.core.value_codec import UNTYPED, ValueCodec, encode_message
from stageflow_actors.definition.type_hints import return_type
from stageflow_actors.testing import run

if TYPE_CHECKING:
    from nowhere import Unknown  # type: ignore[import-not-found]


class Colour(enum.Enum):
    red = "red"


@dataclass
class Receipt:
    id: str
    amount: Decimal = Decimal(1)


class Model(pydantic.BaseModel):
    at: date


@pytest.mark.parametrize(
    ("kind", "value", "plain"),
    [
        (int, "x", "x"),
        (int, Decimal("1.5"), "1.5"),
        (int, (1, 2), [1, 2]),
        (str, Colour.red, "red"),
        (dict, Receipt("a"), {"id": "a", "amount": "1"}),
        (Receipt, {"id": "a"}, {"id": "a"}),
        (Receipt, Model(at=date(2026, 1, 1)), {"at": "2026-01-01"}),
        (Decimal, "1.5", "1.5"),
        (Decimal, None, None),
        (list[int], Counter("a"), {"a": 1}),
        (list[Receipt], [1], [1]),
        (set[int], [1], [1]),
        (Colour, "red", "red"),
        (Path, "/a", "/a"),
        (datetime, "2026-01-01T00:00:00", "2026-01-01T00:00:00"),
    ],
)
def test_a_result_that_does_not_fit_its_annotation_is_kept_as_plain_data(kind: Any, value: Any, plain: Any) -> None:
    codec = ValueCodec(kind)
    data, warning = codec.keep(value, what="the result of stage 'pay'")
    assert codec.decode(data) == plain == decode_value(data)
    assert type(codec.decode(data)) is type(plain)
    if value is not None:
        assert warning is not None
        assert warning.startswith("the result of stage 'pay' is a ")
        assert "does not fit its annotation" in warning


@pytest.mark.parametrize("kind", [Any, int, Receipt])
def test_a_result_that_has_no_plain_form_is_refused(kind: Any) -> None:
    with pytest.raises(InvalidContext, match=r"the result of stage 'pay': value is an object.*store"):
        ValueCodec(kind).keep(object(), what="the result of stage 'pay'")


def test_an_object_without_annotation_is_kept_as_its_fields() -> None:
    for value in (Receipt("a"), Model(at=date(2026, 1, 1))):
        data, warning = UNTYPED.keep([value], what="it")
        assert warning is None
        assert isinstance(decode_value(data)[0], dict)


def test_a_reader_without_the_annotation_restores_what_describes_itself() -> None:
    value = (Decimal("1.50"), {date(2026, 1, 1): {Path("a")}}, frozenset({(1, "a")}))
    data, warning = ValueCodec(tuple[Decimal, dict[date, set[Path]], frozenset[tuple[int, str]]]).keep(value, what="it")
    assert warning is None
    assert decode_value(data) == value


@pytest.mark.parametrize("kind", [Any, dict, dict[str, Any]])
def test_an_aware_datetime_in_a_result_keeps_its_offset(kind: Any) -> None:
    value = {"at": datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=5, minutes=30))), "n": float("inf")}
    data, warning = ValueCodec(kind).keep(value, what="it")
    assert warning is None
    assert repr(ValueCodec(kind).decode(data)) == repr(value)


def test_a_typed_result_has_a_view_for_json() -> None:
    kind = tuple[Decimal, set[date], frozenset[int], Path, timedelta, UUID, dict[datetime, int]]
    at = datetime(2026, 1, 1, tzinfo=UTC)
    value = (Decimal("1.5"), {date(2026, 1, 1)}, frozenset({1}), Path("a"), timedelta(1), UUID(int=1), {at: 1})
    data, warning = ValueCodec(kind).keep(value, what="it")
    assert warning is None
    expected = ["1.5", ["2026-01-01"], [1], "a", "P1D", str(UUID(int=1)), {"2026-01-01T00:00:00+00:00": 1}]
    assert orjson.loads(orjson.dumps(json_view(data))) == expected


def test_a_message_keeps_its_values_for_a_receiver_with_an_annotation() -> None:
    data = encode_message([Receipt("a", Decimal(2)), {1: Model(at=date(2026, 1, 1))}], what="the command")
    assert decode_value(data) == [{"id": "a", "amount": Decimal(2)}, {1: {"at": date(2026, 1, 1)}}]
    assert ValueCodec(Receipt).decode(encode_message(Receipt("a", Decimal(2)), what="it")) == Receipt("a", Decimal(2))
    for untyped in ({1, 2}, Decimal(1), [Colour.red], (1,)):
        with pytest.raises(InvalidContext, match=r"the command: value.* is a"):
            encode_message(untyped, what="the command")
    with pytest.raises(InvalidContext, match=r"the command: value\[0\] is a collections.Counter .*use dict"):
        encode_message([Counter("a")], what="the command")
    with pytest.raises(InvalidContext, match=r"the command: value\.a is a socket\.socket"), socket.socket() as opened:
        encode_message({"a": opened}, what="the command")


def test_an_annotation_that_cannot_be_resolved_counts_as_none() -> None:
    class Local:
        pass

    def of_type_checking(order: Unknown) -> Decimal: ...  # type: ignore[empty-body]
    def unknown(order: dict[str, Any]) -> Unknown: ...
    def local(order: dict[str, Any]) -> Local: ...  # type: ignore[empty-body]
    def nothing(order: dict[str, Any]) -> None: ...
    async def awaited(order: dict[str, Any]) -> int: ...  # type: ignore[empty-body]
    def awaitable(order: dict[str, Any]) -> Awaitable[int]: ...  # type: ignore[empty-body]
    def replaced(order: dict[str, Any]) -> Replace | Decimal: ...  # type: ignore[empty-body]

    found = [return_type(each) for each in (of_type_checking, unknown, local, nothing, awaited, awaitable, replaced)]
    assert found == [Decimal, Any, Any, Any, int, int, Decimal]
    assert run(Workflow("w").add_stage(unknown), {}).success


def give_amount(order: dict[str, Any]) -> Decimal:
    return order["amount"]  # type: ignore[no-any-return]


def test_one_warning_per_stage_and_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    flow = (
        Workflow("w")
        .add_stage(give_amount, id="a")
        .add_map("each", lambda amount: amount, over=lambda order: [1, 2, 3])
        .add_map("typed", give_item, over=lambda order: [1, 2, 3])
    )
    with caplog.at_level(logging.WARNING, "stageflow_actors"):
        result = run(flow, {"amount": "1.5"})
    assert result.success, result.error
    assert [stage.data for stage in result.stages] == ["1.5", [1, 2, 3], [1, 2, 3]]
    assert len([record for record in caplog.records if "does not fit its annotation" in record.message]) == 2


class State(enum.StrEnum):
    paid = "paid"


class Pair(NamedTuple):
    a: int


PLAIN: list[tuple[Any, Any, str]] = [
    (Decimal("1.50"), "1.50", "value is a decimal.Decimal"),
    ((1, (2,)), [1, [2]], "value is a tuple"),
    (Pair(1), [1], f"value is a {__name__}.Pair"),
    ({3, 1}, [1, 3], "value is a set"),
    (frozenset({"a"}), ["a"], "value is a frozenset"),
    ({"at": [Path("/x")]}, {"at": ["/x"]}, "value.at[0] is a pathlib.PosixPath"),
    (date(2026, 1, 2), "2026-01-02", "value is a datetime.date"),
    (datetime(2026, 1, 2), "2026-01-02T00:00:00", "value is a datetime.datetime"),  # noqa: DTZ001
    (timedelta(1), "P1D", "value is a datetime.timedelta"),
    (UUID(int=1), str(UUID(int=1)), "value is an uuid.UUID"),
    (Colour.red, "red", f"value is a {__name__}.Colour"),
    ({Decimal(1): (), 2: 3}, {"1": [], 2: 3}, "value has the key Decimal('1')"),
    (
        {"kept": datetime(2026, 1, 2, tzinfo=UTC), "t": ()},
        {"kept": datetime(2026, 1, 2, tzinfo=UTC), "t": []},
        "value.t",
    ),
]


@pytest.mark.parametrize(("value", "plain", "where"), PLAIN, ids=lambda each: type(each).__name__)
def test_a_result_without_an_annotation_is_kept_as_plain_data_and_the_warning_says_what_to_write(
    value: Any, plain: Any, where: str
) -> None:
    data, warning = UNTYPED.keep(value, what="the result of stage 'pay'")
    back = UNTYPED.decode(data)
    assert (back, repr(back)) == (plain, repr(plain))
    assert warning is not None
    assert warning.startswith(f"the result of stage 'pay': {where}")
    assert re.search(
        r", because no return annotation names its type: annotate what the function returns, or use ", warning
    )


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (State.paid, "x.value"),
        ((State.paid,), "x.value"),
        (Counter("a"), "dict(x)"),
        ([1 + 2j], "x.real"),
        (range(3), "list(x)"),
        ({Decimal(1): 1, "1": 2}, "str(x)"),
        ((2**64,), "str, bytes or float"),
        ((object(),), "a service"),
    ],
)
def test_a_result_without_an_annotation_that_has_no_plain_form_of_its_own_is_refused(value: Any, advice: str) -> None:
    with pytest.raises(InvalidContext, match=r"^the result of stage 'pay': value.*" + re.escape(advice)):
        UNTYPED.keep(value, what="the result of stage 'pay'")


def test_a_stage_and_a_step_whose_results_have_no_annotation_go_on(caplog: pytest.LogCaptureFixture) -> None:
    def stage(order: dict[str, Any], ctx: StageContext):  # type: ignore[no-untyped-def]
        assert ctx.step("price", lambda: Decimal("1.50")) == "1.50"
        return {"seen": {2, 1}, "where": Path("/x")}

    flow = Workflow("w").add_stage(stage, id="a").add_map("each", lambda item: (item,), over=lambda order: [1, 2])
    with caplog.at_level(logging.WARNING, "stageflow_actors"):
        result = run(flow, {})
    assert result.success, result.error
    assert [one.data for one in result.stages] == [{"seen": [1, 2], "where": "/x"}, [[1], [2]]]
    told = [record.message for record in caplog.records if "no return annotation" in record.message]
    assert len(told) == 3, "one of the step, one of the stage, one of the items"


def give_item(number: int) -> Decimal:
    return number  # type: ignore[return-value]


def test_every_value_of_a_workflow_is_typed_by_its_annotation() -> None:
    def step() -> tuple[int, Decimal]:
        return 1, Decimal(2)

    def pay(order: dict[str, Any], ctx: StageContext) -> Receipt:
        assert ctx.step("f", step) == (1, Decimal(2))
        if ctx.attempt == 1:
            raise OSError
        return Receipt("a", Decimal("1.50"))

    def ask(order: dict[str, Any], ctx: StageContext) -> Any:
        return ctx.request("price", ctx.results["pay"])

    def price(receipt: Receipt) -> Decimal:
        return receipt.amount * 2

    def use(order: dict[str, Any], ctx: StageContext) -> Decimal:
        return ctx.payload  # type: ignore[no-any-return]

    def approve(order: dict[str, Any], payload: Receipt) -> set[str]:
        return {payload.id}

    flow = (
        Workflow("w")
        .add_stage(pay, retry=Retry.fixed(2, 1))
        .add_stage(ask)
        .add_stage(use)
        .add_map("each", double, over=lambda order: [Decimal(1), Decimal(2)])
        .add_signal("sign", on_signal=approve)
    )
    result = run(flow, {}, endpoints={"price": price}, signals={"sign": Receipt("s")})
    assert result.success, result.error
    expected = [Receipt("a", Decimal("1.50")), None, Decimal("3.00"), [(Decimal(2), 2), (Decimal(4), 4)], {"s"}]
    assert [stage.data for stage in result.stages] == expected


def test_a_reply_arrives_as_the_type_that_its_endpoint_is_annotated_with() -> None:
    seen: list[Any] = []

    def ask(order: dict[str, Any], ctx: StageContext) -> Any:
        return ctx.request(order["of"], 2)

    def use(order: dict[str, Any], ctx: StageContext) -> None:
        seen.append(ctx.payload)
        raise OSError

    def receipt(number: int) -> Receipt:
        return Receipt("a", Decimal(number))

    def receipts(number: int) -> list[Receipt] | None:
        return [Receipt("b")] * number

    def none(number: int) -> Receipt | None:
        return None

    def wrong(number: int) -> Receipt:
        return {"other": number}  # type: ignore[return-value]

    def plain(number: int):  # type: ignore[no-untyped-def]
        return Receipt("c")

    flow = Workflow("w", on_failure="park").add_stage(ask).add_delay("rest", 1)
    flow.add_branch("way", lambda order: "a", {"a": [Stage(use, retry=Retry.fixed(2, 0))]})
    endpoints = {"receipt": receipt, "receipts": receipts, "none": none, "wrong": wrong, "plain": plain}
    expected = {
        "receipt": Receipt("a", Decimal(2)),
        "receipts": [Receipt("b"), Receipt("b")],
        "none": None,
        "wrong": {"other": 2},
        "plain": {"id": "c", "amount": "1"},
    }
    for name, payload in expected.items():
        run(flow, {"of": name}, endpoints=endpoints)
        assert seen == [payload, payload], name
        seen.clear()
    last = run(Workflow("last").add_stage(ask), {"of": "receipt"}, endpoints=endpoints)
    assert last.stages[0].data == {"id": "a", "amount": "2"}, "the result of the stage, which has no annotation"


def double(amount: Decimal) -> tuple[Decimal, int]:
    return amount * 2, int(amount) * 2


def _named(hint: Any) -> Callable[[Any], Any]:
    def stage(order: Any) -> Any: ...

    stage.__annotations__["return"] = hint
    return stage


@pytest.mark.parametrize(
    ("hint", "advice"),
    [
        (socket.socket, "service"),
        (list[socket.socket], "service"),
        (Counter[str], "dict(x)"),
        (Iterator[int], "list(x)"),
        (dict[str, Callable[[], None]], "service"),
        (complex, "x.real"),
    ],
)
def test_an_annotation_that_names_what_cannot_be_kept_is_a_definition_error(hint: Any, advice: str) -> None:
    with pytest.raises(
        WorkflowDefinitionError, match="the return annotation of stage 'stage' of workflow 'w' names"
    ) as e:
        Workflow("w").add_stage(_named(hint)).validate()
    assert advice in str(e.value)


@pytest.mark.parametrize("hint", [object, Iterable[int], Model, Path, list[Path], Any, "Nowhere", Colour | None, None])
def test_an_annotation_of_a_kept_type_is_accepted(hint: Any) -> None:
    Workflow("w").add_stage(_named(hint)).validate()


def test_a_field_and_an_item_that_cannot_be_kept_are_definition_errors() -> None:
    @dataclass
    class Order:
        connection: socket.socket

    def pick(item: socket.socket) -> None: ...

    with pytest.raises(WorkflowDefinitionError, match="the field 'connection' of Order, the context of workflow 'w'"):
        Workflow("w", context=Order).add_stage(lambda order: None).validate()
    with pytest.raises(WorkflowDefinitionError, match="the first parameter of stage 'm' of workflow 'w' names"):
        Workflow("w").add_map("m", pick, over=lambda order: []).validate()


class Tagged(msgspec.Struct, tag=True):
    n: int = 0


@dataclass
class Order:
    id: str
    total: float = 1.0
    lines: list[str] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    note: str | None = None


def _digest(codec: ContextCodec[Any], context: Any) -> bytes:
    return codec.digest(codec.prepare(context))


def test_equal_inputs_have_one_digest() -> None:
    codec, untyped = ContextCodec(Order), ContextCodec(dict)
    same = [Order("a"), {"id": "a"}, {"total": 1, "id": "a"}, Order("a", 1), {"id": "a", "lines": [], "names": {}}]
    assert len({_digest(codec, context) for context in same}) == 1
    others = [Order("b"), Order("a", 2), Order("a", lines=["x"]), Order("a", note=""), Order("a", names={1: ""})]
    assert len({_digest(codec, context) for context in [*same[:1], *others]}) == 1 + len(others)
    pairs: list[tuple[Any, Any]] = [
        ({"n": 1}, {"n": 1.0}),
        ({"n": [2**53 + 1]}, {"n": [2**53 + 1]}),
        ({"n": float("nan")}, {"n": float("nan")}),
        ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3.0, "c": 2.0}, "a": 1.0}),
        ({1: "a"}, {1.0: "a"}),
        ({"n": 0.0}, {"n": -0.0}),
        ({"t": datetime(2026, 1, 1, tzinfo=UTC)}, {"t": datetime(2026, 1, 1, tzinfo=UTC)}),
    ]
    for one, other in pairs:
        assert _digest(untyped, one) == _digest(untyped, other)
    for one, other in [
        ({"n": 1}, {"n": True}),
        ({"n": 0}, {"n": False}),
        ({"n": 1}, {"n": "1"}),
        ({"n": 1}, {"n": 1.5}),
    ]:
        assert _digest(untyped, one) != _digest(untyped, other)
    for one, other in [({"n": []}, {"n": {}}), ({"n": None}, {}), ({"n": [[1]]}, {"n": [1]}), ({1: 2}, {"1": 2})]:
        assert _digest(untyped, one) != _digest(untyped, other)


def test_a_field_added_with_a_default_changes_no_digest() -> None:
    @dataclass
    class Later(Order):
        colour: str = "red"
        tags: set[str] = field(default_factory=set)
        made: list[int] = field(default_factory=lambda: [1])

    before, after = ContextCodec(Order), ContextCodec(Later)
    assert _digest(before, Order("a")) != _digest(after, Later("a"))  # a factory of other values is no default
    assert _digest(after, Later("a", made=[])) == _digest(after, Later("a", made=[], colour="red", tags=set()))

    class One(pydantic.BaseModel):
        a: int

    class Two(One):
        b: str = "x"
        c: list[int] = pydantic.Field(default_factory=list)

    assert _digest(ContextCodec(One), One(a=1)) == _digest(ContextCodec(Two), Two(a=1))
    assert _digest(ContextCodec(One), One(a=1)) != _digest(ContextCodec(Two), Two(a=1, b="y"))
    assert _digest(ContextCodec(Tagged), Tagged()) == _digest(ContextCodec(Tagged), Tagged(0))


def test_an_earlier_digest_of_a_dict_and_of_its_object_are_known_for_each_other() -> None:
    codec = ContextCodec(Order)
    data = codec.prepare(Order("a"))
    earlier = list(codec.earlier_digests(data, "orders"))
    assert len(set(earlier)) > 1
    assert set(earlier) & set(codec.earlier_digests(codec.prepare({"id": "a"}), "orders"))


def test_json_keys_become_the_key_type_of_the_field() -> None:
    schema = derive_schema(Order)
    assert schema is not None
    data = SchemaCodec(schema).prepare({"id": "a", "names": {"1": "x"}})
    assert ContextCodec(Order).decode(data) == Order("a", names={1: "x"})
    with pytest.raises(InvalidContext, match=r"a key of context\.names must be int, not str"):
        SchemaCodec(schema).prepare({"id": "a", "names": {"one": "x"}})
    reader = key_reader(Order)
    assert reader is not None
    assert reader({"id": "a", "names": {"-7": "x"}}) == {"id": "a", "names": {-7: "x"}}
    assert key_reader(dict) is None
    assert key_reader(Receipt) is None
    keyed = ValueCodec(dict[int, str])
    assert keyed.decode_input(encode_message({"1": "x"}, what="it")) == {1: "x"}
