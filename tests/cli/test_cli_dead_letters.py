"""`stageflow dlq`: reasons of dead letters, and their requeue."""

import json
from pathlib import Path
from typing import Any

import pytest
from programs import Stageflow

from stageflow_actors.core.envelope import Failure

PAY = "stageflow.orders.stage1"


@pytest.fixture
def parked(filled: Any) -> Path:
    """Two instances parked at `pay`, one waiting behind them."""
    for name in ("i1", "i2", "i3"):
        filled.start(name, {"name": name}, stage="pay", queue=PAY)
    filled.settle_next(PAY, parked=Failure("exception", "ValueError: card declined", "ValueError"))
    filled.settle_next(PAY, parked=Failure("exception", "KeyError: 'card'", "KeyError"))
    return Path(filled.close())


def listed(stageflow: Stageflow, data: Path) -> list[dict[str, Any]]:
    code, out, _ = stageflow("dlq", "list", "--data", data, "--output", "json")
    assert code == 0
    found: list[dict[str, Any]] = json.loads(out)
    return found


def test_list_shows_instance_stage_and_reason(stageflow: Stageflow, parked: Path) -> None:
    found = [(row["instance"], row["workflow"], row["stage"], row["reason"]) for row in listed(stageflow, parked)]
    assert found == [
        ("i1", "orders", "pay", "ValueError: card declined"),
        ("i2", "orders", "pay", "KeyError: 'card'"),
    ]
    assert "card declined" in stageflow("dlq", "list", "--data", parked)[1]


def test_a_parked_instance_is_shown_as_parked(stageflow: Stageflow, parked: Path) -> None:
    _, out, _ = stageflow("instances", "list", "--data", parked, "--status", "parked", "--output", "json")
    assert {(row["instance_id"], row["error"]) for row in json.loads(out)} == {
        ("i1", "ValueError: card declined"),
        ("i2", "KeyError: 'card'"),
    }


def test_show_prints_everything_by_number_or_by_instance(stageflow: Stageflow, parked: Path) -> None:
    code, out, _ = stageflow("dlq", "show", "i1", "--data", parked, "--output", "json")
    row = json.loads(out)
    assert (code, row["context"], row["stages"][0]["stage_id"]) == (0, {"name": "i1"}, "reserve")
    code, out, _ = stageflow("dlq", "show", row["id"], "--data", parked)
    assert code == 0
    assert "ValueError: card declined" in out
    assert f"dlq.{PAY}" in out


def test_requeue_puts_the_named_message_back(stageflow: Stageflow, parked: Path) -> None:
    code, _, err = stageflow("dlq", "requeue", "i2", "--data", parked)
    assert (code, err) == (0, "1 requeued; they resume when a runtime starts on this directory\n")
    assert [row["instance"] for row in listed(stageflow, parked)] == ["i1"]
    _, out, _ = stageflow("queue", "peek", PAY, "--data", parked, "--output", "json")
    assert [(row["instance"], row["attempts"]) for row in json.loads(out)] == [("i2", 0), ("i3", 0)]


@pytest.mark.parametrize("which", [("--all",), ("--queue", PAY), ("--queue", f"dlq.{PAY}")])
def test_requeue_of_all_or_of_a_queue(stageflow: Stageflow, parked: Path, which: tuple[str, ...]) -> None:
    assert stageflow("dlq", "requeue", *which, "--data", parked)[2].startswith("2 requeued")
    assert listed(stageflow, parked) == []


@pytest.mark.parametrize(
    ("revivable", "code", "said"), [(1, 0, "1 requeued"), (0, 1, "0 requeued")], ids=["beside_another", "alone"]
)
def test_requeue_of_all_fails_only_if_all_are_evidence(
    stageflow: Stageflow, filled: Any, revivable: int, code: int, said: str
) -> None:
    died = Failure("died", "WorkerDied: killed by SIGSEGV", "WorkerDied")
    filled.start("dead", {"n": 1}, stage="pay", queue=PAY)
    filled.evidence(PAY, died)
    for number in range(revivable):
        filled.start(f"i{number}", {"n": 2}, queue="stageflow.orders.stage0")
        filled.settle_next("stageflow.orders.stage0", parked=Failure("exception", "KeyError: 'card'", "KeyError"))
    data = filled.close()
    got, _, err = stageflow("dlq", "requeue", "--all", "--data", data)
    assert got == code, err
    assert err.startswith(said)
    assert "1 not requeued: evidence" in err
    assert [row["instance"] for row in listed(stageflow, data)] == ["dead"]


def test_purge_throws_away_only_what_is_named(stageflow: Stageflow, parked: Path) -> None:
    code, _, err = stageflow("dlq", "purge", "i1", "--yes", "--data", parked)
    assert (code, err) == (0, "1 dead letter deleted, 1 instance with them\n")
    assert [row["instance"] for row in listed(stageflow, parked)] == ["i2"]
    assert stageflow("instances", "show", "i1", "--data", parked)[0] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("requeue",), 2, "--all"),
        (("requeue", "--all", "i1"), 2, "--all"),
        (("requeue", "nope"), 1, "'nope'"),
        (("show", "nope"), 1, "'nope'"),
        (("list", "--queue", "nope"), 1, "'nope'"),
        (("purge", "--all"), 2, "--yes"),
    ],
)
def test_mistakes_are_one_line(
    stageflow: Stageflow, parked: Path, arguments: tuple[str, ...], code: int, word: str
) -> None:
    said = stageflow("dlq", *arguments, "--data", parked)
    assert (said[0], said[1], said[2].count("\n")) == (code, "", 1)
    assert word in said[2]
    assert len(listed(stageflow, parked)) == 2


def test_nothing_is_no_error(stageflow: Stageflow, filled: Any) -> None:
    filled.start("i1", {})
    assert stageflow("dlq", "list", "--data", filled.close()) == (0, "", "no dead letters\n")
