"""The broker process: journal, engine and socket. It ends when its parent process asks for it, or ends.

`python -m stageflow_brokers.zeromq.process '{"address": …, "journal": …}'`. A parent asks by closing a pipe, `stop_fd`,
and the process ignores SIGTERM: a service manager sends that to all processes at once, and the broker has to outlive
the settlements of its workers. Without such a pipe it ends on SIGTERM. It reports its start as one line of JSON on
the file descriptor `ready_fd`. It must never run user code, unpickle data, or start threads other than those of ZeroMQ.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import resource
import select
import signal
import sys
from pathlib import Path
from typing import Literal

import msgspec

from stageflow_brokers.core.machine import Limits
from stageflow_brokers.engine.engine import Engine
from stageflow_brokers.errors import BrokerError, JournalCorrupt, JournalError
from stageflow_brokers.log_sender import relay_process
from stageflow_brokers.pause_flags import PauseFlags
from stageflow_brokers.resources import raise_descriptor_limit, shortage
from stageflow_brokers.signals import reset_signals
from stageflow_brokers.zeromq.server import Server

__all__ = ["ProcessOptions", "main"]

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15

PROCESS_NAME = "stageflow-brok"
"""The name of the process, as `ps -o comm` shows it, with at most 15 bytes."""

MAX_REQUESTED_DESCRIPTORS = 16_384
"""The most file descriptors that the broker requests from the operating system."""

MIN_DESCRIPTORS = 48
"""The fewest file descriptors with which the broker starts: those of ZeroMQ, of the journal and of some connections."""

THREADS = 2
"""Threads of ZeroMQ."""

EXIT_JOURNAL_FAILED = 70
"""Exit code after a failure of the journal. A new start recovers from the data on disk."""


class ProcessOptions(msgspec.Struct):
    """The options of a broker process. `max_message_bytes` replaces the value in `limits`.

    `pause_fd` is the memory of the `PauseFlags` that workers read, -1 for none.
    `log_fd` is a socket for the log records of this process from `log_level` on, see `LogSender`; -1 for none.
    `stop_fd` is the read end of the parent's pipe; -1 for none.
    """

    address: str
    journal: str | None
    durability: Literal["fsync", "write", "memory"] = "fsync"
    supervised: bool = True
    max_message_bytes: int = 16 << 20
    limits: Limits = Limits()
    segment_bytes: int = 64 << 20
    ready_fd: int = -1
    parent: int = 0
    pause_fd: int = -1
    stop_fd: int = -1
    log_fd: int = -1
    log_level: int = 30


class _Stop:
    """Returns True once a stop is requested, by the end of the pipe or by SIGTERM; `wakeup` becomes readable with it.

    Ctrl-C and the end of the terminal are for the program.
    """

    def __init__(self, stop_fd: int) -> None:
        self.wakeup = stop_fd
        for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            signal.signal(ignored, signal.SIG_IGN)
        if stop_fd < 0:
            self.wakeup, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
            signal.signal(signal.SIGTERM, lambda *_: None)  # the pipe receives its number
        self._poll = select.poll()
        self._poll.register(self.wakeup, select.POLLIN)

    def __call__(self) -> bool:
        return bool(self._poll.poll(0))


def main(argument: str) -> int:
    """Run until a stop is requested.

    Return 0 after a clean stop, 1 if the start failed; exit with 70 if the journal failed.
    """
    # Not msgspec's JSON, here and in the report: it rejects file names that are not valid UTF-8.
    options = msgspec.convert(json.loads(argument), ProcessOptions)
    reset_signals()
    ctypes.CDLL(None).prctl(PR_SET_NAME, ctypes.create_string_buffer(PROCESS_NAME.encode()), 0, 0, 0)
    if options.log_fd >= 0:
        relay_process(options.log_fd, options.log_level)
    stop = _Stop(options.stop_fd)
    max_descriptors = _raise_descriptor_limit()
    problem = shortage("the broker process", descriptors=MIN_DESCRIPTORS, threads=THREADS)
    if problem:
        _report(options.ready_fd, {"error": "BrokerUnavailable", "message": problem})
        return 1
    gc.disable()  # the broker creates no reference cycles, and a collection of a million messages takes seconds
    if options.parent:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != options.parent:
            return 1
    try:
        engine = Engine(
            journal_dir=None if options.durability == "memory" or options.journal is None else Path(options.journal),
            durability="fsync" if options.durability == "memory" else options.durability,
            limits=msgspec.structs.replace(
                options.limits,
                max_message_bytes=options.max_message_bytes,
                max_peers=min(options.limits.max_peers, max_descriptors),
            ),
            supervised=options.supervised,
            segment_bytes=options.segment_bytes,
            warn=_warn,
            pause_flags=PauseFlags(options.pause_fd) if options.pause_fd >= 0 else None,
            stop_requested=stop,
        )
        server = Server(engine, options.address, wakeup=stop.wakeup, max_descriptors=max_descriptors)
    except (BrokerError, OSError) as error:
        report: dict[str, object] = {"error": type(error).__name__, "message": str(error)}
        if isinstance(error, JournalCorrupt):
            report |= {"file": error.file, "offset": error.offset, "reason": error.reason}
        _report(options.ready_fd, report)
        return 1
    _report(options.ready_fd, {"ready": True, "epoch": engine.machine.state.epoch})
    try:
        server.run(stop)
    except JournalError as error:
        # Uncommitted frames must never leave, but a socket that is closed regularly still sends: exit at once.
        _warn(f"the broker ends because its journal failed: {error}")
        os._exit(EXIT_JOURNAL_FAILED)
    server.close()
    engine.close()
    return 0


def _raise_descriptor_limit() -> int:
    """Raise the limit of descriptors; return how many may be open when a connection is accepted.

    A quarter of them is reserved for files and sockets of the broker itself.
    """
    raise_descriptor_limit(MAX_REQUESTED_DESCRIPTORS)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_REQUESTED_DESCRIPTORS if soft == resource.RLIM_INFINITY else min(soft, MAX_REQUESTED_DESCRIPTORS)
    return limit - limit // 4


def _warn(text: str) -> None:
    """Log a warning. A process without logging writes it to stderr, as `logging.lastResort` does."""
    logger.warning("%s", text)


def _report(fd: int, report: dict[str, object]) -> None:
    if fd >= 0:
        os.write(fd, json.dumps(report).encode() + b"\n")
        os.close(fd)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
