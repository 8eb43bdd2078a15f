"""A script that is asked to try nothing says so, and does not end well."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from argument_types import above_zero, from_one, share  # noqa: E402


@pytest.mark.parametrize(
    ("kind", "taken", "refused"),
    [
        (from_one, ["1", "200"], ["0", "-1", "1.5", "many", ""]),
        (above_zero, ["0.1", "2", "1e3"], ["0", "-1", "inf", "nan", "much"]),
        (share, ["0.1", "1"], ["0", "1.01", "nan"]),
    ],
)
def test_only_amounts_that_try_something_are_taken(
    kind: Callable[[str], Any], taken: list[str], refused: list[str]
) -> None:
    assert [kind(text) for text in taken] == [float(text) for text in taken]
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match="must be"):
            kind(text)


@pytest.mark.parametrize(
    "command",
    [("torture.py", "--share", "0"), ("fuzz.py", "-n", "0"), ("simulate.py", "-n", "0"), ("chaos.py", "-n", "0")],
)
def test_a_run_of_nothing_is_refused(command: tuple[str, ...]) -> None:
    line = [sys.executable, str(SCRIPTS / command[0]), *command[1:]]
    run = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2
    assert command[1] in run.stderr.splitlines()[-1]
