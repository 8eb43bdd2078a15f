"""`stageflow_actors.testing.run`: the behaviour of production in the calling thread."""

from __future__ import annotations

import asyncio
import bdb
import logging
import math
import threading
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from stageflow_actors import (
    Compensation,
    InvalidContext,
    PayloadTooLarge,
    Replace,
    Retry,
    StageContext,
    StageFlowError,
    StageStatus,
    Workflow,
    WorkflowDefinitionError,
    WorkflowStatus,
)
from stageflow_actors.testing import run


@dataclass
class Order:
    order_id: str
    total: float
    notes: list[str] = field(default_factory=list)

    def validate(self) -> None:
        if self.total < 0:
            raise ValueError("total is negative")


class Seat(msgspec.Struct):
    row: int


# results


def test_a_workflow_that_goes_well_completes_with_each_result_in_order() -> None:
    orders = Workflow("orders", context=Order)

    @orders.stage
    def reserve(order: Order) -> dict[str, int]:
        order.notes.append("reserved")
        return {"shelf": 3}

    @orders.stage
    def pay(order: Order, ctx: StageContext) -> float:
        order.notes.append(f"paid from shelf {ctx.results['reserve']['shelf']}")
        return order.total

    result = run(orders, Order("A", 9.5))
    assert result.status is WorkflowStatus.completed
    assert result.success
    assert result.workflow_id == "orders"
    assert result.context == Order("A", 9.5, ["reserved", "paid from shelf 3"])
    assert [(s.stage_id, s.status, s.attempts, s.data) for s in result.stages] == [
        ("reserve", StageStatus.completed, 1, {"shelf": 3}),
        ("pay", StageStatus.completed, 1, 9.5),
    ]
    assert result.compensations == []
    assert result.finished_at >= result.started_at > 0


def test_contexts_are_serialised_at_each_hop() -> None:
    seen: list[Order] = []
    orders = Workflow("orders", context=Order).add_stage(seen.append, id="one").add_stage(seen.append, id="two")
    given = Order("A", 1.0)
    run(orders, given)
    assert seen == [given, given]
    assert len({id(one) for one in (*seen, given)}) == 3


def test_what_would_not_come_back_equal_fails_the_stage_by_name_and_field() -> None:
    flow = Workflow("flow")

    @flow.stage
    def puts_a_set(context: dict[str, Any]) -> None:
        context["tags"] = {1, 2}

    result = run(flow, {})
    assert result.status == "failed"
    assert result.failed_stage == "puts-a-set"
    assert result.error is not None
    assert result.error.startswith("InvalidContext: ")
    assert "'puts-a-set'" in result.error
    assert "context.tags" in result.error


def test_floats_that_json_does_not_know_survive() -> None:
    flow = Workflow("flow").add_stage(lambda context: None)
    back = run(flow, {"nan": math.nan, "inf": -math.inf, "raw": b"\xff"}).context
    assert math.isnan(back["nan"])
    assert back["inf"] == -math.inf
    assert back["raw"] == b"\xff"


def test_a_struct_that_is_returned_replaces_the_context() -> None:
    flow = Workflow("flow", context=Seat).add_stage(lambda seat: Seat(seat.row + 1), id="move")
    result = run(flow, Seat(3))
    assert result.context == Seat(4)
    assert result.stages[0].data is None


def test_a_dict_that_is_returned_is_a_result_and_replace_is_a_replacement() -> None:
    flow = Workflow("flow").add_stage(lambda context: {"r": 1}, id="one").add_stage(lambda c: Replace({"n": 2}))
    result = run(flow, {"a": 1})
    assert result.stages[0].data == {"r": 1}
    assert result.context == {"n": 2}


def test_async_handlers_share_one_event_loop_and_leave_none_behind() -> None:
    loops: list[asyncio.AbstractEventLoop] = []
    flow = Workflow("flow")

    @flow.stage
    async def one(context: dict[str, Any]) -> str:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return "awaited"

    @one.compensation
    async def undo(context: dict[str, Any]) -> None:
        loops.append(asyncio.get_running_loop())

    @flow.stage
    async def two(context: dict[str, Any]) -> None:
        loops.append(asyncio.get_running_loop())
        raise ValueError("boom")

    result = run(flow, {})
    assert result.status == "compensated"
    assert result.stages[0].data == "awaited"
    assert len(loops) == 3
    assert len(set(loops)) == 1
    assert loops[0].is_closed()


def test_async_handlers_inside_a_running_loop_are_refused_with_advice() -> None:
    async def stage(context: dict[str, Any]) -> None: ...

    flow = Workflow("flow").add_stage(stage)

    async def main() -> str:
        with pytest.raises(StageFlowError, match=r"await asyncio\.to_thread"):
            run(flow, {})
        result = await asyncio.to_thread(run, flow, {})
        return str(result.status)

    assert asyncio.run(main()) == "completed"


# steps


def test_a_step_that_completed_is_not_run_again_by_a_later_attempt() -> None:
    charged: list[str] = []
    flow = Workflow("flow")

    def charge(card: str) -> dict[str, Any]:
        charged.append(card)
        return {"receipt": len(charged)}

    @flow.stage(retry=Retry.fixed(max_attempts=3, delay=1))
    def pay(context: dict[str, Any], ctx: StageContext) -> None:
        assert ctx.is_step_completed("charge") is (ctx.attempt > 1)
        context["receipt"] = ctx.step("charge", charge, "visa")["receipt"]
        if ctx.attempt < 3:
            raise ValueError("boom")

    result = run(flow, {})
    assert result.context == {"receipt": 1}
    assert charged == ["visa"]


def test_steps_belong_to_one_stage_of_one_run() -> None:
    flow = Workflow("flow")
    flow.add_stage(lambda c, ctx: ctx.step("s", lambda: "first"), id="one")
    flow.add_stage(lambda c, ctx: [ctx.is_step_completed("s"), ctx.step("s", lambda: "second")], id="two")
    for _ in range(2):
        assert [stage.data for stage in run(flow, {}).stages] == ["first", [False, "second"]]


def test_a_step_of_a_compensation_is_kept_across_its_attempts() -> None:
    refunds: list[int] = []
    flow = Workflow("flow")

    def refund(context: dict[str, Any], ctx: StageContext) -> None:
        ctx.step("refund", lambda: refunds.append(1))
        if ctx.attempt == 1:
            raise ValueError("boom")

    flow.add_stage(lambda c: None, compensation=Compensation(refund, retry=Retry.fixed(2, delay=1)))
    flow.add_stage(lambda c: 1 / 0)
    assert run(flow, {}).status == "compensated"
    assert refunds == [1]


def test_the_idempotency_key_is_the_same_for_each_attempt() -> None:
    keys: list[str] = []
    flow = Workflow("flow")

    @flow.stage(retry=Retry.fixed(max_attempts=2, delay=1), timeout=5)
    def pay(context: dict[str, Any], ctx: StageContext) -> None:
        assert ctx.deadline is not None
        keys.append(ctx.idempotency_key)
        if ctx.attempt == 1:
            raise ValueError("boom")

    result = run(flow, {})
    assert keys == [f"flow:{result.instance_id}:pay"] * 2


# services


class Till:
    def __init__(self) -> None:
        self.charged: list[float] = []


def test_each_factory_that_is_needed_is_called_once_and_what_it_makes_is_shared() -> None:
    made: list[Till] = []

    def make() -> Till:
        made.append(Till())
        return made[-1]

    def unneeded() -> Any:
        raise AssertionError("nobody asked for this")

    flow = Workflow("flow")

    @flow.stage
    def one(context: dict[str, Any], *, till: Till) -> None:
        till.charged.append(1.0)

    @one.compensation
    def undo(context: dict[str, Any], *, till: Till) -> None:
        till.charged.append(-1.0)

    @flow.stage
    def two(context: dict[str, Any], *, till: Till) -> None:
        till.charged.append(2.0)
        raise ValueError("boom")

    assert run(flow, {}, services={"till": make, "other": unneeded}).status == "compensated"
    assert [till.charged for till in made] == [[1.0, 2.0, -1.0]]


def test_a_class_handler_is_constructed_with_its_services() -> None:
    class Pay:
        def __init__(self, *, till: Till) -> None:
            self.till = till

        def execute(self, context: dict[str, Any]) -> None:
            self.till.charged.append(3.0)

    till = Till()
    run(Workflow("flow").add_stage(Pay), {}, services={"till": lambda: till})
    assert till.charged == [3.0]


def test_what_a_factory_raises_comes_out() -> None:
    def broken() -> Any:
        raise ConnectionError("no database")

    def stage(context: dict[str, Any], *, db: Any) -> None: ...

    with pytest.raises(ConnectionError, match="no database"):
        run(Workflow("flow").add_stage(stage), {}, services={"db": broken})


# refusals


def test_mistakes_in_the_definition_are_refused_as_by_a_runtime() -> None:
    def needs_till(context: dict[str, Any], *, till: Any) -> None: ...

    with pytest.raises(WorkflowDefinitionError, match="has no stages"):
        run(Workflow("flow"), {})
    with pytest.raises(WorkflowDefinitionError, match="till"):
        run(Workflow("flow").add_stage(needs_till), {})
    with pytest.raises(WorkflowDefinitionError, match=r"service 'till'.* asks for ctx"):
        run(Workflow("flow").add_stage(needs_till), {}, services={"till": lambda ctx: None})
    with pytest.raises(WorkflowDefinitionError, match="takes a workflow"):
        run("flow", {})  # type: ignore[arg-type]
    with pytest.raises(WorkflowDefinitionError, match="unknown"):
        run(Workflow("flow").add_stage(lambda context: None, after=["unknown"]), {})


def test_a_signal_that_nothing_waits_for_is_refused() -> None:
    with pytest.raises(WorkflowDefinitionError, match="signal 'approval'"):
        run(Workflow("flow").add_stage(lambda context: None), {}, signals={"approval": True})


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({"order_id": "A"}, "context.total is missing"),
        ({"order_id": "A", "total": "9.5"}, "context.total"),
        ({"order_id": "A", "total": 1.0, "colour": "red"}, "context.colour: Order has no such field"),
        ({"order_id": "A", "total": -1.0}, "total is negative"),
        (Order("A", -1.0), "total is negative"),
        (7, "the context must be Order or a dict with its fields, not int"),
    ],
)
def test_a_context_that_submit_refuses_is_refused_and_nothing_runs(context: Any, message: str) -> None:
    ran: list[Order] = []
    orders = Workflow("orders", context=Order).add_stage(ran.append, id="one")
    with pytest.raises(InvalidContext, match=message):
        run(orders, context)
    assert ran == []


def test_a_dict_is_taken_where_a_typed_context_is_due() -> None:
    orders = Workflow("orders", context=Order).add_stage(lambda order: None)
    assert run(orders, {"order_id": "A", "total": 2}).context == Order("A", 2.0)


def test_a_context_that_is_too_large_is_refused() -> None:
    with pytest.raises(PayloadTooLarge, match="max_message_bytes"):
        run(Workflow("flow").add_stage(lambda context: None), {"blob": bytes(17 << 20)})


def test_a_context_that_grows_too_large_fails_its_stage() -> None:
    flow = Workflow("flow").add_stage(lambda c: c.update(blob=bytes(17 << 20)), id="grows")
    result = run(flow, {"a": 1})
    assert result.status == "failed"
    assert result.error is not None
    assert result.error.startswith("PayloadTooLarge: stage 'grows'")
    assert result.context == {"a": 1}


# the one who is debugging


@pytest.mark.parametrize("way_out", [KeyboardInterrupt, bdb.BdbQuit])
def test_an_interrupt_comes_through_a_stage_with_the_handler_in_its_traceback(way_out: type[BaseException]) -> None:
    undone: list[int] = []

    def interrupted(context: dict[str, Any]) -> None:
        raise way_out

    flow = Workflow("flow").add_stage(lambda c: None, compensation=lambda c: undone.append(1))
    flow.add_stage(interrupted, retry=Retry.fixed(max_attempts=3, delay=0))
    with pytest.raises(way_out) as caught:
        run(flow, {})
    assert "interrupted" in [entry.name for entry in caught.traceback]
    assert undone == []


def test_an_interrupt_comes_through_an_async_stage_and_through_a_compensation() -> None:
    async def interrupted(context: dict[str, Any]) -> None:
        await asyncio.sleep(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Workflow("flow").add_stage(interrupted), {})
    flow = Workflow("flow").add_stage(lambda c: None, compensation=interrupted).add_stage(lambda c: 1 / 0)
    with pytest.raises(KeyboardInterrupt):
        run(flow, {})


def test_handlers_run_in_the_calling_thread() -> None:
    threads: list[threading.Thread] = []
    run(Workflow("flow").add_stage(lambda context: threads.append(threading.current_thread())), {})
    assert threads == [threading.current_thread()]


def test_the_traceback_of_a_failed_handler_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def breaks(context: dict[str, Any]) -> None:
        raise ValueError("boom")

    with caplog.at_level(logging.INFO, "stageflow_actors.testing"):
        run(Workflow("flow").add_stage(breaks), {})
    (record,) = caplog.records
    assert record.getMessage() == "breaks failed in attempt 1"
    assert "in breaks" in caplog.text


def test_a_run_inside_a_handler_of_another_run_is_a_run_of_its_own() -> None:
    inner = Workflow("inner").add_stage(lambda c, ctx: ctx.step("s", lambda: c["n"] + 1), id="add")
    outer = Workflow("outer").add_stage(lambda c: run(inner, {"n": c["n"]}).stages[0].data, id="ask")
    assert run(outer, {"n": 4}).stages[0].data == 5
