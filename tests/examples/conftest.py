"""The example as a user has it: its files import one another, as they do for `python examples/order_processing.py`."""

from __future__ import annotations

import shutil
import socket
import subprocess
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


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis server of the tests' own; skips where there is none to be started."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pytest.importorskip("redis", reason="the package redis is not installed")
    directory = tmp_path_factory.mktemp("redis")
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(directory)]
    with subprocess.Popen([program, *options], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert any("eady to accept connections" in line for line in server.stdout), "the server did not start"
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()
            server.communicate(timeout=20)
