"""The node's side of the zygote: asks for workers, and hears of their births and deaths.

Requests and reports are small datagrams over a socket pair. Nothing here blocks on a worker, and nothing
here decides what a death means.
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
"""What every worker imports. None of these starts a thread or opens a socket when it is imported."""

# `-c` and not `-m`: the program's own sys.path, not the working directory, says where this package lies.
_BOOTSTRAP = """\
import sys
sys.path[:] = sys.argv[2:]
from stageflow_actors.runtime.zygote.main import main
main(int(sys.argv[1]))
"""

_REPORT = msgspec.msgpack.Decoder(tuple[int, str, int, int | str])


class Spawned(Struct, frozen=True):
    """A worker lives. `pidfd` belongs to the receiver, who closes it."""

    worker_id: str
    pid: int
    pidfd: int


class Exited(Struct, frozen=True):
    """A worker has ended and so has what it had started. `status` as in `subprocess`; see `describe_exit`."""

    worker_id: str
    pid: int
    status: int


class SpawnFailed(Struct, frozen=True):
    """A worker could not be forked: `reason` says why (no memory, too many processes)."""

    worker_id: str
    reason: str


class ZygoteGone(Struct, frozen=True):
    """The zygote has ended. Its workers die with it, unreported; requests that were not answered are lost.

    `status` as in `subprocess`.
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
    ) -> None:
        """`entry` is `module:function`; each worker calls it with (payload: bytes, slot: Slot or None).

        What it returns is the worker's exit code; an exception makes it 70, with a traceback on stderr. `keep_fds`
        (the data directory's lock) stay open in the zygote and in the workers under the same numbers. `sys_path`
        and `cwd` are the workers', by default those of this process.
        """
        self._entry = entry
        self._slots = slots
        self._keep_fds = list(keep_fds)
        self._sys_path = list(sys.path if sys_path is None else sys_path)
        self._cwd = cwd
        self._preload = list(preload)
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._gone = False

    @property
    def pid(self) -> int:
        """The zygote's process id. Raises `RuntimeError` before `start`."""
        if self._process is None:
            raise RuntimeError("the zygote has not been started")
        return self._process.pid

    def start(self) -> None:
        """Starts the process; requests may follow at once. Raises `OSError` if there is no room for a process."""
        if self._process is not None:
            raise RuntimeError("a zygote is started once; make another")
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
        )
        config_fd = _anonymous_file(msgspec.msgpack.encode(config))
        passed = [theirs.fileno(), config_fd, *self._keep_fds, *([self._slots.fd] if self._slots else [])]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, str(config_fd), *self._sys_path],
                stdin=subprocess.DEVNULL,
                pass_fds=passed,
                start_new_session=True,  # the terminal's Ctrl-C is for the program
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(config_fd)
        self._socket = ours

    def fileno(self) -> int:
        """Readable when `events` has something to tell. After `ZygoteGone` it stays readable: `close` then."""
        return self._connection().fileno()

    def spawn(
        self,
        worker_id: str,
        payload: bytes,
        slot: int | None = None,
        env: Mapping[str, str] | None = None,
        *,
        stderr: int = -1,
    ) -> None:
        """Asks for a worker. `Spawned`, then some day `Exited`, or `SpawnFailed`, comes through `events`.

        `payload` may be megabytes; `slot` is an index in the slot table; `env` is added to the environment; the
        worker's stderr is a copy of `stderr`, or the zygote's. If the zygote has gone the request is lost, as
        `ZygoteGone` says.
        """
        message = msgspec.msgpack.encode((worker_id, -1 if slot is None else slot))
        input_fd = _anonymous_file(msgspec.msgpack.encode(WorkerInput(dict(env or {}), payload)))
        try:
            with self._lock:
                socket.send_fds(self._connection(), [message], [input_fd, *([stderr] if stderr >= 0 else [])])
        except (BrokenPipeError, ConnectionError):
            pass
        finally:
            os.close(input_fd)

    def events(self) -> list[Event]:
        """What has happened since the last call; does not wait."""
        events: list[Event] = []
        while not self._gone:
            message, pidfd = self._receive()
            if message is None:
                break
            if not message:
                self._gone = True
                assert self._process is not None  # there is a socket only once there is a process
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
        """Whether somebody has stopped the process (SIGSTOP, a debugger): it neither forks nor reports."""
        return is_stopped(self.pid)

    def kill(self) -> bool:
        """Ends the process, stopped or not, from any thread; `ZygoteGone` follows. False: it had ended already."""
        if self._process is None or self._process.poll() is not None:
            return False
        self._process.kill()
        return True

    def close(self, timeout: float = 5.0) -> None:
        """Ends the zygote, all workers and what they have started; waits for the zygote's end. Idempotent."""
        if self._socket is not None:
            with self._lock:
                self._socket.close()
        if self._process is None:
            return
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            # Stopped, or starved. Its workers die with it.
            self._process.kill()
            self._process.wait()

    def _receive(self) -> tuple[bytes | None, int]:
        """One report and the pidfd that came with it (or -1); None when there is none, empty at the end."""
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
            raise RuntimeError("the zygote has not been started")
        return self._socket


def _anonymous_file(content: bytes) -> int:
    """A file without a name that holds `content`; whoever inherits it reads from the start."""
    fd = os.memfd_create("stageflow")
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(fd, rest) :]
    except BaseException:
        os.close(fd)
        raise
    return fd
