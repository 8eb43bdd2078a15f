"""Instances are found by workflow and status, wherever they wait: all workflows share the coordinator's queue."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from constructs_fixtures import does

from stageflow_actors import Config, Runtime, Stage, Workflow
from stageflow_actors.cli.main import main


def hold(item: str) -> None:
    """Waits until the test lets it go on."""
    while not os.path.exists(item):
        time.sleep(0.005)


asks = (
    Workflow("asks")
    .add_stage(does("before"), id="before")
    .add_parallel("checks", [Stage(does("a"), id="a"), Stage(does("b"), id="b")])
    .add_signal("approval")
)
late = Workflow("late").add_delay("first", 3600)
later = Workflow("later").add_delay("first", 3600)
takes = Workflow("takes").add_signal("word", on_signal=lambda context, payload: None, timeout=3600)
bounded = Workflow("bounded", timeout=3600).add_signal("word")
items = Workflow("items").add_map("held", hold, over=lambda context: [context["gate"]] * 5)
every = (asks, late, later, takes, bounded, items)

STARTED = {"asks": 4, "late": 2, "takes": 1, "bounded": 1, "items": 1}
FAST = Config(durability="write")


@pytest.fixture
def waiting(serve: Any, tmp_path: Path, gate: Path, eventually: Any) -> Runtime:
    """A cluster on which nothing happens until a signal is sent."""
    runtime: Runtime = serve(*every, data_dir=tmp_path / "data", config=FAST)
    for name, count in STARTED.items():
        for number in range(count):
            runtime.submit(name, {"gate": str(gate)}, instance_id=f"{name}-{number}")
    ids = [f"{name}-{number}" for name, count in STARTED.items() if name != "items" for number in range(count)]
    for id in ids:
        eventually(lambda id=id: runtime.instance(id).status() == "waiting", f"{id} to wait")
    eventually(lambda: [q.leased for q in runtime.queues("stageflow.items.stage0.held")] == [1], "an item in work")
    return runtime


def found(runtime: Any, **wanted: Any) -> dict[str, int]:
    names = [instance.id.rpartition("-")[0] for instance in runtime.instances(**wanted)]
    return {name: names.count(name) for name in names}


def shown(capfd: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capfd.readouterr()
    assert main([*map(str, arguments), "--output", "json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_instances_that_wait_are_found_by_workflow_and_status_and_counted_at_the_next_start(
    waiting: Runtime, tmp_path: Path, gate: Path, capfd: pytest.CaptureFixture[str], serve: Callable[..., Runtime]
) -> None:
    for name in ("asks", "late", "later", "takes", "bounded", "items"):
        count = STARTED.get(name)
        assert found(waiting, workflow=name) == ({} if count is None else {name: count})
        assert len(waiting.instances(workflow=name, limit=1)) == (count is not None)
    assert found(waiting, status="waiting", limit=1_000) == {n: c for n, c in STARTED.items() if n != "items"}
    assert found(waiting, status="running") == {"items": 1}
    with Runtime.connect(tmp_path / "data") as client:
        assert found(client, workflow="asks") == {"asks": 4}

    rows = {row["instance_id"]: row for row in shown(capfd, "instances", "list", "--data", tmp_path / "data")}
    assert {(row["workflow"], row["status"]) for row in rows.values()} == {
        (name, "running" if name == "items" else "waiting") for name in STARTED
    }
    assert all(row["started"] for row in rows.values())
    one = shown(capfd, "instances", "show", "asks-0", "--data", tmp_path / "data")
    assert (one["stage"], one["waiting"], one["context"]) == ("approval", ["signal approval"], {"gate": str(gate)})
    assert [stage["stage_id"] for stage in one["stages"]] == ["before", "checks", "a", "b", "approval"]

    waiting.stop(grace=0)
    capfd.readouterr()
    again = serve(*every, data_dir=tmp_path / "data", config=FAST)
    lines = [line for line in capfd.readouterr().err.splitlines() if "resuming" in line]
    assert sorted(lines) == sorted(
        f"stageflow: resuming {count} instance{'s' if count > 1 else ''} of {name}" for name, count in STARTED.items()
    )
    assert found(again, workflow="asks") == {"asks": 4}
