"""Places where no runtime may start: while a module is imported for its definitions.

A module that starts a `Runtime` when it is imported, instead of under `if __name__ == "__main__":`, would start another
cluster in each worker that loads it, and these in their workers. `check_may_start` refuses it with one sentence.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["check_may_start", "importing_for"]

_importing = threading.local()


@contextlib.contextmanager
def importing_for(reader: str) -> Iterator[None]:
    """Refuse to start a runtime in this thread while user modules are imported for `reader`, as "a worker"."""
    before = getattr(_importing, "reader", "")
    _importing.reader = reader
    try:
        yield
    finally:
        _importing.reader = before


def check_may_start(modules: Iterable[str] = ()) -> None:
    """Raise `WorkflowDefinitionError` if a module that starts a runtime is being imported for its definitions.

    `modules` are those of the handlers, which workers will import: none of them may be in the middle of its own import.
    """
    reader = getattr(_importing, "reader", "")
    if not reader and getattr(multiprocessing.current_process(), "_inheriting", False):
        reader = "a child process of multiprocessing"
    if not reader and any(map(_is_being_imported, modules)):
        reader = "each worker"
    if reader:
        raise WorkflowDefinitionError(
            f"{_module_frame()} starts a Runtime when it is imported, and {reader} imports it for its definitions: "
            "put the code that starts the Runtime under `if __name__ == '__main__':`"
        )


def _is_being_imported(name: str) -> bool:
    """Return True if the import of the module, or of a package that holds it, has not ended."""
    parts = name.split(".")
    names = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    specs = (getattr(sys.modules.get(each), "__spec__", None) for each in names if each != "__main__")
    return any(getattr(spec, "_initializing", False) for spec in specs)


def _module_frame() -> str:
    """Return the innermost module that is being imported, with file and line."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            name, file = frame.f_globals.get("__name__", "?"), Path(frame.f_code.co_filename).name
            return f"module {name} ({file}, line {frame.f_lineno})"
        frame = frame.f_back
    return "a module"
