"""Imports the workflow or runtime that MODULE:NAME names. Each mistake is one sentence, never a traceback.

A path is imported under the name of its file, with its folder on `sys.path`, and not run as a script: worker
processes import the same module by that name.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import click

import stageflow_actors
from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["load"]

_PACKAGE = str(Path(stageflow_actors.__file__).parent) + os.sep


def load(target: str, *kinds: type[Any]) -> Any:
    """Return the object that `target` names, an instance of one of `kinds`. Raises `click.UsageError`."""
    from stageflow_actors.definition.guesses import closest
    from stageflow_actors.definition.workflow import workflow_of

    wanted = " or ".join(kind.__name__ for kind in kinds)
    module_name, _, name = target.rpartition(":")
    if not module_name and not name.endswith(".py"):
        raise click.UsageError(f"{target!r} names no module: write MODULE:NAME, as in orders.py:orders")
    if not module_name or (module_name and name.endswith(".py")):
        module_name, name = target, ""
    module = _module(module_name)
    if not name:
        raise click.UsageError(f"name a {wanted}: {_choices(module_name, module, kinds)}")
    found: Any = module
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            fitting = [each for each, value in vars(module).items() if isinstance(value, kinds)]
            meant = closest(name, fitting)
            hint = f" (did you mean {module_name}:{meant}?)" if meant else ""
            raise click.UsageError(
                f"there is no {name!r} in {module_name}{hint}: {_choices(module_name, module, kinds)}"
            ) from None
    found = workflow_of(found)
    if not isinstance(found, kinds):
        raise click.UsageError(f"{target} is {_kind_of(found)}, not a {wanted}: {_choices(module_name, module, kinds)}")
    return found


def _module(name: str) -> ModuleType:
    try:
        cwd = os.getcwd()
    except FileNotFoundError:
        raise click.UsageError(
            "the working directory has been removed: change to a directory that exists, and try again"
        ) from None
    if cwd not in sys.path:
        sys.path.insert(0, cwd)
    if name.endswith(".py") or os.sep in name:
        return _from_path(Path(name))
    if name.startswith("."):
        raise click.UsageError(f"{name!r} is not a module: write a path as in ./orders.py:orders, or orders:orders")
    try:
        return _import(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            hint = f"; did you mean {name}.py?" if Path(f"{name}.py").exists() else ""
            raise click.UsageError(f"no module {name!r}, neither in {cwd} nor installed{hint}") from None
        raise _unimportable(name, error) from None


def _from_path(path: Path) -> ModuleType:
    from stageflow_actors.definition.guesses import closest

    path = path.absolute()
    if not path.is_file():
        meant = closest(path.name, [each.name for each in path.parent.glob("*.py")])
        raise click.UsageError(f"no file {path}" + (f": did you mean {meant}?" if meant else ""))
    name = path.stem
    if path.suffix != ".py" or not name.isidentifier():
        raise click.UsageError(
            f"{path.name} cannot be imported by worker processes: rename it to a .py file whose name consists of "
            "letters, digits and underscores"
        )
    folder = str(path.parent)
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)
    try:
        module = _import(name)
    except ModuleNotFoundError as error:
        raise _unimportable(path.name, error) from None
    origin = getattr(module, "__file__", None)
    if origin is None or not os.path.samefile(origin, path):
        raise click.UsageError(
            f"{path.name} cannot be imported: the name {name!r} belongs to {origin or 'a module of Python itself'}; "
            "rename the file"
        )
    return module


def _import(name: str) -> ModuleType:
    from stageflow_actors.runtime.system.start_guard import importing_for

    try:
        with importing_for("`stageflow`"):
            return importlib.import_module(name)
    except ModuleNotFoundError:
        raise
    except SystemExit:
        raise click.UsageError(
            f"{name} exited while it was imported: put the code that it runs under `if __name__ == '__main__':`"
        ) from None
    except WorkflowDefinitionError as error:
        raise click.UsageError(f"{name} cannot be imported: {error}{_place(error)}") from None
    except Exception as error:  # noqa: BLE001 - user code may raise anything
        raise _unimportable(name, error) from None


def _unimportable(name: str, error: Exception) -> click.UsageError:
    where = "" if isinstance(error, SyntaxError) else _place(error)  # the text of a SyntaxError contains the place
    return click.UsageError(f"{name} cannot be imported: {type(error).__name__}: {error}{where}")


def _place(error: Exception) -> str:
    """Return file and line of the innermost frame of user code, in parentheses, or ""."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    if isinstance(error, WorkflowDefinitionError):
        frames = [f for f in frames if not f.filename.startswith(_PACKAGE)]
    frames = [f for f in frames if f.filename != __file__]
    place = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    return "" if not place or place in str(error) else f" ({place})"


def _choices(module_name: str, module: ModuleType, kinds: tuple[type[Any], ...]) -> str:
    found = [
        f"{module_name}:{name} ({type(value).__name__})"
        for name, value in vars(module).items()
        if isinstance(value, kinds)
    ]
    return f"it has {', '.join(found)}" if found else f"it has no {' or '.join(kind.__name__ for kind in kinds)}"


def _kind_of(found: Any) -> str:
    return "a class" if isinstance(found, type) else _a(type(found).__name__)


def _a(word: str) -> str:
    return f"{'an' if word[:1] in 'aeiouAEIOU' else 'a'} {word}"
