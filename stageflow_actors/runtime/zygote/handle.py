"""`ZygoteHandle`: the node's side of the zygote.

It requests workers, and receives reports of their starts and exits.

Requests and reports are small datagrams over a socket pair. This module must not block on a worker, and must not
decide what follows from an exit.
"""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

import msgspec
from msgspec import Struct

from stageflow_actors.runtime.ipc.slots import SlotTable
from stageflow_actors.runtime.system.processes import describe_exit, is_stopped
from stageflow_actors.runtime.zygote.protocol import (
    EXITED,
    FAILED,
    MAX_DATAGRAM_BYTES,
    SPAWNED,
    WorkerInput,
    ZygoteConfig,
)

__all__ = ["Event", "Exited", "SpawnFailed", "Spawned", "ZygoteGone", "ZygoteHandle", "describe_exit"]

PRELOAD = ("zmq", "msgspec", "pykka", "cloudpickle", "stageflow_actors.runtime.worker.main")
"""Modules that every worker imports. None of them starts a thread or opens a socket at import."""

# `-c` and not `-m`: this package is found by the program's sys.path, not in the working directory.
_BOOTSTRAP = """\
import sys
sys.path[:] = sys.argv[2:]
from stageflow_actors.runtime.zygote.main import main
main(int(sys.argv[1]))
"""

_REPORT = msgspec.msgpack.Decoder(tuple[int, str, int, int | str])


class Spawned(Struct, frozen=True):
    """A worker has started. The receiver owns `pidfd` and closes it."""

    worker_id: str
    pid: int
    pidfd: int


class Exited(Struct, frozen=True):
    """A worker and the processes that it started have ended.

    `status` is as in `subprocess`; see `describe_exit`.
    """

    worker_id: str
    pid: int
    status: int


class SpawnFailed(Struct, frozen=True):
    """A worker could not be forked. `reason` describes the cause (no memory, too many processes)."""

    worker_id: str
    reason: str


class ZygoteGone(Struct, frozen=True):
    """The zygote has ended. Its workers end with it, without reports; unanswered requests are lost.

    `status` is as in `subprocess`.
    """

    status: int


Event = Spawned | Exited | SpawnFailed | ZygoteGone


class ZygoteHandle:
    """One zygote. `spawn` may be called from any thread; `events` and `close` from one."""

    def __init__(
        self,
        entry: str,
        *,
        slots: SlotTable | None = None,
        keep_fds: Sequence[int] = (),
        sys_path: Sequence[str] | None = None,
        cwd: str | None = None,
        preload: Sequence[str] = PRELOAD,
        flags: Sequence[str] = (),
        descriptor_limit: int = 0,
    ) -> None:
        """Prepare a zygote; `start` starts it.

        Args:
            entry: `module:function`, which each worker calls with (payload: bytes, slot: Slot or None). Its return
                value is the exit code of the worker; an exception gives 70, with a traceback on stderr.
            slots: The table of the workers' slots. Default: workers without slots.
            keep_fds: Descriptors (the lock of the data directory) that stay open, under the same numbers, in the zygote
                and the workers.
            sys_path: The workers' `sys.path`. Default: that of this process.
            cwd: The workers' working directory. Default: that of this process.
            preload: Modules that the zygote imports before the first fork.
            descriptor_limit: The workers' soft limit of file descriptors. Default: that of this process.
        """
        self._entry = entry
        self._slots = slots
        self._keep_fds = list(keep_fds)
        self._sys_path = list(sys.path if sys_path is None else sys_path)
        self._cwd = cwd
        self._preload = list(preload)
        self._flags = list(flags)
        self._descriptor_limit = descriptor_limit
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._gone = False

    @property
    def pid(self) -> int:
        """The zygote's process id. Raises `RuntimeError` before `start`."""
        if self._process is None:
            raise RuntimeError("the zygote has not been started: call start() first")
        return self._process.pid

    def start(self) -> None:
        """Start the process; requests may follow at once. Raises `OSError` if no process can be created."""
        if self._process is not None:
            raise RuntimeError("a ZygoteHandle starts only once; create another one")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        config = ZygoteConfig(
            socket_fd=theirs.fileno(),
            node_pid=os.getpid(),
            entry=self._entry,
            sys_path=[os.fsencode(entry) for entry in self._sys_path],
            cwd=None if self._cwd is None else os.fsencode(self._cwd),
            preload=self._preload,
            slots_fd=self._slots.fd if self._slots else -1,
            slot_count=len(self._slots) if self._slots else 0,
            keep_fds=self._keep_fds,
            descriptor_limit=self._descriptor_limit,
        )
        config_fd = _anonymous_file(msgspec.msgpack.encode(config))
        passed = [theirs.fileno(), config_fd, *self._keep_fds, *([self._slots.fd] if self._slots else [])]
        try:
            self._process = subprocess.Popen(
                [sys.executable, *self._flags, "-c", _BOOTSTRAP, str(config_fd), *self._sys_path],
                stdin=subprocess.DEVNULL,
                pass_fds=passed,
                start_new_session=True,  # the terminal's Ctrl-C must reach only the program
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(config_fd)
        self._socket = ours

    def fileno(self) -> int:
        """Return a descriptor that is readable if there are reports.

        After `ZygoteGone` it is always readable: call `close` then.
        """
        return self._connection().fileno()

    def spawn(
        self,
        worker_id: str,
        payload: bytes,
        slot: int | None = None,
        env: Mapping[str, str] | None = None,
        *,
        streams: Sequence[int] = (),
    ) -> None:
        """Request a worker. `events` then returns `Spawned` and later `Exited`, or `SpawnFailed`.

        If the zygote has ended, the request is lost, and `events` returns `ZygoteGone`.

        Args:
            worker_id: The name of the worker in all reports.
            payload: The bytes for the entry function; may be megabytes.
            slot: Index of the worker's slot. Default: no slot.
            env: Variables that are added to the environment.
            streams: Two descriptors of which the worker gets copies as its stdout and stderr, and perhaps a third one,
                whose number the entry function gets as its third argument. Default: stdout and stderr of the zygote.
        """
        message = msgspec.msgpack.encode((worker_id, -1 if slot is None else slot))
        input_fd = _anonymous_file(msgspec.msgpack.encode(WorkerInput(dict(env or {}), payload)))
        try:
            with self._lock:
                socket.send_fds(self._connection(), [message], [input_fd, *streams])
        except (BrokenPipeError, ConnectionError):
            pass
        finally:
            os.close(input_fd)

    def events(self) -> list[Event]:
        """Return the reports since the last call, without waiting."""
        events: list[Event] = []
        while not self._gone:
            message, pidfd = self._receive()
            if message is None:
                break
            if not message:
                self._gone = True
                assert self._process is not None  # the socket exists only with a process
                events.append(ZygoteGone(self._process.wait()))
                break
            kind, worker_id, pid, detail = _REPORT.decode(message)
            if kind == SPAWNED:
                events.append(Spawned(worker_id, pid, pidfd))
            elif kind == EXITED:
                events.append(Exited(worker_id, pid, int(detail)))
            elif kind == FAILED:
                events.append(SpawnFailed(worker_id, str(detail)))
        return events

    def is_stopped(self) -> bool:
        """Return True if the process is stopped (SIGSTOP, a debugger): it neither forks nor reports."""
        return is_stopped(self.pid)

    def kill(self) -> bool:
        """Kill the process, stopped or not; return False if it had already ended.

        `events` then returns `ZygoteGone`. May be called from any thread.
        """
        if self._process is None or self._process.poll() is not None:
            return False
        self._process.kill()
        return True

    def close(self, timeout: float = 5.0) -> None:
        """End the zygote, all workers and their child processes; wait for the zygote. Idempotent."""
        if self._socket is not None:
            with self._lock:
                self._socket.close()
        if self._process is None:
            return
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            # It is stopped, or gets no CPU time. Its workers die with it.
            self._process.kill()
            self._process.wait()

    def _receive(self) -> tuple[bytes | None, int]:
        """Return one report and its pidfd (or -1).

        The report is None if there is none yet, and empty after the end of the zygote.
        """
        try:
            message, ancillary, _, _ = self._connection().recvmsg(
                MAX_DATAGRAM_BYTES, socket.CMSG_SPACE(4), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None, -1
        except ConnectionError:
            return b"", -1
        fds = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        return message, fds[0] if fds else -1

    def _connection(self) -> socket.socket:
        if self._socket is None:
            raise RuntimeError("the zygote has not been started: call start() first")
        return self._socket


def _anonymous_file(content: bytes) -> int:
    """Create an anonymous file with `content`; a process that inherits it must seek to the start."""
    fd = os.memfd_create("stageflow")
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(fd, rest) :]
    except BaseException:
        os.close(fd)
        raise
    return fd
