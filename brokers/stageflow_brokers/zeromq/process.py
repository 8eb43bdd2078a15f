"""The broker process: journal, engine, socket; says when it is ready, ends when told or when its parent is gone.

`python -m stageflow_brokers.zeromq.process '{"address": …, "journal": …}'`. The report of its start goes to the file
descriptor `ready_fd` as one line of JSON. It runs no user code, unpickles nothing and starts no thread but those of
ZeroMQ.
"""

from __future__ import annotations

import ctypes
import gc
import json
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
from stageflow_brokers.zeromq.server import Server

__all__ = ["ProcessOptions", "main"]

PR_SET_PDEATHSIG = 1

MOST_DESCRIPTORS = 16_384
"""As many as the broker asks the system for, at most."""

EXIT_JOURNAL = 70
"""How the process ends when its journal has failed: start it again, and it recovers from what is on disk."""


class ProcessOptions(msgspec.Struct):
    """What a broker process is told at its start. `max_message_bytes` counts, whatever `limits` says of it."""

    address: str
    journal: str | None
    durability: Literal["fsync", "write", "memory"] = "fsync"
    supervised: bool = True
    max_message_bytes: int = 16 << 20
    limits: Limits = Limits()
    segment_bytes: int = 64 << 20
    ready_fd: int = -1
    parent: int = 0


class _Stop:
    """SIGTERM, remembered; `wakeup` becomes readable with it."""

    def __init__(self) -> None:
        self.wanted = False
        self.wakeup, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._heard)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def __call__(self) -> bool:
        return self.wanted

    def _heard(self, signum: int, frame: object) -> None:
        self.wanted = True


def main(argument: str) -> int:
    """Run until SIGTERM; 0 when all went well, 1 when it could not start, 70 when the journal failed."""
    # Not msgspec's JSON, here and in what it says: it takes no file names that are not text.
    options = msgspec.convert(json.loads(argument), ProcessOptions)
    stop = _Stop()
    descriptors = _descriptors()
    gc.disable()  # nothing here makes cycles, and looking through a million messages for some takes seconds
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
                max_peers=min(options.limits.max_peers, descriptors),
            ),
            supervised=options.supervised,
            segment_bytes=options.segment_bytes,
            warn=_warn,
            stop_requested=stop,
        )
        server = Server(engine, options.address, wakeup=stop.wakeup, most_descriptors=descriptors)
    except (BrokerError, OSError) as error:
        report: dict[str, object] = {"error": type(error).__name__, "message": str(error)}
        if isinstance(error, JournalCorrupt):
            report |= {"file": error.file, "offset": error.offset, "reason": error.reason}
        _say(options.ready_fd, report)
        return 1
    _say(options.ready_fd, {"ready": True, "epoch": engine.machine.state.epoch})
    try:
        server.run(stop)
    except JournalError as error:
        # Nothing that was not committed may leave, and sockets that are closed in good order still send.
        _warn(f"the broker ends because its journal failed: {error}")
        os._exit(EXIT_JOURNAL)
    server.close()
    engine.close()
    return 0


def _descriptors() -> int:
    """How many descriptors connections may have taken when another one comes: the others are needed for the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):
            pass
    most = MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else min(soft, MOST_DESCRIPTORS)
    return most - most // 4


def _warn(text: str) -> None:
    print(f"stageflow: {text}", file=sys.stderr, flush=True)


def _say(fd: int, report: dict[str, object]) -> None:
    if fd >= 0:
        os.write(fd, json.dumps(report).encode() + b"\n")
        os.close(fd)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
