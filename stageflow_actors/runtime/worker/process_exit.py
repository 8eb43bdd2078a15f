"""The end of a worker process, which is that of a Python program.

Services are closed, the event loop ends its tasks, threads are joined, `atexit` functions run and streams are flushed.
The interpreter is finalized only if that can have an effect: an open file, an object with `__del__`, an extension
module of another package. Otherwise the process exits at once, which saves some 20 ms of work. The node limits the
time and kills a worker that exceeds it; this module must never set a limit of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any

from stageflow_actors.runtime.ipc.slots import Slot
from stageflow_actors.runtime.system.processes import kill_other_sessions
from stageflow_actors.runtime.zygote.protocol import InterpreterExit

__all__ = ["ProcessExit"]

_STANDARD_LIBRARY = os.path.dirname(os.__file__)

_FLUSHED = frozenset(
    {
        io.TextIOWrapper,
        io.BufferedWriter,
        io.BufferedRandom,
        io.BufferedRWPair,
        io.BufferedReader,
        io.FileIO,
        io.BytesIO,
        io.StringIO,
        socket.socket,
    }
)
"""Types of which only a flush matters: the kernel closes descriptors."""

_HARMLESS = (asyncio.Future, asyncio.Task, asyncio.BaseEventLoop, subprocess.Popen)
"""Types whose `__del__` only warns or releases memory."""


class ProcessExit:
    """The end of this worker. It is created before user code is loaded, because it compares with that state."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._modules = frozenset(sys.modules)

    def run(self, close_services: Callable[[Callable[[str], None]], None], runner: asyncio.Runner, code: int) -> int:
        """End everything that user code has started, and return the exit code of the process.

        Raises `InterpreterExit` if the interpreter has to be finalized. No message may be in work or unsettled.
        """
        step = self._slot.set_step
        self._slot.begin_end(time.monotonic_ns())
        close_services(step)
        step("the end of tasks on the event loop")
        try:
            runner.close()
        except BaseException as error:  # noqa: BLE001 - a task of a handler may do anything
            sys.excepthook(type(error), error, error.__traceback__)
        step("the end of threads that are not daemons")
        threading._shutdown()  # type: ignore[attr-defined]
        step("an atexit function")
        atexit._run_exitfuncs()
        step("the flush of stdout and stderr")
        _flush_standard_streams()
        kill_other_sessions()
        step("the flush of an open file")
        _flush_files()
        step("the finalization of the interpreter")
        if self._has_remains():
            gc.unfreeze()  # else objects that those of the zygote refer to would not be freed
            raise InterpreterExit(code)
        return code

    def _has_remains(self) -> bool:
        """Return True if the finalization of the interpreter can have an effect."""
        loaded = [sys.modules[name] for name in list(sys.modules) if name not in self._modules]
        if any(map(_is_foreign_extension, loaded)):
            return True
        finalized: dict[type[Any], bool] = {}
        for each in gc.get_objects():  # without those of the zygote, which are frozen
            kind = type(each)
            if kind not in finalized:
                finalized[kind] = _is_finalized(kind)
            if finalized[kind] and not _is_spent(each):
                return True
        return False


def _flush_files() -> None:
    """Flush the files that are open: objects in a circle of references are freed in any order, and may lose data."""
    files = [each for each in gc.get_objects() if issubclass(type(each), io.IOBase)]
    files.sort(key=lambda each: not issubclass(type(each), io.TextIOBase))  # a text file writes to a buffered one
    for each in files:
        try:
            each.flush()
        except Exception:  # noqa: BLE001 - it is closed, or its disk is full
            pass


def _is_foreign_extension(module: Any) -> bool:
    """Return True for an extension module outside the standard library: it may have handlers of the C library."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or not file.endswith(tuple(EXTENSION_SUFFIXES)):
        return False
    return not file.startswith(_STANDARD_LIBRARY) or "site-packages" in file or "dbm" in file


def _is_finalized(kind: type[Any]) -> bool:
    """Return True if objects of this type do something when they are freed."""
    if kind in _FLUSHED or issubclass(kind, _HARMLESS) or kind.__module__.startswith("zmq."):
        return False
    return hasattr(kind, "__del__")


def _is_spent(each: Any) -> bool:
    """Return True if nothing happens when this object is freed."""
    kind = type(each)
    if issubclass(kind, io.IOBase):
        try:
            return bool(each.closed)
        except Exception:  # noqa: BLE001 - a class of a user
            return False
    if kind is GeneratorType:
        return each.gi_frame is None
    if kind is CoroutineType:
        return each.cr_frame is None
    if kind is AsyncGeneratorType:
        return each.ag_frame is None
    return False


def _flush_standard_streams() -> None:
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            # A handler closed it, or its reader has gone. The interpreter would fail to flush it once more.
            try:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, number)
                os.close(null)
            except OSError:
                pass
