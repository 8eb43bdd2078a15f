"""README and guides: their blocks run and print what they show, their commands exist, their links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from stageflow_actors.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
OPERATIONS = (ROOT / "examples" / "operations.md").read_text("utf-8")
# The constructs build on one another's first lines: `test_constructs.py` runs them. The block behind them is a program.
TESTING = (ROOT / "examples" / "constructs.md").read_text("utf-8").partition("\n## Testing a workflow\n")[2]
GUIDES = ["README.md", *(f"examples/{path.name}" for path in sorted((ROOT / "examples").glob("*.md"))), "CHANGELOG.md"]


def blocks(page: str) -> list[tuple[str, str]]:
    """Each block of Python, and the text block with what it prints, where one follows at once."""
    return re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", page, re.DOTALL | re.MULTILINE)


BLOCKS = [
    pytest.param(code, output, id=f"{page} block {number}")
    for page, text in (("README", README), ("operations", OPERATIONS), ("constructs", TESTING))
    for number, (code, output) in enumerate(blocks(text), 1)
]


@pytest.mark.parametrize(("code", "output"), BLOCKS)
def test_a_block_of_a_guide_runs_and_prints_what_it_shows(code: str, output: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
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
    assert blocks(README)[0][1]


def commands() -> list[tuple[str, ...]]:
    """Every command in the table of operations.md, as its words."""
    found: list[tuple[str, ...]] = []
    for cell in re.findall(r"^\| (`stageflow [^|]*) \|", OPERATIONS, re.MULTILINE):
        group = ""
        for span in re.findall(r"`([^`]*)`", cell):
            words = re.findall(r"\b[a-z]+", span)
            words = words[1:] if words[0] == "stageflow" else [group, *words]
            group = words[0]
            found.append(tuple(words[: 2 if isinstance(cli.commands.get(group), click.Group) else 1]))
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_table_exists(words: tuple[str, ...]) -> None:
    command: click.Command = cli
    for word in words:
        assert isinstance(command, click.Group)
        found = command.commands.get(word)
        assert found is not None, f"stageflow {' '.join(words)} is in operations.md and not in the program"
        command = found


def leaves(command: click.Command, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The commands of the program, as their words."""
    if not isinstance(command, click.Group):
        return [words]
    return [leaf for name, below in command.commands.items() for leaf in leaves(below, (*words, name))]


def test_every_command_of_the_program_is_in_the_table() -> None:
    assert sorted(commands()) == sorted(leaves(cli))


def test_the_readme_is_a_front_page() -> None:
    assert len(README.splitlines()) <= 350


def headings(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("guide", GUIDES)
def test_a_link_leads_to_a_file_or_a_heading(guide: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / guide).read_text("utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / guide).parent / path if path else ROOT / guide
        assert file.exists(), target
        assert not anchor or anchor in headings(file.read_text("utf-8")), target
