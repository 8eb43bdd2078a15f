"""A few rounds of `scripts/chaos.py`, and its judge."""

from __future__ import annotations

import re

from script_runner import run_script

import chaos


def test_whatever_is_killed_each_instance_ends_once_and_each_transition_is_accepted_once() -> None:
    run = run_script("chaos", "-n", "100", "-k", "10", "--seed", "2", "--work", "0.02")
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    killed = re.search(r"SIGKILLs\D+(\d+)", run.stdout)
    assert killed is not None
    assert int(killed[1]) >= 8, run.stdout


def test_the_oracle_notices_a_lost_instance_a_double_transition_and_compensations_in_the_wrong_order() -> None:
    def effects(fails: bool, *seen: str) -> list[str]:
        wrong: list[str] = []
        chaos._judge_effects("order", fails, list(seen), wrong)
        return wrong

    whole = ("reserve", "charge", "ship")
    assert effects(False, *whole) == []
    assert effects(False, "reserve", "reserve", "charge", "ship", "ship") == [], "a crash may repeat a stage in work"
    assert effects(False, "reserve", "charge"), "lost half-way"
    assert effects(False, "reserve", "charge", "reserve", "ship"), "a settled stage that ran again"
    assert effects(False, *whole, "undo-charge"), "undone for nothing"
    assert effects(True, *whole, "undo-charge", "undo-reserve") == []
    assert effects(True, *whole, "undo-reserve", "undo-charge"), "undone in order of completion"
    assert effects(True, *whole, "undo-charge"), "half undone"

    def ends(results: list[str], listed: list[str], status: str = "completed") -> list[str]:
        wrong: list[str] = []
        stages = [[stage, "completed"] for stage in whole]
        rows = [{"id": id, "status": status, "stages": stages, "undone": []} for id in results]
        report = {"results": rows, "listed": [[id, status] for id in listed]}
        chaos._judge_ends(["a", "b"], set(), report, wrong)
        return wrong

    assert ends(["a", "b"], ["b", "a"]) == []
    assert ends(["a"], ["a", "b"]), "a result is missing"
    assert ends(["a", "b"], ["a"]), "the history has lost one"
    assert ends(["a", "b"], ["a", "b", "b"]), "one ended twice"
    assert ends(["a", "b"], ["a", "b"], "failed")
