"""The broker process as its parent sees it: started, ready or refused, watched by a pidfd, asked to end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import msgspec

from stageflow_actors.errors import BrokerUnavailable, JournalCorrupt, JournalLocked, StageFlowError
from stageflow_actors.runtime.processes import wait_dead

__all__ = ["BrokerProcess"]

_BOOTSTRAP = """\
import sys
sys.path[:] = sys.argv[2:]
from brokers.zeromq.process import main
sys.exit(main(sys.argv[1]))
"""

START_SECONDS = 120.0
"""How long a broker may take to read its journal before its start has failed."""


class BrokerProcess:
    """One broker process on one journal."""

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
        self.pidfd = -1

    @property
    def pid(self) -> int:
        """The process id of the broker last started."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it is ready. Raises `JournalCorrupt`, `JournalLocked`, `BrokerUnavailable`."""
        ready, said = os.pipe()
        try:
            options = msgspec.json.encode({**self._options, "ready_fd": said}).decode()
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, options, *sys.path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(said, *self._keep_fds),
                start_new_session=True,
            )
            os.close(said)
            said = -1
            if self.pidfd >= 0:
                os.close(self.pidfd)
            self.pidfd = os.pidfd_open(self._process.pid)
            report = _read_line(ready, START_SECONDS)
        finally:
            os.close(ready)
            if said >= 0:
                os.close(said)
        if report.get("ready"):
            return
        self._process.wait()
        raise _error(report)

    def stop(self, timeout: float = 10.0) -> None:
        """Ask it to end, and wait; killed after `timeout` seconds."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def reap(self) -> int | None:
        """The exit status if it has ended."""
        if self._process is None or not wait_dead(self.pidfd, 0):
            return None
        return self._process.wait()


def _read_line(fd: int, timeout: float) -> dict[str, object]:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    data = b""
    while not data.endswith(b"\n"):
        if not poller.poll(int(timeout * 1000)):
            return {"error": "BrokerUnavailable", "message": f"the broker was not ready within {timeout:g} s"}
        chunk = os.read(fd, 65536)
        if not chunk:
            return {"error": "BrokerUnavailable", "message": "the broker process ended while it was starting"}
        data += chunk
    report = msgspec.json.decode(data)
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
