"""Contexts and results through real processes: equal values come back, others are refused by field."""

from __future__ import annotations

import math
import socket
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import msgspec
import pytest
from effect_log import note, noted

from stageflow_actors import InvalidContext, PayloadTooLarge, Replace, Runtime, StageContext, Workflow


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Item:
    sku: str
    price: Decimal


@dataclass
class Everything:
    name: str
    when: datetime = datetime(2024, 2, 29, 12, 30, 15, 250, tzinfo=UTC)
    price: Decimal = Decimal("19.990")
    id: UUID = UUID(int=0x12345678)  # noqa: RUF009 - a UUID never changes
    colour: Colour = Colour.BLUE
    pair: tuple[int, str] = (1, "a")
    tags: set[str] = field(default_factory=lambda: {"x", "y"})
    wait: timedelta = timedelta(minutes=5)
    items: list[Item] = field(default_factory=lambda: [Item("TEA", Decimal("4.50"))])
    blob: bytes = b"\x00\xff"
    note: str | None = None


class Account(msgspec.Struct):
    owner: str
    balance: Decimal = Decimal(0)
    history: list[tuple[str, Decimal]] = []


@dataclass
class Checked:
    customer: str = ""
    total: float = 0.0

    def validate(self) -> None:
        note("validated", self.customer)
        if not self.customer:
            raise ValueError("customer is required")


def touch(context: Everything) -> None:
    assert isinstance(context.price, Decimal)
    assert isinstance(context.tags, set)
    context.tags.add("z")
    context.pair = (context.pair[0] + 1, "b")
    context.items.append(Item("POT", Decimal("64.90")))


def replace(context: Everything) -> Everything:
    return Everything(context.name.upper(), tags=context.tags, pair=context.pair, items=context.items)


def deposit(account: Account, ctx: StageContext) -> dict[str, str]:
    account.balance += Decimal("10.10")
    account.history.append((ctx.stage_id, Decimal("10.10")))
    return {"balance": str(account.balance)}


def replace_account(account: Account) -> Account:
    return Account(account.owner, account.balance * 2, account.history)


def mutate(context: dict[str, Any]) -> None:
    context["seen"] = [1]


def replace_dict(context: dict[str, Any]) -> Replace:
    return Replace({"only": context["seen"]})


def returned_dict_is_a_result(context: dict[str, Any]) -> dict[str, Any]:
    return {"result": True}


def echo(context: dict[str, Any]) -> Any:
    return context["value"]


def bad_result(context: dict[str, Any]) -> Any:
    return {"rows": [{"conn": socket.socket()}]} if context["kind"] == "socket" else {"rows": [{"conn": Counter("a")}]}


def bad_context(context: dict[str, Any]) -> None:
    context["order"] = {"amount": 2**64} if context["kind"] == "int" else {"amount": {1, 2}}


def undo(context: dict[str, Any]) -> None:
    context["undone"] = True


def bad_type(context: Checked) -> None:
    context.total = "twelve"  # type: ignore[assignment]


def wrong_replacement(context: dict[str, Any]) -> Any:
    return Replace([1])


def grow(context: dict[str, Any]) -> None:
    context["blob"] = b"x" * context["size"]


everything = Workflow("everything", context=Everything).add_stage(touch).add_stage(replace)
accounts = Workflow("accounts", context=Account).add_stage(deposit).add_stage(replace_account)
dicts = Workflow("dicts").add_stage(mutate).add_stage(replace_dict).add_stage(returned_dict_is_a_result)
echoes = Workflow("echoes").add_stage(echo).add_stage(echo, id="again")
bad_results = Workflow("bad-results").add_stage(mutate, compensation=undo).add_stage(bad_result)
bad_contexts = Workflow("bad-contexts").add_stage(mutate, compensation=undo).add_stage(bad_context)
bad_types = Workflow("bad-types", context=Checked).add_stage(bad_type)
wrong = Workflow("wrong").add_stage(wrong_replacement)
growing = Workflow("growing").add_stage(grow, compensation=undo).add_stage(mutate)


@pytest.fixture(scope="module")
def runtime(serve: Any) -> Runtime:
    return serve(everything, accounts, dicts, echoes, bad_results, bad_contexts, bad_types, wrong, growing)


def test_a_typed_context_comes_back_with_its_types(runtime: Runtime) -> None:
    result = runtime.execute(everything, Everything("a"), timeout=20)
    result.raise_for_status()
    expected = Everything("A", tags={"x", "y", "z"}, pair=(2, "b"))
    expected.items.append(Item("POT", Decimal("64.90")))
    assert result.context == expected
    assert str(result.context.price) == "19.990"


def test_a_struct_context_is_mutated_replaced_and_keeps_results(runtime: Runtime) -> None:
    result = runtime.execute(accounts, Account("ida", Decimal("0.05")), timeout=20)
    assert result.context == Account("ida", Decimal("20.30"), [("deposit", Decimal("10.10"))])
    assert result.stages[0].data == {"balance": "10.15"}
    assert result.stages[1].data is None


def test_a_dict_for_a_typed_context_is_converted(runtime: Runtime) -> None:
    result = runtime.execute(accounts, {"owner": "emil", "balance": "1.00"}, timeout=20)  # type: ignore[arg-type]
    assert result.context.balance == Decimal("22.20")


def test_a_returned_dict_is_a_result_and_replace_replaces(runtime: Runtime) -> None:
    result = runtime.execute(dicts, {}, timeout=20)
    assert result.context == {"only": [1]}
    assert [s.data for s in result.stages] == [None, None, {"result": True}]


@pytest.mark.parametrize(
    "value",
    [
        math.inf,
        -math.inf,
        -0.0,
        2**64 - 1,
        -(2**63),
        b"\x00\xff\xfe",
        "grüße \U0001f600 \x00",
        [None, True, {"k": [1.5, -1]}],
        {"1": 1, "nested": {"deep": [{}]}},
        {1: "int keys", -2: "stay ints"},
    ],
)
def test_plain_values_survive_exactly_as_context_and_result(runtime: Runtime, value: Any) -> None:
    result = runtime.execute(echoes, {"value": value}, timeout=20)
    result.raise_for_status()
    assert result.context == {"value": value}
    assert [s.data for s in result.stages] == [value, value]
    assert repr(result.context["value"]) == repr(value)


def test_nan_survives_in_context_and_result(runtime: Runtime) -> None:
    result = runtime.execute(echoes, {"value": [math.nan]}, timeout=20)
    result.raise_for_status()
    assert math.isnan(result.context["value"][0])
    assert math.isnan(result.stages[0].data[0])


def test_results_of_earlier_stages_that_are_none_or_false_are_distinguished(runtime: Runtime) -> None:
    results = [runtime.execute(echoes, {"value": v}, timeout=20).stages[0].data for v in (None, False, 0, "", [])]
    assert list(map(repr, results)) == ["None", "False", "0", "''", "[]"]


@pytest.mark.parametrize(("kind", "place"), [("socket", "rows[0].conn"), ("Counter", "rows[0].conn")])
def test_a_result_that_cannot_be_serialised_fails_the_stage_by_name_and_field(
    runtime: Runtime, kind: str, place: str
) -> None:
    result = runtime.execute(bad_results, {"kind": kind}, timeout=20)
    assert result.status == "compensated"
    assert result.failed_stage == "bad-result"
    assert result.error is not None
    assert result.error.startswith("InvalidContext: ")
    assert "'bad-result'" in result.error
    assert place in result.error
    assert result.context == {"kind": kind, "seen": [1], "undone": True}


@pytest.mark.parametrize("kind", ["int", "set"])
def test_a_context_that_would_not_come_back_fails_the_stage_by_name_and_field(runtime: Runtime, kind: str) -> None:
    result = runtime.execute(bad_contexts, {"kind": kind}, timeout=20)
    assert result.status == "compensated"
    assert result.failed_stage == "bad-context"
    assert result.error is not None
    assert "'bad-context'" in result.error
    assert "context.order.amount" in result.error
    assert "order" not in result.context, "what the failed attempt did to its context is gone"


def test_a_field_that_a_handler_gave_another_type_is_named(runtime: Runtime) -> None:
    result = runtime.execute(bad_types, Checked("ida"), timeout=20)
    assert result.status == "failed"
    assert result.error is not None
    assert "'bad-type'" in result.error
    assert "context.total must be float, not str" in result.error
    assert result.context == Checked("ida")


def test_validate_runs_at_the_door_and_nowhere_else(runtime: Runtime) -> None:
    runtime.execute(bad_types, Checked("emil"), timeout=20)
    assert noted("validated", "emil") == [()]


def test_a_replacement_of_another_type_fails_the_stage(runtime: Runtime) -> None:
    result = runtime.execute(wrong, {}, timeout=20)
    assert result.status == "failed"
    assert result.error is not None
    assert "'wrong-replacement'" in result.error
    assert "must be dict, not list" in result.error


def test_a_context_that_outgrows_the_limit_fails_the_stage_with_advice(runtime: Runtime) -> None:
    result = runtime.execute(growing, {"size": 17 << 20}, timeout=30)
    assert result.status == "failed", "the only stage with a compensation did not complete"
    assert result.failed_stage == "grow"
    assert result.error is not None
    assert result.error.startswith("PayloadTooLarge: stage 'grow'")
    assert result.context == {"size": 17 << 20}
    assert runtime.execute(growing, {"size": 8 << 20}, timeout=30).success


def queued(runtime: Runtime) -> int:
    return sum(q.ready + q.leased + q.delayed + q.dead for q in runtime.queues())


@pytest.mark.parametrize(
    ("workflow", "context", "words"),
    [
        (everything, {}, ["context.name is missing", "Everything"]),
        (everything, {"name": 5}, ["context.name must be str, not int"]),
        (everything, {"name": "a", "colour": "green"}, ["context.colour"]),
        (everything, {"name": "a", "nmae": "b"}, ["context.nmae", "no such field"]),
        (everything, Everything("a", items=[Item("T", "cheap")]), ["context.items[0].price"]),  # type: ignore[arg-type]
        (everything, "a", ["Everything", "str"]),
        (everything, None, ["Everything", "NoneType"]),
        (bad_types, Checked(), ["customer is required"]),
        (bad_types, {"total": 3}, ["customer is required"]),
        (dicts, {"a": {"b": socket}}, ["context.a.b", "module"]),
        (dicts, {"a": [{1, 2}]}, ["context.a[0]", "set"]),
        (dicts, {"big": 2**64}, ["context.big", "64 bits"]),
        (dicts, {"t": (1, 2)}, ["context.t", "tuple"]),
        (dicts, [1], ["a dict", "list"]),
        (dicts, {"d": datetime(2024, 1, 1)}, ["context.d", "isoformat"]),  # noqa: DTZ001 - naive on purpose
        (accounts, Account("a", history=[("x", "five")]), ["context.history[0][1]"]),  # type: ignore[list-item]
    ],
)
def test_bad_input_is_one_clear_error_and_nothing_is_enqueued(
    runtime: Runtime, eventually: Any, workflow: Any, context: Any, words: list[str]
) -> None:
    eventually(lambda: queued(runtime) == 0, "nothing queued")
    with pytest.raises(InvalidContext) as refused:
        runtime.submit(workflow, context, instance_id="refused")
    message = str(refused.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert queued(runtime) == 0
    assert not [i for i in runtime.instances(limit=1000) if i.id == "refused"]


def test_a_context_over_max_message_bytes_is_refused_with_its_size(runtime: Runtime) -> None:
    with pytest.raises(PayloadTooLarge, match="max_message_bytes=16777216"):
        runtime.submit(dicts, {"blob": b"x" * (17 << 20)})
    assert queued(runtime) == 0


@pytest.mark.parametrize("bad", ["", 5, "x" * 257, b"id", True])
def test_an_instance_id_is_a_string_of_bounded_length(runtime: Runtime, bad: Any) -> None:
    with pytest.raises(InvalidContext, match="instance id"):
        runtime.submit(dicts, {}, instance_id=bad)


def test_submit_many_names_the_context_that_is_refused_and_starts_none(runtime: Runtime) -> None:
    before = len(runtime.instances(limit=100_000))
    with pytest.raises(InvalidContext, match="context 2: ") as refused:
        runtime.submit_many(everything, [Everything("a"), Everything("b"), {"name": 7}, Everything("c")])  # type: ignore[list-item]
    assert refused.value.field == "name"
    assert len(runtime.instances(limit=100_000)) == before
    assert queued(runtime) == 0
