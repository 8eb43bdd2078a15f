"""`scripts/prove` runs the long forms, and the README's commands are such runs.

It is run in a copy of the repository's root, whose .venv is the interpreter of the tests: nothing is installed.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
README = (ROOT / "README.md").read_text("utf-8")
NAMES = re.findall(r"^names=\((.*)\)$", (SCRIPTS / "prove").read_text("utf-8"), re.MULTILINE)[0].split()
COMMANDS = [shlex.split(command) for command in re.findall(r"`\./scripts/prove ([^`]+)`", README)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clone")
    for name in ("scripts", "tests", "examples", "stageflow_actors", "brokers"):
        (root / name).symlink_to(ROOT / name)
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    (root / "pyproject.toml").write_text(project, "utf-8")
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', "utf-8")
    python.chmod(0o700)
    (root / ".venv" / "installed-test").write_text(f"# {root}\n{project}", "utf-8")
    return root


def prove(root: Path, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    line = [str(root / "scripts" / "prove"), *words]
    return subprocess.run(line, cwd=cwd or root, capture_output=True, text=True, timeout=60, check=False)


def test_the_readme_has_commands_and_none_that_bypasses_the_wrapper() -> None:
    assert len(COMMANDS) >= 9
    bare = [name for name in re.findall(r"scripts/(\w+)\.py", README) if name in NAMES]
    assert bare == []


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_of_the_readme_names_a_script_and_options_that_it_has(command: list[str], root: Path) -> None:
    name, *words = command
    assert name in NAMES
    said = prove(root, name, "--help")
    for word in words:
        if word.startswith("-"):
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", said.stdout), word


@pytest.mark.parametrize("name", NAMES)
def test_each_script_starts_from_anywhere(name: str, root: Path, tmp_path: Path) -> None:
    ran = prove(root, name, "--help", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.lower().startswith("usage")


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_without_a_name_it_lists_them_with_what_they_do(words: tuple[str, ...], root: Path) -> None:
    ran = prove(root, *words)
    assert ran.returncode == 0
    for name in NAMES:
        source = (SCRIPTS / f"{name}.py").read_text("utf-8")
        first = source.partition('"""')[2].partition("\n")[0]
        assert re.search(rf"^ *{name} +{re.escape(first)}$", ran.stdout, re.MULTILINE), ran.stdout


@pytest.mark.parametrize("name", ["nix", "fuzz.py", "fuzz limits", "../demo"])
def test_an_unknown_name_is_one_line_and_wrong_usage(name: str, root: Path) -> None:
    ran = prove(root, name, "--help")
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1
    assert name in ran.stderr


def test_exit_codes_and_arguments_pass_through(root: Path) -> None:
    ran = prove(root, "fuzz", "-n", "0")
    assert ran.returncode == 2
    assert "-n" in ran.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["prove", *(f"{name}.py" for name in NAMES)])
def test_it_can_be_started_as_it_lies_there(name: str) -> None:
    assert (SCRIPTS / name).stat().st_mode & 0o111
