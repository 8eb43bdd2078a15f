"""`stageflow run` with inputs of other kinds, as a program and before its cluster starts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from programs import Command, Stageflow

FLOW = """
from dataclasses import dataclass
from stageflow_actors import Workflow

@dataclass
class Order:
    order_id: str
    amount: float

orders = Workflow("orders", context=Order)

@orders.stage
def pay(order: Order) -> str:
    return f"{order.order_id}: {order.amount}"
"""


@pytest.fixture(autouse=True)
def flows(tmp_path: Path) -> None:
    (tmp_path / "flows.py").write_text(FLOW)


def results(path: Path) -> dict[str, Any]:
    return {line["instance_id"]: line["context"] for line in map(json.loads, path.read_text().splitlines())}


def test_an_input_of_another_kind_is_refused_in_one_line_and_nothing_is_touched(
    stageflow: Stageflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "orders.parquet").write_bytes(b"PAR1" + bytes(100))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "lock").touch()
    before = sorted(tmp_path.iterdir())
    options = ("--data", "data", "--fresh", "--results", "out.jsonl")
    code, out, err = stageflow("run", "flows.py:orders", "--input", "orders.parquet", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "orders.parquet looks like a Parquet file; stageflow run reads JSON lines" in err
    assert sorted(path for path in tmp_path.iterdir() if path.name != "__pycache__") == before
    code, _, err = stageflow("run", "flows.py:orders", "--input", tmp_path)
    assert (code, err.count("\n"), "directory" in err) == (2, 1, True)


def test_a_compressed_table_from_stdin_runs_and_resumes(command: Command, tmp_path: Path) -> None:
    table = gzip.compress("".join(f"o{n};{n}.5\r\n" for n in range(5)).encode())
    (tmp_path / "orders.gz").write_bytes(gzip.compress(b"order_id;amount\r\n") + table)
    words = ("run", "flows.py:orders", "--input", "-", "--data", "data", "--results", "out.jsonl")
    for state in ("5 done", "5 skipped"):
        with open(tmp_path / "orders.gz", "rb") as file:
            done = command(*words, stdin=file)
        assert (done.returncode, state in done.stderr) == (0, True), done.stderr
        found = results(tmp_path / "out.jsonl")
        assert found == {f"stdin:{n + 2}": {"order_id": f"o{n}", "amount": n + 0.5} for n in range(5)}


def test_an_array_that_breaks_off_is_continued_when_it_is_whole(command: Command, tmp_path: Path) -> None:
    text = json.dumps([{"order_id": f"o{n}", "amount": float("nan")} for n in range(6)], indent=1)
    words = ("run", "flows.py:orders", "--input", "orders.json", "--data", "data", "--results", "out.jsonl")
    (tmp_path / "orders.json").write_text(text[: text.index("o4")])
    done = command(*words)
    assert done.returncode == 1
    assert "orders.json element 5: not valid JSON: " in done.stderr
    assert "nothing from here on was read" in done.stderr
    assert "4 done, 1 refused" in done.stderr.splitlines()[-1]
    (tmp_path / "orders.json").write_text(text)
    done = command(*words)
    assert (done.returncode, "2 done, 4 skipped" in done.stderr) == (0, True), done.stderr
    assert results(tmp_path / "out.jsonl")["orders.json:6"] == {"order_id": "o5", "amount": "NaN"}
