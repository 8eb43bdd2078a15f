"""Misspelt names on the command line: one line that names what is meant, or what there is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from programs import Stageflow

from stageflow_actors import Workflow
from stageflow_actors.core.plan import Naming, compile_plan
from stageflow_actors.runtime.messaging.manifest import MANIFEST_FACT, ClusterManifest, write_manifest

SHOP = """
from stageflow_actors import Workflow

class Order: ...

orders = Workflow("orders").add_stage(print, id="price")
"""


@pytest.fixture
def data(filled: Any) -> Path:
    filled.start("i1", {"n": 1})
    plan = compile_plan(Workflow("orders").add_stage(print, id="price"), Naming())
    manifest = write_manifest(ClusterManifest([plan], Naming(), 1 << 20))
    filled._client.admin.set_fact(MANIFEST_FACT, manifest).result(5)
    return Path(filled.close())


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "shop_m.py").write_text(SHOP)
    (folder / "in.jsonl").write_text('{"order_id": "a"}\n')
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "shop_m", raising=False)
    return folder


@pytest.mark.parametrize("command", ["peek", "pause", "resume", "purge", "stats"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("price", "that of stage 'price' of workflow 'orders' is 'stageflow.orders.stage0'"),
        ("stageflow.orders.stag0", "did you mean 'stageflow.orders.stage0'?"),
        ("nope", "`stageflow queue list` lists them all"),
    ],
)
def test_a_queue_that_does_not_exist_is_named_with_the_one_that_is_meant(
    stageflow: Stageflow, data: Path, command: str, name: str, said: str
) -> None:
    confirmed = ["--yes"] if command == "purge" else []
    answer = stageflow("queue", command, name, *confirmed, "--data", data)
    assert answer == (1, "", f"stageflow: no queue is named {name!r}: {said}\n")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("shpo_m.py:orders", "shpo_m.py: did you mean shop_m.py?"),
        ("shop_m.py:ordres", "there is no 'ordres' in shop_m.py (did you mean shop_m.py:orders?)"),
        ("shop_m.py:Order", "shop_m.py:Order is a class, not a Workflow"),
    ],
)
def test_a_misspelt_module_or_workflow_is_named_with_the_one_that_is_meant(
    stageflow: Stageflow, shop: Path, target: str, said: str
) -> None:
    code, out, err = stageflow("graph", target)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_a_misspelt_key_names_the_field_that_is_meant(command: Any, shop: Path) -> None:
    done = command("run", shop / "shop_m.py:orders", "--input", shop / "in.jsonl", "--key", "orderid")
    assert done.returncode == 1
    assert "in.jsonl line 1: has no 'orderid' (did you mean 'order_id'?), the field of --key" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("scale", "orders", "price", "many"), "invalid value for 'N': 'many' is not a whole number"),
        (("instances", "list", "--limit", "x"), "invalid value for '--limit': 'x' is not a whole number"),
        (("queue", "watch", "--interval", "x"), "invalid value for '--interval': 'x' is not a number"),
    ],
)
def test_a_word_in_place_of_a_number_is_refused_in_plain_words(
    stageflow: Stageflow, arguments: tuple[str, ...], said: str
) -> None:
    code, out, err = stageflow(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
