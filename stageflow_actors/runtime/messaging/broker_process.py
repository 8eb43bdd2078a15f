"""The broker process as its parent sees it: started, ready or refused, kept alive, asked to end."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from stageflow_actors.errors import BrokerUnavailable, JournalCorrupt, JournalLocked, StageFlowError
from stageflow_actors.runtime.system.processes import describe_exit, wait_dead
from stageflow_actors.runtime.system.restart_limit import RestartLimit

__all__ = ["BrokerProcess"]

logger = logging.getLogger("stageflow_actors.messaging.broker_process")

_BOOTSTRAP = """\
import sys
sys.path[:] = sys.argv[2:]
from stageflow_brokers.zeromq.process import main
sys.exit(main(sys.argv[1]))
"""

START_TIMEOUT_SECONDS = 120.0
"""How long a broker may take to read its journal before its start has failed."""

MAX_START_ATTEMPTS = 5
"""Starts at once of a broker that ends without a word: somebody has killed it, and it may do better next time."""


class _EndedSilently(BrokerUnavailable):
    """It ended while it was starting, and said nothing."""


class BrokerProcess:
    """One broker on one journal, whichever process it is by now."""

    def __init__(
        self,
        *,
        address: str,
        journal: str | None,
        durability: str,
        max_message_bytes: int,
        keep_fds: tuple[int, ...] = (),
        supervised: bool = True,
    ) -> None:
        self.address = address
        self._options = {
            "address": address,
            "journal": journal,
            "durability": durability,
            "supervised": supervised,
            "max_message_bytes": max_message_bytes,
            "parent": os.getpid(),
        }
        self._keep_fds = keep_fds
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._lock = threading.Lock()
        self._ending = False

    @property
    def pid(self) -> int:
        """The process id of the broker last started."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it is ready. Raises `JournalCorrupt`, `JournalLocked`, `BrokerUnavailable`.

        The broker dies with the *thread* that starts it (`PR_SET_PDEATHSIG`): call it from one that stays.
        """
        for attempt in range(1, MAX_START_ATTEMPTS + 1):
            try:
                self._start_once()
                return
            except _EndedSilently:
                if attempt == MAX_START_ATTEMPTS:
                    raise

    def keep(self, failed: Callable[[StageFlowError], None]) -> None:
        """Start it again whenever it has ended unasked; the journal holds everything. For a thread of its own.

        Returns when it was asked to end. `failed` is told why it cannot be kept.
        """
        restart_limit = RestartLimit("broker process")
        while True:
            wait_dead(self._pidfd, None)
            with self._lock:
                if self._ending:
                    return
                assert self._process is not None
                logger.warning(
                    "the broker process has ended (%s); it is started again", describe_exit(self._process.wait())
                )
                try:
                    restart_limit.record()
                    self.start()
                    continue
                except StageFlowError as error:
                    told = error
            failed(told)
            return

    def stop(self, timeout: float = 10.0) -> None:
        """Ask it to end, and wait; killed after `timeout` seconds."""
        self._ending = True
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                return
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start_once(self) -> None:
        ready, said = os.pipe()
        try:
            # Not msgspec's JSON, which takes no file names that are not text.
            options = json.dumps({**self._options, "ready_fd": said})
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, options, *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(said, *self._keep_fds),
                start_new_session=True,
                umask=0o077,
            )
            os.close(said)
            said = -1
            if self._pidfd >= 0:
                os.close(self._pidfd)
            self._pidfd = os.pidfd_open(process.pid)
            self._process = process
            report = _read_line(ready, START_TIMEOUT_SECONDS)
        except OSError as error:
            raise BrokerUnavailable(f"the broker process could not be started: {error}") from error
        finally:
            os.close(ready)
            if said >= 0:
                os.close(said)
        if report is not None and report.get("ready"):
            return
        if wait_dead(self._pidfd, 1.0):
            status = process.wait()
        else:
            process.kill()
            status = process.wait()
        if report is None:
            raise _EndedSilently(f"the broker process ended while it was starting ({describe_exit(status)})")
        raise _error(report)


def _read_line(fd: int, timeout: float) -> dict[str, object] | None:
    """What the process says about its start; None if it ends without having said anything."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    deadline = time.monotonic() + timeout
    data = b""
    while not data.endswith(b"\n"):
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return {"error": "BrokerUnavailable", "message": f"the broker was not ready within {timeout:g} s"}
        chunk = os.read(fd, 65536)
        if not chunk:
            return None
        data += chunk
    report = json.loads(data)
    assert isinstance(report, dict)
    return report


def _error(report: dict[str, object]) -> StageFlowError:
    message = str(report.get("message", "the broker did not start"))
    kind = report.get("error")
    if kind == "JournalCorrupt":
        offset = report.get("offset")
        return JournalCorrupt(message, file=str(report.get("file")), offset=offset if isinstance(offset, int) else None)
    if kind == "JournalLocked":
        return JournalLocked(message)
    return BrokerUnavailable(f"the broker could not start: {message}")
