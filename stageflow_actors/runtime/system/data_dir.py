"""The data directory: journal, history and lock of one cluster.

Its record, cluster.json, names the processes of the cluster.

The lock is an `flock` whose descriptor every process of the cluster inherits, so that it is free only when the last of
them has ended: no cluster can start on a journal that a remaining process of the previous cluster may still write.
This module must not read a journal or a history.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
import weakref
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from stageflow_actors.errors import JournalLocked, StageFlowError
from stageflow_actors.runtime.system.processes import start_ticks
from stageflow_actors.runtime.system.surroundings import check_process_table

__all__ = [
    "ClusterRecord",
    "DataDir",
    "DataDirUnusable",
    "absolute_path",
    "file_system_of",
]

NETWORK_FILE_SYSTEMS = frozenset(
    "9p acfs afs beegfs ceph cifs coda curlftpfs davfs fhgfs fuse.beegfs fuse.ceph fuse.cephfs fuse.curlftpfs "
    "fuse.davfs fuse.davfs2 fuse.gcsfuse fuse.glusterfs fuse.goofys fuse.juicefs fuse.lizardfs fuse.moosefs "
    "fuse.mfsmount fuse.rclone fuse.s3fs fuse.seaweedfs fuse.smbnetfs fuse.sshfs gfs gfs2 gfarm glusterfs gpfs lustre "
    "ncp ncpfs nfs nfs4 ocfs2 orangefs panfs pvfs2 quobyte smb2 smb3 smbfs wekafs".split()
)
"""Types, as in /proc/mounts, on which locks, shared memory or syncs are not reliable between processes."""

SHARED_FOLDERS = frozenset({"fuse.vmhgfs-fuse", "prl_fs", "vboxsf", "vmhgfs"})
"""Types of the folders that a hypervisor shares with its guests: as unreliable as a network file system."""

LOCAL_FUSE = frozenset(
    "fuse.bindfs fuse.encfs fuse.fuse-overlayfs fuse.gocryptfs fuse.mergerfs fuse.unionfs fuse.unionfs-fuse".split()
)
"""The types `fuse.*` that store files on a local disk. Any other FUSE file system is refused: it may ignore a sync."""

_JOURNAL = "journal"
_HISTORY = "history.db"
_ADVICE = "no version of stageflow creates it in this form: check what it is, and move it away"


class DataDirUnusable(StageFlowError):
    """The data directory or the private socket directory cannot be used; `path` is that directory."""

    def __init__(self, message: str, *, path: Path) -> None:
        super().__init__(message)
        self.path = path


class ClusterRecord(Struct, kw_only=True, frozen=True):
    """The cluster that runs on a data directory, as recorded in cluster.json.

    Attributes:
        program: Process id of the program.
        program_ticks: Start of the program in clock ticks since boot; together with the pid it identifies one process.
        node: Process id of the node.
        address: Address of the broker.
        started: Seconds since the Unix epoch.
        host: Name of the host or container of the program; None in records of earlier versions.
        process_space: The PID namespace of the program, as in `/proc/self/ns/pid`: in another one its process ids are
            those of other processes.
    """

    program: int
    program_ticks: int | None = None
    node: int | None = None
    address: Annotated[str, Meta(pattern=r"\A[^\0]+\Z")] | None = None
    started: float = 0.0
    host: str | None = None
    process_space: str | None = None

    @classmethod
    def of_program(cls, pid: int, *, node: int | None = None, address: str | None = None) -> ClusterRecord:
        """Return a record of the cluster of the program with this process id, which runs in this container."""
        return cls(
            program=pid,
            program_ticks=start_ticks(pid),
            node=node,
            address=address,
            started=time.time(),
            host=socket.gethostname(),
            process_space=_process_space(),
        )

    def is_elsewhere(self) -> bool:
        """Return True if the program was started in another container, so that this process cannot see it."""
        return self.process_space is not None and self.process_space != _process_space()

    def is_program_alive(self) -> bool:
        """Return True if the recorded program still runs, and not another process with its pid.

        Only for a program of this container; see `DataDir.is_live`.
        """
        if self.is_elsewhere():
            return False
        ticks = start_ticks(self.program)
        return ticks is not None and self.program_ticks in (None, ticks)


class DataDir:
    """A data directory that exists, is private if this class created it, and lies on a local disk."""

    def __init__(self, path: Path | str, *, create: bool = True) -> None:
        """Open the directory, and create it (mode 0700) if it is missing.

        Raises `DataDirUnusable` if it is missing (with `create=False`), not accessible, or on a network disk.
        Raises `StageFlowError` without a usable /proc, which shows who holds the lock.
        """
        self.path = absolute_path(path)
        check_process_table()
        try:
            if create:
                _make_private(self.path)
            usable = self.path.is_dir() and os.access(self.path, os.R_OK | os.W_OK | os.X_OK)
        except OSError as error:
            reason = "it is a file" if self.path.is_file() else error.strerror or str(error)
            raise self._unusable(f"{reason}; choose another directory") from None
        if not self.path.is_dir():
            raise self._unusable("the directory does not exist; check --data")
        if not usable:
            raise self._unusable("this user has no permission to read and write it")
        _check_local_disk(self.path)
        self._lock_fd: int | None = None

    @property
    def journal(self) -> Path:
        """The directory of the broker's journal."""
        return self.path / _JOURNAL

    @property
    def history(self) -> Path:
        """The SQLite database of finished instances."""
        return self.path / _HISTORY

    @property
    def lock(self) -> Path:
        """The lock file. It is never removed: otherwise two clusters could each lock a file of this name."""
        return self.path / "lock"

    @property
    def cluster(self) -> Path:
        """The file that records the cluster running on this directory."""
        return self.path / "cluster.json"

    @property
    def lock_fd(self) -> int:
        """The descriptor that holds the lock, for `pass_fds`.

        Raises `RuntimeError` before `acquire` or `adopt`.
        """
        if self._lock_fd is None:
            raise RuntimeError(f"the lock of {self.path} is not held: call acquire() or adopt() first")
        return self._lock_fd

    def acquire(self, program_pid: int, wait: float = 5.0) -> int:
        """Lock the directory for `program_pid`, record it, and return the descriptor of the lock.

        If the recorded program has ended, waits up to `wait` seconds until the other processes of its cluster have
        ended too. Raises `JournalLocked` if that program runs, or if one of its processes still holds the lock after
        `wait` seconds; `DataDirUnusable` if the lock or the record cannot be opened or written.
        """
        try:
            fd = _open_private(self.lock)
        except OSError as error:
            raise self._unusable(f"its lock {self.lock} cannot be opened ({error.strerror}); {_ADVICE}") from error
        try:
            deadline = time.monotonic() + wait
            while not _try_lock(fd):
                # Read in each round: a new owner writes the record only after it has the lock.
                owner = self.read_cluster()
                if owner is not None and owner.is_program_alive():
                    who = "a Runtime of this program" if owner.program == os.getpid() else "the program"
                    raise JournalLocked(
                        f"{self.path} is in use by {who} with pid {owner.program}; connect to its cluster with "
                        f"Runtime.connect({str(self.path)!r}), or use another data_dir (--data)",
                        data_dir=str(self.path),
                        pid=owner.program,
                    )
                if time.monotonic() >= deadline:
                    raise self._remaining_processes_error(owner, wait)
                time.sleep(0.02)
        except BaseException:
            os.close(fd)
            raise
        try:
            self.write_cluster(ClusterRecord.of_program(program_pid))
        except OSError as error:
            os.close(fd)
            raise self._unusable(f"{self.cluster} cannot be written ({error.strerror}); {_ADVICE}") from error
        self._lock_fd = fd
        _ACQUIRED.add(self)
        return fd

    def adopt(self, lock_fd: int) -> None:
        """Take over the lock that this process inherited from the process that acquired it."""
        self._lock_fd = lock_fd

    def release(self) -> None:
        """Close this process's descriptor of the lock.

        The lock is free when no process holds an inherited copy of it.
        """
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def is_empty_or_used(self) -> bool:
        """Return True if a cluster has used the directory, or it is empty.

        False if it holds only files of other programs.
        """
        if self.journal.is_dir() or self.history.is_file() or self.cluster.is_file():
            return True
        return {entry.name for entry in self.path.iterdir()} <= {self.lock.name}

    def read_cluster(self) -> ClusterRecord | None:
        """Return the record of the cluster, or None. The recorded cluster may have ended.

        A record that cannot be decoded counts as missing.
        """
        try:
            return msgspec.json.decode(self.cluster.read_bytes(), type=ClusterRecord)
        except (FileNotFoundError, IsADirectoryError, RecursionError, UnicodeDecodeError, msgspec.DecodeError):
            return None

    def contents(self, durability: str) -> tuple[Path, ...]:
        """Return what a running cluster keeps here: journal and history, or nothing with durability "memory"."""
        return () if durability == "memory" else (self.journal, self.history)

    def check_present(self, *parts: Path) -> None:
        """Raise `DataDirUnusable` if the directory, or one of these parts of it, was removed or replaced in use."""
        if not self._is_lock(f"/proc/self/fd/{self.lock_fd}"):
            missing = self.path
        else:
            absent = [part for part in parts if not part.exists()]
            if not absent:
                return
            missing = absent[0]
        raise self._unusable(
            f"{missing} was removed or replaced while its cluster ran, so the cluster has been stopped. Restore the "
            "directory from a backup, or start with another one; do not submit again what has finished"
        )

    def is_live(self, record: ClusterRecord) -> bool:
        """Return True if the recorded program still runs.

        One of another container is not visible here; it runs if the lock is held.
        """
        return self._is_locked() if record.is_elsewhere() else record.is_program_alive()

    def _is_locked(self) -> bool:
        try:
            fd = os.open(self.lock, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def write_cluster(self, record: ClusterRecord) -> None:
        """Replace the record atomically: a reader sees the old one or the new one."""
        draft = self.cluster.with_suffix(f".{os.getpid()}.new")
        with open(_open_private(draft), "wb") as file:
            file.truncate()
            file.write(msgspec.json.encode(record))
        try:
            draft.replace(self.cluster)
        except OSError:
            draft.unlink(missing_ok=True)
            raise

    def remove_cluster(self) -> None:
        """Remove the record, at the end of a graceful stop."""
        self.cluster.unlink(missing_ok=True)

    def holders(self) -> list[int]:
        """Return the processes that have the lock file open.

        Only processes that this user has permission to inspect.
        """
        found = []
        for name in filter(str.isdecimal, os.listdir("/proc")):
            try:
                with os.scandir(f"/proc/{name}/fd") as open_files:
                    if any(self._is_lock(each.path) for each in open_files):
                        found.append(int(name))
            except OSError:
                continue  # it has just ended, or belongs to another user
        return sorted(set(found) - {os.getpid()})

    def _is_lock(self, descriptor: str) -> bool:
        try:
            return os.path.samefile(descriptor, self.lock)
        except OSError:
            return False  # it has just been closed

    def _remaining_processes_error(self, owner: ClusterRecord | None, wait: float) -> JournalLocked:
        if owner is not None and owner.is_elsewhere():
            return JournalLocked(
                f"{self.path} is in use by a cluster that was started in another container (host name "
                f"{owner.host!r}): stop that container, run your command in it, or use another data_dir",
                data_dir=str(self.path),
            )
        pids = self.holders()
        who = f"process{'es' if len(pids) > 1 else ''} {', '.join(map(str, pids))}" if pids else "another process"
        before = f"its program (pid {owner.program}) has ended, but " if owner is not None else ""
        end = (
            f"end {'them' if len(pids) > 1 else 'it'} (kill {' '.join(map(str, pids))})" if pids else "end that process"
        )
        return JournalLocked(
            f"{self.path} is in use: {before}{who} still held its lock after {wait:g} s; {end}, and start again",
            data_dir=str(self.path),
            pid=pids[0] if pids else None,
        )

    def _unusable(self, reason: str) -> DataDirUnusable:
        return DataDirUnusable(f"the data directory {self.path} cannot be used: {reason}", path=self.path)


_ACQUIRED: weakref.WeakSet[DataDir] = weakref.WeakSet()
"""The directories that this process itself has acquired."""


def _release_in_child() -> None:
    """Release the locks in a process that the program forks.

    Such a process is no part of the cluster, and may outlive it.
    """
    for data_dir in list(_ACQUIRED):
        data_dir.release()


os.register_at_fork(after_in_child=_release_in_child)


def _process_space() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def absolute_path(data_dir: Path | str) -> Path:
    """Return the absolute path of a data directory. Raises `DataDirUnusable` if the working directory is gone."""
    path = Path(data_dir)
    try:
        return path.absolute()
    except FileNotFoundError:
        raise DataDirUnusable(
            f"the data directory {str(path)!r} is relative to the working directory of this program, which has been "
            "removed: change to a directory that exists, or give an absolute path",
            path=path,
        ) from None


def _make_private(path: Path) -> None:
    """Create the directory with mode 0700.

    Missing parents get the mode of the umask, plus access for their owner.
    """
    if path.is_dir():
        return
    missing = [parent for parent in path.parents if not parent.exists()]
    for parent in reversed(missing):
        try:
            parent.mkdir()
        except FileExistsError:
            continue
        parent.chmod(parent.stat().st_mode | 0o700)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_dir():
            raise
    else:
        path.chmod(0o700)  # independent of the umask


def _open_private(path: Path) -> int:
    """Open the file for reading and writing; a new file gets mode 0600, independent of the umask."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if os.fstat(fd).st_mode & 0o600 != 0o600:
        os.fchmod(fd, 0o600)
    return fd


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def file_system_of(path: Path, mounts: str) -> tuple[str, str]:
    """Return (type, mount point) of the file system that holds `path`.

    `mounts` is the text of /proc/mounts.
    """
    best = ("", "")
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mount = _unescape(fields[1])
        # A later mount on the same point hides the earlier one.
        if len(mount) >= len(best[1]) and path.is_relative_to(mount):
            best = (fields[2], mount)
    return best


def _unescape(field: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field


def _check_local_disk(path: Path, mounts: str | None = None) -> None:
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text(errors="surrogateescape")
        except OSError:
            return  # without /proc the type is unknown, and the directory is accepted
    # Journal and history may be links, or mount points themselves.
    for what, part in (("data directory", path), ("journal", path / _JOURNAL), ("history", path / _HISTORY)):
        if not os.path.lexists(part):
            continue
        kind, mount = file_system_of(Path(os.path.realpath(part)), mounts)
        description = _nonlocal_kind(kind)
        if description:
            raise DataDirUnusable(
                f"the {what} {part} lies on {description} ({kind}, mounted at {mount}), where locks and syncs are not "
                "reliable; use a data_dir on a local disk and copy results from there",
                path=part,
            )


def _nonlocal_kind(kind: str) -> str:
    """Return a description of a file system type that is not local; empty for a local one."""
    if kind in NETWORK_FILE_SYSTEMS:
        return "a network file system"
    if kind in SHARED_FOLDERS:
        return "a shared folder of a virtual machine's host"
    if (kind == "fuse" or kind.startswith("fuse.")) and kind not in LOCAL_FUSE:
        return "a FUSE file system that is not in the list of local ones"
    return ""
