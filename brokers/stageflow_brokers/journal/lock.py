"""The lock of a journal directory: one writer, named by its process id.

The kernel holds the lock and releases it when the process ends, however it ends. The number in the file only informs
readers. The file must never be removed: a process that had opened it before would lock a file that no other process
sees.
"""

from pathlib import Path

from stageflow_brokers.errors import JournalLocked
from stageflow_brokers.journal.filesystem import FileSystem, read_at, write_at

__all__ = ["DirectoryLock", "writer_of"]

_LOCK_NAME = "lock"
_PID_WIDTH = 20


class DirectoryLock:
    """The lock, held from construction to `release`. Raises JournalLocked if another process or journal holds it."""

    def __init__(self, files: FileSystem, directory: Path, pid: int) -> None:
        self._files = files
        path = directory / _LOCK_NAME
        self._fd = files.open(path, create=True)
        try:
            if not files.try_lock(self._fd):
                holder = _read_pid(files, self._fd)
                owner = f"process {holder}" if holder is not None else "another process"
                raise JournalLocked(
                    f"{owner} is using the journal in {directory}: stop it, or choose another directory",
                    path=path,
                    pid=holder,
                )
            self._write(b"%d" % pid)
        except BaseException:
            files.close(self._fd)
            raise

    def release(self) -> None:
        """Release the lock. The number that a killed process leaves in the file is harmless."""
        try:
            self._write(b"")
        finally:
            self._files.close(self._fd)

    def _write(self, name: bytes) -> None:
        line = name.ljust(_PID_WIDTH) + b"\n"  # always the same length, so that it fits on a full disk
        try:
            write_at(self._files, self._fd, [line], len(line), 0)
        except OSError:
            pass  # the number only informs readers; the lock is held without it


def writer_of(files: FileSystem, directory: Path) -> int | None:
    """Return the process that writes this journal according to the lock file; None if there is none.

    Takes no lock, not even briefly: a broker that starts at that moment would be refused.
    """
    try:
        fd = files.open(directory / _LOCK_NAME, write=False)
    except FileNotFoundError:
        return None
    try:
        pid = _read_pid(files, fd)
    finally:
        files.close(fd)
    return pid if pid is not None and files.is_alive(pid) else None


def _read_pid(files: FileSystem, fd: int) -> int | None:
    try:
        text = read_at(files, fd, 32, 0).strip()
    except OSError:
        return None  # the number only informs readers
    return int(text) if text.isdigit() else None
