"""An order saga: validate, price, reserve, pay, ship, confirm; undone in reverse.

    python examples/order_processing.py init
    stageflow run examples/order_processing.py:runtime --input examples/orders.jsonl \\
        --key order_id --results results.jsonl
    python examples/order_processing.py audit --results results.jsonl

Kill it at any moment and run the second command again: it continues, and the audit still balances, because each stage
passes its `ctx.idempotency_key` to the shop. The shop's database is `shop.db`, or the file named by SHOP_DB.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import click
import msgspec

from shop import Address, GatewayBusy, Shop, load_data
from shop_audit import audit, print_audit, read_json_lines
from stageflow_actors import Retry, Runtime, StageContext, StageTimeout, WorkerDied, Workflow

HERE = Path(__file__).resolve().parent


@dataclass
class Item:
    """A number of pieces of one article."""

    sku: str
    quantity: int


@dataclass
class Order:
    """The context: an order as received, and the fields that its stages set. Money is in cents."""

    order_id: str
    customer_id: str
    items: list[Item]
    address: Address
    card: str
    placed_at: datetime
    note: str = ""
    total: int = 0
    tracking: str | None = None
    undone: list[str] = field(default_factory=list)

    def validate(self) -> None:
        if not self.order_id:
            raise ValueError("order_id is empty")
        if not self.items:
            raise ValueError(f"order {self.order_id} has no items")
        for item in self.items:
            if not 1 <= item.quantity <= 99:
                raise ValueError(f"order {self.order_id}: {item.quantity} pieces of {item.sku}; 1 to 99 can be ordered")

    def quantities(self) -> dict[str, int]:
        """Return the pieces per SKU; one SKU may occur in several lines."""
        pieces: dict[str, int] = {}
        for item in self.items:
            pieces[item.sku] = pieces.get(item.sku, 0) + item.quantity
        return pieces


# Temporary errors. A stage that timed out or whose worker died may have completed its work: a retry with the same
# idempotency key finds that out; without one the work would remain and not be compensated.
TEMPORARY = (StageTimeout, WorkerDied, sqlite3.OperationalError)
PATIENT = Retry.exponential(max_attempts=5, initial=0.1, maximum=5, retry_on=TEMPORARY)

orders = Workflow("order-processing", context=Order, stage_timeout=20, retry=PATIENT)


@orders.stage
def validate(order: Order, *, shop: Shop) -> None:
    shop.email_of(order.customer_id)


@orders.stage
def price(order: Order, *, shop: Shop) -> None:
    order.total = shop.total(order.quantities())


@orders.stage(actors=2)
def reserve_inventory(order: Order, ctx: StageContext, *, shop: Shop) -> int:
    return shop.reserve(ctx.idempotency_key, order.order_id, order.quantities())


@reserve_inventory.compensation
def release_inventory(order: Order, ctx: StageContext, *, shop: Shop) -> None:
    shop.release(ctx.results["reserve-inventory"])
    order.undone.append("reserve-inventory")


@orders.stage(
    actors=2,
    timeout=30,
    retry=Retry.exponential(max_attempts=6, initial=0.05, maximum=2, retry_on=(GatewayBusy, *TEMPORARY)),
)
def pay(order: Order, ctx: StageContext, *, shop: Shop) -> int:
    return shop.charge(ctx.idempotency_key, order.order_id, order.card, order.total)


@pay.compensation(timeout=30, retry=PATIENT)
def refund(order: Order, ctx: StageContext, *, shop: Shop) -> None:
    shop.refund(ctx.idempotency_key, ctx.results["pay"])
    order.undone.append("pay")


@orders.stage(actors=2)
def ship(order: Order, ctx: StageContext, *, shop: Shop) -> str:
    order.tracking = shop.book_shipment(ctx.idempotency_key, order.order_id, order.address)
    return order.tracking


@ship.compensation
def cancel_parcel(order: Order, ctx: StageContext, *, shop: Shop) -> None:
    shop.cancel_shipment(ctx.results["ship"])
    order.tracking = None
    order.undone.append("ship")


@orders.stage
def confirm(order: Order, ctx: StageContext, *, shop: Shop) -> None:
    shop.confirm(ctx.idempotency_key, order.order_id, order.customer_id, order.tracking or "")


def shop_path() -> Path:
    return Path(os.environ.get("SHOP_DB", "shop.db"))


def open_shop() -> Shop:
    """Open the shop, once in each worker process: an SQLite connection belongs to one process."""
    return Shop(shop_path(), gateway_busy=0.02)


runtime = Runtime(orders, services={"shop": open_shop}, data_dir=os.environ.get("STAGEFLOW_DATA", "stageflow-data"))


@click.group()
def main() -> None:
    """Create, use and audit the shop of the order-processing example."""


@main.command()
@click.option("--data", "data_file", default=HERE / "shop.json", type=click.Path(exists=True, dir_okay=False))
def init(data_file: Path) -> None:
    """Create the shop's database: price list, stock, customers."""
    path = shop_path()
    try:
        Shop.create(path, load_data(data_file))
    except FileExistsError:
        raise click.ClickException(f"a shop exists at {path}; name another file with SHOP_DB") from None
    click.echo(f"Created the shop {path}.", err=True)


@main.command("order")
@click.argument("order_id")
@click.option("--input", "orders_file", default=HERE / "orders.jsonl", type=click.Path(exists=True, dir_okay=False))
def one_order(order_id: str, orders_file: Path) -> None:
    """Run one order of the input file."""
    for line in read_json_lines(orders_file):
        if line["order_id"] == order_id:
            order = msgspec.convert(line, Order)
            break
    else:
        raise click.ClickException(f"no order {order_id} in {orders_file}")
    with runtime:
        result = runtime.execute(orders, order, instance_id=order_id)
    click.echo(f"{order_id}: {result.status}" + (f", {result.error}" if result.error else ""))
    for stage in result.stages:
        click.echo(f"  {stage.stage_id:<20} {stage.status}" + (f": {stage.error}" if stage.error else ""))


@main.command("audit")
@click.option("--input", "orders_file", default=HERE / "orders.jsonl", type=click.Path(exists=True, dir_okay=False))
@click.option("--results", "results_file", required=True, type=click.Path(exists=True, dir_okay=False))
def audit_command(orders_file: Path, results_file: Path) -> None:
    """Check that shop, orders and results agree; exit code 1 if not."""
    if not shop_path().is_file():
        raise click.ClickException(f"no shop at {shop_path()}")
    checks = audit(shop_path(), read_json_lines(orders_file), read_json_lines(results_file))
    print_audit(checks)
    sys.exit(0 if all(check.holds for check in checks) else 1)


if __name__ == "__main__":
    main()
