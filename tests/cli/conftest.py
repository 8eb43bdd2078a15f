"""The `stageflow` command, run in this process or as a program."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from effect_log import effects
from filled_data_dir import filled
from programs import STAGEFLOW, Command, Stageflow

__all__ = ["effects", "filled"]


@pytest.fixture
def stageflow(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Stageflow:
    """Runs a command in this process: exit code, stdout, stderr."""
    from stageflow_actors.cli.main import main

    monkeypatch.delenv("STAGEFLOW_DATA", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        said = capfd.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Runs a command as a program of its own, in `tmp_path`."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "STAGEFLOW_DATA"}
        return subprocess.run(
            [*STAGEFLOW, *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
            **options,
        )

    return run
