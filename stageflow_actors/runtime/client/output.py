"""`ProgramOutput`: writes the output of handlers to the program's stdout and stderr, and handles their log records.

One thread reads the connection to the node. Three others write stdout, write stderr and call the program's loggers,
each with a bounded queue, so that one that is stalled holds up neither the others nor the node. Nothing here may raise
into the program, and a stream that is gone, full or stalled must never reach a stage.
"""

from __future__ import annotations

import _thread
import contextlib
import contextvars
import io
import logging
import os
import select
import socket
import stat
import sys
import threading
import time
import traceback
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

import msgspec

from stageflow_actors.runtime.client.drop_report import DropReport
from stageflow_actors.runtime.ipc.failed_attempts import FAILED_ATTEMPTS, AttemptLimiter, count_record
from stageflow_actors.runtime.ipc.log_levels import OWN_LOGGERS, LogLevels, LogSetup, read_setup
from stageflow_actors.runtime.ipc.output_frames import DROPPED_OUTPUT, LOGS, STDERR, STDOUT, FrameReader
from stageflow_brokers.log_sender import DROPPED, FRAME_LENGTH_BYTES
from stageflow_brokers.signals import blocked_signals

__all__ = ["ProgramOutput"]

logger = logging.getLogger(OWN_LOGGERS[0])

MAX_QUEUED_BYTES = 16 << 20
"""Most bytes that wait for a stream, or for the program's loggers."""
MAX_QUEUED_RECORDS = 20_000
"""Most log records that wait for the program's loggers."""
SETUP_SECONDS = 0.5
"""Time between two checks for a change of the program's logging set-up."""
DRAIN_SECONDS = 5.0
"""Longest wait for the output at a stop."""
STALL_SECONDS = 1.0
"""The same if nothing moves."""
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
"""The format of records in a program that has not configured logging."""


class _Consumer:
    """A bounded queue with a thread that empties it. The thread starts with the first item."""

    def __init__(self, most: int, on_dropped: Callable[[int, bytes], None]) -> None:
        self._items: deque[tuple[bytes, int]] = deque()
        self._bytes = 0
        self._most = most
        self._changed = threading.Condition()
        self._on_dropped = on_dropped
        self._started = False
        self._busy = False
        self.done = 0
        self.abandoned = False

    def put(self, data: bytes, count: int = 1) -> None:
        """Add an item of `count` lines or records; if the queue is full, drop the oldest items."""
        dropped, old = 0, b""
        with self._changed:
            if self.abandoned:
                return
            self._items.append((data, count))
            self._bytes += len(data)
            while self._bytes > MAX_QUEUED_BYTES or len(self._items) > self._most:
                old, lines = self._items.popleft()
                self._bytes -= len(old)
                dropped += lines
            if not self._started:
                self._started = True
                # A bare thread: in a notebook, output of a `threading.Thread` belongs to the cell that started it.
                # The reader of a pipe may leave: SIGPIPE must not end the program, even if it resets its action.
                try:
                    with blocked_signals():
                        _thread.start_new_thread(self._run, ())
                except RuntimeError:
                    self._started = False  # no thread is left: tried again with the next item
            self._changed.notify_all()
        if dropped:
            self._on_dropped(dropped, old)

    @property
    def is_idle(self) -> bool:
        """True if everything has been handled."""
        return not self._items and not self._busy

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._items:
                    if self.abandoned:
                        return
                    self._changed.wait()
                data, _ = self._items.popleft()
                self._bytes -= len(data)
                self._busy = True
            try:
                contextvars.Context().run(self._handle, data)
            except Exception:  # noqa: BLE001 - a handler or a stream of the user
                if logging.raiseExceptions:
                    with contextlib.suppress(Exception):
                        traceback.print_exc()
            self.done += 1
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def wait(self, deadline: float) -> None:
        """Wait until everything is handled, until the deadline at most, or until nothing moves."""
        seen, moved = self.done, time.monotonic()
        with self._changed:
            while not self.is_idle:
                now = time.monotonic()
                if self.done != seen:
                    seen, moved = self.done, now
                if now >= deadline or now - moved > STALL_SECONDS:
                    return
                self._changed.wait(0.05)

    def abandon(self) -> int:
        """Drop what is left and end the thread when it can. Return the number of dropped lines or records."""
        with self._changed:
            self.abandoned = True
            left = sum(count for _, count in self._items)
            self._items.clear()
            self._bytes = 0
            self._changed.notify_all()
            return left

    @abstractmethod
    def _handle(self, data: bytes) -> None:
        """Handle one item."""


class _StreamWriter(_Consumer):
    """Writes to the program's `sys.stdout` or `sys.stderr`, whatever that is at the time."""

    def __init__(self, name: str, on_dropped: Callable[[int, bytes], None]) -> None:
        super().__init__(1 << 30, on_dropped)
        self._name = name
        self._reported = False

    def _handle(self, data: bytes) -> None:
        stream = getattr(sys, self._name, None)
        if stream is None:
            return
        try:
            fd = _file_of(stream)
            if fd is None:
                stream.write(data.decode("utf-8", "backslashreplace"))
                stream.flush()
            else:
                with contextlib.suppress(OSError):
                    stream.flush()  # what the program has printed before
                self._write(fd, _encoded(data, stream.encoding))
        except Exception as error:  # noqa: BLE001 - the stream may be an object of the user
            self._report(error)

    def _write(self, fd: int, data: bytes) -> None:
        """Write to the descriptor itself: nothing that fails may stay in the stream's buffer, and fail at exit."""
        view = memoryview(data)
        at_once = len(data) if stat.S_ISREG(os.fstat(fd).st_mode) else select.PIPE_BUF
        poller = select.poll()
        poller.register(fd, select.POLLOUT)
        while view:
            if not poller.poll(100):
                if self.abandoned:
                    return
                continue
            try:
                view = view[os.write(fd, view[:at_once]) :]
            except BlockingIOError:
                time.sleep(0.01)

    def _report(self, error: Exception) -> None:
        if not self._reported:
            self._reported = True
            logger.warning(
                "the program's %s cannot be written (%s): output of handlers is discarded there", self._name, error
            )


def _file_of(stream: TextIO) -> int | None:
    """Return the descriptor of a stream of the interpreter; None for other objects, which have their own `write`."""
    if type(stream) is not io.TextIOWrapper:
        return None
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


def _encoded(data: bytes, encoding: str) -> bytes:
    if encoding.lower().replace("-", "").replace("_", "") == "utf8":
        return data
    return data.decode("utf-8", "backslashreplace").encode(encoding, "backslashreplace")


class _RecordHandler(_Consumer):
    """Passes log records to the program's loggers."""

    def __init__(self, setup: Callable[[], LogSetup], own_level: int, plain: _StreamWriter) -> None:
        super().__init__(MAX_QUEUED_RECORDS, self._on_full)
        self._setup = setup
        self._own_level = own_level
        self._plain = plain
        self._formatter = logging.Formatter(FORMAT)
        self._drops = DropReport()
        self._attempts = AttemptLimiter()
        self._closing = False

    def _on_full(self, records: int, last: bytes) -> None:
        self._drops.count_records(records, msgspec.msgpack.decode(last) if last else {})

    def count_dropped_lines(self, lines: int) -> None:
        """Count lines of output that have been dropped; the thread reports them."""
        self._drops.count_lines(lines)

    def _handle(self, data: bytes) -> None:
        if data:
            fields = msgspec.msgpack.decode(data)
            if DROPPED in fields:
                self._drops.count_records(int(fields[DROPPED]), fields)
            else:
                record = logging.makeLogRecord({**fields, "args": (), "exc_info": None})
                if not self._is_counted(record):
                    self._pass_on(record)
        for count, text in self._drops.take():
            self._warn(count, text)
        for stage, attempts in self._attempts.take_counts(time.monotonic(), early=self._closing).items():
            self._pass_on(count_record(logging.getLogger(f"{OWN_LOGGERS[0]}.worker"), stage, attempts))

    def check_dropped(self, *, now: bool = False) -> None:
        """Make the thread report what has been dropped, if the last report is long enough ago, or `now`."""
        if now:
            self._drops.make_due()
            self._closing = True
        if not self._drops.is_empty or self._attempts.has_counts:
            self.put(b"", 0)

    def _is_counted(self, record: logging.LogRecord) -> bool:
        """Return True if a record about failed attempts is one too many of its stage, and therefore only counted."""
        attempts = getattr(record, FAILED_ATTEMPTS, 0)
        stage, now = (getattr(record, "workflow_id", ""), getattr(record, "stage_id", "")), time.monotonic()
        if attempts == 1:
            return not self._attempts.admit(stage, now)
        if attempts:
            self._attempts.count(stage, attempts, now)
        return bool(attempts)

    def _pass_on(self, record: logging.LogRecord) -> None:
        target = logging.getLogger(record.name)
        if target.disabled or record.levelno < self._level_of(target) or record.levelno <= logging.root.manager.disable:
            return
        if target.hasHandlers():
            target.handle(record)
            return
        allowed: Any = target.filter(record)
        if allowed:
            self._print(allowed if isinstance(allowed, logging.LogRecord) else record)

    def _level_of(self, target: logging.Logger) -> int:
        if self._own_level and target.name.partition(".")[0] in OWN_LOGGERS:
            return self._setup().level_of(target)
        if target.hasHandlers():
            return target.getEffectiveLevel()
        return self._setup().level_of(target)

    def _print(self, record: logging.LogRecord) -> None:
        """Write to stderr, as `logging.lastResort` does in a program that has not configured logging."""
        self._plain.put(f"{self._formatter.format(record)}\n".encode("utf-8", "backslashreplace"))

    def _warn(self, count: int, text: str) -> None:
        """Warn about what has been dropped."""
        if not logger.isEnabledFor(logging.WARNING):
            return
        extra = {"dropped": count}
        record = logger.makeRecord(logger.name, logging.WARNING, __file__, 0, text, (), None, extra=extra)
        if logger.hasHandlers():
            logger.handle(record)
        else:
            self._print(record)


class ProgramOutput:
    """The output and the log records of a cluster, over all restarts of its node. `levels` are shared with it."""

    def __init__(self, log_level: str) -> None:
        self.levels = LogLevels.create()
        self._log_level = log_level
        self._setup = read_setup(log_level)
        self.levels.publish(self._setup)
        own = logging.getLevelName(log_level)
        err = _StreamWriter("stderr", lambda lines, _: self._records.count_dropped_lines(lines))
        out = _StreamWriter("stdout", lambda lines, _: self._records.count_dropped_lines(lines))
        self._records = _RecordHandler(lambda: self._setup, own if own != logging.WARNING else 0, err)
        self._streams = {STDOUT: out, STDERR: err}
        self._readers: list[threading.Thread] = []

    def connect(self) -> socket.socket:
        """Start to read a connection to a new node. Return the node's end, which the caller closes."""
        ours, theirs = socket.socketpair()
        ours.setblocking(True)  # whatever the program's `socket.setdefaulttimeout`
        reader = threading.Thread(target=self._read, args=(ours,), name="node-output", daemon=True)
        self._readers = [thread for thread in self._readers if thread.is_alive()] + [reader]
        with blocked_signals():
            reader.start()
        return theirs

    def close(self, timeout: float = DRAIN_SECONDS) -> None:
        """Wait until everything that ended nodes have sent is handled, if it moves; then discard the rest."""
        deadline = time.monotonic() + timeout
        for reader in self._readers:
            reader.join(max(0.0, deadline - time.monotonic()))
        for stream in self._streams.values():
            stream.wait(deadline)
        # stderr last: records of a program that has not configured logging are written there.
        self._records.count_dropped_lines(self._streams[STDOUT].abandon())
        self._records.check_dropped(now=True)
        self._records.wait(deadline)
        self._records.abandon()
        self._streams[STDERR].wait(deadline)
        self._streams[STDERR].abandon()
        self.levels.close()

    def _read(self, connection: socket.socket) -> None:
        frames = FrameReader()
        poller = select.poll()
        poller.register(connection, select.POLLIN)
        check_at = 0.0
        try:
            while True:
                if time.monotonic() >= check_at:
                    self._follow_setup()
                    self._records.check_dropped()
                    check_at = time.monotonic() + SETUP_SECONDS
                if not poller.poll(SETUP_SECONDS * 1000):
                    continue
                data = connection.recv(1 << 18)
                if not data:
                    return
                for kind, content in frames.feed(data):
                    self._dispatch(kind, content)
        except (OSError, ValueError):
            return  # the node has ended, or the cluster is stopped and its shared memory closed
        finally:
            connection.close()

    def _dispatch(self, kind: int, content: bytes) -> None:
        if kind == LOGS:
            at = 0
            while at + FRAME_LENGTH_BYTES <= len(content):
                start = at + FRAME_LENGTH_BYTES
                at = start + int.from_bytes(content[at:start], "little")
                self._records.put(content[start:at])
        elif kind == DROPPED_OUTPUT:
            self._records.count_dropped_lines(int(content))
        else:
            self._streams[kind].put(content, content.count(b"\n"))

    def _follow_setup(self) -> None:
        """Publish the logging set-up if the program has changed it."""
        setup = read_setup(self._log_level)
        if setup != self._setup:
            self._setup = setup
            self.levels.publish(setup)
