"""A disk in memory that fails, tears and forgets: `FileSystem` for tests and simulators. Never for data that matters.

It is stricter than any real disk. What was written lasts only after the file was synced; a name that was made, moved or
removed lasts only after its directory was synced; until then a crash of the machine may keep any part of it, sector by
sector and name by name. After a failed sync the data is still to be read, and yet will never reach the disk.
"""

import errno
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stageflow_brokers.journal.format import SECTOR, Buffer

__all__ = ["Call", "Crash", "SimulatedDisk"]

Call = tuple[str, str]  # operation, name of the file or directory
Write = tuple[int, bytes]  # where, what

LOST, KEPT, FRONT, BACK = range(4)  # what a crash makes of an unsynced step; the last two: half of a write's sectors


class Crash(BaseException):
    """The process, or its machine, ends in the middle of a call. Not an Exception: nothing may handle it."""


@dataclass(eq=False, slots=True)
class _Inode:
    seen: bytearray = field(default_factory=bytearray)  # what a read returns
    durable: bytearray = field(default_factory=bytearray)  # what a crash of the machine leaves for certain
    dirty: list[Write | int] = field(default_factory=list)  # on the way there: writes, and sizes
    bad: set[int] = field(default_factory=set)  # where sectors begin that cannot be read until they are written


@dataclass(eq=False, slots=True)
class _Change:
    """One step of a directory: `gone` is a name that ends, `path` one that begins to mean `inode`."""

    gone: Path | None
    path: Path | None
    inode: _Inode | None

    def apply(self, names: dict[Path, _Inode]) -> None:
        if self.gone is not None:
            names.pop(self.gone, None)
        if self.path is not None and self.inode is not None:
            names[self.path] = self.inode

    @property
    def directory(self) -> Path:
        path = self.path or self.gone
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

    # -- what happens to the disk

    def kill(self) -> None:
        """The process is gone: its descriptors and locks with it, but nothing that it wrote."""
        self._open.clear()
        self._locks.clear()
        self.on_call = lambda name, path: None
        self.on_read = lambda path, offset: None

    def crash(self, chance: random.Random | None = None) -> None:
        """The machine is gone. Without `chance` it leaves only what was synced; with it, any part of the rest too."""
        self.kill()
        for inode in dict.fromkeys([*self._names.values(), *self._durable_names.values()]):  # one seed, one crash
            if chance is not None:
                for step in inode.dirty:
                    if isinstance(step, int):
                        if chance.random() < 0.5:
                            _resize(inode.durable, step)
                    else:
                        _tear(inode.durable, step, chance)
            inode.dirty.clear()
            inode.seen[:] = inode.durable
        if chance is not None:
            for change in self._changes:
                if chance.random() < 0.5:
                    change.apply(self._durable_names)
        self._changes.clear()
        self._names = dict(self._durable_names)

    def crash_states(self, most: int, chance: random.Random) -> Iterator["SimulatedDisk"]:
        """What a crash of the machine now might leave, as other disks; this one goes on.

        Every combination of unsynced steps lost, kept and (a write of several sectors) half kept, whatever the order
        they were made in; where there are more than `most`, the two extremes, each step alone lost and each alone kept,
        and others by `chance`.
        """
        inodes = list(dict.fromkeys([*self._durable_names.values(), *self._names.values()]))
        steps = [step for inode in inodes for step in inode.dirty]
        fates = [4 if not isinstance(step, int) and len(step[1]) > SECTOR else 2 for step in steps]
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
            yield self._left_by(inodes, iter(combination))

    def _left_by(self, inodes: list[_Inode], fates: Iterator[int]) -> "SimulatedDisk":
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
                    half = len(piece) // SECTOR // 2 * SECTOR or SECTOR
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
        """What a read of the file returns."""
        return bytes(self._names[path].seen)

    def damage(self, path: Path, content: bytes) -> None:
        """Put other bytes in the place of a file, on the disk too; one that is not there is made."""
        if path not in self._names:
            self._names[path] = self._durable_names[path] = _Inode()
        inode = self._names[path]
        inode.seen[:] = inode.durable[:] = content
        inode.dirty.clear()

    def spoil(self, path: Path, offset: int) -> None:
        """The sector at `offset` cannot be read any more, until it is written again."""
        self._names[path].bad.add(offset // SECTOR * SECTOR)

    def heal(self) -> None:
        """Every sector can be read again, and nothing was lost."""
        for inode in self._names.values():
            inode.bad.clear()

    def remove(self, path: Path) -> None:
        """Someone deletes a file, for good."""
        del self._names[path], self._durable_names[path]

    def used(self) -> int:
        """Bytes of all files."""
        return sum(len(inode.seen) for inode in self._names.values())

    # -- Files

    def open(self, path: Path, *, create: bool = False, write: bool = True) -> int:
        inode = self._names.get(path)
        if inode is None:
            if not create:
                raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
            self._note("create", path)
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
        return len(self._open[fd][0].seen)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        inode, path, _ = self._open[fd]
        self.on_read(path, offset)
        if inode.bad and any(sector < offset + size and offset < sector + SECTOR for sector in inode.bad):
            raise OSError(errno.EIO, "unreadable sector")
        return bytes(inode.seen[offset : offset + size])

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        inode, path, write = self._open[fd]
        assert write, f"{path} is open for reading"
        limit = self._note("pwritev", path)
        data = b"".join(buffers)[:limit]
        self._need(max(0, offset + len(data) - len(inode.seen)))
        _put(inode.seen, offset, data)
        inode.bad -= {sector for sector in inode.bad if offset <= sector < offset + len(data)}
        inode.dirty.append((offset, data))
        return len(data)

    def fdatasync(self, fd: int) -> None:
        self._sync("fdatasync", fd)

    def fsync(self, fd: int) -> None:
        self._sync("fsync", fd)

    def fallocate(self, fd: int, size: int) -> None:
        inode, path, _ = self._open[fd]
        self._note("fallocate", path)
        if size > len(inode.seen):
            self._need(size - len(inode.seen))
            _resize(inode.seen, size)
            inode.dirty.append(size)

    def free_bytes(self, path: Path) -> int:
        return 1 << 60 if self.size_bytes is None else max(0, self.size_bytes - self.used())

    def rename(self, source: Path, target: Path) -> None:
        self._note("rename", target)
        inode = self._names.pop(source)
        self._names[target] = inode
        if source.parent == target.parent:
            self._changes.append(_Change(source, target, inode))
        else:
            self._changes += [_Change(None, target, inode), _Change(source, None, None)]

    def unlink(self, path: Path) -> None:
        self._note("unlink", path)
        del self._names[path]
        self._changes.append(_Change(path, None, None))

    def fsync_dir(self, path: Path) -> None:
        self._note("fsync_dir", path)
        for change in self._changes:
            if change.directory == path:
                change.apply(self._durable_names)
        self._changes = [change for change in self._changes if change.directory != path]

    def listdir(self, path: Path) -> list[str]:
        if path not in self._directories:
            raise FileNotFoundError(errno.ENOENT, "no such directory", str(path))
        start = f"{path}/"  # compared as text, for a torture lists a million times
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
        inode.seen[:] = inode.durable
        for step in inode.dirty:
            _apply(inode.seen, step)

    def random(self) -> int:
        return self._random.getrandbits(64)

    # -- inside

    def _note(self, name: str, path: Path) -> int | None:
        self.calls.append((name, path.name))
        return self.on_call(name, path.name)

    def _need(self, more: int) -> None:
        if self.size_bytes is not None and more and self.used() + more > self.size_bytes:
            raise OSError(errno.ENOSPC, "no space left on this device")

    def _sync(self, name: str, fd: int) -> None:
        inode, path, _ = self._open[fd]
        try:
            self._note(name, path)
        except OSError:
            inode.dirty.clear()  # as Linux does: the pages are clean from now on, and the data nowhere
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
    """Of a write that was not synced, each sector is there, or not, or full of something else."""
    offset, piece = write
    at = 0
    while at < len(piece):
        sector = piece[at : at + SECTOR - (offset + at) % SECTOR]
        fate = chance.random()
        if fate < 0.45:
            _put(data, offset + at, sector)
        elif fate > 0.9:
            _put(data, offset + at, chance.randbytes(len(sector)))
        at += len(sector)
