"""The data directory: where the journal, the history and the lock of one cluster lie, and who owns it.

The lock is an `flock` whose descriptor is handed on to every process of the cluster, so that it is free only when
the last of them has ended: nobody starts on a journal that a straggler of the old cluster may still write.
This module never reads a journal or a history.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
import weakref
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from stageflow_actors.errors import JournalLocked, StageFlowError
from stageflow_actors.runtime.system.processes import start_ticks
from stageflow_brokers.zeromq.private_dir import why_not_private

__all__ = [
    "ClusterRecord",
    "DataDir",
    "DataDirUnusable",
    "file_system_of",
    "remove_runtime_dir",
    "runtime_dir",
    "runtime_path",
]

NETWORK_FILE_SYSTEMS = frozenset(
    "9p acfs afs beegfs ceph cifs coda curlftpfs davfs fhgfs fuse.beegfs fuse.ceph fuse.cephfs fuse.curlftpfs "
    "fuse.davfs fuse.davfs2 fuse.gcsfuse fuse.glusterfs fuse.goofys fuse.juicefs fuse.lizardfs fuse.moosefs "
    "fuse.mfsmount fuse.rclone fuse.s3fs fuse.seaweedfs fuse.smbnetfs fuse.sshfs gfs gfs2 gfarm glusterfs gpfs lustre "
    "ncp ncpfs nfs nfs4 ocfs2 orangefs panfs pvfs2 quobyte smb2 smb3 smbfs wekafs".split()
)
"""Types, as in /proc/mounts, on which locks, shared memory or syncs of several processes cannot be relied upon."""

SHARED_FOLDERS = frozenset({"fuse.vmhgfs-fuse", "prl_fs", "vboxsf", "vmhgfs"})
"""Types of what a hypervisor shows its guests of the host's files: no better."""

LOCAL_FUSE = frozenset(
    "fuse.bindfs fuse.encfs fuse.fuse-overlayfs fuse.gocryptfs fuse.mergerfs fuse.unionfs fuse.unionfs-fuse".split()
)
"""Those of the types `fuse.*` that lie on a local disk: what one that is not known does with a sync, nobody can say."""

_JOURNAL = "journal"
_HISTORY = "history.db"
_ADVICE = "no release makes it like that: look what it is, and move it away"
_MAX_SOCKET_PATH_BYTES = 107
_MAX_SOCKET_NAME_BYTES = 24


class DataDirUnusable(StageFlowError):
    """The data directory, or the private directory of the sockets, cannot be used; `path` is which."""

    def __init__(self, message: str, *, path: Path) -> None:
        super().__init__(message)
        self.path = path


class ClusterRecord(Struct, kw_only=True, frozen=True):
    """Who serves a data directory (cluster.json).

    `program` and `node` are process ids, `program_ticks` the program's start in clock ticks since boot (with the
    pid it names one process), `address` the broker's, `started` seconds since the Unix epoch.
    """

    program: int
    program_ticks: int | None = None
    node: int | None = None
    address: Annotated[str, Meta(pattern=r"\A[^\0]+\Z")] | None = None
    started: float = 0.0

    def is_program_alive(self) -> bool:
        """Whether that very program still runs."""
        ticks = start_ticks(self.program)
        return ticks is not None and self.program_ticks in (None, ticks)


class DataDir:
    """A data directory that exists, is private if it is new, and lies on a local disk."""

    def __init__(self, path: Path | str, *, create: bool = True) -> None:
        """Makes the directory (mode 0700) if there is none. Raises `DataDirUnusable`, also for a network disk."""
        self.path = Path(path).absolute()
        try:
            if create:
                _make_private(self.path)
            usable = self.path.is_dir() and os.access(self.path, os.R_OK | os.W_OK | os.X_OK)
        except OSError as error:
            raise self._unusable(error.strerror or str(error)) from error
        if not self.path.is_dir():
            raise self._unusable("there is no such directory; is --data right?")
        if not usable:
            raise self._unusable("it may not be read and written by this user")
        _check_local_disk(self.path)
        self._lock_fd: int | None = None

    @property
    def journal(self) -> Path:
        """The directory of the broker's journal."""
        return self.path / _JOURNAL

    @property
    def history(self) -> Path:
        """The file of finished instances."""
        return self.path / _HISTORY

    @property
    def lock(self) -> Path:
        """The lock file. It is never removed: two clusters could each hold a lock on a file of that name."""
        return self.path / "lock"

    @property
    def cluster(self) -> Path:
        """The file that says who serves this directory."""
        return self.path / "cluster.json"

    @property
    def lock_fd(self) -> int:
        """The descriptor that holds the lock, to be passed on (`pass_fds`). Raises `RuntimeError` without one."""
        if self._lock_fd is None:
            raise RuntimeError(f"{self.path} has not been acquired")
        return self._lock_fd

    def acquire(self, program_pid: int, wait: float = 5.0) -> int:
        """Takes the directory for `program_pid`, and returns the lock's descriptor.

        If the program that has it is dead, waits up to `wait` seconds for the rest of its cluster to end. Raises
        `JournalLocked` if it lives, or if something of it is left after that; `DataDirUnusable` if what is there
        under the names of the lock and the record cannot be used.
        """
        try:
            fd = _open_private(self.lock)
        except OSError as error:
            raise self._unusable(f"its lock {self.lock} cannot be opened ({error.strerror}); {_ADVICE}") from error
        try:
            deadline = time.monotonic() + wait
            while not _try_lock(fd):
                # Read each time: a new owner writes its name only after it has the lock.
                owner = self.read_cluster()
                if owner is not None and owner.is_program_alive():
                    raise JournalLocked(
                        f"{self.path} is in use by the program with pid {owner.program}; use "
                        f"Runtime.connect({str(self.path)!r}) to work with it from here, or another data_dir",
                        data_dir=str(self.path),
                        pid=owner.program,
                    )
                if time.monotonic() >= deadline:
                    raise self._still_held(owner, wait)
                time.sleep(0.02)
        except BaseException:
            os.close(fd)
            raise
        try:
            self.write_cluster(
                ClusterRecord(program=program_pid, program_ticks=start_ticks(program_pid), started=time.time())
            )
        except OSError as error:
            os.close(fd)
            raise self._unusable(f"{self.cluster} cannot be written ({error.strerror}); {_ADVICE}") from error
        self._lock_fd = fd
        _ACQUIRED.add(self)
        return fd

    def adopt(self, lock_fd: int) -> None:
        """Takes over a lock that was inherited from the process that acquired it."""
        self._lock_fd = lock_fd

    def release(self) -> None:
        """Closes this process's descriptor; the lock is free when all who inherited it have ended or released."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def is_empty_or_used(self) -> bool:
        """Whether a cluster has been here, or nothing has: any other directory is somebody else's."""
        if self.journal.is_dir() or self.history.is_file() or self.cluster.is_file():
            return True
        return {entry.name for entry in self.path.iterdir()} <= {self.lock.name}

    def read_cluster(self) -> ClusterRecord | None:
        """Who serves the directory, or None if nobody is on record. The record may be of a cluster that has ended.

        One that cannot be read, or says what no runtime has written, is no record.
        """
        try:
            return msgspec.json.decode(self.cluster.read_bytes(), type=ClusterRecord)
        except (FileNotFoundError, IsADirectoryError, RecursionError, UnicodeDecodeError, msgspec.DecodeError):
            return None

    def write_cluster(self, record: ClusterRecord) -> None:
        """Replaces the record at once: a reader sees the old one or the new one."""
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
        """Takes the record away at the end of a graceful stop."""
        self.cluster.unlink(missing_ok=True)

    def holders(self) -> list[int]:
        """The processes that have the lock file open, as far as this user may see."""
        found = []
        for name in filter(str.isdecimal, os.listdir("/proc")):
            try:
                with os.scandir(f"/proc/{name}/fd") as open_files:
                    if any(self._is_lock(each.path) for each in open_files):
                        found.append(int(name))
            except OSError:
                continue  # ended meanwhile, or another user's
        return sorted(set(found) - {os.getpid()})

    def _is_lock(self, descriptor: str) -> bool:
        try:
            return os.path.samefile(descriptor, self.lock)
        except OSError:
            return False  # closed meanwhile: whoever starts up opens and closes many

    def _still_held(self, owner: ClusterRecord | None, wait: float) -> JournalLocked:
        pids = self.holders()
        who = f"process{'es' if len(pids) > 1 else ''} {', '.join(map(str, pids))}" if pids else "another process"
        before = f"the program {owner.program} that used it has ended, but " if owner is not None else ""
        return JournalLocked(
            f"{self.path} is in use: {before}{who} still held it after {wait:g} s; end what is left, and start again "
            "(Runtime.connect is for a cluster whose program lives)",
            data_dir=str(self.path),
            pid=pids[0] if pids else None,
        )

    def _unusable(self, reason: str) -> DataDirUnusable:
        return DataDirUnusable(f"the data directory {self.path} cannot be used: {reason}", path=self.path)


_ACQUIRED: weakref.WeakSet[DataDir] = weakref.WeakSet()
"""Directories that this process has acquired itself."""


def _release_in_child() -> None:
    """What a program forks for itself is no part of its cluster, and may outlive both."""
    for data_dir in list(_ACQUIRED):
        data_dir.release()


os.register_at_fork(after_in_child=_release_in_child)


def _make_private(path: Path) -> None:
    """Makes the directory with mode 0700, and its parents with what the umask leaves and their owner needs."""
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
        path.chmod(0o700)  # whatever the umask has taken away


def _open_private(path: Path) -> int:
    """A descriptor for reading and writing; a file that it makes is its owner's, whatever the umask takes away."""
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
    """(type, mount point) of the file system that holds `path`, from the text of /proc/mounts."""
    best = ("", "")
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mount = _unescape(fields[1])
        # A later mount on the same point covers the earlier one.
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
            return  # no /proc: nothing is known, and nothing can be said
    # The journal and the history may be links, or mounts of their own.
    for what, part in (("data directory", path), ("journal", path / _JOURNAL), ("history", path / _HISTORY)):
        if not os.path.lexists(part):
            continue
        kind, mount = file_system_of(Path(os.path.realpath(part)), mounts)
        on = _nonlocal_kind(kind)
        if on:
            raise DataDirUnusable(
                f"the {what} {part} lies on {on} ({kind}, mounted at {mount}), where locks and syncs are not "
                "reliable; choose a data_dir on a local disk and copy results from there",
                path=part,
            )


def _nonlocal_kind(kind: str) -> str:
    """What else a file system of this type is; empty for a local one."""
    if kind in NETWORK_FILE_SYSTEMS:
        return "a network file system"
    if kind in SHARED_FOLDERS:
        return "a shared folder of a virtual machine's host"
    if (kind == "fuse" or kind.startswith("fuse.")) and kind not in LOCAL_FUSE:
        return "a FUSE file system that is not known to be local"
    return ""


def runtime_dir(data_dir: Path) -> Path:
    """The private directory (mode 0700) of the sockets that belong to `data_dir`; made if there is none.

    It lies below `$XDG_RUNTIME_DIR` or the directory for temporary files, because a socket's path may have 107
    bytes at most. Always the same for the same data directory. Raises `DataDirUnusable` if what lies there is not
    this user's alone.
    """
    path = runtime_path(data_dir)
    try:
        path.mkdir(mode=0o700)
        path.chmod(0o700)  # whatever the umask has taken away
    except FileExistsError:
        pass
    except OSError as error:
        raise DataDirUnusable(f"cannot make the sockets' directory {path}: {error.strerror}", path=path) from error
    _check_private(path)
    return path


def runtime_path(data_dir: Path) -> Path:
    """Where `runtime_dir` is, whether it is there or not. Raises `DataDirUnusable` if there is no place for it."""
    # The user's number is part of the name: in a shared /tmp two users may each have a /data of their container.
    digest = hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:16]
    name = f"stageflow-{os.geteuid()}-{digest}"
    return _runtime_base(len(name)) / name


def _runtime_base(name_length: int) -> Path:
    candidates = [os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"]
    room = _MAX_SOCKET_PATH_BYTES - _MAX_SOCKET_NAME_BYTES - name_length - 2
    for candidate in candidates:
        fits = candidate and len(os.fsencode(candidate)) <= room
        if fits and os.access(candidate, os.W_OK | os.X_OK) and _is_protected(candidate):
            return Path(candidate)
    raise DataDirUnusable(
        f"there is no writable directory for sockets among {', '.join(filter(None, candidates))} with a path of at "
        f"most {room} bytes in which nobody else can replace what is there; set XDG_RUNTIME_DIR to one",
        path=Path(candidates[-1]),
    )


def _is_protected(directory: str) -> bool:
    """Whether nobody but this user can rename or remove what this user makes there, and put another in its place."""
    found = os.stat(directory)
    if found.st_uid not in (0, os.geteuid()):
        return False
    return not found.st_mode & 0o022 or bool(found.st_mode & stat.S_ISVTX)


def _check_private(path: Path) -> None:
    reason = why_not_private(path)
    if not reason:
        return
    raise DataDirUnusable(
        f"the sockets' directory {path} is not private: {reason}; remove it, or set XDG_RUNTIME_DIR to a private "
        "directory",
        path=path,
    )


def remove_runtime_dir(path: Path) -> None:
    """Removes a directory that `runtime_dir` made, with the sockets in it; once everything has stopped."""
    if path.name.startswith("stageflow-"):
        shutil.rmtree(path, ignore_errors=True)
