"""A few rounds of `scripts/chaos.py`; the script itself is for hours."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "chaos.py"


def test_whatever_is_killed_each_instance_ends_once_and_each_transition_is_accepted_once() -> None:
    command = [sys.executable, str(SCRIPT), "-n", "100", "-k", "10", "--seed", "2", "--work", "0.02"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    killed = re.search(r"SIGKILLs\D+(\d+)", run.stdout)
    assert killed is not None
    assert int(killed[1]) >= 8, run.stdout


def test_the_oracle_notices_a_lost_instance_a_double_transition_and_compensations_in_the_wrong_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # as for a script that is run

    spec = spec_from_file_location("chaos_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    chaos = module_from_spec(spec)
    sys.modules["chaos_script"] = chaos  # its dataclass looks itself up there
    try:
        spec.loader.exec_module(chaos)
    finally:
        del sys.modules["chaos_script"]

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
