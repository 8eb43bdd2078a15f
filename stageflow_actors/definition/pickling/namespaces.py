"""Namespaces of modules that a worker cannot import: the program's `__main__`, and modules outside the import path.

Such a module is a fragment in the worker: a module object under its own name in `sys.modules`, whose attributes are
the functions, classes and other globals that arrived, each set as soon as it is made. The functions have its `__dict__`
as their globals, so that everything which looks names up in the module finds them: pickle, multiprocessing,
`typing.get_type_hints`, caches. The source is never run again.

A name that no code of this worker refers to is made on demand from the program's definitions (`add_definitions`): the
worker of another stage may have pickled an object of that class. There is one namespace per module and process, and
the first definition of a name stays.
"""

from __future__ import annotations

import builtins
import fcntl
import importlib
import io
import os
import pickle
import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from stageflow_actors.errors import WorkflowDefinitionError

__all__ = [
    "LATER",
    "RUN_ID",
    "SCRIPT_ENVIRON",
    "add_definitions",
    "attribute_of",
    "define",
    "is_filled",
    "open_namespace",
    "publish_definitions",
    "rebuilt",
    "restore_script",
]

RUN_ID = os.urandom(8).hex()
"""Identifies the program: code that is loaded in the process that dumped it uses the module itself."""

SCRIPT_ENVIRON = "STAGEFLOW_SCRIPT"
"""The environment variable that names the file of the definitions, for interpreters that multiprocessing starts."""

_SCRIPT_MODULE = "stageflow_actors.definition.pickling.script_module"
_MIN_DESCRIPTOR = 200

_fragments: dict[str, _Fragment] = {}
_rebuilt: dict[str, Any] = {}
_filled: set[str] = set()


class Later:
    """The type of `LATER`, which stands for a global that is another definition.

    The other definition is made when the one that refers to it is complete.
    """


LATER = Later()


class _Fragment(ModuleType):
    """A module of which only the attributes that code refers to exist; others are made from its definitions."""

    def __init__(self, name: str, attributes: dict[str, Any]) -> None:
        super().__init__(name, attributes.get("__doc__"))
        vars(self).update(attributes)
        vars(self)["__builtins__"] = builtins
        self.__dict__.setdefault("__package__", "")

    def __getattr__(self, name: str) -> Any:
        definitions = _definitions.get(self.__name__, {})
        data = definitions.pop(name, None)
        if data is None:
            raise AttributeError(
                f"module {self.__name__!r} has no attribute {name!r} in this worker process: of a script, workers "
                "have its functions and classes and what these refer to"
            )
        try:
            _load_definition(self, name, data)
        except BaseException:
            definitions.setdefault(name, data)
            raise
        return vars(self)[name]


_keep_alive: list[Any] = []
"""Modules that fragments have replaced: the globals of a module are cleared when it is freed."""
_definitions: dict[str, dict[str, bytes]] = {}
_pending: list[tuple[str, str]] = []


def open_namespace(name: str, attributes: dict[str, Any], run_id: str) -> dict[str, Any]:
    """Return the globals of the fragment `name`, which is made at the first call."""
    if run_id == RUN_ID:
        return vars(sys.modules[name]) if name in sys.modules else vars(_fragment(name, attributes))
    return vars(_fragment(name, attributes))


def _fragment(name: str, attributes: dict[str, Any]) -> _Fragment:
    fragment = _fragments.get(name)
    if fragment is None:
        fragment = _fragments[name] = _Fragment(name, attributes)
        if name == "__main__":
            # multiprocessing starts interpreters that import `__spec__.name`, or else run `__file__` again.
            fragment.__spec__ = _ScriptSpec(attributes.get("__package__") or "")
        _keep_alive.append(sys.modules.get(name))
        sys.modules[name] = fragment
    return fragment


class _ScriptSpec(ModuleSpec):
    def __init__(self, package: str) -> None:
        super().__init__(_SCRIPT_MODULE, None)
        self._package = package

    @property
    def parent(self) -> str:
        """The package of the script, for relative imports in handlers."""
        return self._package


def define(namespace: dict[str, Any], name: str, value: Any) -> None:
    """Set a global unless it exists: code that has run may have changed it."""
    if value is LATER:
        if name not in namespace:
            _pending.append((namespace["__name__"], name))
    else:
        namespace.setdefault(name, value)


def rebuilt(token: str | None, make: Any, where: tuple[dict[str, Any], str] | None) -> Any:
    """Return the object that was made for `token`, or `make()`, which becomes a global if it is one in the program."""
    found = None if token is None else _rebuilt.get(token)
    if found is None:
        found = make()
        if token is not None:
            found = _rebuilt.setdefault(token, found)
    if where is not None:
        namespace, name = where
        define(namespace, name, found)
    return found


def is_filled(token: str | None) -> bool:
    """Return True if the object for `token` has its state already, which code that has run may have changed."""
    if token is None:
        return False
    if token in _filled:
        return True
    _filled.add(token)
    return False


def attribute_of(module: str, name: str, kind: str) -> Any:
    """Return an attribute of an importable module, an object of the class `kind` in the program."""
    found = getattr(importlib.import_module(module), name, None)
    if type(found).__qualname__ != kind:
        raise WorkflowDefinitionError(
            f"{module}.{name} is a {kind} in the program and a {type(found).__qualname__} in worker processes, which "
            "import the module again: make it in a service factory, Runtime(services={...})"
        )
    return found


def add_definitions(module: str, definitions: dict[str, bytes]) -> None:
    """Add pickled definitions of a fragment, by name; each one is loaded when something looks for its name."""
    known = _definitions.setdefault(module, {})
    for name, data in definitions.items():
        known.setdefault(name, data)


def _load_definition(fragment: _Fragment, name: str, data: bytes) -> None:
    define(vars(fragment), name, _DefinitionUnpickler(data, fragment).load())
    while _pending:
        module, wanted = _pending.pop()
        if wanted not in vars(_fragments[module]):
            getattr(_fragments[module], wanted)


class _DefinitionUnpickler(pickle.Unpickler):
    """Other definitions that a definition refers to are attributes of the fragment."""

    def __init__(self, data: bytes, fragment: _Fragment) -> None:
        super().__init__(io.BytesIO(data))
        self._fragment = fragment

    def persistent_load(self, pid: Any) -> Any:
        return getattr(self._fragment, pid)


def publish_definitions(main: dict[str, Any], definitions: dict[str, bytes]) -> None:
    """Write the definitions of `__main__` to a file for the interpreters that multiprocessing starts in this worker.

    The file is anonymous and belongs to this worker, whose child processes end with it. There is one per worker.
    """
    prefix = f"/proc/{os.getpid()}/fd/"
    if os.environ.get(SCRIPT_ENVIRON, "").startswith(prefix):
        return
    fd = os.memfd_create("stageflow-script")
    try:
        with open(fd, "wb", closefd=False) as file:
            pickle.dump((main, definitions), file)
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _MIN_DESCRIPTOR)
    except OSError:
        high = os.dup(fd)  # the limit of open files is lower
    finally:
        os.close(fd)
    os.environ[SCRIPT_ENVIRON] = f"{prefix}{high}"


def restore_script() -> _Fragment | None:
    """Make the fragment of `__main__` in an interpreter that multiprocessing has started; None without definitions."""
    path = os.environ.get(SCRIPT_ENVIRON, "")
    if re.fullmatch(r"/proc/\d+/fd/\d+", path) is None:
        return None  # only a process of the same user can have made such a file
    try:
        with open(path, "rb") as file:
            file.seek(0)
            main, definitions = pickle.load(file)
    except OSError:
        return None
    add_definitions("__main__", definitions)
    return _fragment("__main__", main)
