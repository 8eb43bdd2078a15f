"""The docstring of each package is its map: it names every module and subpackage, and nothing that is gone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = sorted(
    path.parent
    for top in (ROOT / "stageflow_actors", ROOT / "brokers" / "stageflow_brokers")
    for path in top.rglob("__init__.py")
)


def contents(package: Path) -> set[str]:
    """Return the names of the modules and subpackages of a package."""
    found = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    return found - {"__init__", "__main__"}


def named(docstring: str) -> tuple[set[str], set[str]]:
    """Return the names in the first column of the map, and all names in backticks of the docstring."""
    column = re.findall(r"^((?:`\w+`(?:, )?)+)  +\S", docstring, re.MULTILINE)
    return set(re.findall(r"`(\w+)`", " ".join(column))), set(re.findall(r"`(\w+)`", docstring))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: str(package.relative_to(ROOT)))
def test_a_package_names_its_modules(package: Path) -> None:
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text("utf-8"))) or ""
    if len(contents(package)) == 1:
        return
    column, everywhere = named(docstring)
    assert column - contents(package) == set(), "names what is not there"
    assert contents(package) - everywhere == set(), "does not name all of its modules"


def test_a_missing_and_a_stale_name_are_noticed() -> None:
    column, everywhere = named("The parts.\n\n====  ====\n`old`  gone; `other` beside it\n====  ====")
    assert column == {"old"}
    assert everywhere == {"old", "other"}
