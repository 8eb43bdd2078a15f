"""`ProgramChannel`: the node's end of the connection on which output and log records reach the program.

Sending never waits: frames that the program does not read are kept up to a limit, and then the oldest are dropped and
counted. Any thread may send.
"""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from stageflow_actors.runtime.ipc.output_frames import (
    DROPPED_OUTPUT,
    LOGS,
    REPORTED_ATTRIBUTES,
    STDERR,
    STDOUT,
    FrameReader,
    pack_frame,
)
from stageflow_brokers.log_sender import FRAME_LENGTH_BYTES, encode_dropped, encode_record, frame

__all__ = ["ProgramChannel"]

MAX_BACKLOG_BYTES = 8 << 20
"""Most bytes that are kept for a program that does not read: it holds the GIL, or is stopped."""


class ProgramChannel:
    """Sends frames over `connection`. Without one, or after the end of the program, everything is discarded."""

    def __init__(self, connection: socket.socket | None) -> None:
        self._connection = connection
        if connection is not None:
            connection.setblocking(False)
        self._lock = threading.Lock()
        self._backlog: deque[tuple[int, memoryview, int]] = deque()
        self._backlog_bytes = 0
        self._begun = False
        self._dropped_lines = self._dropped_records = 0
        self._last_dropped = b""
        self.on_backlog: Callable[[], None] = lambda: None

    def fileno(self) -> int:
        """Return the descriptor to poll for writing while there is a backlog; -1 without a connection."""
        return -1 if self._connection is None else self._connection.fileno()

    @property
    def has_backlog(self) -> bool:
        """True if frames wait for the program to read."""
        return bool(self._backlog)

    def send(self, kind: int, data: bytes, count: int) -> None:
        """Send a frame that has `count` lines or records. Never waits."""
        with self._lock:
            if self._connection is None:
                return
            waiting = bool(self._backlog)
            self._append(kind, data, count)
            if waiting:
                self._limit()
            else:
                self._flush()
            wake = bool(self._backlog) and not waiting
        if wake:
            self.on_backlog()

    def send_record(self, record: logging.LogRecord) -> None:
        """Send a log record of the node itself. Never raises an `Exception`."""
        try:
            data = frame(encode_record(record))
        except Exception:  # noqa: BLE001 - a record that cannot be formatted
            logging.Handler().handleError(record)
            return
        self.send(LOGS, data, 1)

    def flush(self) -> None:
        """Send as much of the backlog as the program has room for. Never waits."""
        with self._lock:
            self._flush()

    def drain(self, deadline: float) -> None:
        """Send the backlog, until the deadline at most."""
        while self._backlog and self._connection is not None and time.monotonic() < deadline:
            poller = select.poll()
            poller.register(self._connection, select.POLLOUT)
            poller.poll(100)
            self.flush()

    def close(self) -> None:
        """Close the connection; later frames are discarded."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            self._backlog.clear()

    def _append(self, kind: int, data: bytes, count: int) -> None:
        packed = memoryview(pack_frame(kind, data))
        self._backlog.append((kind, packed, count))
        self._backlog_bytes += len(packed)

    def _limit(self) -> None:
        """Drop the oldest frames above the limit; the first one may be half sent already."""
        while self._backlog_bytes > MAX_BACKLOG_BYTES and len(self._backlog) > 1 + self._begun:
            first = self._backlog.popleft() if self._begun else None
            kind, packed, count = self._backlog.popleft()
            if first is not None:
                self._backlog.appendleft(first)
            self._backlog_bytes -= len(packed)
            if kind == LOGS:
                self._dropped_records += count
                self._last_dropped = bytes(packed)
            elif kind in (STDOUT, STDERR):
                self._dropped_lines += count

    def _flush(self) -> None:
        assert self._connection is not None
        while self._backlog:
            kind, packed, count = self._backlog[0]
            try:
                sent = self._connection.send(packed, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:  # the program has ended
                self._connection.close()
                self._connection = None
                self._backlog.clear()
                self._backlog_bytes = 0
                return
            self._backlog_bytes -= sent
            if sent < len(packed):
                self._backlog[0] = (kind, packed[sent:], count)
                self._begun = True
                continue
            self._begun = False
            self._backlog.popleft()
            self._report_dropped()

    def _report_dropped(self) -> None:
        if self._dropped_records:
            count, self._dropped_records = self._dropped_records, 0
            _, records = next(FrameReader().feed(self._last_dropped))
            length = int.from_bytes(records[:FRAME_LENGTH_BYTES], "little")
            last = records[FRAME_LENGTH_BYTES : FRAME_LENGTH_BYTES + length]
            self._append(LOGS, frame(encode_dropped(count, last, REPORTED_ATTRIBUTES)), 0)
        if self._dropped_lines:
            count, self._dropped_lines = self._dropped_lines, 0
            self._append(DROPPED_OUTPUT, str(count).encode(), 0)
