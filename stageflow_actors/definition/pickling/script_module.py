"""Stands for the program's script in interpreters that multiprocessing starts within a worker (spawn, forkserver).

multiprocessing runs the module that `__main__.__spec__` names, and makes its globals those of `__main__`. The script
itself is never run again: its definitions arrive from the worker, and each is made when its name is looked up.
"""

from __future__ import annotations

from typing import Any

from stageflow_actors.definition.pickling.namespaces import restore_script

__all__: list[str] = []

_fragment = restore_script()


def __getattr__(name: str) -> Any:
    return getattr(_fragment, name) if _fragment is not None else _missing(name)


def _missing(name: str) -> Any:
    raise AttributeError(f"the worker that started this process has no definition {name!r} of its script")
