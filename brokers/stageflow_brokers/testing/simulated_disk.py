"""A simulated disk: a `FileSystem` in memory that fails, tears writes and loses unsynced data. Only for tests.

It is stricter than any real disk. Written data is durable only after a sync of the file; a created, renamed or deleted
name is durable only after a sync of its directory. Until then a crash of the machine may keep any part of it, sector by
sector and name by name. After a failed sync the data can still be read, but never reaches the disk.
"""

import errno
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stageflow_brokers.journal.format import SECTOR_BYTES, Buffer

__all__ = ["Call", "Crash", "SimulatedDisk"]

Call = tuple[str, str]  # operation, name of the file or directory
Write = tuple[int, bytes]  # offset, data

LOST, KEPT, FRONT, BACK = range(4)  # the effect of a crash on an unsynced step; FRONT and BACK keep half of the sectors


class Crash(BaseException):
    """The process or its machine ends in the middle of a call. Not an Exception: no code may handle it."""


@dataclass(eq=False, slots=True)
class _Inode:
    content: bytearray = field(default_factory=bytearray)  # returned by reads
    durable: bytearray = field(default_factory=bytearray)  # survives every crash of the machine
    dirty: list[Write | int] = field(default_factory=list)  # unsynced writes and sizes
    bad: set[int] = field(default_factory=set)  # offsets of sectors that are unreadable until written


@dataclass(eq=False, slots=True)
class _Change:
    """One change of a directory: `removed` is a deleted name, `path` a name that now refers to `inode`."""

    removed: Path | None
    path: Path | None
    inode: _Inode | None

    def apply(self, names: dict[Path, _Inode]) -> None:
        if self.removed is not None:
            names.pop(self.removed, None)
        if self.path is not None and self.inode is not None:
            names[self.path] = self.inode

    @property
    def directory(self) -> Path:
        path = self.path or self.removed
        assert path is not None
        return path.parent


class SimulatedDisk:
    """A file system in memory whose failures a test controls.

    `on_call` is called before each call that changes or syncs something, with the names of the call and the file. It
    may raise (OSError, Crash), or return the number of bytes after which a write stops; None lets the call succeed.
    `on_read` is called before each read, with the file and the offset. `size_bytes` is the size of the disk, None for
    no limit. `calls` lists all calls.
    """

    def __init__(self, *, seed: int = 0, size_bytes: int | None = None) -> None:
        self.on_call: Callable[[str, str], int | None] = lambda name, path: None
        self.on_read: Callable[[Path, int], None] = lambda path, offset: None
        self.size_bytes = size_bytes
        self.calls: list[Call] = []
        self.living: set[int] = set()
        self._random = random.Random(seed)
        self._names: dict[Path, _Inode] = {}
        self._durable_names: dict[Path, _Inode] = {}
        self._changes: list[_Change] = []
        self._directories: set[Path] = set()
        self._open: dict[int, tuple[_Inode, Path, bool]] = {}
        self._locks: dict[_Inode, int] = {}
        self._next_fd = 3

    # -- accidents

    def kill(self) -> None:
        """End the process: its descriptors and locks are gone, its written data stays."""
        self._open.clear()
        self._locks.clear()
        self.on_call = lambda name, path: None
        self.on_read = lambda path, offset: None

    def crash(self, chance: random.Random | None = None) -> None:
        """Crash the machine. Only synced data stays; with `chance`, also a random part of the unsynced data."""
        self.kill()
        # The order is fixed (dict, not set), so that one seed gives one result.
        for inode in dict.fromkeys([*self._names.values(), *self._durable_names.values()]):
            if chance is not None:
                for step in inode.dirty:
                    if isinstance(step, int):
                        if chance.random() < 0.5:
                            _resize(inode.durable, step)
                    else:
                        _tear(inode.durable, step, chance)
            inode.dirty.clear()
            inode.content[:] = inode.durable
        if chance is not None:
            for change in self._changes:
                if chance.random() < 0.5:
                    change.apply(self._durable_names)
        self._changes.clear()
        self._names = dict(self._durable_names)

    def crash_states(self, most: int, chance: random.Random) -> Iterator["SimulatedDisk"]:
        """Yield the possible disks after a crash of the machine now; this disk stays unchanged.

        Each unsynced step is lost, kept or (a write of several sectors) half kept, independently of the order of the
        steps. If there are more than `most` combinations: the two extremes, each step alone lost and each alone kept,
        and others chosen by `chance`.
        """
        inodes = list(dict.fromkeys([*self._durable_names.values(), *self._names.values()]))
        steps = [step for inode in inodes for step in inode.dirty]
        fates = [4 if not isinstance(step, int) and len(step[1]) > SECTOR_BYTES else 2 for step in steps]
        fates += [2] * len(self._changes)
        combinations = 1
        for count in fates:
            combinations *= count
        chosen: Iterator[tuple[int, ...]] | set[tuple[int, ...]]
        if combinations <= most:
            chosen = itertools.product(*(range(count) for count in fates))
        else:
            size = len(fates)
            chosen = {(LOST,) * size, (KEPT,) * size}
            for each in range(size):
                chosen.add(tuple(KEPT if at == each else LOST for at in range(size)))
                chosen.add(tuple(LOST if at == each else KEPT for at in range(size)))
            while len(chosen) < most:
                chosen.add(tuple(chance.randrange(count) for count in fates))
            chosen = set(sorted(chosen)[:most]) if len(chosen) > most else chosen
        for combination in chosen:
            yield self._after_crash(inodes, iter(combination))

    def _after_crash(self, inodes: list[_Inode], fates: Iterator[int]) -> "SimulatedDisk":
        disk = SimulatedDisk(size_bytes=self.size_bytes)
        disk._random.setstate(self._random.getstate())
        disk._directories = set(self._directories)
        copies = {}
        for inode in inodes:
            durable = bytearray(inode.durable)
            for step in inode.dirty:
                fate = next(fates)
                if fate == KEPT:
                    _apply(durable, step)
                elif fate in (FRONT, BACK) and not isinstance(step, int):
                    offset, piece = step
                    half = len(piece) // SECTOR_BYTES // 2 * SECTOR_BYTES or SECTOR_BYTES
                    _put(durable, *((offset, piece[:half]) if fate == FRONT else (offset + half, piece[half:])))
            copies[inode] = _Inode(bytearray(durable), durable)
        names = dict(self._durable_names)
        for change in self._changes:
            if next(fates) == KEPT:
                change.apply(names)
        disk._names = {path: copies[inode] for path, inode in names.items() if inode in copies}
        disk._durable_names = dict(disk._names)
        return disk

    def content(self, path: Path) -> bytes:
        """Return the content of a file as a read returns it."""
        return bytes(self._names[path].content)

    def damage(self, path: Path, content: bytes) -> None:
        """Replace the content of a file, on the disk too; create it if it is missing."""
        if path not in self._names:
            self._names[path] = self._durable_names[path] = _Inode()
        inode = self._names[path]
        inode.content[:] = inode.durable[:] = content
        inode.dirty.clear()

    def spoil(self, path: Path, offset: int) -> None:
        """Make the sector at `offset` unreadable until it is written again."""
        self._names[path].bad.add(offset // SECTOR_BYTES * SECTOR_BYTES)

    def heal(self) -> None:
        """Make every sector readable again, with its content."""
        for inode in self._names.values():
            inode.bad.clear()

    def remove(self, path: Path) -> None:
        """Delete a file durably, as an operator would."""
        del self._names[path], self._durable_names[path]

    def used(self) -> int:
        """Return the bytes of all files."""
        return sum(len(inode.content) for inode in self._names.values())

    # -- the interface `FileSystem`

    def open(self, path: Path, *, create: bool = False, write: bool = True) -> int:
        inode = self._names.get(path)
        if inode is None:
            if not create:
                raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
            self._on_call("create", path)
            inode = self._names[path] = _Inode()
            self._changes.append(_Change(None, path, inode))
        fd, self._next_fd = self._next_fd, self._next_fd + 1
        self._open[fd] = inode, path, write
        return fd

    def close(self, fd: int) -> None:
        inode = self._open.pop(fd)[0]
        if self._locks.get(inode) == fd:
            del self._locks[inode]

    def size(self, fd: int) -> int:
        return len(self._open[fd][0].content)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        inode, path, _ = self._open[fd]
        self.on_read(path, offset)
        if inode.bad and any(sector < offset + size and offset < sector + SECTOR_BYTES for sector in inode.bad):
            raise OSError(errno.EIO, "unreadable sector")
        return bytes(inode.content[offset : offset + size])

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        inode, path, write = self._open[fd]
        assert write, f"{path} is open for reading"
        limit = self._on_call("pwritev", path)
        data = b"".join(buffers)[:limit]
        self._check_space(max(0, offset + len(data) - len(inode.content)))
        _put(inode.content, offset, data)
        inode.bad -= {sector for sector in inode.bad if offset <= sector < offset + len(data)}
        inode.dirty.append((offset, data))
        return len(data)

    def fdatasync(self, fd: int) -> None:
        self._sync("fdatasync", fd)

    def fsync(self, fd: int) -> None:
        self._sync("fsync", fd)

    def fallocate(self, fd: int, size: int) -> None:
        inode, path, _ = self._open[fd]
        self._on_call("fallocate", path)
        if size > len(inode.content):
            self._check_space(size - len(inode.content))
            _resize(inode.content, size)
            inode.dirty.append(size)

    def free_bytes(self, path: Path) -> int:
        return 1 << 60 if self.size_bytes is None else max(0, self.size_bytes - self.used())

    def rename(self, source: Path, target: Path) -> None:
        self._on_call("rename", target)
        inode = self._names.pop(source)
        self._names[target] = inode
        if source.parent == target.parent:
            self._changes.append(_Change(source, target, inode))
        else:
            self._changes += [_Change(None, target, inode), _Change(source, None, None)]

    def unlink(self, path: Path) -> None:
        self._on_call("unlink", path)
        del self._names[path]
        self._changes.append(_Change(path, None, None))

    def fsync_dir(self, path: Path) -> None:
        self._on_call("fsync_dir", path)
        for change in self._changes:
            if change.directory == path:
                change.apply(self._durable_names)
        self._changes = [change for change in self._changes if change.directory != path]

    def listdir(self, path: Path) -> list[str]:
        if path not in self._directories:
            raise FileNotFoundError(errno.ENOENT, "no such directory", str(path))
        start = f"{path}/"  # compared as text, which is faster: some tests list directories a million times
        below = (str(each)[len(start) :] for each in (*self._directories, *self._names) if str(each).startswith(start))
        return sorted(name for name in below if "/" not in name)

    def mkdir(self, path: Path) -> None:
        self._directories.update((path, *path.parents))

    def try_lock(self, fd: int) -> bool:
        return self._locks.setdefault(self._open[fd][0], fd) == fd

    def is_alive(self, pid: int) -> bool:
        return pid in self.living

    def drop_cache(self, fd: int) -> None:
        inode = self._open[fd][0]
        inode.content[:] = inode.durable
        for step in inode.dirty:
            _apply(inode.content, step)

    def random(self) -> int:
        return self._random.getrandbits(64)

    # -- private

    def _on_call(self, name: str, path: Path) -> int | None:
        self.calls.append((name, path.name))
        return self.on_call(name, path.name)

    def _check_space(self, more: int) -> None:
        if self.size_bytes is not None and more and self.used() + more > self.size_bytes:
            raise OSError(errno.ENOSPC, "no space left on this device")

    def _sync(self, name: str, fd: int) -> None:
        inode, path, _ = self._open[fd]
        try:
            self._on_call(name, path)
        except OSError:
            inode.dirty.clear()  # like Linux: the pages count as clean from now on, and the data is never written
            raise
        for step in inode.dirty:
            _apply(inode.durable, step)
        inode.dirty.clear()


def _resize(data: bytearray, size: int) -> None:
    del data[size:]
    data.extend(bytes(size - len(data)))


def _put(data: bytearray, offset: int, piece: bytes) -> None:
    if offset + len(piece) > len(data):
        _resize(data, offset + len(piece))
    data[offset : offset + len(piece)] = piece


def _apply(data: bytearray, step: Write | int) -> None:
    if isinstance(step, int):
        _resize(data, step)
    else:
        _put(data, *step)


def _tear(data: bytearray, write: Write, chance: random.Random) -> None:
    """Apply an unsynced write sector by sector: each one is written, lost, or filled with random bytes."""
    offset, piece = write
    at = 0
    while at < len(piece):
        sector = piece[at : at + SECTOR_BYTES - (offset + at) % SECTOR_BYTES]
        fate = chance.random()
        if fate < 0.45:
            _put(data, offset + at, sector)
        elif fate > 0.9:
            _put(data, offset + at, chance.randbytes(len(sector)))
        at += len(sector)
