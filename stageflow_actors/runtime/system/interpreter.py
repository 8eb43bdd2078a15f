"""`python_interpreter`: the interpreter that runs the processes of a cluster.

`sys.executable` is empty in an embedded interpreter, or the program that embeds it. That program must never be started
in the place of an interpreter: it would run once more.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

from stageflow_actors.errors import StageFlowError

__all__ = ["python_interpreter"]

_INTERPRETER_NAME = re.compile(r"(python|pypy)[\d.]*[a-z]*(\.exe)?")
_VERSION = "import sys; print(sys.implementation.cache_tag, sys.maxsize)"
VERSION_SECONDS = 20.0
"""Longest wait for the version of an interpreter."""


def python_interpreter() -> str:
    """Return the path of an interpreter of this version.

    Raises `StageFlowError` if there is none, as in a frozen program.
    """
    if getattr(sys, "frozen", False) or hasattr(sys.modules.get("__main__"), "__compiled__"):
        raise StageFlowError(
            "a frozen program (PyInstaller, cx_Freeze, Nuitka …) has no Python interpreter, and the processes of a "
            "cluster need one: serve the workflows with Python, as `stageflow up MODULE:RUNTIME --data DIRECTORY`, and "
            "use Runtime.connect(DIRECTORY) in the frozen program"
        )
    return _find(sys.executable or "")


@cache
def _find(given: str) -> str:
    if _is_interpreter(given) and _is_same_file(given, "/proc/self/exe"):
        return given
    for path in _candidates(given):
        if _is_interpreter(path) and _has_this_version(path):
            return path
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    raise StageFlowError(
        f"sys.executable is {given!r}, which is no interpreter of Python {version}, and there is none in {sys.prefix}: "
        f"set sys.executable to the path of one before the start of the runtime"
    )


def _candidates(given: str) -> Iterator[str]:
    yield given
    yield getattr(sys, "_base_executable", None) or ""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for prefix in dict.fromkeys((sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix)):
        for each in (name, "python3", "python"):
            yield os.path.join(prefix, "bin", each)
    yield shutil.which(name) or ""


def _is_interpreter(path: str) -> bool:
    named = _INTERPRETER_NAME.fullmatch(os.path.basename(path)) is not None
    return named and os.path.isabs(path) and os.path.isfile(path)


def _is_same_file(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def _has_this_version(path: str) -> bool:
    try:
        answer = subprocess.run(
            [path, "-I", "-c", _VERSION],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=VERSION_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return answer.stdout.split() == [str(sys.implementation.cache_tag), str(sys.maxsize)]
