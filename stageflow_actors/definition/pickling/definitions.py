"""`Script`: the functions and classes of the program's `__main__`, each pickled on its own.

Code in a worker may look for a name that nothing in its own stage refers to: it reads a pickle that another stage has
written, or starts a process. `Script` sends what can be sent, within a limit, and is silent about the rest: nothing is
known to need it.
"""

from __future__ import annotations

import io
import pickle
import sys
from types import FunctionType
from typing import Any

from stageflow_actors.definition.pickling.code_pickler import CodePickler, DefinitionPickler, Namespace
from stageflow_actors.definition.pickling.importable import ReferenceIndex, resolve

__all__ = ["Script"]

MAX_DEFINITION_BYTES = 256 << 10
"""Largest definition with the constants that it refers to."""
MAX_SCRIPT_BYTES = 4 << 20
"""Most bytes of all definitions together."""


class Script:
    """The definitions of a script, by name, and the attributes of its module. `index` is shared by all its pickles."""

    def __init__(self) -> None:
        self.main: dict[str, Any] = {}
        self.definitions: dict[str, bytes] = {}
        self.index = ReferenceIndex()

    @classmethod
    def of_program(cls) -> Script:
        """Return the definitions of this program's `__main__`."""
        script = cls()
        main = sys.modules.get("__main__")
        if main is None:
            return script
        script.main = Namespace("__main__").__reduce__()[1][1]
        found = {name: value for name, value in list(vars(main).items()) if _is_definition(name, value)}
        names = {id(value): name for name, value in found.items()}
        size = 0
        for name, value in found.items():
            data = _dump(value, names, script.index)
            if data is not None and size + len(data) <= MAX_SCRIPT_BYTES:
                script.definitions[name] = data
                size += len(data)
        return script


class _TooLarge(Exception):
    """A definition refers to more data than is sent without need."""


class _LimitedBuffer(io.BytesIO):
    def write(self, data: Any) -> int:
        """Raise `_TooLarge` beyond the limit."""
        if self.tell() + len(data) > MAX_DEFINITION_BYTES:
            raise _TooLarge
        return super().write(data)


def _is_definition(name: str, value: Any) -> bool:
    kind = type(value)
    if kind.__module__ == "__main__" and not isinstance(value, type):
        has_own = any(getattr(kind, each) is not getattr(object, each) for each in ("__reduce__", "__reduce_ex__"))
        return has_own and _pickles_as(value) == name
    is_named = isinstance(value, (type, FunctionType)) or kind.__module__ in ("functools", "typing")
    module = getattr(value, "__module__", None)
    qualname = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    return is_named and module == "__main__" and name == qualname and resolve("__main__", name) is value


def _pickles_as(value: Any) -> str | None:
    """Return the name by which an object pickles, as some singletons do."""
    try:
        reduced = value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    except Exception:  # noqa: BLE001 - an object of the user, which nothing is known to need
        return None
    return reduced if isinstance(reduced, str) else None


def _dump(value: Any, names: dict[int, str], index: ReferenceIndex) -> bytes | None:
    buffer = _LimitedBuffer()
    pickler: CodePickler = DefinitionPickler(buffer, value, names, index)
    try:
        pickler.dump(value)
    except Exception:  # noqa: BLE001 - nothing is known to need it
        return None
    finally:
        pickler.release()
    return buffer.getvalue()
