"""The errors of the brokers. Each message states what happened, where, and what to do next.

::

    BrokerError
    ├── JournalError            the journal cannot be used
    │   ├── JournalCorrupt      acknowledged data is damaged: names file and offset
    │   ├── JournalLocked       another process uses the directory
    │   ├── JournalVersion      a newer program wrote it
    │   ├── JournalFull         no disk space for the next segment; nothing was written
    │   └── JournalFailed       a write or a sync failed: this process must end
    ├── BrokerUnavailable       the broker does not answer
    ├── SocketNotPrivate        other users have access to the directory of the socket
    ├── QueueFull               the queue has reached its limit
    ├── PayloadTooLarge         a body, or a batch of bodies, exceeds the limit
    ├── ProtocolError           a frame does not follow the protocol
    └── Refused                 the broker declined the request
        └── StorageFull         it accepts no new groups: the disk of the journal is nearly full

Errors have their details as attributes, which survive pickling. This module must not import other modules of the
project: each of them may import it.
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
    """The base class of all errors of a broker."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are rebuilt from args alone by default, which drops keyword fields and fails on required ones.
        return _rebuild, (type(self), self.args, self.__dict__)


class JournalError(BrokerError):
    """The journal cannot be used, or a call to it is invalid."""


class JournalCorrupt(JournalError):
    """Acknowledged data cannot be read. Nothing was changed.

    Args:
        message: Description of the damage, with advice.
        file: Name of the segment.
        offset: Offset of the damage in bytes.
        reason: Kind of the damage.
    """

    def __init__(self, message: str, *, file: str, offset: int, reason: str) -> None:
        super().__init__(message)
        self.file = file
        self.offset = offset
        self.reason = reason


class JournalLocked(JournalError):
    """Another process uses the journal.

    Args:
        message: Which journal.
        path: Path of its directory.
        pid: Process id of its owner. None: not known.
    """

    def __init__(self, message: str, *, path: str | PathLike[str], pid: int | None) -> None:
        super().__init__(message)
        self.path = fspath(path)
        self.pid = pid


class JournalVersion(JournalError):
    """A newer program wrote the journal. Nothing was changed.

    Args:
        message: Which journal, and the fix.
        file: Name of the segment.
        found: Version of its format.
        supported: Newest version that this program reads.
    """

    def __init__(self, message: str, *, file: str, found: int, supported: int) -> None:
        super().__init__(message)
        self.file = file
        self.found = found
        self.supported = supported


class JournalFull(JournalError):
    """The disk has no space for the next segment. Nothing was written, and the journal is intact.

    Args:
        message: Which disk.
        needed: Size of the segment in bytes.
    """

    def __init__(self, message: str, *, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


class JournalFailed(JournalError):
    """A write or a sync failed, so the state on disk is unknown. The process must end; its next start recovers.

    A second attempt is no use: the operating system may drop the data of a failed sync and report success next time.
    """


class BrokerUnavailable(BrokerError):
    """The broker does not answer: it starts, restarts, or has ended."""


class SocketNotPrivate(BrokerError):
    """Other users may have access to the directory of the socket, or it belongs to another user.

    Args:
        message: Description of the access, with advice.
        path: Path of the directory.
    """

    def __init__(self, message: str, *, path: str | PathLike[str]) -> None:
        super().__init__(message)
        self.path = fspath(path)


class QueueFull(BrokerError):
    """The queue holds as many messages as its limit allows.

    Args:
        message: Which queue.
        queue: The name of the queue. Default: not known.
        limit: The limit. Default: not known.
    """

    def __init__(self, message: str, *, queue: str = "", limit: int | None = None) -> None:
        super().__init__(message)
        self.queue = queue
        self.limit = limit


class PayloadTooLarge(BrokerError):
    """A body, or a batch of bodies, exceeds the limit.

    Args:
        message: Which limit.
        size: The size in bytes. Default: not known.
        limit: The limit in bytes. Default: not known.
    """

    def __init__(self, message: str, *, size: int | None = None, limit: int | None = None) -> None:
        super().__init__(message)
        self.size = size
        self.limit = limit


class ProtocolError(BrokerError):
    """A frame does not follow the protocol: wrong count, size, type or version."""


class Refused(BrokerError):
    """The broker declined the request; the message says why."""


class StorageFull(Refused):
    """The broker accepts no new groups until the disk of its journal has space again."""
