"""`LogSender`: sends the log records of this process as data to the process that collects them, over a socket.

Records travel as msgpack and are never pickled: the message is formatted, the traceback is text, and other attributes
that are no plain values are replaced by their `repr`. Sending must never fail the caller and never wait for long: a
record that does not fit into the socket is dropped and counted.
"""

from __future__ import annotations

import logging
import select
import socket
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

__all__ = [
    "DROPPED",
    "FRAME_LENGTH_BYTES",
    "LogSender",
    "annotate_nothing",
    "encode_dropped",
    "encode_record",
    "frame",
    "relay_process",
    "send_logs",
]

FRAME_LENGTH_BYTES = 4
"""Each record is preceded by its length."""
DROPPED = "dropped_records"
"""The key of a frame that reports records which its sender has dropped; it has some attributes of the last one, too."""
MAX_RECORD_BYTES = 120_000
"""Largest record; the buffer of a socket holds at least 160 KB."""
MAX_CUT_CHARS = 20_000
"""Characters of a message that are kept if its record is too large; of the traceback half as many, from its end."""
MAX_WAIT_SECONDS = 0.1
"""Longest wait for a full socket. The collector reads within milliseconds, unless it is stopped."""

_NOT_SENT = frozenset({"args", "exc_info", "exc_text", "msg", "message", "asctime"})
_PLAIN = frozenset({type(None), bool, float, str, bytes})
_encode = msgspec.msgpack.Encoder().encode
_formatter = logging.Formatter()


def encode_record(record: logging.LogRecord) -> bytes:
    """Return the record as data. Raises the exception of a message that cannot be formatted."""
    fields: dict[str, Any] = {
        str(name): value if type(value) in _PLAIN else _as_plain(value)
        for name, value in record.__dict__.items()
        if name not in _NOT_SENT
    }
    fields["msg"] = record.getMessage()
    fields["exc_text"] = record.exc_text
    if record.exc_info and not record.exc_text:
        fields["exc_text"] = _formatter.formatException(record.exc_info)
    try:
        data = _encode(fields)
    except (UnicodeEncodeError, TypeError, ValueError):  # lone surrogates, in a value or a name
        data = _encode(_as_text(fields))
    return data if len(data) <= MAX_RECORD_BYTES else _encode(_as_text(_cut(fields)))


def _as_plain(value: Any, depth: int = 0) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 64 else repr(value)
    if kind in (list, tuple) and depth < 8:
        return [_as_plain(one, depth + 1) for one in value]
    if kind is dict and depth < 8 and all(type(key) is str for key in value):
        return {key: _as_plain(one, depth + 1) for key, one in value.items()}
    try:
        return repr(value)
    except Exception as error:  # noqa: BLE001 - the object belongs to the user
        return f"<{kind.__name__}: repr() failed with {type(error).__name__}>"


def _as_text(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [_as_text(one) for one in value]
    if isinstance(value, dict):
        return {_as_text(key): _as_text(one) for key, one in value.items()}
    return value


def _cut(fields: dict[str, Any]) -> dict[str, Any]:
    cut: dict[str, Any] = {}
    for name, value in {"msg": "", "exc_text": None, **fields}.items():
        most = MAX_CUT_CHARS if name == "msg" else MAX_CUT_CHARS // 2 if name == "exc_text" else 200
        if not isinstance(value, str):
            text = "" if type(value) in (int, float, bool, type(None)) else repr(value)
            cut[name] = value if len(text) <= most else text[:most]
        elif len(value) <= most:
            cut[name] = value
        elif name == "exc_text":
            cut[name] = f"({len(value) - most} characters cut) ...{value[-most:]}"
        else:
            cut[name] = f"{value[:most]}... ({len(value) - most} characters cut)"
    while len(cut) > 200:  # attributes of the user, which are the last
        cut.popitem()
    return cut


def frame(data: bytes) -> bytes:
    """Return the data with its length in front."""
    return len(data).to_bytes(FRAME_LENGTH_BYTES, "little") + data


def encode_dropped(count: int, last: bytes, attributes: Sequence[str]) -> bytes:
    """Return the report on dropped records as data, with some attributes of the last one, which is encoded."""
    fields = msgspec.msgpack.decode(last)
    return _encode({DROPPED: count, **{name: fields[name] for name in attributes if name in fields}})


class LogSender:
    """Sends records over `connection`, whose other end the collector reads. Usable from any thread, and after a fork.

    It has no lock, which a fork could leave locked in the child: the count of dropped records is approximate.
    `attributes` are those of a dropped record that are reported with the count.
    """

    def __init__(self, connection: socket.socket, attributes: Sequence[str] = ("name",)) -> None:
        self._connection = connection
        self._attributes = attributes
        self._dropped = 0
        self._last = b""
        self._stalled = False

    def send(self, record: logging.LogRecord) -> None:
        """Send a record, or drop and count it if the collector does not read. Never raises an `Exception`."""
        try:
            data = encode_record(record)
        except Exception:  # noqa: BLE001 - the record belongs to the user
            logging.Handler().handleError(record)
            return
        if self._dropped:
            dropped = self._dropped
            if self._try_send(frame(encode_dropped(dropped, self._last, self._attributes))):
                self._dropped -= dropped
        if not self._try_send(frame(data)):
            self._dropped += 1
            self._last = data

    def _try_send(self, data: bytes) -> bool:
        while True:
            try:
                self._connection.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                self._stalled = False
                return True
            except BlockingIOError:
                if self._stalled:
                    return False
                try:
                    room = select.poll()
                    room.register(self._connection, select.POLLOUT)
                    self._stalled = not room.poll(MAX_WAIT_SECONDS * 1000)
                except (OSError, ValueError):
                    return False
                if self._stalled:
                    return False
            except (OSError, ValueError):
                return False  # a handler has closed the descriptor, or the collector has ended


def send_logs(send: Callable[[logging.LogRecord], None], annotate: Callable[[logging.LogRecord], None]) -> None:
    """Pass each record of each logger of this process to `send`, beside the handlers that are configured here.

    `annotate` is called before the filters of a logger. This changes `logging.Logger` and adds no handler to the root
    logger: a handler would be removed by `logging.config`, and would prevent `logging.basicConfig`.
    """
    handle, call_handlers = logging.Logger.handle, logging.Logger.callHandlers

    def annotate_and_handle(self: logging.Logger, record: logging.LogRecord) -> None:
        annotate(record)
        handle(self, record)

    def send_and_call_handlers(self: logging.Logger, record: logging.LogRecord) -> None:
        send(record)
        if self.hasHandlers():
            call_handlers(self, record)

    logging.Logger.handle = annotate_and_handle  # type: ignore[method-assign]
    logging.Logger.callHandlers = send_and_call_handlers  # type: ignore[method-assign]


def annotate_nothing(record: logging.LogRecord) -> None:
    """Leave the record as it is."""


def relay_process(fd: int, level: int) -> None:
    """Send the records of this process from `level` on over the socket `fd`."""
    logging.root.setLevel(level)
    send_logs(LogSender(socket.socket(fileno=fd)).send, annotate_nothing)
