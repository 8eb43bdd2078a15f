"""`BrokerProcess`: starts the broker process, restarts it when it ends, and stops it.

This module must not open the journal: the broker process alone reads and writes it.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from stageflow_actors.errors import BrokerUnavailable, JournalCorrupt, JournalLocked, StageFlowError
from stageflow_actors.runtime.system.interpreter import python_interpreter
from stageflow_actors.runtime.system.interpreter_flags import service_flags
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
"""Time for a broker to read its journal; after that its start counts as failed."""

MAX_START_ATTEMPTS = 5
"""Attempts to start a broker that ends without a report: it was probably killed, and the next start may succeed."""


class _EndedSilently(BrokerUnavailable):
    """The broker process ended during its start without a report."""


class BrokerProcess:
    """The broker of one journal, over all restarts of its process."""

    def __init__(
        self,
        *,
        address: str,
        journal: str | None,
        durability: str,
        max_message_bytes: int,
        keep_fds: tuple[int, ...] = (),
        supervised: bool = True,
        pause_fd: int = -1,
        log_fd: int = -1,
        log_level: int = logging.WARNING,
    ) -> None:
        self.address = address
        self._options = {
            "address": address,
            "journal": journal,
            "durability": durability,
            "supervised": supervised,
            "max_message_bytes": max_message_bytes,
            "parent": os.getpid(),
            "pause_fd": pause_fd,
            "log_fd": log_fd,
            "log_level": log_level,
        }
        self._keep_fds = (*keep_fds, *(fd for fd in (pause_fd, log_fd) if fd >= 0))
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._stop_fd = -1
        self._lock = threading.Lock()
        self._ending = False

    @property
    def pid(self) -> int:
        """Process id of the broker started last."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the process and wait until it is ready.

        The kernel kills the broker when the *thread* that starts it ends (`PR_SET_PDEATHSIG`): call this method from a
        thread that lives as long as the broker. Raises `JournalCorrupt`, `JournalLocked`, `BrokerUnavailable`.
        """
        for attempt in range(1, MAX_START_ATTEMPTS + 1):
            try:
                self._start_once()
                return
            except _EndedSilently:
                if attempt == MAX_START_ATTEMPTS:
                    raise

    def keep_running(self, check: Callable[[], None], on_failure: Callable[[StageFlowError], None]) -> None:
        """Restart the process whenever it ends unexpectedly; its journal holds the whole state.

        Blocks until `stop`, so it needs a thread of its own. Before each restart it calls `check`, which raises
        `StageFlowError` if the journal is not there any more. If the process cannot be restarted, calls `on_failure`
        and returns.
        """
        restart_limit = RestartLimit("broker process")
        while True:
            wait_dead(self._pidfd, None)
            with self._lock:
                if self._ending:
                    return
                assert self._process is not None
                logger.warning("the broker process ended (%s) and is restarted", describe_exit(self._process.wait()))
                try:
                    check()
                    restart_limit.record()
                    self.start()
                    continue
                except StageFlowError as error:
                    failure = error
            on_failure(failure)
            return

    def stop(self, timeout: float = 10.0) -> None:
        """Ask the process to end, and wait; after `timeout` seconds, kill it."""
        self._ending = True
        with self._lock:
            process = self._process
            self._close_stop_pipe()
            if process is None or process.poll() is not None:
                return
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _close_stop_pipe(self) -> None:
        """Close this end of the pipe: the process ends when its read end has no other."""
        if self._stop_fd >= 0:
            os.close(self._stop_fd)
            self._stop_fd = -1

    def _start_once(self) -> None:
        self._close_stop_pipe()
        ready_fd, report_fd = os.pipe()
        stop_fd, self._stop_fd = os.pipe()
        try:
            # Not msgspec's JSON, which refuses file names that are not valid text.
            options = json.dumps({**self._options, "ready_fd": report_fd, "stop_fd": stop_fd})
            process = subprocess.Popen(
                [python_interpreter(), *service_flags(), "-c", _BOOTSTRAP, options, *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(report_fd, stop_fd, *self._keep_fds),
                start_new_session=True,
                umask=0o077,
            )
            os.close(report_fd)
            report_fd = -1
            if self._pidfd >= 0:
                os.close(self._pidfd)
            self._pidfd = os.pidfd_open(process.pid)
            self._process = process
            report = _read_report(ready_fd, START_TIMEOUT_SECONDS)
        except OSError as error:
            raise BrokerUnavailable(f"the broker process cannot be started: {error}") from error
        finally:
            os.close(ready_fd)
            os.close(stop_fd)
            if report_fd >= 0:
                os.close(report_fd)
        if report is not None and report.get("ready"):
            return
        if wait_dead(self._pidfd, 1.0):
            status = process.wait()
        else:
            process.kill()
            status = process.wait()
        if report is None:
            raise _EndedSilently(
                f"the broker process ended during its start ({describe_exit(status)}) and sent no report; its stderr, "
                "above, may show the cause"
            )
        raise _error(report)


def _read_report(fd: int, timeout: float) -> dict[str, object] | None:
    """Return the report of the process about its start; None if it ends without one."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    deadline = time.monotonic() + timeout
    data = b""
    while not data.endswith(b"\n"):
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return {"error": "BrokerUnavailable", "message": f"it was not ready within {timeout:g} s"}
        chunk = os.read(fd, 65536)
        if not chunk:
            return None
        data += chunk
    report = json.loads(data)
    assert isinstance(report, dict)
    return report


def _error(report: dict[str, object]) -> StageFlowError:
    message = str(report.get("message", "it gave no reason"))
    kind = report.get("error")
    if kind == "JournalCorrupt":
        offset = report.get("offset")
        return JournalCorrupt(message, file=str(report.get("file")), offset=offset if isinstance(offset, int) else None)
    if kind == "JournalLocked":
        return JournalLocked(message)
    return BrokerUnavailable(f"the broker cannot start: {message}")
