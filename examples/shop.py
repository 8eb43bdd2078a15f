"""The shop behind the order example: stock, payments ledger, shipments and customers in one SQLite file.

It takes the place of the services that a real shop calls. Like them it acts at most once per idempotency key: a call
repeated with the same key changes nothing and returns the first result. It must never import StageFlow: a service does
not depend on its callers.

Money is in integer cents. Each public method is one transaction; a refused call raises a `Refused` and changes nothing.
"""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "AccountHeld",
    "Address",
    "AddressRefused",
    "CardDeclined",
    "GatewayBusy",
    "OutOfStock",
    "Refused",
    "Shop",
    "UnknownCustomer",
    "UnknownProduct",
]


class Refused(Exception):
    """The shop refuses permanently: a retry fails too."""


class UnknownCustomer(Refused):
    """No such customer."""


class UnknownProduct(Refused):
    """No such product in the price list."""


class OutOfStock(Refused):
    """The stock has fewer pieces than ordered."""


class CardDeclined(Refused):
    """The bank declines the card."""


class AddressRefused(Refused):
    """The carrier does not deliver there."""


class AccountHeld(Refused):
    """The fraud review holds deliveries to this customer."""


class GatewayBusy(Exception):
    """The card gateway is temporarily unavailable; nothing was charged."""


@dataclass
class Address:
    """The address of a parcel. `country` is an ISO 3166 code of two letters."""

    name: str
    street: str
    postcode: str
    city: str
    country: str


SCHEMA = """
CREATE TABLE customers (
    customer_id TEXT PRIMARY KEY, name TEXT NOT NULL, email TEXT NOT NULL, held INTEGER NOT NULL DEFAULT 0);
CREATE TABLE cards (
    token TEXT PRIMARY KEY, customer_id TEXT NOT NULL, declined_for TEXT);
CREATE TABLE products (
    sku TEXT PRIMARY KEY, name TEXT NOT NULL, price INTEGER NOT NULL CHECK (price > 0));
CREATE TABLE stock (
    sku TEXT PRIMARY KEY REFERENCES products, initial INTEGER NOT NULL, on_hand INTEGER NOT NULL CHECK (on_hand >= 0));
CREATE TABLE reservations (
    reservation_id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, order_id TEXT NOT NULL,
    released INTEGER NOT NULL DEFAULT 0);
CREATE TABLE reservation_lines (
    reservation_id INTEGER NOT NULL REFERENCES reservations, sku TEXT NOT NULL, quantity INTEGER NOT NULL,
    PRIMARY KEY (reservation_id, sku));
CREATE TABLE ledger (
    entry_id INTEGER PRIMARY KEY, kind TEXT NOT NULL CHECK (kind IN ('charge', 'refund')), key TEXT NOT NULL,
    order_id TEXT NOT NULL, amount INTEGER NOT NULL CHECK (amount > 0), refund_of INTEGER UNIQUE REFERENCES ledger,
    UNIQUE (kind, key));
CREATE TABLE shipments (
    shipment_id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, order_id TEXT NOT NULL, address TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'booked' CHECK (status IN ('booked', 'cancelled')));
CREATE TABLE confirmations (
    key TEXT PRIMARY KEY, order_id TEXT NOT NULL, email TEXT NOT NULL, tracking TEXT NOT NULL);
"""

# Islands and exclaves that the carrier has no route to.
UNSERVED_POSTCODES = frozenset({"27498", "78266", "25849"})
PO_BOXES = ("postfach", "po box", "boîte postale", "postbus")


class Shop:
    """One connection to the shop's database; each worker process opens its own.

    `gateway_busy` is the share of charges that fail with `GatewayBusy`, from 0 to 1.
    Raises `FileNotFoundError` if there is no shop at `path`.
    """

    def __init__(self, path: str | Path, *, gateway_busy: float = 0.0) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no shop at {path}: create one with `python examples/order_processing.py init`")
        # Autocommit: transactions begin explicitly and as writers, so that none fails half-way at the write lock.
        self._db = sqlite3.connect(path, timeout=10, isolation_level=None)
        self._db.execute("PRAGMA synchronous = FULL")
        self._gateway_busy = gateway_busy

    @classmethod
    def create(cls, path: str | Path, data: Mapping[str, Any]) -> None:
        """Create a shop from `data` (`customers`, `cards`, `products`). Raises `FileExistsError` if there is one."""
        Path(path).touch(exist_ok=False)
        db = sqlite3.connect(path, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(SCHEMA)
            db.execute("BEGIN")
            db.executemany("INSERT INTO customers VALUES (:customer_id, :name, :email, :held)", data["customers"])
            db.executemany("INSERT INTO cards VALUES (:token, :customer_id, :declined_for)", data["cards"])
            db.executemany("INSERT INTO products VALUES (:sku, :name, :price)", data["products"])
            db.executemany("INSERT INTO stock VALUES (:sku, :stock, :stock)", data["products"])
            db.execute("COMMIT")
        finally:
            db.close()

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def email_of(self, customer_id: str) -> str:
        """Return the customer's e-mail address. Raises `UnknownCustomer`."""
        row = self._db.execute("SELECT email FROM customers WHERE customer_id = ?", (customer_id,)).fetchone()
        if row is None:
            raise UnknownCustomer(f"there is no customer {customer_id}")
        return str(row[0])

    def total(self, quantities: Mapping[str, int]) -> int:
        """Return the price of these pieces, in cents. Raises `UnknownProduct`."""
        total = 0
        for sku, quantity in quantities.items():
            row = self._db.execute("SELECT price FROM products WHERE sku = ?", (sku,)).fetchone()
            if row is None:
                raise UnknownProduct(f"{sku} is not in the price list")
            total += row[0] * quantity
        return total

    def reserve(self, key: str, order_id: str, quantities: Mapping[str, int]) -> int:
        """Take the pieces from the stock, all or none; return the reservation's id. Raises `OutOfStock`."""
        with self._transaction() as db:
            added = db.execute(
                "INSERT INTO reservations (key, order_id) VALUES (?, ?) ON CONFLICT DO NOTHING", (key, order_id)
            ).rowcount
            (reservation,) = db.execute("SELECT reservation_id FROM reservations WHERE key = ?", (key,)).fetchone()
            if added:
                for sku, quantity in quantities.items():
                    self._take(reservation, sku, quantity)
        return int(reservation)

    def _take(self, reservation: int, sku: str, quantity: int) -> None:
        taken = self._db.execute(
            "UPDATE stock SET on_hand = on_hand - ? WHERE sku = ? AND on_hand >= ?", (quantity, sku, quantity)
        ).rowcount
        if not taken:
            row = self._db.execute("SELECT on_hand FROM stock WHERE sku = ?", (sku,)).fetchone()
            raise OutOfStock(f"{sku}: {quantity} wanted, {row[0] if row else 0} left")
        self._db.execute("INSERT INTO reservation_lines VALUES (?, ?, ?)", (reservation, sku, quantity))

    def release(self, reservation: int) -> None:
        """Return the pieces of a reservation to the stock, once."""
        with self._transaction() as db:
            released = db.execute(
                "UPDATE reservations SET released = 1 WHERE reservation_id = ? AND released = 0", (reservation,)
            ).rowcount
            if released:
                db.execute(
                    "UPDATE stock SET on_hand = on_hand + line.quantity FROM reservation_lines AS line"
                    " WHERE line.reservation_id = ? AND line.sku = stock.sku",
                    (reservation,),
                )

    def charge(self, key: str, order_id: str, card: str, amount: int) -> int:
        """Charge `amount` cents; return the ledger entry. Raises `CardDeclined`, `GatewayBusy` (temporary)."""
        if random.random() < self._gateway_busy:
            raise GatewayBusy("the card gateway is busy")
        with self._transaction() as db:
            row = db.execute("SELECT declined_for FROM cards WHERE token = ?", (card,)).fetchone()
            if row is None:
                raise CardDeclined(f"{card}: not a card")
            if row[0] is not None:
                raise CardDeclined(f"{card}: {row[0]}")
            db.execute(
                "INSERT INTO ledger (kind, key, order_id, amount) VALUES ('charge', ?, ?, ?) ON CONFLICT DO NOTHING",
                (key, order_id, amount),
            )
            (entry,) = db.execute("SELECT entry_id FROM ledger WHERE kind = 'charge' AND key = ?", (key,)).fetchone()
        return int(entry)

    def refund(self, key: str, charge: int) -> int:
        """Refund a charge, once; return the ledger entry of the refund."""
        with self._transaction() as db:
            # A charge has at most one refund, with any key: `refund_of` is unique too.
            db.execute(
                "INSERT INTO ledger (kind, key, order_id, amount, refund_of)"
                " SELECT 'refund', ?, order_id, amount, entry_id FROM ledger WHERE entry_id = ? AND kind = 'charge'"
                " ON CONFLICT DO NOTHING",
                (key, charge),
            )
            row = db.execute("SELECT entry_id FROM ledger WHERE refund_of = ?", (charge,)).fetchone()
        if row is None:
            raise LookupError(f"no charge {charge} in the ledger")
        return int(row[0])

    def book_shipment(self, key: str, order_id: str, address: Address) -> str:
        """Book a parcel with the carrier; return its tracking number. Raises `AddressRefused`."""
        if address.postcode in UNSERVED_POSTCODES:
            raise AddressRefused(f"no route to {address.postcode} {address.city}")
        if address.street.lower().startswith(PO_BOXES):
            raise AddressRefused(f"no parcels to a PO box ({address.street})")
        line = f"{address.name}, {address.street}, {address.postcode} {address.city}, {address.country}"
        with self._transaction() as db:
            db.execute(
                "INSERT INTO shipments (key, order_id, address) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (key, order_id, line),
            )
            (shipment,) = db.execute("SELECT shipment_id FROM shipments WHERE key = ?", (key,)).fetchone()
        return f"{address.country}{shipment:09d}"

    def cancel_shipment(self, tracking: str) -> None:
        """Cancel a parcel before it is collected; cancelling it again changes nothing."""
        with self._transaction() as db:
            db.execute("UPDATE shipments SET status = 'cancelled' WHERE shipment_id = ?", (int(tracking[2:]),))

    def confirm(self, key: str, order_id: str, customer_id: str, tracking: str) -> None:
        """Confirm to the customer that the parcel is on its way. Raises `AccountHeld`."""
        with self._transaction() as db:
            email, held = db.execute(
                "SELECT email, held FROM customers WHERE customer_id = ?", (customer_id,)
            ).fetchone() or ("", 1)
            if held:
                raise AccountHeld(f"the account of {customer_id} is held for review")
            db.execute(
                "INSERT INTO confirmations VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (key, order_id, email, tracking),
            )


def load_data(path: str | Path) -> dict[str, Any]:
    """Read the price list with its stock, the customers and their cards from a JSON file."""
    data: dict[str, Any] = json.loads(Path(path).read_text("utf-8"))
    return data
