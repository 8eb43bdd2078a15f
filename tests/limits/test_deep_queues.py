"""`scripts/limits.py` on a small backlog: memory per message, and recovery in proportion."""

from __future__ import annotations

import re

from script_runner import run_script


def test_bodies_of_deep_queues_leave_memory_and_recovery_is_linear() -> None:
    # Ten thousand bodies stay in memory; the others cost what a message costs, which is 600 bytes and not 1,600.
    ran = run_script("limits", "-n", "100000", "--memory", "140", "--recovery", "60", "--slack", "8")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    small, large = (float(found.replace(",", "")) for found in re.findall(r"bytes: ([\d,]+) MB", ran.stdout))
    per_message = (large - small) * 1e6 / 75_000
    assert per_message < 1000, ran.stdout


def test_a_broken_limit_is_reported() -> None:
    ran = run_script("limits", "-n", "2000", "--memory", "1", "--slack", "1000")
    assert ran.returncode == 1
    assert "broken: memory is over 1 MB" in ran.stdout
