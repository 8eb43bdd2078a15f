"""`StartReport`: the cause for which a worker cannot start, in an anonymous file that it shares with the node.

The report is at the start of the file. Behind it, at `DUMP_OFFSET`, the interpreter writes the traceback of a crash.
The file outlives its worker, so that nothing is lost however the worker ends, and no worker has to print it.
"""

from __future__ import annotations

import os

import msgspec
from msgspec import Struct

__all__ = ["DUMP_OFFSET", "StartReport", "create_report_file", "read_dump", "read_report", "write_report"]

DUMP_OFFSET = 1 << 16
MAX_DUMP_BYTES = 1 << 15
_LENGTH_BYTES = 4


class StartReport(Struct, array_like=True):
    """Why a worker cannot start.

    - `step`: the step that failed, as in `service 'bank' cannot be made`
    - `error`: the exception, as in `ConnectionError: no route`
    - `traceback`: the formatted traceback with the user's frames
    """

    step: str
    error: str
    traceback: str = ""


def create_report_file() -> int:
    """Return the descriptor of an empty file. Raises `OSError` if no descriptors are free."""
    return os.memfd_create("stageflow-start")


def write_report(fd: int, report: StartReport) -> None:
    """Write the report of this worker; without effect if user code has closed the file."""
    fields = [text.encode("utf-8", "backslashreplace").decode() for text in (report.step, report.error)]
    trace = report.traceback.encode("utf-8", "backslashreplace").decode()
    data = msgspec.msgpack.encode(StartReport(fields[0], fields[1], trace[-DUMP_OFFSET // 4 :]))
    try:
        os.pwrite(fd, len(data).to_bytes(_LENGTH_BYTES, "little") + data, 0)
    except OSError:
        pass


def read_report(fd: int) -> StartReport | None:
    """Return the report in the file, or None if the worker wrote none, or `fd` is negative."""
    if fd < 0:
        return None
    data = os.pread(fd, DUMP_OFFSET, 0)
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    try:
        return msgspec.msgpack.decode(data[_LENGTH_BYTES : _LENGTH_BYTES + length], type=StartReport)
    except msgspec.MsgspecError:
        return None


def read_dump(fd: int) -> bytes:
    """Return the interpreter's traceback of a crash; empty without one, or if `fd` is negative."""
    if fd < 0:
        return b""
    return os.pread(fd, MAX_DUMP_BYTES, DUMP_OFFSET)
