"""The example as its docstring says to run it: the three commands, in a folder of their own."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "order_processing.py"
STAGEFLOW = Path(sys.executable).with_name("stageflow")


class Folder:
    """A folder with the first orders of the example, where its commands are run."""

    def __init__(self, path: Path, orders: int) -> None:
        self.path = path
        lines = (ROOT / "examples" / "orders.jsonl").read_text("utf-8").splitlines(keepends=True)[:orders]
        self.orders = [json.loads(line) for line in lines]
        (path / "orders.jsonl").write_text("".join(lines), "utf-8")

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name not in ("SHOP_DB", "STAGEFLOW_DATA")}
        return subprocess.run(command, cwd=self.path, env=environment, capture_output=True, text=True, check=False)

    def example(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, EXAMPLE, *arguments)

    def stageflow_run(self) -> subprocess.CompletedProcess[str]:
        options = ["--input", "orders.jsonl", "--key", "order_id", "--results", "results.jsonl"]
        return self.run(STAGEFLOW, "run", f"{EXAMPLE}:runtime", *options)

    def audit(self) -> subprocess.CompletedProcess[str]:
        return self.example("audit", "--input", "orders.jsonl", "--results", "results.jsonl")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path, orders=60)


def test_the_orders_run_once_and_the_shop_balances_until_its_books_are_touched(folder: Folder) -> None:
    assert folder.example("init").returncode == 0
    first = folder.stageflow_run()
    assert first.returncode == 1, first.stderr  # some were refused
    audited = folder.audit()
    assert audited.returncode == 0, audited.stdout

    again = folder.stageflow_run()
    assert "60 skipped" in again.stderr
    assert folder.audit().returncode == 0

    with closing(sqlite3.connect(folder.path / "shop.db")) as db, db:
        db.execute("DELETE FROM ledger WHERE entry_id = 1")
    assert folder.audit().returncode == 1


def test_one_order_can_be_run_alone_and_lists_its_stages(folder: Folder) -> None:
    assert folder.example("init").returncode == 0
    order_id = folder.orders[0]["order_id"]
    ran = folder.example("order", order_id, "--input", "orders.jsonl")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0] == f"{order_id}: completed"
    assert [line.split() for line in ran.stdout.splitlines()[1:]] == [
        [stage, "completed"] for stage in ("validate", "price", "reserve-inventory", "pay", "ship", "confirm")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["order", "ORD-0", "--input", "orders.jsonl"], "Error: no order ORD-0 in orders.jsonl"),
        (["audit", "--results", "orders.jsonl"], "Error: no shop at shop.db"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, folder: Folder) -> None:
    ran = folder.example(*arguments)
    assert ran.returncode == 1
    assert ran.stderr.strip() == message
