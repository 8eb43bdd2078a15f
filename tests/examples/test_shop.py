"""The shop of the example: each call once per key, and what it refuses changes nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import shop as shop_module
from shop import AccountHeld, Address, AddressRefused, CardDeclined, GatewayBusy, OutOfStock, Shop

HOME = Address("Ida Koch", "Lindenallee 4", "10115", "Berlin", "DE")


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


def everything(path: Path) -> list[list[tuple[Any, ...]]]:
    tables = ["stock", "reservations", "reservation_lines", "ledger", "shipments", "confirmations"]
    return [rows(path, f"SELECT * FROM {table}") for table in tables]


def reserve(shop: Shop) -> object:
    return shop.reserve("k1", "O-1", {"TEA": 3, "POT": 1})


def release(shop: Shop) -> object:
    return shop.release(shop.reserve("k1", "O-1", {"TEA": 3, "POT": 1}))


def charge(shop: Shop) -> object:
    return shop.charge("k1", "O-1", "tok_good", 7840)


def refund(shop: Shop) -> object:
    # The key of the charge on purpose: a compensation may well get the key of its stage.
    return shop.refund("k1", shop.charge("k1", "O-1", "tok_good", 7840))


def book(shop: Shop) -> object:
    return shop.book_shipment("k1", "O-1", HOME)


def call_back(shop: Shop) -> object:
    return shop.cancel_shipment(shop.book_shipment("k1", "O-1", HOME))


def confirm(shop: Shop) -> object:
    return shop.confirm("k1", "O-1", "C-1", "DE1")


@pytest.mark.parametrize("call", [reserve, release, charge, refund, book, call_back, confirm])
def test_a_call_repeated_with_its_key_changes_nothing_and_returns_the_same(
    call: Callable[[Shop], object], shop: Shop, shop_db: Path
) -> None:
    untouched = everything(shop_db)
    first = call(shop)
    once = everything(shop_db)
    assert once != untouched

    with closing(Shop(shop_db)) as next_worker:
        assert call(next_worker) == first
    assert everything(shop_db) == once


def test_another_key_is_another_charge(shop: Shop, shop_db: Path) -> None:
    assert shop.charge("k1", "O-1", "tok_good", 100) != shop.charge("k2", "O-1", "tok_good", 100)
    assert rows(shop_db, "SELECT count(*), sum(amount) FROM ledger") == [(2, 200)]


def test_a_charge_is_refunded_once_whatever_the_key(shop: Shop, shop_db: Path) -> None:
    charged = shop.charge("k1", "O-1", "tok_good", 100)
    assert shop.refund("k2", charged) == shop.refund("k3", charged)
    assert rows(shop_db, "SELECT amount, refund_of FROM ledger WHERE kind = 'refund'") == [(100, charged)]


def test_a_refund_of_what_was_never_charged_is_an_error(shop: Shop) -> None:
    with pytest.raises(LookupError, match="no charge 7"):
        shop.refund("k1", 7)


def test_released_pieces_can_be_sold_again(shop: Shop) -> None:
    shop.release(shop.reserve("k1", "O-1", {"POT": 2}))
    shop.reserve("k2", "O-2", {"POT": 2})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda shop: shop.reserve("k", "O-1", {"TEA": 3, "POT": 3}), OutOfStock, "POT: 3 wanted, 2 left"),
        (lambda shop: shop.reserve("k", "O-1", {"TEA": 3, "CUP": 1}), OutOfStock, "CUP: 1 wanted, 0 left"),
        (lambda shop: shop.charge("k", "O-1", "tok_bad", 100), CardDeclined, "card expired"),
        (lambda shop: shop.charge("k", "O-1", "tok_none", 100), CardDeclined, "not a card"),
        (
            lambda shop: shop.book_shipment("k", "O-1", Address("Ida Koch", "Postfach 12", "10115", "Berlin", "DE")),
            AddressRefused,
            "PO box",
        ),
        (
            lambda shop: shop.book_shipment("k", "O-1", Address("Ida Koch", "Am Lung 1", "27498", "Helgoland", "DE")),
            AddressRefused,
            "no route to 27498 Helgoland",
        ),
        (lambda shop: shop.confirm("k", "O-1", "C-2", "DE1"), AccountHeld, "C-2 is held"),
    ],
)
def test_what_the_shop_refuses_changes_nothing(
    call: Callable[[Shop], object], error: type[Exception], message: str, shop: Shop, shop_db: Path
) -> None:
    before = everything(shop_db)
    with pytest.raises(error, match=message):
        call(shop)
    assert everything(shop_db) == before


def test_a_busy_gateway_has_charged_nothing(shop_db: Path) -> None:
    with closing(Shop(shop_db, gateway_busy=1.0)) as busy, pytest.raises(GatewayBusy):
        busy.charge("k1", "O-1", "tok_good", 100)
    assert rows(shop_db, "SELECT * FROM ledger") == []


def test_a_missing_shop_is_an_error_that_explains_how_to_create_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"order_processing.py init"):
        Shop(tmp_path / "shop.db")


def test_a_new_shop_does_not_replace_an_old_one(shop_db: Path) -> None:
    with pytest.raises(FileExistsError):
        Shop.create(shop_db, {"customers": [], "cards": [], "products": []})
    assert rows(shop_db, "SELECT count(*) FROM products") == [(2,)]


def test_the_shop_knows_nothing_of_workflows() -> None:
    assert "stageflow" not in Path(shop_module.__file__).read_text("utf-8").lower().partition('"""\n\nfrom')[2]
