"""A script that is asked to try nothing says so, and does not end well."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest
from script_runner import run_script

from argument_types import above_zero, from_one, share


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
    [("torture", "--share", "0"), ("fuzz", "-n", "0"), ("simulate", "-n", "0"), ("chaos", "-n", "0")],
)
def test_a_run_of_nothing_is_refused(command: tuple[str, ...]) -> None:
    run = run_script(*command)
    assert run.returncode == 2
    assert command[1] in run.stderr.splitlines()[-1]
