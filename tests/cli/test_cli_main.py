"""Help, usage errors, and the form of error messages."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from programs import Stageflow

from stageflow_actors.cli.main import cli


def commands(group: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in getattr(group, "commands", {}).items():
        yield (*path, name), command
        yield from commands(command, (*path, name))


@pytest.mark.parametrize(("path", "command"), list(commands(cli)), ids=lambda value: getattr(value, "name", value))
def test_every_command_teaches_by_example(stageflow: Stageflow, path: tuple[str, ...], command: click.Command) -> None:
    code, out, err = stageflow(*path, "--help")
    assert (code, err) == (0, "")
    body = out.partition("\n")[2]
    assert f"stageflow {' '.join(path)}" in body
    assert "--data DIR" in out or hasattr(command, "commands") or path == ("graph",), "which looks at code only"


def test_data_comes_from_the_environment_unless_it_is_given(
    stageflow: Stageflow, filled: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    filled.start("i1", {})
    monkeypatch.chdir(tmp_path)
    assert "stageflow-data" in stageflow("queue", "list")[2]
    monkeypatch.setenv("STAGEFLOW_DATA", str(filled.close()))
    assert stageflow("queue", "list")[0] == 0
    assert stageflow("queue", "list", "--data", tmp_path / "other")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("nope",), 2, "'nope'"),
        (("queue", "nope"), 2, "'nope'"),
        (("queue", "list", "--nope"), 2, "--nope"),
        (("queue", "list", "--output", "xml"), 2, "'xml'"),
        (("instances", "show"), 2, "ID"),
        (("instances", "list", "--limit", "many"), 2, "many"),
        (("queue", "list", "--data", "nowhere"), 1, "directory does not exist"),
        (("journal", "verify", "--data", "."), 1, "no journal"),
        (("history", "vacuum", "--data", "nowhere"), 1, "directory does not exist"),
        (("history", "prune", "--older-than", "5x"), 2, "90d"),
        (("scale", "orders", "pay", "1001"), 2, "1000"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(
    stageflow: Stageflow,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    code: int,
    word: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    said = stageflow(*arguments)
    assert (said[0], said[1], said[2].count("\n")) == (code, "", 1)
    assert word in said[2]
    assert list(tmp_path.iterdir()) == []


def test_without_a_command_the_help_is_shown(stageflow: Stageflow) -> None:
    code, _, err = stageflow()
    assert code == 2
    assert "Commands:" in err


def test_a_file_that_cannot_be_written_is_named_as_it_was_given(stageflow: Stageflow, filled: Any) -> None:
    filled.start("i1", {})
    code, out, err = stageflow("instances", "export", "no/such.csv", "--data", filled.close())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no/such.csv cannot be written: No such file or directory" in err
