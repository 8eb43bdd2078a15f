"""The standard streams and the logging of a worker: what user code prints and logs reaches the program.

Streams are pipes that the node reads. Log records are sent as data, beside the handlers that are configured in this
worker. Nothing here may fail or block user code.
"""

from __future__ import annotations

import fcntl
import io
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from stageflow_actors.runtime.ipc.log_levels import LogLevels
from stageflow_actors.runtime.ipc.output_frames import REPORTED_ATTRIBUTES
from stageflow_actors.runtime.ipc.pool_spec import WorkerPayload
from stageflow_actors.runtime.ipc.slots import Slot
from stageflow_actors.runtime.worker.current_attempt import AttemptAnnotator
from stageflow_brokers.log_sender import LogSender, send_logs

__all__ = ["MIN_OWN_DESCRIPTOR", "WorkerLogging", "own_stderr", "prepare_streams"]

MIN_OWN_DESCRIPTOR = 200
"""The least number of our own descriptors, where we choose it: handlers close low descriptors and open others."""


def prepare_streams() -> None:
    """Make `sys.stdout` and `sys.stderr` write each line when it is complete, and any text without an error."""
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = _open_stream(fd)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _open_stream(fd: int, *, closefd: bool = False) -> io.TextIOWrapper:
    return open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=closefd)


def own_stderr() -> TextIO:
    """Return a stderr that works after handlers have closed `sys.stderr` or descriptor 2."""
    try:
        fd = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, MIN_OWN_DESCRIPTOR)
    except OSError:
        return sys.stderr  # the limit of open files is lower
    return _open_stream(fd, closefd=True)


class WorkerLogging:
    """The logging of a worker, which follows that of the program."""

    def __init__(self, payload: WorkerPayload, slot: Slot) -> None:
        self._levels: LogLevels | None = None
        if payload.log_fd < 0:
            return  # the worker of a test: its logging is its own
        try:
            fd = fcntl.fcntl(payload.log_fd, fcntl.F_DUPFD_CLOEXEC, MIN_OWN_DESCRIPTOR)
            os.close(payload.log_fd)
        except OSError:
            fd = payload.log_fd  # the limit of open files is lower
        self._levels = LogLevels(payload.levels_fd)
        self._levels.close_fd()
        sender = LogSender(socket.socket(fileno=fd), REPORTED_ATTRIBUTES)
        send_logs(sender.send, AttemptAnnotator(slot, payload.lanes))
        self._levels.apply()

    @contextmanager
    def loading_code(self) -> Iterator[None]:
        """Import modules of the user, and undo their changes of the logging that the program has too.

        The program has imported the same modules, and has perhaps changed its logging since.
        """
        if self._levels is None:
            yield
            return
        before = self._levels.current()
        yield
        self._levels.restore(before)
        self._levels.remove_duplicates()

    @contextmanager
    def initializing(self) -> Iterator[None]:
        """Run the initializer, whose configuration holds; handlers that the program has too are detached."""
        yield
        if self._levels is not None:
            self._levels.remove_duplicates()

    def follow_levels(self) -> None:
        """Apply changes of the program's set-up. Cheap without one: called for each batch of deliveries."""
        if self._levels is not None:
            self._levels.follow()
