"""The audit of the shop: compare the orders, the results of the workflows, and the shop's books.

It reads the database directly and computes all sums from the orders: it must never call the shop's own functions, whose
mistakes it is meant to find.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["Check", "audit", "print_audit", "read_json_lines"]

UNDO_ORDER = ["ship", "pay", "reserve-inventory"]
SHOWN = 3

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the audit: the rule, the figures found, and the cases that break the rule."""

    name: str
    found: str
    broken: list[str]

    @property
    def holds(self) -> bool:
        return not self.broken


@dataclass(frozen=True, kw_only=True)
class _Books:
    """The contents of the shop's database."""

    prices: dict[str, int]
    stock: dict[str, tuple[int, int]]  # initial, on hand
    charges: dict[str, list[int]]  # cents, by order
    refunds: dict[str, list[int]]
    wrong_refunds: list[str]
    parcels: Counter[str]  # standing ones, by order
    confirmations: Counter[str]


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON Lines file."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def audit(shop_db: str | Path, orders: Iterable[Row], results: Iterable[Row]) -> list[Check]:
    """Run all checks and return them, passed or failed.

    `orders`: the lines of the input. `results`: one object per instance with `instance_id` (the order's id), `status`,
    `error` and `context`. No order of the input may be in work during the audit.
    """
    placed = {order["order_id"]: order for order in orders}
    ends: dict[str, list[Row]] = {}
    for result in results:
        ends.setdefault(result["instance_id"], []).append(result)
    completed = [order for order in placed if order in ends and ends[order][-1]["status"] == "completed"]
    books = _read_books(shop_db)
    due = {order: _total(placed[order], books.prices) for order in completed}
    return [
        _each_order_has_one_end(placed, ends),
        _each_failure_has_a_reason(ends),
        _undone_in_reverse(ends),
        _stock_balances(books, [placed[order] for order in completed]),
        _totals_follow_the_price_list(ends, due),
        _ledger_balances(books, due),
        _each_order_paid_what_it_owes(books, due, placed),
        _no_order_charged_twice(books),
        _refunds_match_their_charges(books),
        _stands_for_completed_only("parcels: one for each completed order, none for any other", books.parcels, due),
        _stands_for_completed_only("confirmations: the same", books.confirmations, due),
    ]


def print_audit(checks: Iterable[Check], console: Console | None = None) -> None:
    """Print the audit as a table, with the first cases of each broken rule."""
    table = Table(title="Audit of the shop", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("rule", overflow="fold")
    table.add_column("found", overflow="fold")
    for check in checks:
        found = check.found
        if check.broken:
            more = len(check.broken) - SHOWN
            found += "\n" + "\n".join(check.broken[:SHOWN]) + (f"\nand {more} more" if more > 0 else "")
        table.add_row("[green]yes[/]" if check.holds else "[bold red]NO[/]", check.name, found)
    (console or Console()).print(table)


def _each_order_has_one_end(placed: Mapping[str, Row], ends: Mapping[str, list[Row]]) -> Check:
    broken = [f"{order}: no result" for order in placed if order not in ends]
    broken += [f"{order}: not in the input" for order in ends if order not in placed]
    for order, results in ends.items():
        if len(results) > 1:
            broken.append(f"{order}: {len(results)} results")
        if results[-1]["status"] not in ("completed", "compensated", "failed"):
            broken.append(f"{order}: {results[-1]['status']}")
    counts = Counter(results[-1]["status"] for results in ends.values())
    return Check(
        name="each order ended once: completed, compensated or failed",
        found=", ".join(f"{count:,} {status}" for status, count in sorted(counts.items())) or "no results",
        broken=broken,
    )


def _each_failure_has_a_reason(ends: Mapping[str, list[Row]]) -> Check:
    errors = {
        order: results[-1].get("error") for order, results in ends.items() if results[-1]["status"] != "completed"
    }
    reasons = Counter(str(error).partition(":")[0] for error in errors.values() if error)
    return Check(
        name="each order that did not complete has a reason",
        found=", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "nothing failed",
        broken=[f"{order}: no reason" for order, error in errors.items() if not error],
    )


def _undone_in_reverse(ends: Mapping[str, list[Row]]) -> Check:
    broken, lengths = [], Counter[int]()
    for order, results in ends.items():
        status, undone = results[-1]["status"], (results[-1].get("context") or {}).get("undone", [])
        lengths[len(undone)] += 1
        expected = UNDO_ORDER[len(UNDO_ORDER) - len(undone) :] if status == "compensated" else []
        if undone != expected or (status == "compensated" and not undone):
            broken.append(f"{order} ({status}): undid {', '.join(undone) or 'nothing'}")
    return Check(
        name="compensations ran once each, in reverse order",
        found=", ".join(f"{lengths[n]} with {n}" for n in sorted(lengths) if n) or "none ran",
        broken=broken,
    )


def _stock_balances(books: _Books, completed: Iterable[Row]) -> Check:
    taken: Counter[str] = Counter()
    for order in completed:
        taken.update(_pieces(order))
    broken = [
        f"{sku}: {on_hand} on hand + {taken[sku]} sold = {on_hand + taken[sku]}, started with {initial}"
        for sku, (initial, on_hand) in books.stock.items()
        if on_hand + taken[sku] != initial
    ]
    on_hand = sum(left for _, left in books.stock.values())
    return Check(
        name="stock + what completed orders took = stock at the start, for each article",
        found=f"{on_hand:,} on hand + {taken.total():,} sold, of {len(books.stock)} articles",
        broken=broken + [f"{sku}: sold, but never in stock" for sku in taken if sku not in books.stock],
    )


def _totals_follow_the_price_list(ends: Mapping[str, list[Row]], due: Mapping[str, int]) -> Check:
    broken = []
    for order, owed in due.items():
        total = (ends[order][-1].get("context") or {}).get("total")
        if total != owed:
            broken.append(f"{order}: total {total}, by the price list {owed}")
    return Check(name="totals are what the price list says", found=f"{len(due):,} orders", broken=broken)


def _ledger_balances(books: _Books, due: Mapping[str, int]) -> Check:
    charged, refunded = (sum(map(sum, side.values())) for side in (books.charges, books.refunds))
    owed = sum(due.values())
    return Check(
        name="charges - refunds = totals of the completed orders",
        found=f"{_money(charged)} - {_money(refunded)} = {_money(charged - refunded)}",
        broken=[] if charged - refunded == owed else [f"the completed orders come to {_money(owed)}"],
    )


def _each_order_paid_what_it_owes(books: _Books, due: Mapping[str, int], placed: Mapping[str, Row]) -> Check:
    broken = []
    for order in sorted({*due, *books.charges, *books.refunds}):
        paid = sum(books.charges.get(order, ())) - sum(books.refunds.get(order, ()))
        if paid != due.get(order, 0):
            whose = "" if order in placed else " (not in the input)"
            broken.append(f"{order}{whose}: paid {_money(paid)}, owes {_money(due.get(order, 0))}")
    return Check(name="the same, for each order", found=f"{len(books.charges):,} orders in the ledger", broken=broken)


def _no_order_charged_twice(books: _Books) -> Check:
    # Without refunded charges: a failed order may be placed again.
    standing = {order: len(charges) - len(books.refunds.get(order, ())) for order, charges in books.charges.items()}
    return Check(
        name="no order was charged twice",
        found=f"{sum(standing.values()):,} charges stand",
        broken=[f"{order}: {count} charges" for order, count in standing.items() if count > 1],
    )


def _refunds_match_their_charges(books: _Books) -> Check:
    return Check(
        name="each refund is of one charge, order and amount",
        found=f"{sum(map(len, books.refunds.values())):,} refunds",
        broken=books.wrong_refunds,
    )


def _stands_for_completed_only(name: str, standing: Counter[str], due: Mapping[str, int]) -> Check:
    broken = [f"{order}: completed, and has none" for order in due if not standing[order]]
    broken += [f"{order}: not completed, and has one" for order in standing if order not in due]
    broken += [f"{order}: has {count}" for order, count in standing.items() if count > 1]
    return Check(name=name, found=f"{standing.total():,} for {len(due):,} orders", broken=broken)


def _pieces(order: Row) -> Counter[str]:
    pieces: Counter[str] = Counter()
    for item in order["items"]:
        pieces[item["sku"]] += item["quantity"]
    return pieces


def _total(order: Row, prices: Mapping[str, int]) -> int:
    return sum(prices.get(sku, 0) * quantity for sku, quantity in _pieces(order).items())


def _money(cents: int) -> str:
    return f"{cents / 100:,.2f}"


def _read_books(shop_db: str | Path) -> _Books:
    with closing(sqlite3.connect(shop_db, timeout=10)) as db:
        amounts: dict[str, dict[str, list[int]]] = {"charge": {}, "refund": {}}
        for kind, order, amount in db.execute("SELECT kind, order_id, amount FROM ledger"):
            amounts[kind].setdefault(order, []).append(amount)
        wrong_refunds = db.execute(
            "SELECT back.order_id || ': refund ' || back.entry_id || ' fits no charge' FROM ledger AS back"
            " LEFT JOIN ledger AS charge ON charge.entry_id = back.refund_of AND charge.kind = 'charge'"
            " WHERE back.kind = 'refund'"
            " AND (charge.order_id IS NOT back.order_id OR charge.amount IS NOT back.amount)"
        )
        standing = db.execute("SELECT order_id FROM shipments WHERE status <> 'cancelled'")
        return _Books(
            prices=dict(db.execute("SELECT sku, price FROM products")),
            stock={sku: (initial, left) for sku, initial, left in db.execute("SELECT * FROM stock")},
            charges=amounts["charge"],
            refunds=amounts["refund"],
            wrong_refunds=[line for (line,) in wrong_refunds],
            parcels=Counter(order for (order,) in standing),
            confirmations=Counter(order for (order,) in db.execute("SELECT order_id FROM confirmations")),
        )
