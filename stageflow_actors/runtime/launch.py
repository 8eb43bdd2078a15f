"""Starting a node from the program, and keeping one: a node that dies is started again.

The program holds the lock of the data directory; its node inherits it. Must never run the program's code in the node:
definitions pass through it as bytes.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from stageflow_actors import errors
from stageflow_actors.errors import BrokerUnavailable, StageFlowError
from stageflow_actors.history import errors as history_errors
from stageflow_actors.runtime.control import Channel, NodeConfig, Register, Report, Scale, Stop
from stageflow_actors.runtime.datadir import DataDir
from stageflow_actors.runtime.processes import wait_dead

__all__ = ["NodeHandle"]

_BOOTSTRAP = """\
import sys
sys.path[:] = sys.argv[2:]
from stageflow_actors.runtime.node import main
main(int(sys.argv[1]))
"""

READY_SECONDS = 180.0
"""How long a node may take: a large journal is read in that time."""
REMAINS_SECONDS = 5.0
RESTARTS = 20
PERIOD = 60.0


class NodeHandle:
    """The node of a runtime. `notice` is given sentences for people; `failed` why the node cannot be kept."""

    def __init__(
        self, data: DataDir, config: NodeConfig, notice: Callable[[str], None], failed: Callable[[StageFlowError], None]
    ) -> None:
        self._data = data
        self._config = config
        self._notice = notice
        self._failed = failed
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._stopping = False
        self._stopped = threading.Event()
        self._registered = threading.Semaphore(0)
        self._restarts: list[float] = []
        self.address = ""
        self.resuming: dict[str, int] = {}

    @property
    def pid(self) -> int:
        """The process id of the node as it is now."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the node and wait until it is ready. Raises what kept it from starting."""
        self._launch()
        threading.Thread(target=self._watch, name="node-watch", daemon=True).start()

    def register(self, register: Register) -> None:
        """More workflows, for this node and any later one."""
        self._config.plans.extend(register.plans)
        self._config.pools.extend(register.pools)
        self._send(register)
        self._registered.acquire(timeout=30)

    def scale(self, queue: str, actors: int) -> None:
        """Another number of actors, for this node and any later one."""
        for pool in self._config.pools:
            if pool.queue == queue:
                pool.actors = actors
        self._send(Scale(queue, actors))

    def stop(self, grace: float | None) -> None:
        """End the cluster; returns when its node has ended. A KeyboardInterrupt meanwhile kills it."""
        with self._lock:
            self._stopping = True
        try:
            self._send(Stop(grace))
            while not wait_dead(self._pidfd, 0.2):
                pass
        except BaseException:
            self.kill()
            raise
        finally:
            self._reap()

    def kill(self) -> None:
        """End the cluster at once; its journal has all that counts."""
        with self._lock:
            self._stopping = True
        try:
            self._send(Stop(None, kill=True))
        except StageFlowError:
            pass
        if self._process is not None and not wait_dead(self._pidfd, 3.0):
            self._process.kill()
        self._reap()

    def _send(self, message: Register | Scale | Stop) -> None:
        channel = self._channel
        if channel is None:
            raise BrokerUnavailable("the runtime has not been started: call start() or use `with`")
        try:
            channel.send(message)
        except OSError:
            pass  # the node is gone; the watch starts another, which is told by its configuration

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, str(theirs.fileno()), *self._config.sys_path],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), self._data.lock_fd),
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise BrokerUnavailable(f"the node process could not be started: {error}") from error
        finally:
            theirs.close()
        self._pidfd = os.pidfd_open(self._process.pid)
        channel = Channel(ours)
        try:
            channel.send(self._config)
            report = self._await_report(channel)
        except BaseException:
            self._process.kill()
            self._process.wait()
            channel.close()
            raise
        if report is None or report.word != "ready":
            self._process.wait()
            channel.close()
            raise _error(report)
        self._channel = channel
        self.address = report.text
        self.resuming = report.fields.get("resuming", {})

    def _await_report(self, channel: Channel) -> Report | None:
        poller = select.poll()
        poller.register(channel.fileno(), select.POLLIN)
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if poller.poll(200):
                report = channel.receive()
                return report if isinstance(report, Report) else None
        return Report("failed", f"the node was not ready within {READY_SECONDS:g} s", "BrokerUnavailable")

    def _watch(self) -> None:
        """Hear what the node says; start another when it ends unasked."""
        while True:
            channel = self._channel
            report = None if channel is None else channel.receive()
            if isinstance(report, Report):
                if report.word == "registered":
                    self._registered.release()
                elif report.word == "notice" or report.word == "failed":
                    self._notice(report.text)
                continue
            with self._lock:
                if self._stopping:
                    return
            wait_dead(self._pidfd, None)
            self._reap()
            try:
                self._relaunch()
            except StageFlowError as error:
                self._failed(error)
                return

    def _relaunch(self) -> None:
        now = time.monotonic()
        self._restarts = [at for at in self._restarts if now - at < PERIOD] + [now]
        if len(self._restarts) > RESTARTS:
            raise BrokerUnavailable(f"the node process ended {len(self._restarts)} times within {PERIOD:g} s")
        deadline = now + REMAINS_SECONDS
        while self._data.holders():
            if time.monotonic() > deadline:
                raise BrokerUnavailable(
                    f"the node process ended, and processes {self._data.holders()} of its cluster outlived it"
                )
            time.sleep(0.01)
        with self._lock:
            if self._stopping:
                return
            self._launch()

    def _reap(self) -> None:
        if self._process is not None:
            self._process.wait()
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def _error(report: Report | None) -> StageFlowError:
    if report is None:
        return BrokerUnavailable("the node process ended while it was starting; see stderr for its reason")
    known = getattr(errors, report.kind, None) or getattr(history_errors, report.kind, None)
    if known is errors.JournalCorrupt:
        return errors.JournalCorrupt(report.text, file=report.fields.get("file"), offset=report.fields.get("offset"))
    if known is not None and isinstance(known, type) and issubclass(known, StageFlowError):
        made = known.__new__(known, report.text)
        made.args = (report.text,)
        return made
    return StageFlowError(report.text)
