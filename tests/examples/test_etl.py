"""The pipeline example: on Python files of this machine, checked against a plain loop over the same files."""

from __future__ import annotations

import ast
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import warnings
from contextlib import closing
from pathlib import Path

import pytest

import etl
from stageflow_actors import InvalidContext
from stageflow_actors.testing import run

ROOT = Path(__file__).resolve().parents[2]
STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Some packages of the standard library, and two files that do not parse."""
    folder = tmp_path / "library"
    for name in ("json", "logging", "html"):
        shutil.copytree(STDLIB / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "bad.py").write_text("def f(:\n", "utf-8")
    (folder / "bad_coding.py").write_bytes(b"# coding: no-such-coding\n")
    (folder / "site-packages").mkdir()
    (folder / "site-packages" / "theirs.py").write_text("x = 1\n", "utf-8")
    return folder


def lines_of(folder: Path) -> dict[str, int]:
    """By a loop: each file that parses, and its lines."""
    found = {}
    for path in folder.rglob("*.py"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ast.parse(path.read_bytes())
            except SyntaxError:
                continue
        found[str(path.relative_to(folder))] = path.read_bytes().count(b"\n")
    found.pop("site-packages/theirs.py", None)
    return found


def test_the_example_surveys_a_folder_and_reports_what_does_not_parse(folder: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "etl.py"), "--folder", str(folder)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    expected = lines_of(folder)
    first, second, *_ = ran.stdout.splitlines()
    assert first.startswith(f"{len(expected)} files, {sum(expected.values()):,} lines, ")
    assert second == "2 do not parse: bad.py, bad_coding.py"
    with closing(sqlite3.connect(tmp_path / "survey.db")) as db:
        assert dict(db.execute("SELECT path, lines FROM modules")) == expected
        imports = {name for (name,) in db.execute("SELECT module FROM imports WHERE path = 'json/decoder.py'")}
    assert imports == {"re", "json", "_json"}
    assert "most imported:" in ran.stdout
    assert "longest functions:" in ran.stdout


def test_the_files_that_the_library_has_to_test_its_parser_are_no_obstacle(tmp_path: Path) -> None:
    folder = STDLIB / "test" / "tokenizedata"
    if not folder.is_dir():
        pytest.skip("this Python comes without its tests")
    result = run(etl.survey, etl.Survey(str(folder), str(tmp_path / "db")))
    result.raise_for_status()
    assert result.context is not None
    assert result.context.loaded == len(lines_of(folder))
    assert "badsyntax_3131.py" in result.context.unreadable or sys.version_info >= (3, 13)
    assert sorted([*result.context.unreadable, *lines_of(folder)]) == result.context.files


def test_too_many_files_that_do_not_parse_are_an_error(tmp_path: Path) -> None:
    for number in range(101):
        (tmp_path / f"bad{number:03}.py").write_text("(", "utf-8")
    result = run(etl.survey, etl.Survey(str(tmp_path), str(tmp_path / "db")))
    assert result.status.value == "failed"
    assert result.error is not None
    assert (
        "101 of 101 items of 'measure' failed, more than max_failures=100; the first was item 0: SyntaxError"
        in result.error
    )


def test_a_folder_that_is_not_there_is_refused_at_the_door(tmp_path: Path) -> None:
    with pytest.raises(InvalidContext, match="is not a directory"):
        run(etl.survey, etl.Survey(str(tmp_path / "none"), "db"))


def test_a_folder_without_python_fails_at_once(tmp_path: Path) -> None:
    result = run(etl.survey, etl.Survey(str(tmp_path), str(tmp_path / "db")))
    assert (result.failed_stage, result.error) == (
        "list-files",
        f"StageError: there are no Python files below {tmp_path}",
    )


def test_its_help_describes_it() -> None:
    ran = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "etl.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "Survey the Python files below a folder" in ran.stdout
