"""What workers write to stderr: passed on to the program's stderr, its end kept for the error of one that dies.

Each worker writes into a pipe of its own. One thread of the node reads them all and writes to the node's stderr, which
is the program's; it waits for that one if it must, and a worker that fills its pipe meanwhile waits too, as it would
without a pipe. Nothing else in the node ever waits for either. What a worker wrote is read to the end also when it is
dead; only what is in a pipe when the node itself is killed is lost.
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
"""Bytes read at once: what a pipe holds."""
KEPT_BYTES = 32_768
"""Bytes at the end of what a worker wrote that are kept: room for a traceback of the interpreter's own."""
GATHER_SECONDS = 0.005
"""Seconds in which more may gather, so that a stage that writes line by line does not wake the node at each."""
MAX_LINE_BYTES = CHUNK_BYTES
"""Bytes of a line that are held back until its end comes."""
LINE_SECONDS = 0.2
"""Seconds for which the first half of a line is held back: a worker may have to wait for its turn in between."""
MAX_READS = 16
"""Reads after a worker's end: a process that it has left behind may write for ever."""
MAX_ORPHANED_PIPES = 64
"""Most pipes kept open for what dead workers have left behind. The oldest are closed: who writes there is told so."""


class WorkerStderr:
    """The reading end of one worker's stderr. `finish` is the pool's, everything else the relay's.

    `_partial_since`: when the half line that is held back was begun or last went on; nought without one.
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
        """Take in what there is, a chunk at most; how many bytes. Never waits, nor does whoever holds the lock."""
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
        """What is to be passed on now: whole lines, so that those of two workers do not mix.

        Half a line is passed on when its end does not come, or it is very long, or there cannot be an end.
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
        """Whether something waits to be passed on."""
        return bool(self._pending)

    def close_pipe(self) -> None:
        """Nothing more is read: the number may soon be another file's."""
        with self._lock:
            self.at_end = True
            os.close(self.fd)

    def finish(self) -> bytes:
        """The worker has ended: the end of what it wrote. The rest is still passed on."""
        for _ in range(MAX_READS):
            if not self.read():
                break
        self._relay.mark_exited(self)
        with self._lock:
            return self._tail


class StderrRelay:
    """Reads what all workers of a node write, and writes it to the descriptor `out`."""

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
        """For a new worker: our end, and the descriptor that becomes its stderr, which the caller closes.

        Raises `OSError` when there are no descriptors left.
        """
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(ours, False)
        stderr = WorkerStderr(ours, self)
        with self._lock:
            self._open[ours] = stderr
        self._poll.register(ours, select.EPOLLIN)
        return stderr, theirs

    def mark_exited(self, stderr: WorkerStderr) -> None:
        """Its worker has ended; what it left behind may still write."""
        with self._lock:
            if self._open.get(stderr.fd) is stderr:  # else it has been shut, and the number may be another's by now
                self._exited[stderr.fd] = stderr
        self._wake()

    def close(self, timeout: float) -> None:
        """All workers have ended: pass on what is left of what they wrote, for `timeout` seconds at most."""
        self._deadline = time.monotonic() + timeout
        self._wake()
        self._thread.join(timeout)

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        try:
            while not self._round():
                pass
        except BaseException:  # noqa: BLE001 - with nobody to read, workers would wait for ever
            traceback.print_exc()
            os._exit(EXIT_NODE_FAILED)  # the node is started again

    def _round(self) -> bool:
        """Read what there is, as much of one as of another. Whether it was the last round."""
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
                return  # closed, or its disk is full: there is nobody to tell
