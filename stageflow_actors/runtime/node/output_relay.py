"""`OutputRelay`: passes output and log records of workers on to the program, and keeps the last output for errors.

Each worker writes stdout and stderr into pipes of its own; all of them, and the broker, send log records into one
socket. One thread of the node reads everything and sends it over the channel to the program, which never blocks it: a
worker never waits for a program that does not read. Lines of several workers do not mix. The output of a dead worker is
read to its end. Output that is still in a pipe when the node itself is killed is lost.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
import traceback

from stageflow_actors.runtime.ipc.exit_codes import EXIT_NODE_FAILED
from stageflow_actors.runtime.ipc.output_frames import LOGS, STDERR
from stageflow_actors.runtime.node.program_channel import ProgramChannel

__all__ = ["OutputRelay", "WorkerOutput"]

CHUNK_BYTES = 65_536
"""Bytes read at once: the capacity of a pipe."""
KEPT_BYTES = 32_768
"""Last bytes of a worker's output that are kept: room for a traceback by the interpreter."""
GATHER_SECONDS = 0.005
"""Pause between two rounds, so that a stage that writes line by line does not wake the node for each line."""
MAX_LINE_BYTES = CHUNK_BYTES
"""Longest beginning of a line that is held back until the line is complete."""
LINE_SECONDS = 1.0
"""Time for which the beginning of a line is held back: between two writes a worker may have to wait for the CPU."""
POLL_SECONDS = 0.05
"""Time between two checks of lines that are held back."""
MAX_DATAGRAM_BYTES = 1 << 18
"""Largest datagram with log records."""
MAX_DATAGRAMS = 500
"""Most datagrams with log records that are read in one round."""
LOG_BUFFER_BYTES = 4 << 20
"""Requested size of the buffer for log records on their way to the node; the kernel may grant less."""
MAX_READS = 16
"""Most reads after a worker's exit: a process that it has started may continue to write."""
MAX_ORPHANED_PIPES = 64
"""Most pipes kept open for processes that dead workers have started. The oldest are closed first; a process that
writes to a closed pipe gets SIGPIPE or EPIPE."""


class WorkerOutput:
    """The read end of one worker's stdout or stderr. The pool calls `finish`; the relay calls everything else.

    `_partial_since` is the time since which an incomplete line is held back; zero without one.
    """

    def __init__(self, fd: int, kind: int, relay: OutputRelay) -> None:
        self.fd = fd
        self.kind = kind
        self.at_end = False
        self._relay = relay
        self._lock = threading.Lock()
        self._pending: list[bytes] = []
        self._tail = b""
        self._partial_since = 0.0

    def read(self) -> int:
        """Read what is available, at most one chunk. Return the number of bytes.

        Never waits; no thread may wait for anything else while it holds the lock.
        """
        with self._lock:
            if self.at_end:
                return 0
            try:
                data = os.read(self.fd, CHUNK_BYTES)
            except BlockingIOError:
                return 0
            if not data:
                self.at_end = True
                return 0
            self._pending.append(data)
            if self.kind == STDERR:
                self._tail = data[-KEPT_BYTES:] if len(data) >= KEPT_BYTES else (self._tail + data)[-KEPT_BYTES:]
            return len(data)

    def take(self) -> bytes:
        """Return the output to pass on now: whole lines, so that lines of two workers do not mix.

        An incomplete line is passed on if its end does not come in time, if it is very long, or at the end of the pipe.
        """
        now = time.monotonic()
        with self._lock:
            data = b"".join(self._pending)
            cut = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
            if cut or not self._partial_since:
                self._partial_since = now
            if self.at_end or (not cut and (len(data) > MAX_LINE_BYTES or now - self._partial_since > LINE_SECONDS)):
                cut = len(data)
            rest = data[cut:]
            self._pending = [rest] if rest else []
            if not rest:
                self._partial_since = 0.0
            return data[:cut]

    @property
    def has_pending(self) -> bool:
        """True if output is waiting to be passed on."""
        return bool(self._pending)

    def close_pipe(self) -> None:
        """Close the pipe and read no more: another file may get the same descriptor number."""
        with self._lock:
            self.at_end = True
            os.close(self.fd)

    def finish(self) -> bytes:
        """Return the last bytes of the output of a worker that has exited. The relay still passes the rest on."""
        for _ in range(MAX_READS):
            if not self.read():
                break
        self._relay.mark_exited(self)
        with self._lock:
            return self._tail


class OutputRelay:
    """Reads the output of all workers of a node, and log records, and sends them over `channel`.

    `log_fd` is the descriptor into which workers and broker send their log records.
    """

    def __init__(self, channel: ProgramChannel) -> None:
        self._channel = channel
        self._poll = select.epoll()
        self._logs, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._logs.setblocking(False)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOG_BUFFER_BYTES)
        self.log_fd = theirs.detach()
        self._poll.register(self._logs, select.EPOLLIN)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll.register(self._wake_fd, select.EPOLLIN)
        self._lock = threading.Lock()
        self._watching_channel = False
        self._unfinished: dict[int, WorkerOutput] = {}
        self._open: dict[int, WorkerOutput] = {}
        self._exited: dict[int, WorkerOutput] = {}
        self._partial: set[WorkerOutput] = set()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="output-relay", daemon=True)
        self._thread.start()
        channel.on_backlog = self._wake
        self._wake()

    def open(self, kind: int = STDERR) -> tuple[WorkerOutput, int]:
        """Make a pipe for the output of a new worker, `STDOUT` or `STDERR`. Return its read end and its write end.

        The caller closes that descriptor. Raises `OSError` if no descriptors are free.
        """
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(ours, False)
        output = WorkerOutput(ours, kind, self)
        with self._lock:
            self._open[ours] = output
        self._poll.register(ours, select.EPOLLIN)
        return output, theirs

    def mark_exited(self, output: WorkerOutput) -> None:
        """Mark the pipe of a worker that has exited; processes that the worker has started may still write to it."""
        with self._lock:
            if self._open.get(output.fd) is output:  # else it is closed, and another pipe may have the same number
                self._exited[output.fd] = output
        self._wake()

    def close(self, timeout: float) -> None:
        """Pass on the remaining output and log records of workers, which have exited, for at most `timeout` seconds."""
        deadline = self._deadline = time.monotonic() + timeout
        self._wake()
        self._thread.join(timeout)
        self._channel.drain(deadline)
        if not self._thread.is_alive():
            self._logs.close()
            for fd in (self.log_fd, self._wake_fd):
                os.close(fd)
            self._poll.close()

    def _wake(self) -> None:
        if self._thread.is_alive():
            os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        try:
            while not self._round():
                pass
        except BaseException:  # noqa: BLE001 - without a reader, workers would block on stderr for ever
            traceback.print_exc()
            os._exit(EXIT_NODE_FAILED)  # the program starts the node again

    def _round(self) -> bool:
        """Read at most one chunk from each pipe and pass it on. Return True if this was the last round."""
        closing = self._deadline != float("inf")
        ready = [fd for fd, _ in self._poll.poll(0 if closing else POLL_SECONDS if self._partial else None)]
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
            ready.remove(self._wake_fd)
        bytes_read, full = 0, False
        if self._logs.fileno() in ready:
            bytes_read, full = self._pass_logs_on()
            ready.remove(self._logs.fileno())
        self._watch_channel(ready)
        with self._lock:
            readable = {self._open[fd] for fd in ready} | self._partial | set(self._exited.values())
        self._partial.clear()
        for each in readable:
            count = each.read()
            bytes_read += count
            full = full or count > CHUNK_BYTES // 4
            self._pass_on(each, each.take())
            if each.has_pending:
                self._partial.add(each)
        with self._lock:
            closed = [each for each in readable if each.at_end]
            closed += list(self._exited.values())[: max(0, len(self._exited) - MAX_ORPHANED_PIPES)]
        for each in closed:
            self._forget(each)
        if not (closing or full):
            time.sleep(GATHER_SECONDS)
        finished = closing and (not bytes_read or time.monotonic() > self._deadline)
        for each in list(self._partial) if finished else []:
            self._forget(each)
        return finished

    def _watch_channel(self, ready: list[int]) -> None:
        """Continue to send a backlog; poll the channel only while there is one."""
        fd = self._channel.fileno()
        if fd in ready:
            self._channel.flush()
            ready.remove(fd)
        waiting = self._channel.has_backlog
        if fd >= 0 and waiting != self._watching_channel:
            self._poll.register(fd, select.EPOLLOUT) if waiting else self._poll.unregister(fd)
            self._watching_channel = waiting

    def _pass_logs_on(self) -> tuple[int, bool]:
        """Send the log records that have arrived. Return their bytes, and True if more may be waiting."""
        records: list[bytes] = []
        while len(records) < MAX_DATAGRAMS:
            try:
                data = self._logs.recv(MAX_DATAGRAM_BYTES)
            except BlockingIOError:
                break
            if not data:
                break
            records.append(data)
        joined = b"".join(records)
        if joined:
            self._channel.send(LOGS, joined, len(records))
        return len(joined), len(records) > MAX_DATAGRAMS // 4

    def _forget(self, output: WorkerOutput) -> None:
        with self._lock:
            if self._open.get(output.fd) is not output:
                return
            del self._open[output.fd]
            self._exited.pop(output.fd, None)
        self._poll.unregister(output.fd)
        self._partial.discard(output)
        output.close_pipe()
        self._pass_on(output, output.take())
        if self._unfinished.get(output.kind) is output:
            del self._unfinished[output.kind]
            self._channel.send(output.kind, b"\n", 1)

    def _pass_on(self, output: WorkerOutput, data: bytes) -> None:
        """Send output; that of another worker begins on a new line."""
        if not data:
            return
        if self._unfinished.get(output.kind, output) is not output:
            data = b"\n" + data
        if data.endswith((b"\n", b"\r")):
            self._unfinished.pop(output.kind, None)
        else:
            self._unfinished[output.kind] = output
        self._channel.send(output.kind, data, data.count(b"\n") + (output.kind in self._unfinished))
