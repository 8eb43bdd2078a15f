"""The example as a user has it: its files import one another, as they do for `python examples/order_processing.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "scripts")]

from shop import Shop  # noqa: E402 - found by the line above

SMALL_SHOP: dict[str, Any] = {
    "customers": [
        {"customer_id": "C-1", "name": "Ida Koch", "email": "ida@example.org", "held": False},
        {"customer_id": "C-2", "name": "Emil Braun", "email": "emil@example.org", "held": True},
    ],
    "cards": [
        {"token": "tok_good", "customer_id": "C-1", "declined_for": None},
        {"token": "tok_bad", "customer_id": "C-1", "declined_for": "card expired"},
    ],
    "products": [
        {"sku": "TEA", "name": "Tea", "price": 450, "stock": 10},
        {"sku": "POT", "name": "Teapot", "price": 6490, "stock": 2},
    ],
}


@pytest.fixture
def shop_db(tmp_path: Path) -> Path:
    """A shop that sells tea (4.50, ten in stock) and teapots (64.90, two in stock)."""
    path = tmp_path / "shop.db"
    Shop.create(path, SMALL_SHOP)
    return path


@pytest.fixture
def shop(shop_db: Path) -> Iterator[Shop]:
    shop = Shop(shop_db)
    yield shop
    shop.close()
