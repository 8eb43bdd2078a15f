"""`StderrRelay`: passes the stderr of workers on to the program, and keeps its last lines for errors.

Each worker writes into a pipe of its own. One thread of the node reads all pipes and writes to the node's stderr, which
is the program's. If the program's stderr blocks, this thread blocks, and then each worker that fills its pipe, as it
would without a pipe; no other thread of the node may ever wait for either. The output of a dead worker is read to its
end. Output that is still in a pipe when the node itself is killed is lost.
"""

from __future__ import annotations

import os
import select
import threading
import time
import traceback

from stageflow_actors.runtime.ipc.exit_codes import EXIT_NODE_FAILED

__all__ = ["StderrRelay", "WorkerStderr"]

CHUNK_BYTES = 65_536
"""Bytes read at once: the capacity of a pipe."""
KEPT_BYTES = 32_768
"""Last bytes of a worker's output that are kept: room for a traceback by the interpreter."""
GATHER_SECONDS = 0.005
"""Pause between two rounds, so that a stage that writes line by line does not wake the node for each line."""
MAX_LINE_BYTES = CHUNK_BYTES
"""Longest beginning of a line that is held back until the line is complete."""
LINE_SECONDS = 0.2
"""Time for which the beginning of a line is held back: between two writes a worker may have to wait for the CPU."""
MAX_READS = 16
"""Most reads after a worker's exit: a process that it has started may continue to write."""
MAX_ORPHANED_PIPES = 64
"""Most pipes kept open for processes that dead workers have started. The oldest are closed first; a process that
writes to a closed pipe gets SIGPIPE or EPIPE."""


class WorkerStderr:
    """The read end of one worker's stderr. The pool calls `finish`; the relay calls everything else.

    `_partial_since` is the time since which an incomplete line is held back; zero without one.
    """

    def __init__(self, fd: int, relay: StderrRelay) -> None:
        self.fd = fd
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


class StderrRelay:
    """Reads the stderr of all workers of a node and writes it to the descriptor `out`."""

    def __init__(self, out: int = 2) -> None:
        self._out = out
        self._poll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll.register(self._wake_fd, select.EPOLLIN)
        self._lock = threading.Lock()
        self._open: dict[int, WorkerStderr] = {}
        self._exited: dict[int, WorkerStderr] = {}
        self._partial: set[WorkerStderr] = set()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name="stderr-relay", daemon=True)
        self._thread.start()

    def open(self) -> tuple[WorkerStderr, int]:
        """Make a pipe for a new worker. Return its read end, and the descriptor that becomes the worker's stderr.

        The caller closes that descriptor. Raises `OSError` if no descriptors are free.
        """
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(ours, False)
        stderr = WorkerStderr(ours, self)
        with self._lock:
            self._open[ours] = stderr
        self._poll.register(ours, select.EPOLLIN)
        return stderr, theirs

    def mark_exited(self, stderr: WorkerStderr) -> None:
        """Mark the pipe of a worker that has exited; processes that the worker has started may still write to it."""
        with self._lock:
            if self._open.get(stderr.fd) is stderr:  # else it is closed, and another pipe may have the same number
                self._exited[stderr.fd] = stderr
        self._wake()

    def close(self, timeout: float) -> None:
        """Pass on the remaining output of all workers, which have exited, for at most `timeout` seconds."""
        self._deadline = time.monotonic() + timeout
        self._wake()
        self._thread.join(timeout)

    def _wake(self) -> None:
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
        ready = [fd for fd, _ in self._poll.poll(0 if closing else LINE_SECONDS / 4 if self._partial else None)]
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
            ready.remove(self._wake_fd)
        with self._lock:
            readable = {self._open[fd] for fd in ready} | self._partial | set(self._exited.values())
        bytes_read, full = 0, False
        self._partial.clear()
        for each in readable:
            count = each.read()
            bytes_read += count
            full = full or count > CHUNK_BYTES // 4
            self._write(each.take())
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

    def _forget(self, stderr: WorkerStderr) -> None:
        with self._lock:
            if self._open.get(stderr.fd) is not stderr:
                return
            del self._open[stderr.fd]
            self._exited.pop(stderr.fd, None)
        self._poll.unregister(stderr.fd)
        self._partial.discard(stderr)
        stderr.close_pipe()
        self._write(stderr.take())

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._out, rest) :]
            except BlockingIOError:
                room = select.poll()
                room.register(self._out, select.POLLOUT)
                room.poll(1000)
            except OSError:
                return  # stderr is closed or its disk is full: no place is left to report that
