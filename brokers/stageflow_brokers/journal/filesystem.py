"""The interface between the journal and the operating system.

The journal uses files only through `FileSystem`, so that a test can replace it with a disk that fails, tears writes and
forgets unsynced data. This module must never retry a sync or hide an error: each OSError reaches the caller unchanged.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from stageflow_brokers.journal.format import SECTOR_BYTES, Buffer

__all__ = ["FileSystem", "OsFileSystem", "is_full", "is_unreadable", "read_around", "read_at", "write_at"]

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_UNREADABLE = frozenset({errno.EIO, errno.ENODATA, errno.EBADMSG, errno.EUCLEAN})
_MAX_BUFFERS = 1024  # the most buffers that Linux accepts in one call


class FileSystem(Protocol):
    """The operations that the journal needs. Descriptors are small integers; sizes and offsets are bytes."""

    def open(self, path: Path, *, create: bool = False, write: bool = True) -> int:
        """Open a file for reading, and for writing unless `write` is false; `create` creates a missing file."""

    def close(self, fd: int) -> None: ...

    def size(self, fd: int) -> int: ...

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """Read up to `size` bytes; fewer at the end of the file, and possibly elsewhere."""

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """Write the buffers; return the number of bytes written, which may be smaller than their size."""

    def fdatasync(self, fd: int) -> None: ...

    def fsync(self, fd: int) -> None: ...

    def fallocate(self, fd: int, size: int) -> None:
        """Allocate blocks for the first `size` bytes, and extend the file to at least that size."""

    def free_bytes(self, path: Path) -> int:
        """Return the bytes that this user can still allocate on the disk of the directory, as far as known."""

    def rename(self, source: Path, target: Path) -> None: ...

    def unlink(self, path: Path) -> None: ...

    def fsync_dir(self, path: Path) -> None:
        """Sync a directory, so that creations, renames and deletions in it survive a crash."""

    def listdir(self, path: Path) -> list[str]: ...

    def mkdir(self, path: Path) -> None:
        """Create the directory and its parents, private to their owner, and sync them; do nothing if it exists."""

    def try_lock(self, fd: int) -> bool:
        """Take the exclusive lock of an open file without waiting; return False if another process holds it."""

    def is_alive(self, pid: int) -> bool: ...

    def drop_cache(self, fd: int) -> None:
        """Drop the cached pages of the file: after a failed sync the cache holds data that is not on the disk."""

    def random(self) -> int:
        """Return a random unsigned 64-bit number."""


class OsFileSystem:
    """The file system of Linux."""

    def open(self, path: Path, *, create: bool = False, write: bool = True) -> int:
        flags = os.O_RDWR if write else os.O_RDONLY
        fd = os.open(path, flags | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
        # A directory can be opened for reading; the error of its first read would not name it.
        if not write and stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        return fd

    def close(self, fd: int) -> None:
        os.close(fd)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        return os.pread(fd, size, offset)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def fallocate(self, fd: int, size: int) -> None:
        os.posix_fallocate(fd, 0, size)

    def free_bytes(self, path: Path) -> int:
        disk = os.statvfs(path)
        return disk.f_bavail * disk.f_frsize

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def fsync_dir(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def listdir(self, path: Path) -> list[str]:
        return os.listdir(path)

    def mkdir(self, path: Path) -> None:
        if path.is_dir():
            return
        self.mkdir(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        self.fsync_dir(path.parent)

    def try_lock(self, fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_alive(self, pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def drop_cache(self, fd: int) -> None:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def random(self) -> int:
        return int.from_bytes(os.urandom(8), "little")


def is_full(error: OSError) -> bool:
    """True if the error means that the disk or the quota is full."""
    return error.errno in _FULL


def is_unreadable(error: OSError) -> bool:
    """True if the data could not be read: a bad sector, or a wrong checksum of the file system."""
    return error.errno in _UNREADABLE


def read_at(files: FileSystem, fd: int, size: int, offset: int) -> bytes:
    """Return `size` bytes from `offset`, fewer only at the end of the file."""
    data = files.pread(fd, size, offset)
    if len(data) == size or not data:
        return data
    pieces = [data]
    got = len(data)
    while got < size and (data := files.pread(fd, size - got, offset + got)):
        pieces.append(data)
        got += len(data)
    return b"".join(pieces)


def read_around(files: FileSystem, fd: int, size: int, offset: int) -> tuple[bytes, list[int]]:
    """Read like `read_at`, with zeros for unreadable sectors; return the bytes and the offsets of those sectors."""
    try:
        return read_at(files, fd, size, offset), []
    except OSError as error:
        if not is_unreadable(error):
            raise
    middle = (offset + size // 2) // SECTOR_BYTES * SECTOR_BYTES
    if middle <= offset:
        middle = (offset // SECTOR_BYTES + 1) * SECTOR_BYTES
    if middle >= offset + size:
        return bytes(max(0, min(size, files.size(fd) - offset))), [offset // SECTOR_BYTES * SECTOR_BYTES]
    front, bad = read_around(files, fd, middle - offset, offset)
    if len(front) < middle - offset:
        return front, bad
    back, more = read_around(files, fd, offset + size - middle, middle)
    return front + back, bad + more


def write_at(files: FileSystem, fd: int, buffers: Sequence[Buffer], size: int, offset: int) -> None:
    """Write all `size` bytes of the buffers, in one call if the system accepts that.

    A short write is continued, so that its reason (a full disk, for example) appears as the error of the next call.
    """
    if len(buffers) <= _MAX_BUFFERS:
        try:
            if files.pwritev(fd, buffers, offset) == size:
                return
        except InterruptedError:
            pass
        # Write again from the beginning: the same bytes at the same offset change nothing.
    remaining = [memoryview(piece) for piece in buffers if len(piece)]
    first = 0
    while first < len(remaining):
        try:
            written = files.pwritev(fd, remaining[first : first + _MAX_BUFFERS], offset)
        except InterruptedError:
            continue
        if written == 0:
            raise OSError(errno.EIO, "the write wrote no byte")
        offset += written
        while first < len(remaining) and written >= len(remaining[first]):
            written -= len(remaining[first])
            first += 1
        if written:
            remaining[first] = remaining[first][written:]
