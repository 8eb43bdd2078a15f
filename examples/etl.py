"""A pipeline over real input: how Python's own standard library is written.

    python examples/etl.py                       # the library of the Python that runs this
    python examples/etl.py --folder src          # or any other folder of Python files

Extract: list the files. Transform: parse and measure each file, several at a time, in worker processes. A file that
does not parse (the library has some, as tests of its parser) is recorded, and the survey continues. Load: write the
results into a SQLite database. Kill the program while it measures and run it again with the same `--data`: it
continues.
"""

from __future__ import annotations

import ast
import os
import sqlite3
import sysconfig
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from stageflow_actors import Runtime, StageError, Workflow

NOT_OURS = {"site-packages", "dist-packages", "__pycache__"}


@dataclass
class Module:
    """The figures of one file. `longest` is the length of its longest function, in lines."""

    path: str
    lines: int
    functions: int
    classes: int
    longest: int
    imports: list[str]


@dataclass
class Survey:
    """The context: the folder, its files, and the figures of each file (None: it does not parse)."""

    folder: str
    database: str
    files: list[str] = field(default_factory=list)
    modules: list[dict[str, Any] | None] = field(default_factory=list)
    loaded: int = 0
    unreadable: list[str] = field(default_factory=list)

    def validate(self) -> None:
        if not Path(self.folder).is_dir():
            raise ValueError(f"{self.folder} is not a directory")


survey = Workflow("python-survey", context=Survey)


@survey.stage
def list_files(survey: Survey) -> None:
    folder = Path(survey.folder)
    found = (path.relative_to(folder) for path in folder.rglob("*.py"))
    survey.files = sorted(str(path) for path in found if not NOT_OURS & set(path.parts))
    if not survey.files:
        raise StageError(f"there are no Python files below {folder}")


def measure(file: list[str]) -> dict[str, Any]:
    """Measure one file, given as (folder, path below it). Raises if it cannot be read or parsed."""
    folder, path = file
    source = Path(folder, path).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler warns of the style of the files; the survey does not report it
        tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return {
        "path": path,
        "lines": source.count(b"\n"),
        "functions": len(functions),
        "classes": sum(isinstance(node, ast.ClassDef) for node in ast.walk(tree)),
        "longest": max(((each.end_lineno or 0) - each.lineno + 1 for each in functions), default=0),
        "imports": sorted(imported(tree)),
    }


def imported(tree: ast.AST) -> set[str]:
    """Return the top-level modules that a file imports, at any place in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return found


survey.add_map(
    "measure",
    measure,
    over=lambda survey: [[survey.folder, path] for path in survey.files],
    into="modules",
    actors=min(4, os.cpu_count() or 2),
    timeout=60,
    max_failures=100,
)


@survey.stage(timeout=120)
def load(survey: Survey) -> None:
    """Write everything in one transaction that can be repeated: a crash in between leaves no partial result."""
    survey.unreadable = [path for path, found in zip(survey.files, survey.modules, strict=True) if found is None]
    rows = [Module(**found) for found in survey.modules if found is not None]
    with closing(sqlite3.connect(survey.database)) as db, db:
        db.execute("DROP TABLE IF EXISTS modules")
        db.execute("DROP TABLE IF EXISTS imports")
        db.execute("CREATE TABLE modules (path PRIMARY KEY, lines, functions, classes, longest)")
        db.execute("CREATE TABLE imports (path, module)")
        db.executemany(
            "INSERT INTO modules VALUES (?, ?, ?, ?, ?)",
            [(row.path, row.lines, row.functions, row.classes, row.longest) for row in rows],
        )
        db.executemany("INSERT INTO imports VALUES (?, ?)", [(row.path, name) for row in rows for name in row.imports])
    survey.loaded = len(rows)
    survey.modules = []  # they are in the database now, and the result stays small


def report(database: str | Path, result: Survey) -> Iterator[str]:
    """Yield the lines of the report, from the database."""
    with closing(sqlite3.connect(database)) as db:
        files, lines, functions, classes = db.execute(
            "SELECT count(*), sum(lines), sum(functions), sum(classes) FROM modules"
        ).fetchone()
        yield f"{files:,} files, {lines or 0:,} lines, {functions or 0:,} functions, {classes or 0:,} classes"
        yield f"{len(result.unreadable)} do not parse{': ' if result.unreadable else ''}{', '.join(result.unreadable)}"
        yield ""
        yield "most imported:"
        counted = Counter(dict(db.execute("SELECT module, count(*) FROM imports GROUP BY module")))
        for name, times in sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))[:8]:
            yield f"  {times:>6,}  {name}"
        yield ""
        yield "longest functions:"
        for path, longest in db.execute("SELECT path, longest FROM modules ORDER BY longest DESC, path LIMIT 5"):
            yield f"  {longest:>6,} lines in {path}"


@click.command()
@click.option(
    "--folder",
    default=sysconfig.get_paths()["stdlib"],
    show_default=True,
    type=click.Path(exists=True, file_okay=False, resolve_path=True),
    help="The directory to survey.",
)
@click.option("--database", default="survey.db", show_default=True, help="SQLite file for the results.")
@click.option(
    "--data", default=None, help="Data directory of the cluster, to continue after a crash (default: temporary)."
)
def main(folder: str, database: str, data: str | None) -> None:
    """Survey the Python files below a folder: parse them in worker processes, load the figures into SQLite, report."""
    with tempfile.TemporaryDirectory() as temporary, Runtime(survey, data_dir=data or temporary) as runtime:
        context = Survey(folder, str(Path(database).resolve()))
        result = runtime.execute(survey, context, instance_id=f"survey of {folder}")
        result.raise_for_status()
        assert result.context is not None
        for line in report(database, result.context):
            click.echo(line)


if __name__ == "__main__":
    main()
