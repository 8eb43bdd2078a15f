"""The zygote process: forks workers and reports their exits, in one thread.

It has imported the modules that every worker needs, so that a worker starts within milliseconds. It must never load
user code, start a thread, or read a worker's payload, which travels in an anonymous file that only the worker opens.

It ends when its socket closes, which happens however the node ends, and first kills all workers and their child
processes. It must not have a `PR_SET_PDEATHSIG`: a zygote that is killed together with the node cannot kill the child
processes of its workers.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from typing import NoReturn

import msgspec
from msgspec import Struct

from stageflow_actors.runtime.ipc.exit_codes import EXIT_UNHANDLED
from stageflow_actors.runtime.ipc.slots import SlotTable
from stageflow_actors.runtime.system.processes import (
    adopt_orphans,
    child_pids,
    kill_group,
    kill_groups,
    name_process,
    parent_death_fd,
    raise_oom_score,
    session_members,
    set_pdeathsig,
)
from stageflow_actors.runtime.zygote.protocol import (
    EXITED,
    FAILED,
    MAX_DATAGRAM_BYTES,
    MAX_STREAMS,
    SPAWNED,
    WORKER_NAME,
    ZYGOTE_NAME,
    InterpreterExit,
    WorkerInput,
    ZygoteConfig,
    read_config,
)
from stageflow_brokers.failpoints import failpoint
from stageflow_brokers.resources import lower_descriptor_limit
from stageflow_brokers.signals import reset_signals

__all__ = ["ZygoteServer", "main"]


LAST_REAP_SECONDS = 0.3
"""Longest wait for the exits of killed workers at the end of the zygote."""

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class _Worker(Struct):
    """A worker that has not been reaped. `left`: pidfds of processes that it left behind at its end and that run."""

    worker_id: str
    pid: int
    pidfd: int
    slot: int
    left: set[int] = set()


def main(config_fd: int) -> NoReturn:
    """Run the zygote in this process until the node ends."""
    reset_signals()
    config = read_config(config_fd)
    del sys.argv[1:]  # user code in a worker must not see these arguments
    try:
        node = parent_death_fd(config.node_pid)
    except ProcessLookupError:
        os._exit(0)
    # The program receives the signals that stop the cluster; the zygote ends with the node.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    for fd in (config.socket_fd, config.slots_fd, *config.keep_fds):
        if fd >= 0:
            os.set_inheritable(fd, False)
    name_process(ZYGOTE_NAME)
    gc.disable()
    _preload(config.preload)
    gc.collect()
    gc.freeze()  # a collection in a worker would write to, and so copy, every page that it shares with the zygote
    failpoint("zygote.born")
    ZygoteServer(config, node).serve()


def _preload(modules: list[str]) -> None:
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # the module exists, but one of its imports does not
    if threading.active_count() > 1 or len(os.listdir("/proc/self/task")) > 1:
        # A lock that another thread holds during a fork stays locked in the child permanently.
        raise RuntimeError(f"the zygote must have one thread, but importing {modules} started others")


class ZygoteServer:
    """The loop of the zygote: receive requests, fork, send reports. Only the poll may block."""

    def __init__(self, config: ZygoteConfig, node_pidfd: int) -> None:
        self._config = config
        self._pid = os.getpid()
        self._socket = socket.socket(fileno=config.socket_fd)
        self._socket.setblocking(False)
        self._node = node_pidfd
        self._slots = SlotTable.attach(config.slots_fd, config.slot_count) if config.slots_fd >= 0 else None
        self._workers: dict[int, _Worker] = {}
        self._left: dict[int, _Worker] = {}
        self._reports: deque[tuple[bytes, int]] = deque()
        self._poller = select.poll()
        self._poller.register(self._node, select.POLLIN)
        self._poller.register(config.socket_fd, select.POLLIN)
        adopt_orphans()
        self._child_exits, self._signal_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._signal_fd, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _ignore_signal)  # the pipe receives its number
        self._poller.register(self._child_exits, select.POLLIN)

    def serve(self) -> NoReturn:
        """Serve the node until it ends, then exit."""
        connection = self._socket.fileno()
        while True:
            for fd, event in self._poller.poll():
                if fd == self._node:
                    self._end()
                elif fd == self._child_exits:
                    self._reap_adopted()
                elif fd in self._left:
                    self._on_left_exited(fd)
                elif fd != connection:
                    self._on_worker_exited(self._workers[fd])
                else:
                    if event & select.POLLIN:
                        self._serve_request()
                    elif event & ~select.POLLOUT:
                        self._end()
                    if event & select.POLLOUT:
                        self._flush()

    def _end(self) -> NoReturn:
        kill_groups((worker.pid, worker.pidfd) for worker in self._workers.values())
        deadline = time.monotonic() + LAST_REAP_SECONDS
        try:
            # Otherwise they would be zombies of the next parent, until that reaps them.
            while time.monotonic() < deadline:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.001)
        except ChildProcessError:
            pass
        os._exit(0)

    def _reap_adopted(self) -> None:
        """Reap the orphans of workers that have ended; workers are reaped by `_reap`."""
        os.read(self._child_exits, 4096)
        workers = {worker.pid for worker in self._workers.values()}
        for pid in child_pids():
            if pid not in workers:
                os.waitpid(pid, os.WNOHANG)

    def _serve_request(self) -> None:
        try:
            message, fds, _, _ = socket.recv_fds(
                self._socket, MAX_DATAGRAM_BYTES, 1 + MAX_STREAMS, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            self._end()
        if not message:
            self._end()
        worker_id, slot = msgspec.msgpack.decode(message, type=tuple[str, int])
        self._spawn(worker_id, slot, fds)

    def _spawn(self, worker_id: str, slot: int, fds: list[int]) -> None:
        try:
            failpoint("zygote.before-fork")
            pid = os.fork()
        except OSError as error:  # no memory, or too many processes
            _close(fds)
            self._report(FAILED, worker_id, 0, f"cannot fork: {error.strerror}")
            return
        if pid == 0:
            self._become_worker(slot, *fds)
        _close(fds)
        # Only this thread reaps, so the pid still identifies the child, even if it has ended.
        pidfd = os.pidfd_open(pid)
        self._workers[pidfd] = _Worker(worker_id, pid, pidfd, slot)
        self._poller.register(pidfd, select.POLLIN)
        failpoint("zygote.forked")
        self._report(SPAWNED, worker_id, pid, 0, os.dup(pidfd))

    def _on_worker_exited(self, worker: _Worker) -> None:
        """End the child processes of a worker that ended, then reap it.

        In this order: after the reap, its pid may belong to another process.
        """
        self._poller.unregister(worker.pidfd)
        if self._slots is not None and worker.slot >= 0 and self._slots[worker.slot].ending_since_ns:
            self._end_session(worker)
        else:
            kill_group(worker.pid, worker.pidfd)
            self._reap(worker)

    def _end_session(self, worker: _Worker) -> None:
        """Send SIGTERM to the processes that a worker left behind at its end, or reap the worker if there are none.

        Resource trackers (of multiprocessing and loky) ignore SIGTERM: they clean up, because the worker has closed its
        pipe to them, and end. The node kills all of them once the worker's time to stop has passed.
        """
        for pid in session_members({worker.pid}):
            try:
                pidfd = os.pidfd_open(pid)
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            except OSError:
                continue  # it has just ended, or belongs to another user
            worker.left.add(pidfd)
            self._left[pidfd] = worker
            self._poller.register(pidfd, select.POLLIN)
        if not worker.left:
            self._reap(worker)

    def _on_left_exited(self, pidfd: int) -> None:
        worker = self._left.pop(pidfd)
        worker.left.discard(pidfd)
        self._poller.unregister(pidfd)
        os.close(pidfd)
        if not worker.left:
            self._end_session(worker)  # which may have started others

    def _reap(self, worker: _Worker) -> None:
        pidfd = worker.pidfd
        del self._workers[pidfd]
        _, status = os.waitpid(worker.pid, 0)
        os.close(pidfd)
        self._report(EXITED, worker.worker_id, worker.pid, os.waitstatus_to_exitcode(status))

    def _report(self, kind: int, worker_id: str, pid: int, detail: int | str, pidfd: int = -1) -> None:
        self._reports.append((msgspec.msgpack.encode((kind, worker_id, pid, detail)), pidfd))
        self._flush()

    def _flush(self) -> None:
        """Send as many reports as fit.

        Must not block: the node may be blocked in its own send to the zygote.
        """
        while self._reports:
            message, pidfd = self._reports[0]
            try:
                if pidfd >= 0:
                    socket.send_fds(self._socket, [message], [pidfd])
                else:
                    self._socket.send(message)
            except BlockingIOError:
                self._poller.modify(self._socket.fileno(), select.POLLIN | select.POLLOUT)
                return
            except OSError:
                self._end()
            self._reports.popleft()
            if pidfd >= 0:
                os.close(pidfd)
        self._poller.modify(self._socket.fileno(), select.POLLIN)

    def _become_worker(self, slot: int, input_fd: int, *streams: int) -> NoReturn:
        """Run the worker in the forked child. Must never return into the loop of the zygote.

        The first two of `streams` become its stdout and stderr, and a third one its third argument.
        """
        code, finalize = EXIT_UNHANDLED, False
        try:
            os.setsid()
            set_pdeathsig(signal.SIGKILL)
            if os.getppid() != self._pid:
                os._exit(0)
            for number, fd in enumerate(streams[:2], start=1):
                if fd != number:
                    os.dup2(fd, number)
                    os.close(fd)
            self._release_zygote_resources()
            raise_oom_score()
            lower_descriptor_limit(self._config.descriptor_limit)
            opened = self._slots.open_again(slot) if self._slots and slot >= 0 else None
            code = _run_entry(self._config, opened, input_fd, *streams[2:])
        except InterpreterExit as request:
            code, finalize = request.status, True
        except BaseException:  # noqa: BLE001 - the child must end here in any case
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except (OSError, ValueError, AttributeError):
                    pass  # a handler closed it, or its reader has ended
            if not finalize:
                os._exit(code & 0xFF)
        raise SystemExit(code)  # the callers of this method catch nothing

    def _release_zygote_resources(self) -> None:
        """Close the descriptors of the zygote and reset its signal handlers, in a child."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._socket.close()
        for fd in (self._node, self._child_exits, self._signal_fd):
            os.close(fd)
        for pidfd in (*self._workers, *self._left):
            os.close(pidfd)
        for _, pidfd in self._reports:
            if pidfd >= 0:
                os.close(pidfd)
        # A handler and not SIG_IGN: programs that the worker starts would inherit an ignored signal.
        for number in (signal.SIGINT, *_STOP_SIGNALS):
            signal.signal(number, _ignore_signal)
        os.register_at_fork(after_in_child=_heed_stop_signals)
        gc.enable()


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _ignore_signal(_number: int, _frame: object) -> None:
    """Ignore Ctrl-C and the signals of a service manager, which are for the program; the node stops the workers."""


def _heed_stop_signals() -> None:
    """Let SIGTERM end a process that a handler has forked, as `Process.terminate` of multiprocessing expects."""
    for number in _STOP_SIGNALS:
        if signal.getsignal(number) is _ignore_signal:
            signal.signal(number, signal.SIG_DFL)


def _run_entry(config: ZygoteConfig, slot: object, input_fd: int, *more: int) -> int:
    with open(input_fd, "rb") as file:
        file.seek(0)
        given = msgspec.msgpack.decode(file.read(), type=WorkerInput)
    os.environ.update(given.env)
    if config.cwd is not None:
        try:
            os.chdir(config.cwd)
        except FileNotFoundError:
            pass  # removed: as the program itself, the worker goes on in the directory that this process inherited
    sys.path[:] = [os.fsdecode(entry) for entry in config.sys_path]
    name_process(WORKER_NAME)
    module, _, function = config.entry.partition(":")
    payload = given.payload
    del given
    try:
        result = getattr(importlib.import_module(module), function)(payload, slot, *more)
    except InterpreterExit:
        raise
    except SystemExit as exit_request:
        if isinstance(exit_request.code, str):
            sys.stderr.write(f"{exit_request.code}\n")
            return 1
        result = exit_request.code
    return int(result or 0)
