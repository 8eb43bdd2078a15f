"""The broker process: journal, engine and socket. It ends on SIGTERM, or when its parent process ends.

`python -m stageflow_brokers.zeromq.process '{"address": …, "journal": …}'`. It reports its start as one line of JSON on
the file descriptor `ready_fd`. It must never run user code, unpickle data, or start threads other than those of ZeroMQ.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import resource
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
from stageflow_brokers.zeromq.server import Server

__all__ = ["ProcessOptions", "main"]

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1

MAX_REQUESTED_DESCRIPTORS = 16_384
"""The most file descriptors that the broker requests from the operating system."""

EXIT_JOURNAL_FAILED = 70
"""Exit code after a failure of the journal. A new start recovers from the data on disk."""


class ProcessOptions(msgspec.Struct):
    """The options of a broker process. `max_message_bytes` replaces the value in `limits`.

    `pause_fd` is the memory of the `PauseFlags` that workers read, -1 for none.
    `log_fd` is a socket for the log records of this process from `log_level` on, see `LogSender`; -1 for none.
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
    log_fd: int = -1
    log_level: int = 30


class _Stop:
    """Records SIGTERM; `wakeup` becomes readable with it."""

    def __init__(self) -> None:
        self.requested = False
        self.wakeup, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def __call__(self) -> bool:
        return self.requested

    def _on_signal(self, signum: int, frame: object) -> None:
        self.requested = True


def main(argument: str) -> int:
    """Run until SIGTERM. Return 0 after a clean stop, 1 if the start failed; exit with 70 if the journal failed."""
    # Not msgspec's JSON, here and in the report: it rejects file names that are not valid UTF-8.
    options = msgspec.convert(json.loads(argument), ProcessOptions)
    if options.log_fd >= 0:
        relay_process(options.log_fd, options.log_level)
    stop = _Stop()
    max_descriptors = _raise_descriptor_limit()
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
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_REQUESTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_REQUESTED_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):
            pass
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
