"""Modules, classes and objects that a child process finds by importing them.

The result of a search is a name, never a value: an object is the same one after an import only if it is an attribute
of a module that the child can import.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from types import ModuleType
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

__all__ = ["ReferenceIndex", "is_by_value", "is_importable_class", "is_importable_module", "is_stateless", "resolve"]


def is_importable_module(name: str, module: ModuleType) -> bool:
    """Return True if `import name` finds this module in a process with the same import path."""
    path: Any = None
    spec = None
    parts = name.split(".")
    try:
        for count in range(1, len(parts) + 1):
            part = ".".join(parts[:count])
            found = (finder.find_spec(part, path) for finder in sys.meta_path)
            spec = next((each for each in found if each is not None), None)
            if spec is None:
                return False
            path = spec.submodule_search_locations
        file = getattr(module, "__file__", None)
        if file is None or spec is None or spec.origin is None or not spec.has_location:
            return True
        return bool(os.path.realpath(file) == os.path.realpath(spec.origin))
    except Exception:  # noqa: BLE001 - finders are foreign code; after an error the module is pickled by name
        return True


def is_by_value(module: Any) -> bool:
    """Return True if what the module `module` (a name) defines is sent by value."""
    by_value = {"__main__", *cloudpickle.list_registry_pickle_by_value()}
    return isinstance(module, str) and any(module == name or module.startswith(f"{name}.") for name in by_value)


def resolve(module: Any, qualname: str) -> Any:
    """Return the attribute `qualname` of a loaded module; None if there is none."""
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = getattr(found, name, None)
    return found


def is_importable_class(kind: type[Any]) -> bool:
    """Return True if a child process finds the class by its name."""
    return not is_by_value(kind.__module__) and resolve(kind.__module__, kind.__qualname__) is kind


def is_stateless(value: Any) -> bool:
    """Return True if identity is all that an object has: a sentinel such as `dataclasses.MISSING` or `object()`."""
    kind = type(value)
    # `getattr`: mypy takes the methods of two types for different ones.
    if getattr(value, "__dict__", None) or getattr(kind, "__eq__", None) is not object.__eq__:
        return False
    plain = all(
        getattr(kind, name, None) is getattr(object, name, None)
        for name in ("__reduce__", "__reduce_ex__", "__getstate__", "__getnewargs__", "__getnewargs_ex__")
    )
    try:
        return plain and value.__getstate__() is None
    except TypeError:
        return False


class ReferenceIndex:
    """Finds the importable module of which an object is an attribute. It looks at the modules once, when needed."""

    def __init__(self) -> None:
        self._names: dict[int, tuple[str, str]] | None = None
        self._importable: dict[str, bool] = {}

    def is_importable(self, module: str) -> bool:
        """Return True if a child process can import this module, which is loaded."""
        found = self._importable.get(module)
        if found is None:
            found = self._importable[module] = is_importable_module(module, sys.modules[module])
        return found

    def find(self, value: Any) -> tuple[str, str, str] | None:
        """Return module, attribute and class name of an object; None if it is no attribute of an importable module."""
        kind = type(value)
        home = sys.modules.get(kind.__module__)
        if home is not None and not is_by_value(kind.__module__):
            for name, each in list(vars(home).items()):
                if each is value:
                    return kind.__module__, name, kind.__qualname__
        if self._names is None:
            self._names = _attributes()
        found = self._names.get(id(value))
        # Another object may have got the place in memory of one that is gone.
        if found is None or resolve(*found) is not value or not self.is_importable(found[0]):
            return None
        return *found, kind.__qualname__


def _attributes() -> dict[int, tuple[str, str]]:
    """Return the place of each attribute of a module, by the identity of its value.

    Private ones of installed packages are not among them: they may be set only when a function is called.
    """
    found: dict[int, tuple[str, str]] = {}
    for module_name, module in sorted(sys.modules.items(), key=lambda item: item[0].count(".")):
        if not isinstance(module, ModuleType) or is_by_value(module_name) or module_name == "__mp_main__":
            continue
        has_private = _is_of_program(module)
        for name, value in list(vars(module).items()):
            if not name.startswith("__" if has_private else "_"):
                found.setdefault(id(value), (module_name, name))
    return found


def _is_of_program(module: ModuleType) -> bool:
    path = getattr(module, "__file__", None)
    installed = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    return isinstance(path, str) and "site-packages" not in path and not path.startswith(installed)
