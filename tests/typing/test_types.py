"""mypy infers the types that a user expects, and reports wrong uses. One run of mypy checks all files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
INFERRED, MISTAKES = HERE / "inferred.py", HERE / "mistakes.py"

Found = dict[str, dict[int, set[str]]]
"""By file name and line, the codes of the errors."""


@pytest.fixture(scope="module")
def found() -> Found:
    """Run mypy once, with the strict settings of the project."""
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "--no-pretty", str(INFERRED), str(MISTAKES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    errors: Found = {INFERRED.name: {}, MISTAKES.name: {}}
    for file, line, code in re.findall(r"^(.+?):(\d+): error: .*\[([\w-]+)\]$", ran.stdout, re.MULTILINE):
        errors.setdefault(Path(file).name, {}).setdefault(int(line), set()).add(code)
    return errors


def expected() -> dict[int, set[str]]:
    """Return the codes that the comments of `mistakes.py` name, by line."""
    lines = enumerate(MISTAKES.read_text("utf-8").splitlines(), 1)
    named = {number: re.search(r"# error: (.+)$", line) for number, line in lines}
    return {number: set(match.group(1).split(", ")) for number, match in named.items() if match is not None}


def test_mypy_infers_the_types_of_contexts_results_and_decorated_functions(found: Found) -> None:
    assert INFERRED.read_text("utf-8").count("assert_type(") > 40
    assert found[INFERRED.name] == {}


@pytest.mark.parametrize("line", expected(), ids=lambda line: f"line {line}")
def test_mypy_reports_a_wrong_use(found: Found, line: int) -> None:
    assert found[MISTAKES.name].get(line) == expected()[line]


def test_mypy_reports_nothing_else_and_nothing_in_the_package(found: Found) -> None:
    assert set(found[MISTAKES.name]) == set(expected())
    assert set(found) == {INFERRED.name, MISTAKES.name}
