"""The help of each command: complete, and readable in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from programs import Stageflow

from stageflow_actors.cli.main import cli


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield the command and all commands below it, each with its words."""
    yield path, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, (*path, name))


COMMANDS = dict(commands(cli))
GROUPS = [path for path, command in COMMANDS.items() if isinstance(command, click.Group)]


def name_of(path: tuple[str, ...]) -> str:
    return " ".join(("stageflow", *path))


@pytest.fixture(autouse=True)
def _terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")


@pytest.mark.parametrize("path", COMMANDS, ids=name_of)
def test_help_fits_in_80_columns(stageflow: Stageflow, path: tuple[str, ...]) -> None:
    code, out, err = stageflow(*path, "--help")
    assert (code, err) == (0, "")
    assert [line for line in out.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("path", GROUPS, ids=name_of)
def test_the_list_of_a_group_cuts_no_summary(stageflow: Stageflow, path: tuple[str, ...]) -> None:
    group = COMMANDS[path]
    assert isinstance(group, click.Group)
    _, out, _ = stageflow(*path, "--help")
    listed = out.partition("\nCommands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == sorted(group.commands)
    for line in listed:
        assert not line.endswith("...")
        assert len(line.split()) > 2, f"{line.split()[0]} has no summary"


@pytest.mark.parametrize("path", COMMANDS, ids=name_of)
def test_each_option_is_described(path: tuple[str, ...]) -> None:
    options = [parameter for parameter in COMMANDS[path].params if isinstance(parameter, click.Option)]
    assert [option.opts for option in options if not (option.help or "").strip()] == []


@pytest.mark.parametrize("path", COMMANDS, ids=name_of)
def test_each_command_has_a_summary_and_an_example(path: tuple[str, ...]) -> None:
    text = COMMANDS[path].help or ""
    summary, _, rest = text.partition("\n")
    assert summary.endswith(".")
    assert any(line.strip().startswith(name_of(path)) for line in rest.splitlines())
