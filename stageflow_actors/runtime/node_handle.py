"""`NodeHandle`: starts the node process from the program, and starts it again when it dies.

The program holds the lock of the data directory and its node inherits it. User code must never run in the node:
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
from collections.abc import Callable, Iterable

from stageflow_actors import errors
from stageflow_actors.core.failures import describe_error
from stageflow_actors.errors import BrokerUnavailable, StageFlowError, WorkflowDefinitionError
from stageflow_actors.history import errors as history_errors
from stageflow_actors.runtime.client.output import ProgramOutput
from stageflow_actors.runtime.ipc.control_channel import Channel, NodeConfig, Register, Report, Scale, Stop
from stageflow_actors.runtime.ipc.stop_notes import StopNotes, describe_unresponsive
from stageflow_actors.runtime.system import data_dir
from stageflow_actors.runtime.system.data_dir import DataDir, DataDirUnusable
from stageflow_actors.runtime.system.interpreter import python_interpreter
from stageflow_actors.runtime.system.interpreter_flags import service_flags
from stageflow_actors.runtime.system.processes import (
    describe_exit,
    is_stopped,
    occupy_standard_descriptors,
    reap_adopted,
    resume_process,
    wait_dead,
)
from stageflow_actors.runtime.system.restart_limit import RestartLimit
from stageflow_actors.runtime.system.socket_dir import remove_runtime_dir, runtime_dir
from stageflow_actors.runtime.zygote.protocol import WORKER_NAME, ZYGOTE_NAME
from stageflow_brokers.failpoints import failpoint
from stageflow_brokers.signals import blocked_signals

__all__ = ["NodeHandle", "remove_cluster_files"]

_BOOTSTRAP = """\
import sys
sys.path[:] = sys.argv[2:]
from stageflow_actors.runtime.node.main import main
main(int(sys.argv[1]))
"""

READY_SECONDS = 180.0
"""Longest time in which a node becomes ready: within it a large journal is read."""
REGISTER_SECONDS = 30.0
"""Longest wait for the node to confirm a registration."""
STOP_MARGIN_SECONDS = 10.0
"""Time beyond the grace in which a node may stop its cluster before both are killed."""
KILLED_OUTPUT_SECONDS = 1.0
"""Longest wait for the output of a cluster that has been killed."""
SURVIVOR_SECONDS = 5.0
"""Time in which the processes of a dead node's cluster must end after it."""


_ADOPTED = (ZYGOTE_NAME, WORKER_NAME, "stageflow-brok")
"""Names of processes that the program adopts from a node that has died, if the program is process 1 of a container."""


class _DiedWhileStarting(BrokerUnavailable):
    """A signal killed the node while it was starting, before it sent a report: another attempt may succeed."""


class NodeHandle:
    """The node of a runtime. `notify` receives notices for the user; `on_failure` the error that ends the cluster."""

    def __init__(
        self,
        data: DataDir,
        config: NodeConfig,
        notify: Callable[[str], None],
        on_failure: Callable[[StageFlowError], None],
    ) -> None:
        self._data = data
        self._config = config
        self._notify = notify
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._output = ProgramOutput(config.log_level)
        self._channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._stopping = threading.Event()
        self._stopped = threading.Event()
        self._loaded = threading.Condition()
        self._last_requested = 0
        self._withdrawn: set[str] = set()
        self._load_errors: dict[int, str] = {}
        self._restart_limit = RestartLimit("node process")
        self.address = ""
        self._has_failed = False
        self.resuming: dict[str, int] = {}

    @property
    def pid(self) -> int:
        """The process id of the current node."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the node and wait until it is ready. Raises the error that prevents the start."""
        try:
            self._launch_until_ready()
        except BaseException:
            self._output.close(KILLED_OUTPUT_SECONDS)
            raise
        with blocked_signals():
            threading.Thread(target=self._watch, name="node-watch", daemon=True).start()

    def register(self, register: Register) -> None:
        """Register more workflows with this node and with each that replaces it; wait until their code is loaded.

        Raises `WorkflowDefinitionError` if a worker cannot load it; the pools are then those from before.
        """
        earlier_plans, earlier_pools = list(self._config.plans), self._config.pools
        self._config.plans.extend(register.plans)
        known = {source.module for source in self._config.sources}
        self._config.sources += [source for source in register.sources if source.module not in known]
        replaced = {pool.queue: pool for pool in register.pools}
        self._config.pools = [pool for pool in self._config.pools if pool.queue not in replaced] + register.pools
        with self._loaded:
            self._last_requested += 1
            number = register.number = self._last_requested
        self._send(register)
        for queue in self._withdrawn & replaced.keys():
            self._withdrawn.discard(queue)
            self._send(Scale(queue, replaced[queue].actors))
        try:
            self._wait_loaded(number)
        except WorkflowDefinitionError:
            self._config.plans, self._config.pools = earlier_plans, earlier_pools
            restored = [pool for pool in earlier_pools if pool.queue in replaced]
            self._send(Register([], restored))
            for queue in replaced.keys() - {pool.queue for pool in restored}:
                self._withdrawn.add(queue)
                self._send(Scale(queue, 0))
            raise

    def wait_loaded(self) -> None:
        """Wait until a worker of each pool has loaded its code, or cannot start, or `start_timeout` has passed.

        Raises `WorkflowDefinitionError` if an exception ends the load of a pool's code.
        """
        self._wait_loaded(0)

    def _wait_loaded(self, number: int) -> None:
        with self._loaded:
            timeout = self._config.start_timeout + REGISTER_SECONDS
            self._loaded.wait_for(lambda: number in self._load_errors or self._stopping.is_set(), timeout)
            error = self._load_errors.get(number, "")
        if error:
            refusal = WorkflowDefinitionError(error)
            refusal.place = None  # the message names the line of the module
            raise refusal

    def _confirm_loaded(self, numbers: Iterable[int], error: str = "") -> None:
        with self._loaded:
            for number in numbers:
                self._load_errors.setdefault(number, error)
            self._loaded.notify_all()

    def scale(self, queue: str, actors: int) -> None:
        """Change a queue's number of actors, for this node and for each that replaces it."""
        self._record_scale(queue, actors)
        self._send(Scale(queue, actors))

    def _record_scale(self, queue: str, actors: int) -> None:
        for pool in self._config.pools:
            if pool.queue == queue:
                pool.actors = actors

    def stop(self, grace: float | None) -> None:
        """Stop the cluster and wait until its node has ended.

        A KeyboardInterrupt during the wait kills the cluster. So does the end of `grace`, the workers' time to stop and
        `STOP_MARGIN_SECONDS`: the node may be stopped (SIGSTOP), or wait for a broker that is.
        """
        try:
            margin = STOP_MARGIN_SECONDS + self._config.worker_stop_timeout
            deadline = None if grace is None else time.monotonic() + grace + margin
            notes = StopNotes(self._notify)
            failpoint("program.stopping")
            self._stopping.set()
            if not self._lock.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
                self._kill_late()  # it is still starting, and the thread that starts it holds the lock
                self._lock.acquire()
            self._lock.release()
            self._send(Stop(grace))
            while not wait_dead(self._pidfd, 0.2):
                if deadline is not None and time.monotonic() >= deadline:
                    self._kill_late()
                    wait_dead(self._pidfd, None)
                elif is_stopped(self.pid):  # otherwise the node itself sends notices about its wait
                    notes.wait_for(lambda: describe_unresponsive("the node", self.pid))
            self._reap()
            if self._data.cluster.exists():  # a node that stops normally removes it
                self._wait_for_survivors()
                self._data.remove_cluster()
            self._check_data()
        except BaseException:
            self.kill()
            raise
        self._close_pidfd()
        self._output.close()

    def end_stop(self) -> None:
        """Make `stop`, which waits in another thread, kill the stages in work instead of waiting for them."""
        self._send(Stop(None, kill=True))

    def _kill_late(self) -> None:
        self._notify("the cluster did not stop in time and is killed; unfinished instances continue at the next start")
        if self._process is not None:
            self._process.kill()

    def kill(self) -> None:
        """Kill the cluster. Its journal is complete at any time."""
        self._stopping.set()
        try:
            self._send(Stop(None, kill=True))
            if self._process is not None:
                wait_dead(self._pidfd, 0.0 if is_stopped(self.pid) else 3.0)
        finally:
            # Also after another Ctrl-C.
            if self._process is not None:
                self._process.kill()
        self._reap()
        try:
            self._wait_for_survivors()
            self._data.remove_cluster()
        except BrokerUnavailable as error:
            self._notify(str(error))  # not raised: it would hide the error for which the caller kills the cluster
        self._close_pidfd()
        self._output.close(KILLED_OUTPUT_SECONDS)

    def _close_pidfd(self) -> None:
        """Close the pidfd of the last node."""
        with self._lock:
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1

    def _send(self, message: Register | Scale | Stop) -> None:
        channel = self._channel
        if channel is None:
            return  # between two nodes: the next one, if any, has it in its configuration
        try:
            channel.send(message)
        except OSError:
            pass  # the node has died; the watch thread starts another, which has it in its configuration

    def _launch_until_ready(self) -> None:
        """Start nodes until one is ready. Raises the error that one reports, or `BrokerUnavailable` after too many."""
        while True:
            try:
                with self._lock:
                    if not self._stopping.is_set():
                        self._launch()
                return
            except _DiedWhileStarting:
                self._restart_limit.record()
                self._wait_for_survivors()

    def _launch(self) -> None:
        occupy_standard_descriptors()  # the program may have closed them since the start
        runtime_dir(self._data.path)  # an unusable directory is reported by the program and not by a node that fails
        ours, theirs = socket.socketpair()
        output = self._output.connect()
        self._config.output_fd, self._config.levels_fd = output.fileno(), self._output.levels.fd
        try:
            self._process = subprocess.Popen(
                [
                    python_interpreter(),
                    *service_flags(),
                    "-c",
                    _BOOTSTRAP,
                    str(theirs.fileno()),
                    *self._config.sys_path,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Where the program has started without a stderr, descriptor 2 may be a file of its own.
                stderr=subprocess.DEVNULL if sys.__stderr__ is None else None,
                pass_fds=(theirs.fileno(), self._data.lock_fd, output.fileno(), self._output.levels.fd),
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise BrokerUnavailable(f"the node process could not be started: {error}") from error
        finally:
            theirs.close()
            output.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        channel = Channel(ours)
        try:
            self._pidfd = os.pidfd_open(self._process.pid)
            channel.send(self._config)
            failpoint("program.node-started")
            report = self._await_report(channel)
        except BaseException:
            self._process.kill()
            self._process.wait()
            channel.close()
            raise
        if report is None or report.word != "ready":
            status = self._process.wait()
            channel.close()
            if report is None and status < 0:
                raise _DiedWhileStarting(f"the node process ended while it was starting ({describe_exit(status)})")
            self._wait_for_survivors()  # they hold the lock of the directory, which may be opened again at once
            raise _error_of(report)
        failpoint("program.ready")
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
        """Handle the node's reports. If it ends without a stop, start another, unless it has reported a failure."""
        failure_report: Report | None = None
        while True:
            channel = self._channel
            report = None if channel is None else channel.receive()
            if isinstance(report, Report):
                if report.word == "loaded":
                    self._confirm_loaded([report.fields["number"]], report.text)
                elif report.word == "notice":
                    self._notify(report.text)
                elif report.word == "scaled":
                    self._record_scale(report.fields["queue"], report.fields["actors"])
                elif report.word == "failed":
                    failure_report = report
                continue
            if self._stopping.is_set():
                return
            wait_dead(self._pidfd, None)
            status = self._reap()
            if self._stopping.is_set():
                return
            try:
                if failure_report is not None:
                    raise _error_of(failure_report)
                self._data.check_present(*self._data.contents(self._config.durability))
                self._notify(f"the node process has ended ({describe_exit(status)}); it is started again")
                self._restart_limit.record()
                self._wait_for_survivors()
                self._launch_until_ready()
                # The new node has all of them in its configuration.
                self._confirm_loaded(range(self._last_requested + 1))
            except StageFlowError as error:
                self._announce(error)
                self._on_failure(error)
                self._confirm_loaded(range(self._last_requested + 1))
                return
            except Exception as error:  # noqa: BLE001 - callers that wait must learn that no node will be started
                self._on_failure(
                    BrokerUnavailable(f"the node process cannot be started again: {describe_error(error)}")
                )
                self._confirm_loaded(range(self._last_requested + 1))
                return

    def _announce(self, error: StageFlowError) -> None:
        """Write the error to stderr: it may be that no call of the program waits, and none follows."""
        self._has_failed = True
        self._notify(str(error))
        error._noticed = True

    def _check_data(self) -> None:
        """Announce at the end that the data directory was removed, unless the node found it and the program knows."""
        try:
            self._data.check_present(*self._data.contents(self._config.durability))
        except DataDirUnusable as error:
            if not self._has_failed:
                self._announce(error)

    def _wait_for_survivors(self) -> None:
        """Wait until the other processes of a dead node's cluster end. Raises `BrokerUnavailable` if one does not."""
        deadline = time.monotonic() + SURVIVOR_SECONDS
        while survivors := _survivors(self._data):
            if time.monotonic() > deadline:
                pids = ", ".join(map(str, survivors))
                raise BrokerUnavailable(
                    f"the node process ended, but processes of its cluster are still running: {pids}; end them, then "
                    "start again"
                )
            for pid in survivors:
                resume_process(pid)  # a stopped process (SIGSTOP) does not notice the end of its node
            time.sleep(0.01)
        while reap_adopted(_ADOPTED) and time.monotonic() < deadline:  # as process 1 of a container has to
            time.sleep(0.01)

    def _reap(self) -> int:
        status = 0 if self._process is None else self._process.wait()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        return status


def remove_cluster_files(data: DataDir) -> None:
    """Remove the cluster record and the socket directory of a cluster that failed to start.

    Both stay while a process of the cluster is still running, which may need them.
    """
    if _survivors(data):
        return
    data.remove_cluster()
    try:
        remove_runtime_dir(runtime_dir(data.path))
    except DataDirUnusable:
        pass  # the directory belongs to another user


def _survivors(data: DataDir) -> list[int]:
    """Return the running processes of a cluster on this directory, whose lock this process holds.

    They are the holders of the lock outside the program's session. A process that the program itself has forked (in a
    process pool) holds the lock too, but inside that session.
    """
    own = os.getsid(0)
    return [pid for pid in data.holders() if _session(pid) not in (own, None)]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None  # the process has just ended


def _error_of(report: Report | None) -> StageFlowError:
    """Return the error that the node has reported, of the same type as in the node if that is public."""
    if report is None:
        return BrokerUnavailable("the node process ended while it was starting; see stderr for the reason")
    known = (getattr(module, report.kind, None) for module in (errors, history_errors, data_dir))
    error_type = next(filter(None, known), None)
    if error_type is errors.JournalCorrupt:
        file = report.fields.get("file")
        return errors.JournalCorrupt(
            report.text, file=None if file is None else os.fsdecode(file), offset=report.fields.get("offset")
        )
    if error_type is not None and isinstance(error_type, type) and issubclass(error_type, StageFlowError):
        error = error_type.__new__(error_type, report.text)  # without `__init__`, which takes other arguments
        error.args = (report.text,)
        return error
    return StageFlowError(report.text)
