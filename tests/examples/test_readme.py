"""What the README shows runs, and prints what the README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from stageflow_actors.cli.main import cli

README = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8")
# The examples of the language build on one another's first lines: `test_readme_language.py` runs them.
LANGUAGE = README.partition("## The whole language\n")[2].partition("\n## ")[0]
# A block of Python, and the text block that says what it prints, where one follows at once.
BLOCKS = re.findall(
    r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", README.replace(LANGUAGE, ""), re.DOTALL | re.MULTILINE
)


@pytest.mark.parametrize(("code", "output"), BLOCKS, ids=[f"block {number}" for number in range(1, len(BLOCKS) + 1)])
def test_a_block_of_the_readme_runs_and_prints_what_it_shows(code: str, output: str, tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    script.write_text(code, "utf-8")
    ran = subprocess.run(
        [sys.executable, "-W", "error", script.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == output


def test_the_first_block_is_one_that_prints() -> None:
    assert BLOCKS[0][1]


def commands() -> list[tuple[str, ...]]:
    """Every command that the README's table names, as its words."""
    found: list[tuple[str, ...]] = []
    for cell in re.findall(r"^\| (`stageflow [^|]*) \|", README, re.MULTILINE):
        group = ""
        for span in re.findall(r"`([^`]*)`", cell):
            words = re.findall(r"\b[a-z]+", span)
            words = words[1:] if words[0] == "stageflow" else [group, *words]
            group = words[0]
            found.append(tuple(words[: 2 if isinstance(cli.commands.get(group), click.Group) else 1]))
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_readme_is_there(words: tuple[str, ...]) -> None:
    command: click.Command = cli
    for word in words:
        assert isinstance(command, click.Group)
        found = command.commands.get(word)
        assert found is not None, f"stageflow {' '.join(words)} is in the README and not in the program"
        command = found
