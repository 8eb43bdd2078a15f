"""MODULE:NAME is imported, or the error is one sentence with the reason."""

import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

from stageflow_actors.cli.importer import load


class Thing:
    pass


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    things = ModuleType("things")
    things.Thing = Thing  # type: ignore[attr-defined]
    sys.modules["things"] = things
    (tmp_path / "flow_a.py").write_text("from things import Thing\none = Thing()\nother = 5\n")
    return tmp_path


def refused(target: str) -> str:
    with pytest.raises(click.UsageError) as caught:
        load(target, Thing)
    return caught.value.format_message()


def test_a_module_is_found_by_its_name_in_the_working_directory(folder: Path) -> None:
    assert isinstance(load("flow_a:one", Thing), Thing)


def test_a_path_is_imported_under_its_name_so_that_workers_find_it(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "helper_b.py").write_text("value = 7\n")
    (folder / "deep" / "flow_b.py").write_text("import helper_b\nfrom things import Thing\none = Thing()\n")
    load("deep/flow_b.py:one", Thing)
    assert sys.modules["flow_b"].helper_b.value == 7
    assert str(folder / "deep") in sys.path


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nowhere:one", ["no module 'nowhere'"]),
        ("flow_a.py.txt:one", ["no module"]),
        ("nowhere.py:one", ["no file"]),
        ("flow_a:nothing", ["no 'nothing'", "flow_a:one (Thing)"]),
        ("flow_a:other", ["is an int, not a Thing", "flow_a:one (Thing)"]),
        ("flow_a.py", ["name a Thing", "flow_a.py:one"]),
        ("flow_a", ["write MODULE:NAME"]),
    ],
)
def test_what_cannot_be_found_is_reported_with_what_there_is(folder: Path, target: str, words: list[str]) -> None:
    message = refused(target)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\nraise ValueError('boom')\n", ["ValueError: boom", "flow_c.py, line 2"]),
        ("def (:\n", ["SyntaxError", "line 1"]),
        ("import does_not_exist\n", ["No module named 'does_not_exist'", "flow_c.py, line 1"]),
        ("raise SystemExit(3)\n", ["__main__"]),
    ],
)
@pytest.mark.parametrize("target", ["flow_c:one", "flow_c.py:one"])
def test_what_cannot_be_imported_is_reported_with_its_line(
    folder: Path, text: str, words: list[str], target: str
) -> None:
    (folder / "flow_c.py").write_text(text)
    message = refused(target)
    for word in words:
        assert word in message


def test_a_file_whose_name_is_taken_or_is_no_name_is_refused(folder: Path) -> None:
    (folder / "json.py").write_text("from things import Thing\none = Thing()\n")
    assert "rename the file" in refused("json.py:one")
    (folder / "my-flow.py").write_text("")
    assert "rename it" in refused("my-flow.py:one")
