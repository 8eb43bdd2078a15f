"""An order workflow written as classes: stages with services, compensations, a workflow class and nested contexts.

    python examples/order_classes.py [--decline]

Each class that handles a stage receives its services in the constructor and declares its options as attributes. The
payment makes its steps durable (`ctx.step`), the quote is passed to the next stage (`ctx.request("next", ...)`), and a
retry policy of its own decides how often the bank is asked. With `--decline` the bank refuses, and what was completed
is undone. tests/examples/test_order_classes.py shows the unit test of a stage and the test of the whole workflow.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import Any

import click

from stageflow_actors import Config, Runtime, StageContext, StageError, StageTimeout, WorkerDied, Workflow

# the context: nested types, checked and restored in each stage


@dataclass
class Address:
    country: str
    city: str


@dataclass
class Item:
    sku: str
    count: int
    price: float


@dataclass
class Payment:
    receipt: str
    amount: float


@dataclass
class Order:
    """The context of the workflow."""

    order_id: str
    customer: str
    address: Address
    items: list[Item]
    reserved: dict[str, int] = field(default_factory=dict)
    payment: Payment | None = None
    carrier: str | None = None
    log: list[str] = field(default_factory=list)

    def validate(self) -> None:
        if not self.items:
            raise ValueError("an order needs at least one item")

    @property
    def total(self) -> float:
        return sum(item.count * item.price for item in self.items)


# services: made once in each worker that needs them


class Inventory:
    """The stock; a program of a realistic size has a database here (see shop.py)."""

    def reserve(self, sku: str, count: int) -> None:
        if count > 100:
            raise StageError(f"{count} of {sku} are not in stock")

    def release(self, sku: str, count: int) -> None:
        """Put the pieces back."""


class Bank:
    """Charges and refunds customers. It answers a repeated key with the receipt of its first request."""

    def charge(self, customer: str, amount: float, key: str) -> str:
        if customer == "Declined Ltd":
            raise StageError("the card was declined")
        return f"receipt {key} over {amount:.2f}"

    def refund(self, receipt: str) -> None:
        """Give the money back."""


# a retry policy: any object with `next_delay`


class BankHours:
    """Ask again soon after a lost connection or a late answer; a crash of the worker is retried once."""

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        if isinstance(error, (ConnectionError, StageTimeout)) and attempt < 5:
            return float(min(0.1 * 2**attempt, 2.0))
        if isinstance(error, WorkerDied) and attempt < 2:
            return 0.0
        return None


# stages


class ReserveInventory:
    """The parameters of the constructor are services; `compensate` undoes the stage."""

    timeout = 30

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory

    def execute(self, order: Order) -> None:
        for item in order.items:
            self.inventory.reserve(item.sku, item.count)
            order.reserved[item.sku] = item.count

    def compensate(self, order: Order) -> None:
        for sku, count in order.reserved.items():
            self.inventory.release(sku, count)
        order.log.append(f"released {len(order.reserved)} items")
        order.reserved.clear()


class RefundPayment:
    """A compensation as a class of its own."""

    timeout = 60

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    def compensate(self, order: Order, ctx: StageContext) -> None:
        self.bank.refund(ctx.results["pay"]["receipt"])
        order.log.append(f"refunded {order.total:.2f}")
        order.payment = None


class ProcessPayment:
    """A stage with checkpoints: after a crash, the steps that were completed do not run again."""

    id = "pay"
    retry = BankHours()
    compensation = RefundPayment

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    def execute(self, order: Order, ctx: StageContext) -> dict[str, Any]:
        receipt = ctx.step("charge", self.bank.charge, order.customer, order.total, ctx.idempotency_key)
        if not ctx.is_step_completed("booked"):
            order.log.append(f"charged {order.total:.2f}")
            ctx.checkpoint_step("booked")
        order.payment = Payment(receipt, order.total)
        return {"receipt": receipt}


class QuoteShipping:
    """A request to "next" hands a value to the next stage, without a detour through the context."""

    def execute(self, order: Order, ctx: StageContext) -> Any:
        days = 2 if order.address.country == "NO" else 6
        return ctx.request("next", {"carrier": "post" if days < 5 else "air", "days": days})


class ShipOrder:
    required = True
    after = ("pay",)

    def execute(self, order: Order, ctx: StageContext) -> str:
        if order.address.city == "Atlantis":
            raise StageError("no carrier goes to Atlantis")
        order.carrier = ctx.payload["carrier"]
        return f"{order.order_id} by {order.carrier} in {ctx.payload['days']} days"


class OrderWorkflow(Workflow[Order]):
    id = "orders"
    context = Order
    version = 1
    timeout = 3600
    stage_timeout = 60

    def configure(self) -> None:
        self.add_stage(ReserveInventory).add_stage(ProcessPayment).add_stage(QuoteShipping).add_stage(ShipOrder)


SERVICES = {"inventory": Inventory, "bank": Bank}


@click.command()
@click.option("--decline", is_flag=True, help="Let the bank decline the card.  [default: it pays]")
def main(decline: bool) -> None:
    """Run one order, and print how it ended."""
    customer = "Declined Ltd" if decline else "Ida"
    order = Order("A-17", customer, Address("NO", "Oslo"), [Item("tea", 2, 4.5), Item("cup", 1, 12.0)])
    with (
        tempfile.TemporaryDirectory() as folder,
        Runtime(OrderWorkflow, data_dir=folder, services=SERVICES, config=Config(durability="write")) as runtime,
    ):
        result = runtime.execute(OrderWorkflow, order, timeout=60)
    click.echo(f"{result.status.value}: {result.error or result.stages[-1].data}")
    for line in result.context.log:
        click.echo(f"  {line}")


if __name__ == "__main__":
    main()
