"""The errors of the brokers: what happened, where, and what to do next.

::

    BrokerError
    ├── JournalError            something is wrong with the files of the journal
    │   ├── JournalCorrupt      acknowledged data is damaged: names file and offset
    │   ├── JournalLocked       another process has the directory
    │   ├── JournalVersion      written by a newer program
    │   ├── JournalFull         no room for the next segment; nothing was written, free some and go on
    │   └── JournalFailed       a write or a sync failed: this process must end
    ├── BrokerUnavailable       no broker answers
    ├── SocketNotPrivate        others than this user have access to where the broker listens
    ├── QueueFull               the queue has reached its limit
    ├── PayloadTooLarge         a body, or a batch of them, beyond the limit
    ├── ProtocolError           a frame that is not of this protocol
    └── Refused                 the broker understood, and declined
        └── StorageFull         it starts nothing new: the disk that holds its journal is nearly full

Fields are given by keyword and survive pickling. This module must import nothing of the project: everything else may
import it.
"""

from os import PathLike, fspath
from typing import Any

__all__ = [
    "BrokerError",
    "BrokerUnavailable",
    "JournalCorrupt",
    "JournalError",
    "JournalFailed",
    "JournalFull",
    "JournalLocked",
    "JournalVersion",
    "PayloadTooLarge",
    "ProtocolError",
    "QueueFull",
    "Refused",
    "SocketNotPrivate",
    "StorageFull",
]


def _rebuild(kind: type["BrokerError"], args: tuple[Any, ...], fields: dict[str, Any]) -> "BrokerError":
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class BrokerError(Exception):
    """The root: catch it to catch whatever a broker may raise."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are rebuilt from args alone by default, which drops keyword fields and fails on required ones.
        return _rebuild, (type(self), self.args, self.__dict__)


class JournalError(BrokerError):
    """Something is wrong with the files of the journal, or with how it was used."""


class JournalCorrupt(JournalError):
    """Data that was acknowledged cannot be read; nothing has been changed.

    `file` is the name of the segment, `offset` the byte in it where the damage begins, `reason` what is wrong there.
    """

    def __init__(self, message: str, *, file: str, offset: int, reason: str) -> None:
        super().__init__(message)
        self.file = file
        self.offset = offset
        self.reason = reason


class JournalLocked(JournalError):
    """Another process has this journal. `pid` is that process, None when it did not leave its name."""

    def __init__(self, message: str, *, path: str | PathLike[str], pid: int | None) -> None:
        super().__init__(message)
        self.path = fspath(path)
        self.pid = pid


class JournalVersion(JournalError):
    """The journal was written in a format newer than this program reads; nothing has been changed."""

    def __init__(self, message: str, *, file: str, found: int, supported: int) -> None:
        super().__init__(message)
        self.file = file
        self.found = found
        self.supported = supported


class JournalFull(JournalError):
    """The disk has no room for the next segment. Nothing was written; the journal is whole and may be used again.

    `needed` is the size of that segment in bytes.
    """

    def __init__(self, message: str, *, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


class JournalFailed(JournalError):
    """A write or a sync failed, so what is on disk is unknown: the process must end, and recover when it starts again.

    The operating system may forget the data of a failed sync and report success the next time. Hence no second try.
    """


class BrokerUnavailable(BrokerError):
    """No broker answers: it is starting, restarting or gone."""


class SocketNotPrivate(BrokerError):
    """Others may have access to where the broker listens, or it is another user's. `path` is that directory."""

    def __init__(self, message: str, *, path: str | PathLike[str]) -> None:
        super().__init__(message)
        self.path = fspath(path)


class QueueFull(BrokerError):
    """The queue holds as many messages as it may. `limit` is that number."""

    def __init__(self, message: str, *, queue: str = "", limit: int | None = None) -> None:
        super().__init__(message)
        self.queue = queue
        self.limit = limit


class PayloadTooLarge(BrokerError):
    """More bytes than are allowed. `size` is what came, `limit` what may come."""

    def __init__(self, message: str, *, size: int | None = None, limit: int | None = None) -> None:
        super().__init__(message)
        self.size = size
        self.limit = limit


class ProtocolError(BrokerError):
    """A frame that is not of this protocol: wrong count, size, type or version."""


class Refused(BrokerError):
    """The broker understood the request and declined it; the message says why."""


class StorageFull(Refused):
    """The disk that holds the journal is nearly full, so the broker starts nothing new until there is room again."""
