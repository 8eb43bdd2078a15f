"""The approval example: its table, each way through it, and the program as a whole."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import approval
from approval import TRANSITIONS, Event, IllegalTransition, Report, State
from stageflow_actors import InvalidContext, WorkflowResult
from stageflow_actors.testing import run

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "approval.py"
YES, NO = {"by": "Ada", "approve": True}, {"by": "Ada", "approve": False, "reason": "too dear"}


def decide(amount: int, **signals: dict[str, Any]) -> WorkflowResult[Report]:
    levels = approval.levels_of(amount)
    return run(approval.approval(levels, 60), Report("R", "Ida", amount, "x"), signals=signals)


def state_and_last_line(result: WorkflowResult[Report]) -> tuple[State, str, int]:
    assert result.context is not None
    return result.context.state, result.context.history[-1], result.context.reserved


@pytest.mark.parametrize(("amount", "levels"), [(1, 1), (500, 1), (501, 2), (5000, 2), (5001, 3)])
def test_the_amount_decides_how_many_are_asked(amount: int, levels: int) -> None:
    assert approval.levels_of(amount) == ("lead", "head", "finance")[:levels]


def test_when_all_approve_it_is_paid() -> None:
    result = decide(9000, lead=YES, head=YES, finance=YES)
    assert state_and_last_line(result) == (State.PAID, "paid", 0)
    assert result.success


@pytest.mark.parametrize("refuser", ["lead", "head", "finance"])
def test_any_rejection_ends_it_and_the_budget_is_released(refuser: str) -> None:
    result = decide(9000, **{level: NO if level == refuser else YES for level in ("lead", "head", "finance")})
    assert result.status.value == "compensated"
    assert result.failed_stage == refuser
    line = f"refused: StageError: Ada ({refuser}) refused: too dear"
    assert state_and_last_line(result) == (State.REFUSED, line, 0)


def test_silence_escalates_to_the_next_one_above() -> None:
    result = decide(2000, head=YES)
    assert result.success
    assert result.context is not None
    assert result.context.history[1:] == [
        "the lead did not answer in time: escalated",
        "approved by Ada (head)",
        "paid",
    ]


def test_silence_of_the_last_one_refuses_it() -> None:
    result = decide(100)
    assert state_and_last_line(result)[0] == State.REFUSED
    assert result.error == "StageError: the lead did not answer in time, and there is no higher level"


def test_what_the_table_does_not_know_changes_nothing() -> None:
    for state, event in itertools.product(State, Event):
        report = Report("R", "Ida", 1, "x", state=state)
        if (state, event) in TRANSITIONS:
            report.apply(event, "note")
            assert report.state == TRANSITIONS[state, event]
        else:
            with pytest.raises(IllegalTransition):
                report.apply(event, "note")
            assert (report.state, report.history) == (state, [])


def test_an_expense_of_nothing_is_refused_at_the_door() -> None:
    with pytest.raises(InvalidContext, match="more than 0"):
        decide(-1 + 1)


def test_the_example_runs_its_four_reports_through_their_approvals(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), "--patience", "0.3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    ends = [line.rpartition("-> ")[2] for line in ran.stdout.splitlines() if line.startswith("R-")]
    assert ends == ["paid", "paid", "refused", "refused"]
    assert "escalated" in ran.stdout
    assert "refused: StageError: Katherine (finance) refused: not this year" in ran.stdout


def test_its_help_describes_it() -> None:
    ran = subprocess.run([sys.executable, str(EXAMPLE), "--help"], capture_output=True, text=True, check=True)
    assert "approved, escalated, refused, unanswered" in " ".join(ran.stdout.split())
