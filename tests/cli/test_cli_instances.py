"""`stageflow instances`: live and finished instances side by side."""

import json
from pathlib import Path
from typing import Any

import pytest
from programs import Stageflow

from stageflow_actors.core.envelope import (
    CompensationRecord,
    CompensationTask,
    Outcome,
    StageRecord,
    append_record,
    encode,
    raw,
)
from stageflow_actors.history import HistoryRow, HistoryWriter

TRAIL = append_record(
    append_record(
        b"\xdd\x00\x00\x00\x00", StageRecord("reserve", "completed", 1, 1_700_000_000.0, 0.5, None, raw("r"))
    ),
    StageRecord("pay", "failed", 3, 1_700_000_001.0, 0.25, "ValueError: card declined"),
)


def finished(name: str, status: str, error: str | None = None) -> HistoryRow:
    outcome = Outcome(
        "orders",
        1,
        status,
        raw({"name": name}),
        TRAIL,
        1_700_000_000.0,
        1_700_000_002.0,
        error,
        "pay" if error else None,
        [CompensationRecord("reserve", "completed", None, 0.125)] if status == "compensated" else [],
    )
    return HistoryRow(
        name,
        1,
        "orders",
        1,
        status,
        1_700_000_000.0,
        1_700_000_002.0,
        error,
        outcome.failed_stage,
        None,
        encode(outcome),
    )


@pytest.fixture
def data(filled: Any) -> Path:
    """`new` waits for its first stage, `later` for its second, `undone` is being compensated; two have finished."""
    filled.start("new", {"n": 1})
    filled.start("later", {"n": 2}, stage="pay", queue="stageflow.orders.stage1")
    envelope = filled.envelope("reserve", {"n": 3}, trail=TRAIL, error="ValueError: card declined", failed_stage="pay")
    envelope.compensation = CompensationTask(["reserve"], [], "compensated")
    filled.publish("undone", "stageflow.compensation.orders", "compensate:reserve", envelope)
    with HistoryWriter.open(filled.data_dir.history, create=True) as writer:
        writer.write([finished("well", "completed"), finished("back", "compensated", "ValueError: card declined")])
    return Path(filled.close())


def listed(stageflow: Stageflow, data: Path, *options: object) -> dict[str, str]:
    code, out, err = stageflow("instances", "list", "--data", data, "--output", "json", *options)
    assert (code, err) == (0, "")
    return {row["instance_id"]: row["status"] for row in json.loads(out)}


def test_list_shows_live_and_finished_ones(stageflow: Stageflow, data: Path) -> None:
    assert listed(stageflow, data) == {
        "undone": "compensating",
        "later": "running",
        "new": "pending",
        "back": "compensated",
        "well": "completed",
    }


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (("--status", "compensated"), {"back"}),
        (("--status", "pending"), {"new"}),
        (("--status", "parked"), set()),
        (("--workflow", "orders"), {"undone", "later", "new", "back", "well"}),
        (("--workflow", "orders", "--status", "parked"), set()),
        (("--limit", "4"), {"undone", "later", "new", "back"}),
        (("--limit", "1"), {"undone"}),
    ],
)
def test_list_can_be_narrowed(stageflow: Stageflow, data: Path, options: tuple[str, ...], found: set[str]) -> None:
    assert set(listed(stageflow, data, *options)) == found


def test_a_list_is_as_long_as_its_limit_though_an_instance_is_live_and_finished(
    stageflow: Stageflow, filled: Any
) -> None:
    # An instance is in the history before its end leaves the broker, and while it runs again.
    for name in ("both", "live"):
        filled.start(name, {"n": 1})
    with HistoryWriter.open(filled.data_dir.history, create=True) as writer:
        writer.write([finished(name, "completed") for name in ("old", "older", "both", "live")])
    found = listed(stageflow, Path(filled.close()), "--limit", 4)
    assert found == {"both": "pending", "live": "pending", "old": "completed", "older": "completed"}


def test_a_filter_by_an_unknown_workflow_says_which_ones_there_are(
    stageflow: Stageflow, data: Path, tmp_path: Path
) -> None:
    said = "no instance is of workflow 'ordres' (did you mean 'orders'?): the instances are of orders\n"
    assert stageflow("instances", "list", "--data", data, "--workflow", "ordres", "--output", "json") == (
        0,
        "[]\n",
        said,
    )
    code, _, err = stageflow("instances", "export", tmp_path / "all.jsonl", "--data", data, "--workflow", "ordres")
    assert (code, err) == (0, f"{said}0 instances\n")
    assert stageflow("instances", "list", "--data", data, "--workflow", "ordres") == (0, "", said)


def test_a_filter_without_a_match_says_what_it_looked_for(stageflow: Stageflow, data: Path) -> None:
    code, out, err = stageflow("instances", "list", "--data", data, "--workflow", "orders", "--status", "parked")
    assert (code, out, err) == (0, "", "no instances of workflow 'orders' with status parked\n")


def test_a_signal_to_an_instance_that_has_ended_says_how_it_ended(stageflow: Stageflow, data: Path) -> None:
    answer = stageflow("instances", "signal", "back", "approval", "--data", data)
    assert answer == (1, "", "stageflow: no live instance has the id 'back': it has ended (compensated)\n")


def test_show_prints_how_a_finished_instance_ended(stageflow: Stageflow, data: Path) -> None:
    code, out, _ = stageflow("instances", "show", "back", "--data", data, "--output", "json")
    shown = json.loads(out)
    assert (code, shown["status"], shown["failed_stage"]) == (0, "compensated", "pay")
    stages = [(s["stage"], s["status"], s["attempts"], s["duration"], s["result"], s["error"]) for s in shown["stages"]]
    assert stages == [
        ("reserve", "compensated", 1, 0.5, "r", None),
        ("pay", "failed", 3, 0.25, None, "ValueError: card declined"),
    ]
    assert [(c["compensation"], c["status"]) for c in shown["compensations"]] == [("reserve", "completed")]
    assert shown["context"] == {"name": "back"}
    code, out, _ = stageflow("instances", "show", "back", "--data", data)
    assert code == 0
    assert "ValueError: card declined" in out
    assert '"name": "back"' in out


def test_show_prints_where_a_live_instance_is(stageflow: Stageflow, data: Path) -> None:
    shown = json.loads(stageflow("instances", "show", "later", "--data", data, "--output", "json")[1])
    assert (shown["status"], shown["stage"], shown["queue"]) == ("running", "pay", "stageflow.orders.stage1")
    assert [(stage["stage"], stage["status"]) for stage in shown["stages"]] == [
        ("reserve", "completed"),
        ("pay", "pending"),
    ]
    shown = json.loads(stageflow("instances", "show", "undone", "--data", data, "--output", "json")[1])
    assert (shown["status"], shown["failed_stage"], shown["error"]) == (
        "compensating",
        "pay",
        "ValueError: card declined",
    )


def test_an_unknown_instance_is_one_line(stageflow: Stageflow, data: Path) -> None:
    code, out, err = stageflow("instances", "show", "nope", "--data", data)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "'nope'" in err


def test_old_ones_can_be_forgotten(stageflow: Stageflow, data: Path) -> None:
    assert stageflow("history", "prune", "--older-than", "2w", "--data", data)[0] == 2
    code, _, err = stageflow("history", "prune", "--older-than", "2w", "--yes", "--data", data)
    assert code == 0
    assert err.startswith("2 instances deleted")
    assert stageflow("history", "vacuum", "--data", data)[0] == 0
    assert set(listed(stageflow, data)) == {"undone", "later", "new"}
