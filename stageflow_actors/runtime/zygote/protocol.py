"""The protocol of node and zygote.

The configuration of the zygote, the file of a spawn request, the kinds of report.

Requests and reports are datagrams over a socket pair. Values only: nothing here forks or waits.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

__all__ = [
    "EXITED",
    "FAILED",
    "MAX_DATAGRAM_BYTES",
    "MAX_STREAMS",
    "SPAWNED",
    "WORKER_NAME",
    "ZYGOTE_NAME",
    "InterpreterExit",
    "WorkerInput",
    "ZygoteConfig",
    "read_config",
]

ZYGOTE_NAME = "stageflow-zyg"
"""The name of the process, as `ps -o comm` shows it."""

WORKER_NAME = "stageflow-work"
"""The same of a worker."""

SPAWNED, EXITED, FAILED = range(3)
"""Kinds of report: `[kind, worker_id, pid, status or reason]`."""

MAX_DATAGRAM_BYTES = 65_536
"""Size limit of one request or report."""

MAX_STREAMS = 3
"""Most descriptors beside the anonymous file of a spawn request."""


class InterpreterExit(SystemExit):
    """Raised by the entry function of a worker: the interpreter is finalized, as at the end of a Python program.

    Otherwise the process ends at once when the entry function returns, with flushed standard streams.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class ZygoteConfig(Struct):
    """The configuration that a zygote starts with. Descriptors are numbers in the zygote.

    `entry` is `module:function`, called in each worker with (payload, slot or None), and with the third of its streams
    if there is one; its return value is the exit code. `keep_fds` stay open in the zygote and its workers, but not in
    programs that workers start. `descriptor_limit` is the workers' soft limit of open files; 0 for that of the zygote.
    Paths are bytes, as in the operating system: a file name need not be valid text.
    """

    socket_fd: int
    node_pid: int
    entry: str
    sys_path: list[bytes]
    cwd: bytes | None
    preload: list[str]
    slots_fd: int = -1
    slot_count: int = 0
    keep_fds: list[int] = []
    descriptor_limit: int = 0


class WorkerInput(Struct, array_like=True):
    """The content of the anonymous file that a spawn request carries."""

    env: dict[str, str]
    payload: bytes


def read_config(fd: int) -> ZygoteConfig:
    """Return the configuration in the anonymous file `fd`, and close it."""
    with open(fd, "rb") as file:
        file.seek(0)
        return msgspec.msgpack.decode(file.read(), type=ZygoteConfig)
