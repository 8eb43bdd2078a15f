"""The program's interpreter flags (`-O`, `-W`, `-X`, `-B` …) as arguments for the interpreters of child processes.

Workers run user code and receive all flags. Node and broker run none: they receive the flags that decide what is
imported and how it is compiled, but no filter that turns a warning into an error, and no diagnostics.
"""

from __future__ import annotations

import subprocess
import sys

__all__ = ["service_flags", "worker_flags"]

_DIAGNOSTICS = ("-v", "-d", "-b", "-q", "-W")
_DIAGNOSTIC_OPTIONS = frozenset({"dev", "importtime", "tracemalloc", "showrefcount", "faulthandler"})


def worker_flags() -> list[str]:
    """Return the arguments that start an interpreter with the flags of this one."""
    # The function that multiprocessing uses for this, which knows the short flags of each version of Python.
    arguments: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    known = {arguments[i + 1].partition("=")[0] for i, each in enumerate(arguments[:-1]) if each == "-X"}
    for name, value in getattr(sys, "_xoptions", {}).items():
        if name not in known:
            arguments += ["-X", name if value is True else f"{name}={value}"]
    return arguments


def service_flags() -> list[str]:
    """Return the flags for a process that runs no user code."""
    kept = []
    arguments = iter(worker_flags())
    for each in arguments:
        if each == "-X":
            option = next(arguments)
            if option.partition("=")[0] not in _DIAGNOSTIC_OPTIONS:
                kept += ["-X", option]
        elif not each.startswith(_DIAGNOSTICS):
            kept.append(each)
    return kept
