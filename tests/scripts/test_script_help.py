"""The help of each long check fits a terminal of 80 columns."""

from __future__ import annotations

import re

import pytest
from script_runner import SCRIPTS, run_script

NAMES = re.findall(r"^names=\((.*)\)$", (SCRIPTS / "prove").read_text("utf-8"), re.MULTILINE)[0].split()


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_script_fits_80_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = run_script(name, "--help")
    assert ran.returncode == 0, ran.stderr
    assert [line for line in ran.stdout.splitlines() if len(line) > 80] == []
