"""The source files of the program's own modules, and whether they have changed since.

Workers import these modules again when they start. Modules of Python, of installed packages and of this package are not
watched: they change when the program is not running.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator

from msgspec import Struct

__all__ = ["SourceFile", "loaded_sources"]

MAX_FILES = 2_000
"""Most files that are watched."""

_OWN_PACKAGES = ("stageflow_actors", "stageflow_brokers")


class SourceFile(Struct, frozen=True):
    """A module's file as it was when the cluster started. The path is bytes: it need not be valid text."""

    module: str
    path: bytes
    modified_ns: int
    size: int

    def has_changed(self) -> bool:
        """Return True if the file has other content now; a file that is gone has not."""
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_mtime_ns, status.st_size) != (self.modified_ns, self.size)


def loaded_sources() -> list[SourceFile]:
    """Return the files of the modules that this program has imported from directories of its own."""
    found = []
    for module, path in _own_modules():
        try:
            status = os.stat(path)
        except OSError:
            continue
        found.append(SourceFile(module, os.fsencode(path), status.st_mtime_ns, status.st_size))
        if len(found) == MAX_FILES:
            break
    return found


def _own_modules() -> Iterator[tuple[str, str]]:
    installed = tuple(
        {f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    )
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if not isinstance(path, str) or not path.endswith(".py") or name in ("__main__", "__mp_main__"):
            continue
        if path.startswith(installed) or "site-packages" in path or name.partition(".")[0] in _OWN_PACKAGES:
            continue
        yield name, path
