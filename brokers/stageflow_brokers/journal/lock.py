"""The lock of a journal's directory: one writer, known by its process id.

The lock is the kernel's, so it goes with its process however that ends; the number in the file is only for the reader.
The file is never removed: whoever had opened it before would then hold the lock of a file that nobody else sees.
"""

from pathlib import Path

from stageflow_brokers.errors import JournalLocked
from stageflow_brokers.journal.filesystem import FileSystem, read_at, write_at

__all__ = ["DirectoryLock", "writer_of"]

_NAME = "lock"
_WIDTH = 20


class DirectoryLock:
    """Held from construction to `release`. Raises JournalLocked when another process, or another journal, has it."""

    def __init__(self, files: FileSystem, directory: Path, pid: int) -> None:
        self._files = files
        path = directory / _NAME
        self._fd = files.open(path, create=True)
        try:
            if not files.try_lock(self._fd):
                holder = _read_pid(files, self._fd)
                who = f"process {holder}" if holder is not None else "another process"
                raise JournalLocked(
                    f"{who} is using the journal in {directory}: stop it, or choose another directory",
                    path=path,
                    pid=holder,
                )
            self._write(b"%d" % pid)
        except BaseException:
            files.close(self._fd)
            raise

    def release(self) -> None:
        """Let go. What is left in the file of a process that was killed is harmless."""
        try:
            self._write(b"")
        finally:
            self._files.close(self._fd)

    def _write(self, name: bytes) -> None:
        line = name.ljust(_WIDTH) + b"\n"  # always as long, so that on a full disk there is room for it
        try:
            write_at(self._files, self._fd, [line], len(line), 0)
        except OSError:
            pass  # the number is for the reader; the lock, which is what counts, is held without it


def writer_of(files: FileSystem, directory: Path) -> int | None:
    """The process that seems to write this journal now, by what the lock file says; None if there is none.

    Takes no lock, not even for a moment: a broker that starts just then would be refused.
    """
    try:
        fd = files.open(directory / _NAME, write=False)
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
        return None  # the number is for the reader
    return int(text) if text.isdigit() else None
