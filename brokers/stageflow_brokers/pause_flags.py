"""`PauseFlags`: which queues are paused, in memory that the broker shares with the workers of one host.

A worker reads the flag of its queue before each message, so that no message begins after `pause` has been answered,
wherever the messages are that it holds. The supervisor creates the memory and registers its queues; only the broker
sets the flags, after the commit and before the answer. The memory outlives a restart of the broker, which sets all
flags again.

::

    record   0 to 15        16       17 to 31
             hash of name   flag     unused

The first record holds the number of the others in its first eight bytes.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections.abc import Collection, Sequence

__all__ = ["NOT_PAUSED", "PauseFlags"]

MAX_QUEUES = 32_768
"""Queues that can be registered; only the pages in use take memory. A further queue has no flag: its workers stop when
the broker recalls their messages."""

RECORD_BYTES = 32
"""Size of one record: no two queues share a cell of eight bytes."""

HASH_BYTES = 16
_FLAG = HASH_BYTES

NOT_PAUSED: Sequence[int] = b"\0"
"""The flag of a queue that is never paused: of one that is not registered, or without a broker process."""


class PauseFlags:
    """The flags of all queues of one host. `fd` is the shared memory, which child processes may inherit."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._bytes = memoryview(mmap.mmap(fd, (MAX_QUEUES + 1) * RECORD_BYTES))
        self._count = self._bytes[:8].cast("Q")
        self._known: dict[bytes, int] = {}
        self._lock = threading.Lock()

    @classmethod
    def create(cls) -> PauseFlags:
        """Create the memory, without a queue."""
        fd = os.memfd_create("stageflow-pauses")
        try:
            os.ftruncate(fd, (MAX_QUEUES + 1) * RECORD_BYTES)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    def register(self, queue: str) -> int:
        """Return the number of a queue's flag; add one on first use. Return 0 if there is no space.

        Only one process may register queues.
        """
        with self._lock:
            name = _hash(queue)
            self._read_new()
            if name in self._known:
                return self._known[name]
            number = self._count[0] + 1
            if number > MAX_QUEUES:
                return 0
            at = number * RECORD_BYTES
            self._bytes[at : at + HASH_BYTES] = name
            self._count[0] = number  # last: the broker reads only records that are whole
            self._known[name] = number
            return number

    def flag(self, number: int) -> Sequence[int]:
        """Return the flag of that number: its first element is not 0 while the queue is paused."""
        if not 0 < number <= MAX_QUEUES:
            return NOT_PAUSED
        at = number * RECORD_BYTES + _FLAG
        return self._bytes[at : at + 1]

    def set(self, queue: str, paused: bool) -> None:
        """Set the flag of a queue. A queue that is not registered has no workers on this host."""
        name = _hash(queue)
        if name not in self._known:
            self._read_new()
        number = self._known.get(name)
        if number is not None:
            self._bytes[number * RECORD_BYTES + _FLAG] = paused

    def set_all(self, paused: Collection[str]) -> None:
        """Set the flags of all registered queues: those in `paused` are paused, the others are not."""
        self._read_new()
        names = {_hash(queue) for queue in paused}
        for name, number in self._known.items():
            self._bytes[number * RECORD_BYTES + _FLAG] = name in names

    def _read_new(self) -> None:
        for number in range(len(self._known) + 1, self._count[0] + 1):
            at = number * RECORD_BYTES
            self._known[bytes(self._bytes[at : at + HASH_BYTES])] = number


def _hash(queue: str) -> bytes:
    return hashlib.blake2b(queue.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest()
