"""Values keep type and value through stages, retries and compensations, in a script, a module and a notebook."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "fixtures" / "value_kinds.py"
LEAST_KINDS = 60


@pytest.fixture(scope="module")
def programs() -> dict[str, subprocess.CompletedProcess[str]]:
    """The table's program, run in three ways at once."""
    path = os.pathsep.join([str(PROGRAM.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    commands = {
        "script": [sys.executable, str(PROGRAM)],
        "module": [sys.executable, "-c", "import value_kinds; value_kinds.main()"],
        "notebook": [sys.executable, "-"],
    }
    started = {
        name: subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        for name, command in commands.items()
    }
    source = PROGRAM.read_text()
    ended = {}
    for name, process in started.items():
        out, err = process.communicate(source if name == "notebook" else None, timeout=90)
        ended[name] = subprocess.CompletedProcess(commands[name], process.returncode, out, err)
    return ended


@pytest.mark.parametrize("way", ["script", "module", "notebook"])
def test_each_kind_of_value_keeps_its_type_and_value(
    programs: dict[str, subprocess.CompletedProcess[str]], way: str
) -> None:
    program = programs[way]
    assert program.returncode == 0, program.stdout + program.stderr
    last = program.stdout.split()
    assert last[0] == "ok"
    assert int(last[1]) >= LEAST_KINDS
    assert "which does not fit its annotation" not in program.stderr
