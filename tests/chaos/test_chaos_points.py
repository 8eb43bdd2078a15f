"""A sample of `scripts/chaos_points.py`: a process killed, stopped or ended at a failpoint loses nothing."""

from __future__ import annotations

import re

import pytest
from script_runner import SCRIPTS, run_script

from stageflow_brokers.failpoints import FAILPOINTS

SAMPLE = (
    ("broker.committed", "kill"),
    ("coordinator.history-written", "kill"),
    ("worker.before-settle", "stop"),
    ("pool.exit-seen", "kill"),
)


@pytest.mark.parametrize(("point", "signal"), SAMPLE)
def test_an_accident_at_a_named_point_loses_nothing_and_doubles_no_transition(point: str, signal: str) -> None:
    run = run_script("chaos_points", "-n", "20", "--point", point, "--signal", signal)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    assert "1 runs at 1 points: 0 with violations, 0 not reached" in run.stdout


def test_each_point_is_somewhere_in_the_code_and_each_in_the_code_has_a_meaning() -> None:
    reached: list[str] = []
    for folder in ("brokers", "stageflow_actors"):
        for path in sorted((SCRIPTS.parent / folder).rglob("*.py")):
            reached += re.findall(r'\bfailpoint\("([^"]+)"\)', path.read_text())
    assert sorted(set(reached)) == sorted(FAILPOINTS)
    assert len(FAILPOINTS) >= 30
