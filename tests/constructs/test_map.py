"""Map stages: one message per item, results in order, failures counted, items compensated."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from constructs_fixtures import does, done, misbehave, note, noted, stage_of, statuses, undoes, undone

from stageflow_actors import (
    Compensation,
    InstanceParked,
    Retry,
    Runtime,
    StageContext,
    Workflow,
    WorkflowDefinitionError,
)
from stageflow_actors.testing import in_process, run


def pick(item: dict[str, Any], ctx: StageContext) -> Any:
    """An item says what becomes of it."""
    note(ctx.instance_id, "item", item["n"], ctx.attempt, ctx.idempotency_key, os.getpid())
    plan = item.get("fail", [])
    misbehave(plan if isinstance(plan, str) else plan[ctx.attempt - 1] if ctx.attempt <= len(plan) else "")
    return None if item.get("nothing") else item["n"] * 10


def put_back(item: dict[str, Any], ctx: StageContext) -> None:
    note(ctx.instance_id, "put back", item["n"], ctx.results["picks"], ctx.attempt)
    plan = item.get("undo", [])
    misbehave(plan[ctx.attempt - 1] if ctx.attempt <= len(plan) else "")


def items(*fails: Any, n: int = 0) -> list[dict[str, Any]]:
    return [{"n": number, "fail": what} for number, what in enumerate(fails or [""] * n)]


picking = (
    Workflow("picking")
    .add_stage(does("before"), id="before", compensation=undoes("before"))
    .add_map(
        "picks",
        pick,
        over=lambda order: order["items"],
        into="picked",
        retry=Retry.fixed(2, 0),
        compensation=Compensation(put_back, retry=Retry.fixed(3, 0)),
        actors=2,
        timeout=5,
    )
    .add_stage(does("after"), id="after", after=["picks"])
)
tolerant = Workflow("tolerant").add_map(
    "picks", pick, over=lambda order: (one for one in order["items"]), max_failures=2, compensation=put_back
)
optional = (
    Workflow("optional")
    .add_map("picks", pick, over=lambda order: order["items"], required=False, compensation=put_back)
    .add_stage(does("after"), id="after")
)
conditional = (
    Workflow("conditional")
    .add_map("picks", pick, over=lambda order: order["items"], into="picked", when=lambda order: order.get("wanted"))
    .add_stage(does("after"), id="after")
)


@pytest.mark.parametrize("n", [0, 1, 2, 25])
def test_results_are_in_order_of_the_items(execute: Any, n: int) -> None:
    result = execute(picking, {"items": items(n=n)})
    assert result.status == "completed"
    assert result.context["picked"] == [number * 10 for number in range(n)]
    assert statuses(result) == {"before": "completed", "picks": "completed", "after": "completed"}
    assert sorted(int(words[0]) for words in noted(result.instance_id, "item")) == list(range(n))


def test_without_into_the_results_are_the_result_of_the_stage(execute: Any) -> None:
    result = execute(tolerant, {"items": items(n=3)})
    assert result.context == {"items": items(n=3)}
    assert stage_of(result, "picks").data == [0, 10, 20]


def test_an_item_without_a_result_has_none(execute: Any) -> None:
    result = execute(tolerant, {"items": [{"n": 1, "nothing": True}, {"n": 2}]})
    assert stage_of(result, "picks").data == [None, 20]


def test_each_item_is_retried_alone(execute: Any) -> None:
    result = execute(picking, {"items": items("", ["raise"], "")})
    assert (result.status, result.context["picked"]) == ("completed", [0, 10, 20])
    assert sorted(words[:2] for words in noted(result.instance_id, "item")) == [
        ("0", "1"),
        ("1", "1"),
        ("1", "2"),
        ("2", "1"),
    ]


def test_each_item_has_an_idempotency_key_that_stays_for_each_attempt(execute: Any) -> None:
    result = execute(picking, {"items": items("", ["raise"])})
    keys = {(words[0], words[2]) for words in noted(result.instance_id, "item")}
    id = result.instance_id
    assert keys == {("0", f"picking:{id}:picks[0]"), ("1", f"picking:{id}:picks[1]")}


def test_an_item_that_fails_fails_the_stage_and_the_items_done_are_undone(execute: Any) -> None:
    result = execute(picking, {"items": items("", "raise", "", "raise")})
    assert (result.status, result.failed_stage) == ("compensated", "picks")
    assert result.error == (
        "StageError: 2 of 4 items of 'picks' failed, more than max_failures=0; "
        "the first was item 1: ValueError: boom failed"
    )
    assert [words[:2] for words in noted(result.instance_id, "put back")] == [("2", "20"), ("0", "0")]
    assert undone(result.instance_id) == ["before"]
    assert [(one.stage_id, str(one.status)) for one in result.compensations] == [
        ("picks", "completed"),
        ("before", "completed"),
    ]
    assert "after" not in done(result.instance_id)
    assert statuses(result) == {"before": "compensated", "picks": "failed", "after": "pending"}


def test_items_are_undone_last_one_first_when_the_workflow_fails_later(execute: Any) -> None:
    result = execute(picking, {"items": items(n=4), "fail": {"after": "raise"}})
    assert (result.status, result.failed_stage) == ("compensated", "after")
    assert [words[:2] for words in noted(result.instance_id, "put back")] == [
        ("3", "30"),
        ("2", "20"),
        ("1", "10"),
        ("0", "0"),
    ]
    assert statuses(result) == {"before": "compensated", "picks": "compensated", "after": "failed"}


def test_an_item_that_has_been_undone_is_not_undone_again_when_another_fails_to_be(execute: Any) -> None:
    given = items(n=3)
    given[1]["undo"] = ["raise", "raise"]
    result = execute(picking, {"items": given, "fail": {"after": "raise"}})
    assert result.status == "compensated"
    assert [words[0] for words in noted(result.instance_id, "put back")] == ["2", "1", "0", "1", "1"]


def test_items_that_cannot_be_undone_are_reported(execute: Any) -> None:
    given = items(n=2)
    given[0]["undo"] = ["raise"] * 3
    result = execute(picking, {"items": given, "fail": {"after": "raise"}})
    assert result.status == "compensation_failed"
    assert [(one.stage_id, str(one.status), one.error) for one in result.compensations] == [
        (
            "picks",
            "failed",
            "1 of 2 items of 'picks' could not be undone; the first was item 0: ValueError: boom failed",
        ),
        ("before", "completed", None),
    ]


def test_an_item_that_cannot_be_undone_keeps_no_other_from_being_undone(execute: Any) -> None:
    given = items(n=5)
    given[1]["undo"] = given[3]["undo"] = ["raise"] * 3
    result = execute(picking, {"items": given, "fail": {"after": "raise"}})
    assert result.status == "compensation_failed"
    assert result.compensations[0].error == (
        "2 of 5 items of 'picks' could not be undone; the first was item 3: ValueError: boom failed"
    )
    tried = [(words[0], words[2]) for words in noted(result.instance_id, "put back")]
    first = [(number, "1") for number in "43210"]
    assert tried == [*first, ("3", "2"), ("1", "2"), ("3", "3"), ("1", "3")]
    assert statuses(result)["picks"] == "completed", "not all of it is undone"


def test_an_item_is_undone_under_its_own_number_whichever_others_failed(execute: Any) -> None:
    result = execute(numbered, {"items": items("raise", "", "raise", "")})
    assert result.status == "compensated"
    keys = {words[0]: words[2] for words in noted(result.instance_id, "item")}
    back = noted(result.instance_id, "took back")
    assert back == [(number, keys[number], number, f"{number}0") for number in ("3", "1")]
    assert keys["3"].endswith("[3]")


def take_back(item: dict[str, Any], ctx: StageContext) -> None:
    note(ctx.instance_id, "took back", ctx.item, ctx.idempotency_key, item["n"], ctx.results["picks"])


def refuse(context: dict[str, Any]) -> None:
    raise ValueError("boom failed")


numbered = (
    Workflow("numbered")
    .add_map("picks", pick, over=lambda order: order["items"], max_failures=2, compensation=take_back)
    .add_stage(refuse)
)


def test_each_item_has_its_own_time_to_be_undone(runtime: Runtime) -> None:
    given = items(n=6)
    given[4]["undo"] = ["hang"]
    result = runtime.execute(patient, {"items": given}, timeout=60)
    assert result.status == "compensation_failed"
    error = result.compensations[0].error or ""
    assert error.startswith("1 of 6 items of 'picks' could not be undone; the first was item 4: StageTimeout")
    tried = [words[0] for words in noted(result.instance_id, "put back")]
    assert tried[-4:] == ["3", "2", "1", "0"], "the others are undone, each within its time, not all of them in one"
    assert tried.count("4") <= 2


def put_back_slowly(item: dict[str, Any], ctx: StageContext) -> None:
    time.sleep(0.4)  # five of them take longer than one may
    put_back(item, ctx)


patient = (
    Workflow("patient")
    .add_map("picks", pick, over=lambda order: order["items"], compensation=Compensation(put_back_slowly, timeout=1.6))
    .add_stage(refuse)
)


def test_to_undo_thousands_of_items_costs_no_checkpoint_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    keep = in_process._Message.keep

    def count(message: in_process._Message, name: str, value: bytes) -> None:
        kept.append(name)
        keep(message, name, value)

    monkeypatch.setattr(in_process._Message, "keep", count)
    assert run(thousands, {"n": 3_000}).status == "compensated"
    assert len(kept) < 300


thousands = (
    Workflow("thousands")
    .add_map("n", lambda item: None, over=lambda context: range(context["n"]), compensation=lambda item: None)
    .add_stage(refuse)
)


def test_a_map_of_nothing_has_nothing_to_undo(execute: Any) -> None:
    result = execute(picking, {"items": [], "fail": {"after": "raise"}})
    assert result.status == "compensated"
    assert noted(result.instance_id, "put back") == []


@pytest.mark.parametrize("failing", [0, 2, 3])
def test_so_many_items_may_fail(execute: Any, failing: int) -> None:
    result = execute(tolerant, {"items": items(*["raise"] * failing, "", "")})
    if failing > 2:
        assert (result.status, result.failed_stage) == ("compensated", "picks")
        assert "3 of 5 items" in result.error
        assert "max_failures=2" in result.error
        assert [words[0] for words in noted(result.instance_id, "put back")] == ["4", "3"]
    else:
        assert result.status == "completed"
        assert stage_of(result, "picks").data == [None] * failing + [failing * 10, failing * 10 + 10]


def test_an_optional_map_that_fails_is_recorded_and_the_workflow_goes_on(execute: Any) -> None:
    result = execute(optional, {"items": items("", "raise")})
    assert (result.status, statuses(result)) == ("completed", {"picks": "failed", "after": "completed"})
    assert noted(result.instance_id, "put back") == []


def test_a_map_stage_may_be_conditional(execute: Any) -> None:
    result = execute(conditional, {"items": items(n=2)})
    assert (result.status, statuses(result)["picks"]) == ("completed", "skipped")
    assert noted(result.instance_id, "item") == []
    result = execute(conditional, {"items": items(n=2), "wanted": True})
    assert (result.status, result.context["picked"]) == ("completed", [0, 10])


def test_what_over_raises_fails_the_stage(execute: Any) -> None:
    result = execute(picking, {})
    assert (result.status, result.failed_stage, result.error) == ("compensated", "picks", "KeyError: 'items'")
    result = execute(picking, {"items": 5})
    assert result.error == "TypeError: 'int' object is not iterable"


def test_items_and_results_that_cannot_travel_are_named(execute: Any) -> None:
    result = execute(strange, {"item": 1})
    assert result.failed_stage == "odd"
    assert "item 1 of 'odd'" in result.error
    result = execute(strange, {})
    assert result.failed_stage == "odd"
    assert "a result of 'odd'" in result.error


strange = Workflow("strange").add_map(
    "odd", lambda item: object(), over=lambda context: [1, object()] if context.get("item") else [1]
)


def test_items_run_at_the_same_time_in_several_processes(runtime: Runtime, gate: Path, eventually: Any) -> None:
    instance = runtime.submit(picking, {"items": items(str(gate), str(gate))})
    at_work = eventually(lambda: len(found := noted(instance.id, "item")) == 2 and found, "both are in work")
    assert len({words[3] for words in at_work}) == 2
    gate.touch()
    assert instance.result(timeout=20).context["picked"] == [0, 10]


@dataclass
class Cart:
    wanted: list[int] = field(default_factory=list)
    prices: list[Decimal] = field(default_factory=list)


def price(item: int) -> Decimal:
    return Decimal(item) / 4


carts = Workflow("carts", context=Cart).add_map("price", price, over=lambda cart: cart.wanted, into="prices")


def test_typed_contexts_are_given_results_of_their_types(execute: Any) -> None:
    result = execute(carts, Cart([1, 2, 3]))
    assert result.status == "completed", result.error
    assert result.context == Cart([1, 2, 3], [Decimal("0.25"), Decimal("0.5"), Decimal("0.75")])


@dataclass
class Line:
    name: str
    cost: Decimal


@dataclass
class Bill:
    lines: list[Line]
    taxed: list[Line] = field(default_factory=list)
    fail: bool = False


def tax(line: Line) -> Line:
    assert isinstance(line, Line)
    return Line(line.name, line.cost * 2)


def refund(line: Line, ctx: StageContext) -> None:
    note(ctx.instance_id, "refund", line.name, line.cost, ctx.results["tax"]["cost"])


def close(bill: Bill) -> None:
    if bill.fail:
        raise ValueError("not closed")


bills = (
    Workflow("bills", context=Bill)
    .add_map("tax", tax, over=lambda bill: bill.lines, into="taxed", compensation=refund)
    .add_stage(close)
)


def test_items_have_the_type_of_the_handlers_annotation(execute: Any) -> None:
    lines = [Line("a", Decimal("1.5")), Line("b", Decimal(2))]
    result = execute(bills, Bill(lines))
    assert result.status == "completed", result.error
    assert result.context == Bill(lines, [Line("a", Decimal("3.0")), Line("b", Decimal(4))])
    result = execute(bills, Bill(lines, fail=True))
    assert result.status == "compensated"
    assert noted(result.instance_id, "refund") == [("b", "2", "4"), ("a", "1.5", "3.0")]


plain_bills = Workflow("plain-bills").add_map("tax", tax, over=lambda bill: bill["lines"])


def test_plain_items_become_the_annotated_type_of_the_handler(execute: Any) -> None:
    result = execute(plain_bills, {"lines": [{"name": "a", "cost": "2"}]})
    assert result.success, "and its results have the type of its return annotation"
    assert result.stages[0].data == [Line("a", Decimal(4))]


def test_a_field_that_cannot_hold_the_results_is_named(execute: Any) -> None:
    result = execute(wrong_field, Cart([1]))
    assert (result.status, result.failed_stage) == ("failed", "price")
    assert "wanted" in result.error


wrong_field = Workflow("wrong-field", context=Cart).add_map(
    "price", lambda item: "not a number", over=lambda cart: cart.wanted, into="wanted"
)


def give_back(item: int, ctx: StageContext) -> None:
    ctx.step("once", note, ctx.instance_id, "gave back", item)
    note(ctx.instance_id, "tried", item, ctx.attempt)
    if item == 1 and ctx.attempt < 3:
        raise ConnectionError("later")


stepping = (
    Workflow("stepping")
    .add_map(
        "all",
        lambda item: item,
        over=lambda context: range(3),
        compensation=Compensation(give_back, retry=Retry.fixed(3, 0)),
    )
    .add_stage(does("after"), id="after")
)


def test_each_item_that_is_undone_has_steps_of_its_own(execute: Any) -> None:
    result = execute(stepping, {"fail": {"after": "raise"}})
    assert result.status == "compensated"
    assert noted(result.instance_id, "gave back") == [("2",), ("1",), ("0",)]
    assert noted(result.instance_id, "tried") == [("2", "1"), ("1", "1"), ("0", "1"), ("1", "2"), ("1", "3")]


asking = (
    Workflow("asking")
    .add_stage(lambda context, ctx: ctx.request("next", [1, 2]), id="ask")
    .add_map("all", lambda item: item, over=lambda context: [5, 6], into="got")
)


def test_a_map_may_follow_a_stage_that_hands_something_on(execute: Any) -> None:
    result = execute(asking, {})
    assert (result.status, result.context["got"]) == ("completed", [5, 6])


def test_an_item_that_kills_its_workers_has_failed_and_the_others_go_on(runtime: Runtime) -> None:
    result = runtime.execute(tolerant, {"items": items("", "die", "")}, timeout=30)
    assert (result.status, stage_of(result, "picks").data) == ("completed", [0, None, 20])
    assert len([words for words in noted(result.instance_id, "item") if words[0] == "1"]) == 3


def test_a_compensation_of_items_that_dies_goes_on_behind_the_last_that_was_undone(runtime: Runtime) -> None:
    given = items(n=4)
    given[1]["undo"] = ["die"]
    result = runtime.execute(picking, {"items": given, "fail": {"after": "raise"}}, timeout=30)
    assert result.status == "compensated"
    tried = [words[0] for words in noted(result.instance_id, "put back")]
    assert tried[:3] == ["3", "2", "1"]
    assert tried[-2:] == ["0", "1"], "what it was that died is known the second time, and the rest goes on"
    assert (tried.count("0"), tried.count("1")) == (1, 3)


parking = Workflow("parking", on_failure="park").add_map(
    "picks", pick, over=lambda order: order["items"], into="picked"
)


def test_an_item_may_be_parked_alone_and_be_requeued(runtime: Runtime, gate: Path) -> None:
    instance = runtime.submit(parking, {"items": items("", ["raise"], "")})
    with pytest.raises(InstanceParked, match=r"dlq\.stageflow\.parking\.stage0\.picks"):
        instance.result(timeout=20)
    # A requeue resets the attempts, so that this item would fail forever: but not in a new run.
    with pytest.raises(Exception, match="item"):
        instance.retry(context={"items": []})
    instance.restart(context={"items": items("", "", "")})
    result = instance.result(timeout=20)
    assert (result.status, result.context["picked"]) == ("completed", [0, 10, 20])


def test_5_000_items_in_chunks_come_back_in_order(runtime: Runtime) -> None:
    result = runtime.execute(many, {"n": 5_000}, timeout=60)
    assert result.status == "completed"
    assert result.context["doubled"] == [2 * n for n in range(5_000)]


many = Workflow("many").add_map(
    "double", lambda item: item * 2, over=lambda context: range(context["n"]), into="doubled", actors=2
)


def test_what_no_map_can_be_is_refused_when_it_is_written() -> None:
    with pytest.raises(WorkflowDefinitionError, match="max_failures of map stage 'm'"):
        Workflow("w").add_map("m", pick, over=list, max_failures=-1)
    with pytest.raises(WorkflowDefinitionError, match="over of map stage 'm'"):
        Workflow("w").add_map("m", pick, over="items")  # type: ignore[arg-type]
    with pytest.raises(WorkflowDefinitionError, match="into of map stage 'm'"):
        Workflow("w").add_map("m", pick, over=list, into="")
