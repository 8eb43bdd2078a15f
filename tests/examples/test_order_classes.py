"""The unit test of a stage, and the test of a whole workflow, for examples/order_classes.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from order_classes import (
    SERVICES,
    Address,
    Bank,
    BankHours,
    Inventory,
    Item,
    Order,
    OrderWorkflow,
    Payment,
    ProcessPayment,
    RefundPayment,
    ReserveInventory,
    ShipOrder,
)
from stageflow_actors import InvalidContext, StageError, StageTimeout, WorkerDied
from stageflow_actors.testing import run, stage_context

ROOT = Path(__file__).resolve().parents[2]


class FakeBank(Bank):
    def __init__(self) -> None:
        self.charged: list[tuple[str, float, str]] = []
        self.refunded: list[str] = []

    def charge(self, customer: str, amount: float, key: str) -> str:
        self.charged.append((customer, amount, key))
        if len(self.charged) == 1:
            raise ConnectionError("the line is busy")
        return "R-1"

    def refund(self, receipt: str) -> None:
        self.refunded.append(receipt)


def an_order(city: str = "Oslo", **changes: Any) -> Order:
    fields: dict[str, Any] = {
        "order_id": "A-17",
        "customer": "Ida",
        "address": Address("NO", city),
        "items": [Item("tea", 2, 4.5)],
    }
    return Order(**(fields | changes))


# a stage by itself


def test_the_reservation_is_noted_in_the_order_and_undone() -> None:
    order, stage = an_order(), ReserveInventory(Inventory())
    stage.execute(order)
    assert order.reserved == {"tea": 2}
    stage.compensate(order)
    assert (order.reserved, order.log) == ({}, ["released 1 items"])
    with pytest.raises(StageError, match="not in stock"):
        stage.execute(an_order(items=[Item("tea", 200, 4.5)]))


def test_a_completed_step_is_not_charged_again() -> None:
    bank, order = FakeBank(), an_order()
    ctx = stage_context(stage_id="pay", attempt=2, steps={"charge": "R-0"})
    assert ProcessPayment(bank).execute(order, ctx) == {"receipt": "R-0"}
    assert (bank.charged, order.payment) == ([], Payment("R-0", 9.0))
    assert ctx.is_step_completed("booked")


def test_a_refund_uses_the_result_of_the_payment() -> None:
    bank, order = FakeBank(), an_order()
    RefundPayment(bank).compensate(order, stage_context(stage_id="pay", results={"pay": {"receipt": "R-7"}}))
    assert bank.refunded == ["R-7"]


def test_shipping_reads_what_the_stage_before_handed_on() -> None:
    ctx = stage_context(payload={"carrier": "post", "days": 2})
    assert ShipOrder().execute(an_order(), ctx) == "A-17 by post in 2 days"


def test_the_retry_policy() -> None:
    policy = BankHours()
    assert policy.next_delay(1, ConnectionError()) == 0.2
    assert policy.next_delay(5, StageTimeout("pay", 60)) is None
    assert (policy.next_delay(1, WorkerDied("pay")), policy.next_delay(2, WorkerDied("pay"))) == (0.0, None)
    assert policy.next_delay(1, ValueError()) is None


# the whole workflow


def test_an_order_goes_through_and_a_busy_line_is_tried_again() -> None:
    bank = FakeBank()
    result = run(OrderWorkflow, an_order(), services={"inventory": Inventory, "bank": lambda: bank})
    result.raise_for_status()
    assert [stage.stage_id for stage in result.stages] == ["reserve-inventory", "pay", "quote-shipping", "ship-order"]
    assert (result.stages[1].attempts, result.stages[-1].data) == (2, "A-17 by post in 2 days")
    assert result.context.payment == Payment("R-1", 9.0)
    assert result.context.items == [Item("tea", 2, 4.5)]
    assert len({key for _, _, key in bank.charged}) == 1


def test_an_order_that_cannot_be_shipped_is_refunded_and_released() -> None:
    bank = FakeBank()
    result = run(OrderWorkflow(), an_order("Atlantis"), services={"inventory": Inventory, "bank": lambda: bank})
    assert (result.status, result.failed_stage) == ("compensated", "ship-order")
    assert [each.stage_id for each in result.compensations] == ["pay", "reserve-inventory"]
    assert (bank.refunded, result.context.payment, result.context.reserved) == (["R-1"], None, {})


def test_an_order_without_items_is_refused() -> None:
    with pytest.raises(InvalidContext, match="at least one item"):
        run(OrderWorkflow, an_order(items=[]), services=SERVICES)


@pytest.mark.parametrize(
    ("options", "printed"),
    [
        ([], "completed: A-17 by post in 2 days\n  charged 21.00\n"),
        (["--decline"], "compensated: StageError: the card was declined\n  released 2 items\n"),
    ],
)
def test_the_program(options: list[str], printed: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / "order_classes.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, printed), done.stderr
