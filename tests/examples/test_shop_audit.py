"""The audit finds each kind of imbalance, and nothing where there is none."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shop import Address, Shop
from shop_audit import Check, audit, print_audit

HOME = Address("Ida Koch", "Lindenallee 4", "10115", "Berlin", "DE")
ORDERS = [
    {"order_id": "O-1", "items": [{"sku": "TEA", "quantity": 2}, {"sku": "POT", "quantity": 1}]},
    {"order_id": "O-2", "items": [{"sku": "TEA", "quantity": 1}, {"sku": "TEA", "quantity": 3}]},
    {"order_id": "O-3", "items": [{"sku": "POT", "quantity": 1}]},
    {"order_id": "O-4", "items": [{"sku": "POT", "quantity": 9}]},
]

Results = list[dict[str, Any]]


@pytest.fixture
def results(shop: Shop) -> Results:
    """Four orders: two complete, one is undone entirely, one fails with nothing to undo."""
    for order, quantities, total in [("O-1", {"TEA": 2, "POT": 1}, 7390), ("O-2", {"TEA": 4}, 1800)]:
        shop.reserve(order, order, quantities)
        shop.charge(order, order, "tok_good", total)
        shop.confirm(order, order, "C-1", shop.book_shipment(order, order, HOME))
    reservation = shop.reserve("O-3", "O-3", {"POT": 1})
    charge = shop.charge("O-3", "O-3", "tok_good", 6490)
    shop.cancel_shipment(shop.book_shipment("O-3", "O-3", HOME))
    shop.refund("O-3", charge)
    shop.release(reservation)
    return [
        {"instance_id": "O-1", "status": "completed", "error": None, "context": {"total": 7390, "undone": []}},
        {"instance_id": "O-2", "status": "completed", "error": None, "context": {"total": 1800, "undone": []}},
        {
            "instance_id": "O-3",
            "status": "compensated",
            "error": "AccountHeld: the account is held",
            "context": {"total": 6490, "undone": ["ship", "pay", "reserve-inventory"]},
        },
        {"instance_id": "O-4", "status": "failed", "error": "OutOfStock: POT", "context": {"total": 0, "undone": []}},
    ]


def broken(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.holds}


def test_a_shop_that_balances_passes(shop_db: Path, results: Results) -> None:
    checks = audit(shop_db, ORDERS, results)
    assert broken(checks) == set()
    assert checks[0].found == "1 compensated, 2 completed, 1 failed"
    assert "91.90" in next(check.found for check in checks if check.name.startswith("charges"))


ENDED = "each order ended once: completed, compensated or failed"
WHY = "each order that did not complete has a reason"
REVERSE = "compensations ran once each, in reverse order"
STOCK = "stock + what completed orders took = stock at the start, for each article"
TOTALS = "totals are what the price list says"
LEDGER = "charges - refunds = totals of the completed orders"
PER_ORDER = "the same, for each order"
TWICE = "no order was charged twice"
REFUNDS = "each refund is of one charge, order and amount"
PARCELS = "parcels: one for each completed order, none for any other"
CONFIRMATIONS = "confirmations: the same"


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        pytest.param("UPDATE stock SET on_hand = on_hand - 1 WHERE sku = 'TEA'", {STOCK}, id="a piece is missing"),
        pytest.param("UPDATE stock SET on_hand = on_hand + 1 WHERE sku = 'POT'", {STOCK}, id="a piece too many"),
        pytest.param(
            "UPDATE stock SET on_hand = on_hand + CASE sku WHEN 'TEA' THEN 1 ELSE -1 END",
            {STOCK},
            id="one article has what another lacks",
        ),
        pytest.param(
            "INSERT INTO ledger (kind, key, order_id, amount) VALUES ('charge', 'again', 'O-1', 7390)",
            {LEDGER, PER_ORDER, TWICE},
            id="charged twice",
        ),
        pytest.param(
            "DELETE FROM ledger WHERE order_id = 'O-2'", {LEDGER, PER_ORDER}, id="completed and never charged"
        ),
        pytest.param("DELETE FROM ledger WHERE kind = 'refund'", {LEDGER, PER_ORDER}, id="undone and not refunded"),
        pytest.param(
            "UPDATE ledger SET amount = amount - 1 WHERE order_id = 'O-1'", {LEDGER, PER_ORDER}, id="a cent less"
        ),
        pytest.param(
            "UPDATE ledger SET amount = amount + CASE order_id WHEN 'O-1' THEN 5 ELSE -5 END WHERE order_id <> 'O-3'",
            {PER_ORDER},
            id="one customer pays for another",
        ),
        pytest.param(
            "UPDATE ledger SET amount = 6489 WHERE kind = 'refund'",
            {LEDGER, PER_ORDER, REFUNDS},
            id="refunded less than charged",
        ),
        pytest.param(
            "UPDATE ledger SET refund_of = 1 WHERE kind = 'refund'", {REFUNDS}, id="refund of another order's charge"
        ),
        pytest.param("UPDATE shipments SET status = 'booked'", {PARCELS}, id="a parcel stands for an undone order"),
        pytest.param(
            "DELETE FROM shipments WHERE order_id = 'O-1'", {PARCELS}, id="a completed order without a parcel"
        ),
        pytest.param(
            "INSERT INTO shipments (key, order_id, address) VALUES ('again', 'O-2', '')", {PARCELS}, id="shipped twice"
        ),
        pytest.param("DELETE FROM confirmations", {CONFIRMATIONS}, id="completed and never confirmed"),
        pytest.param(
            "INSERT INTO confirmations VALUES ('again', 'O-1', '', '')", {CONFIRMATIONS}, id="confirmed twice"
        ),
        pytest.param(
            "INSERT INTO ledger (kind, key, order_id, amount) VALUES ('charge', 'x', 'O-99', 100)",
            {LEDGER, PER_ORDER},
            id="a charge for an order nobody placed",
        ),
    ],
)
def test_what_is_wrong_in_the_books_is_found(planted: str, found: set[str], shop_db: Path, results: Results) -> None:
    with closing(sqlite3.connect(shop_db)) as db, db:
        assert db.execute(planted).rowcount > 0
    assert broken(audit(shop_db, ORDERS, results)) == found


def lost(results: Results) -> None:
    del results[3]


def twice(results: Results) -> None:
    results.append(results[0])


def parked(results: Results) -> None:
    results[3]["status"] = "parked"


def half_undone(results: Results) -> None:
    results[2]["status"] = "compensation_failed"


def without_a_reason(results: Results) -> None:
    results[3]["error"] = None


def unknown(results: Results) -> None:
    results.append({"instance_id": "O-99", "status": "failed", "error": "OutOfStock: POT", "context": {}})


def forward(results: Results) -> None:
    results[2]["context"]["undone"].reverse()


def repeated(results: Results) -> None:
    results[2]["context"]["undone"].append("reserve-inventory")


def skipped(results: Results) -> None:
    results[2]["context"]["undone"].remove("pay")


def not_undone(results: Results) -> None:
    results[2]["context"]["undone"].clear()


def wrong_total(results: Results) -> None:
    results[0]["context"]["total"] = 7391


def called_completed(results: Results) -> None:
    results[2].update(status="completed", error=None)


def called_failed(results: Results) -> None:
    results[0].update(status="failed", error="ValueError: no")


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (lost, {ENDED}),
        (twice, {ENDED}),
        (parked, {ENDED}),
        (half_undone, {ENDED, REVERSE}),
        (without_a_reason, {WHY}),
        (unknown, {ENDED}),
        (forward, {REVERSE}),
        (repeated, {REVERSE}),
        (skipped, {REVERSE}),
        (not_undone, {REVERSE}),
        (wrong_total, {TOTALS}),
        (called_completed, {REVERSE, STOCK, LEDGER, PER_ORDER, PARCELS, CONFIRMATIONS}),
        (called_failed, {STOCK, LEDGER, PER_ORDER, PARCELS, CONFIRMATIONS}),
    ],
)
def test_what_is_wrong_in_the_results_is_found(
    plant: Callable[[Results], None], found: set[str], shop_db: Path, results: Results
) -> None:
    plant(results)
    assert broken(audit(shop_db, ORDERS, results)) == found


def test_the_table_names_the_first_cases_and_counts_the_others(shop_db: Path, results: Results) -> None:
    results.extend({"instance_id": f"X-{n}", "status": "completed", "context": {}} for n in range(5))
    screen = io.StringIO()
    print_audit(audit(shop_db, ORDERS, results), Console(file=screen, width=200))
    text = screen.getvalue()
    assert "NO" in text
    assert "X-0: not in the input" in text
    assert "and 2 more" in text
    assert "X-4" not in text
