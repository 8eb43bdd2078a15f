"""The journal: one writer, batches in, every acknowledged batch out again.

It keeps bytes and knows nothing of what they mean. A batch is on disk when `commit` returns; after a write or a sync
has failed nothing is ever committed again by this process, because nobody can know what is on disk.

One thread uses it. It must not be carried over a fork: the lock would be held twice.
"""

import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, NoReturn, Self

from stageflow_brokers.errors import JournalCorrupt, JournalError, JournalFailed, JournalFull
from stageflow_brokers.failpoints import failpoint
from stageflow_brokers.journal.filesystem import FileSystem, OsFileSystem, is_full, read_at, write_at
from stageflow_brokers.journal.format import (
    BATCH_HEADER,
    SECTOR,
    Batch,
    Record,
    encode_end,
    encode_header,
    encode_payload,
    file_name,
    span,
)
from stageflow_brokers.journal.lock import DirectoryLock
from stageflow_brokers.journal.recovery import recover, remove_leftovers
from stageflow_brokers.journal.segment_allocator import SegmentAllocator
from stageflow_brokers.journal.segment_reader import check_batch

__all__ = ["BatchLocation", "Durability", "FreeSpace", "Journal", "SegmentInfo"]

Durability = Literal["fsync", "write"]

_LOG = logging.getLogger(__name__)
_ZEROS = bytes(SECTOR)
_SCATTER = 256 << 10  # bytes: from here on joining costs more (new pages) than handing the pieces over one by one
_PIECE = 2048  # bytes on average, for that to be true
_READERS = 64  # sealed segments kept open for reading
_VERIFIED = 4096  # batches whose checksum is not computed again when more is read of them


class BatchLocation(NamedTuple):
    """Where a commit went: the blob of record i begins at `blob_offsets[i]` in the file of `segment`, the batch itself
    at `batch`."""

    segment: int
    blob_offsets: list[int]
    batch: int


class SegmentInfo(NamedTuple):
    """`used` of `size` bytes hold batches, from number `first` on. A sealed segment is never written again."""

    number: int
    first: int
    used: int
    size: int
    sealed: bool


class FreeSpace(NamedTuple):
    """What can be written before the disk must give more: `open_bytes` in the open segment, `spare_bytes` in the spare.

    `has_spare`: a spare segment exists. `is_low`: the last attempt to make one failed because the disk has no space.
    """

    has_spare: bool
    is_low: bool
    open_bytes: int
    spare_bytes: int


class Journal:
    """Made by `open`; used by one thread; ended by `close`."""

    def __init__(
        self,
        files: FileSystem,
        directory: Path,
        lock: DirectoryLock,
        allocator: SegmentAllocator,
        durability: Durability,
    ) -> None:
        self.directory = directory
        self._files = files
        self._lock = lock
        self._allocator = allocator
        self._sync = durability == "fsync"
        self._refusal = "the journal is not open"
        self._sealed: list[SegmentInfo] = []
        self._readers: dict[int, int] = {}
        self._salts: dict[int, int] = {}
        self._verified: dict[tuple[int, int], int] = {}  # (segment, batch) → where the batch ends
        self._sealed_bytes = 0
        self._fd = -1
        self._segment = self._salt = self._first = self._end = self._capacity = 0
        self._next = 1

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        replay: Callable[[Batch], None],
        files: FileSystem | None = None,
        durability: Durability = "fsync",
        segment_bytes: int = 64 << 20,
        warn: Callable[[str], None] = _LOG.warning,
    ) -> Self:
        """Take the lock, recover, and hand every whole batch to `replay`, in order. A missing directory is made.

        With durability "write" a commit survives the end of any process, but not of the machine, which may keep later
        batches and lose earlier ones: the next start then refuses, as for any damage, and `repair` is the way on.

        `warn` gets a sentence when the torn end of the last batch was cut off. An error of `replay` goes up, with the
        journal closed.

        Raises JournalLocked, JournalCorrupt, JournalVersion; JournalFull without room for the first segment;
        JournalFailed when the disk fails.
        """
        if segment_bytes < 4 * SECTOR:
            raise ValueError(f"segment_bytes is {segment_bytes}: give at least {4 * SECTOR}")
        files = files if files is not None else OsFileSystem()
        try:
            files.mkdir(directory)
            lock = DirectoryLock(files, directory, os.getpid())
        except OSError as error:
            raise JournalError(f"cannot use {directory} for a journal: {error}") from error
        try:
            remove_leftovers(files, directory)
            journal = cls(files, directory, lock, SegmentAllocator(files, directory, segment_bytes), durability)
            try:
                journal._start(replay, warn)
            except BaseException:
                journal._release()
                raise
        except OSError as error:
            lock.release()
            raise JournalFailed(f"the journal in {directory} could not be recovered: {error}") from error
        except BaseException:
            lock.release()
            raise
        return journal

    def _start(self, replay: Callable[[Batch], None], warn: Callable[[str], None]) -> None:
        found = recover(self._files, self.directory, self._allocator, replay, warn)
        if not found:
            self._begin(number=1, needed=2 * SECTOR)
        else:
            for each in found[:-1]:
                self._seal(SegmentInfo(each.header.number, each.header.first, each.end, each.size, sealed=True))
                if not each.followed:  # the process ended before it could be said, or an earlier release does not
                    fd = self._files.open(self.directory / file_name(each.header.number))
                    try:
                        self._mark_followed(fd, each.end, each.size, each.following - 1, each.header.salt)
                    finally:
                        self._files.close(fd)
            last = found[-1]
            self._salts = {each.header.number: each.header.salt for each in found}
            self._segment, self._salt, self._first, _ = last.header
            self._next, self._end = last.following, last.end
            self._fd = self._files.open(self.directory / file_name(self._segment))
            self._reserve(last.header.size, last.marked)
        self._allocator.prepare(self._in_use)
        self._refusal = ""

    def _reserve(self, size: int, marked: bool) -> None:
        """Blocks for all of the open segment: it may have been cut short, or copied without its empty parts."""
        try:
            self._files.fallocate(self._fd, size)
        except OSError as error:
            if not is_full(error):
                raise
            self._capacity = self._end  # what cannot be reserved is not written to; the next commit takes the spare
            return
        self._capacity = max(size, self._files.size(self._fd) // SECTOR * SECTOR)
        if not marked and self._end + SECTOR <= self._capacity:
            write_at(self._files, self._fd, [encode_end(self._next - 1, self._salt)], SECTOR, self._end)
        self._files.fsync(self._fd)

    def commit(self, records: Sequence[Record], wall: float) -> BatchLocation:
        """Write one batch, and sync it if the durability says so. `wall` is the time, in seconds since 1970.

        Raises JournalFull (nothing was written; try again when there is room), PayloadTooLarge or struct.error (the
        records are at fault), JournalFailed (end this process).
        """
        if self._refusal:
            self._refuse()
        if not records:
            raise ValueError("a batch without records says nothing: commit when there are some")
        pieces, length, offsets = encode_payload(records, self._end + BATCH_HEADER)
        total = span(length)
        if self._end + total + SECTOR > self._capacity:
            before = self._end
            self._rotate(total + SECTOR)
            moved = self._end - before
            offsets = [offset + moved for offset in offsets]
        number, salt, end = self._next, self._salt, self._end
        if length < _SCATTER or length < _PIECE * len(pieces):
            pieces = [b"".join(pieces)]
        header = encode_header(number, salt, wall, pieces, length, len(records))
        padding = _ZEROS[: total - BATCH_HEADER - length] + encode_end(number, salt)
        try:
            write_at(self._files, self._fd, [header, *pieces, padding], total + SECTOR, end)
            failpoint("journal.written")
            if self._sync:
                self._files.fdatasync(self._fd)
            failpoint("journal.synced")
        except BaseException as error:  # noqa: BLE001 - goes up as it is, or as JournalFailed
            self._die(error, f"batch {number} could not be written to {file_name(self._segment)}")
        self._end, self._next = end + total, number + 1
        return BatchLocation(self._segment, offsets, end)

    def read(self, segment: int, offset: int, size: int, *, batch: int) -> bytes:
        """Return `size` bytes at `offset` of a live segment, from the batch that begins at offset `batch`.

        `BatchLocation` and `Batch` hold these offsets. The first read from a batch checks all of it against its CRC;
        a later read checks it again only if many other batches were checked in between.

        Raises JournalError if the segment is not live or the bytes do not lie in that batch, and JournalCorrupt if they
        are damaged or cannot be read.
        """
        fd = self._reader(segment)
        try:
            end = self._verified.get((segment, batch))
            if end is None:
                end = self._verify(fd, segment, batch)
            if not batch + BATCH_HEADER <= offset <= offset + size <= end:
                raise JournalError(
                    f"the batch at offset {batch} of {file_name(segment)} ends at {end}: it does not hold {size} bytes "
                    f"at {offset}"
                )
            data = read_at(self._files, fd, size, offset)
        except OSError as error:
            raise self._unreadable(segment, batch, str(error)) from error
        if len(data) < size:
            raise self._unreadable(segment, batch, f"the file ends {size - len(data)} bytes early")
        return data

    def _verify(self, fd: int, segment: int, batch: int) -> int:
        end, wrong = check_batch(self._files, fd, batch, self._salts[segment])
        if wrong:
            raise self._unreadable(segment, batch, wrong)
        if len(self._verified) >= _VERIFIED:
            del self._verified[next(iter(self._verified))]
        self._verified[segment, batch] = end
        return end

    def segments(self) -> list[SegmentInfo]:
        """All live segments, oldest first; the last one is the open one."""
        return [*self._sealed, SegmentInfo(self._segment, self._first, self._end, self._capacity, sealed=False)]

    @property
    def last_batch(self) -> int:
        """The number of the last batch committed or replayed; 0 if there never was one."""
        return self._next - 1

    @property
    def free_space(self) -> FreeSpace:
        """How much can be written before the disk must give more."""
        allocator = self._allocator
        open_bytes = max(0, self._capacity - SECTOR - self._end)
        return FreeSpace(allocator.spare_bytes > 0, allocator.is_low, open_bytes, allocator.spare_bytes)

    @property
    def is_space_low(self) -> bool:
        """The disk has no room for a spare segment: refuse what is new, let what is under way go on."""
        return self._allocator.is_low

    @property
    def disk_free_bytes(self) -> int:
        """Bytes free on the disk that holds the journal, as far as is known."""
        return self._files.free_bytes(self.directory)

    def prepare(self, at_least: int = 0) -> bool:
        """Try to have a spare segment, of at least so many bytes; false if the disk has no room for that.

        Cheap when there is one.
        """
        with self._fatal("a spare segment could not be prepared"):
            return self._allocator.prepare(self._in_use, at_least)

    def seal(self) -> None:
        """End the open segment and begin the next one. Raises JournalFull, with nothing changed."""
        if self._refusal:
            self._refuse()
        self._rotate(2 * SECTOR)

    def drop_oldest(self) -> None:
        """Give the oldest sealed segment back: everything in it that still matters must be committed again before.

        There is no way to drop another one: what it says has ended would come back from the ones before it.
        Raises JournalError if only the open one is left.
        """
        if self._refusal:
            self._refuse()
        if not self._sealed:
            raise JournalError(f"{file_name(self._segment)} is open and the only segment: seal it before dropping it")
        oldest = self._sealed[0]
        with self._fatal(f"{file_name(oldest.number)} could not be given back"):
            if (fd := self._readers.pop(oldest.number, None)) is not None:
                self._files.close(fd)
            self._allocator.give_back(oldest.number, oldest.size)
        del self._sealed[0]
        del self._salts[oldest.number]
        self._sealed_bytes -= oldest.used
        self._verified = {place: end for place, end in self._verified.items() if place[0] != oldest.number}

    def close(self) -> None:
        """Close the files and let go of the lock; everything committed is where it should be. Twice is once."""
        if self._fd < 0:
            return
        self._refusal = "the journal is closed"
        self._release()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, number: int, needed: int) -> None:
        self._fd, header = self._allocator.make(number, self._next, needed, self._in_use)
        self._segment, self._salt, self._first, self._capacity = header
        self._salts[number] = self._salt
        self._end = SECTOR

    def _rotate(self, needed: int) -> None:
        """Go on in a new segment with room for `needed` bytes, the end mark among them."""
        sealed = SegmentInfo(self._segment, self._first, self._end, self._capacity, sealed=True)
        with self._fatal(f"the segment after {file_name(self._segment)} could not be begun"):
            if not self._sync:
                self._files.fdatasync(self._fd)  # recovery takes a sealed segment for synced
            fd, salt = self._fd, self._salt
            self._begin(self._segment + 1, needed)
            self._seal(sealed)
            try:
                self._mark_followed(fd, sealed.used, sealed.size, self._next - 1, salt)
            finally:
                self._files.close(fd)
            self._allocator.prepare(self._in_use)

    def _seal(self, sealed: SegmentInfo) -> None:
        self._sealed.append(sealed)
        self._sealed_bytes += sealed.used

    def _mark_followed(self, fd: int, end: int, size: int, last: int, salt: int) -> None:
        """Let the segment that ends at `end` with batch `last` say, for good, that there is another one behind it.

        Whatever the durability: without this, the loss of the newest segment would look like a clean end. Where a
        segment has no room for an end mark, its successor's name has to do.
        """
        if end + SECTOR <= size:
            write_at(self._files, fd, [encode_end(last, salt, followed=True)], SECTOR, end)
            self._files.fdatasync(fd)

    @property
    def _in_use(self) -> int:
        """Bytes of batches in all segments, once the open one is full."""
        return self._sealed_bytes + self._capacity

    def _reader(self, segment: int) -> int:
        if segment == self._segment and self._fd >= 0:
            return self._fd
        if (fd := self._readers.get(segment)) is not None:
            return fd
        if not any(info.number == segment for info in self._sealed):
            raise JournalError(f"{file_name(segment)} is not part of the journal any more")
        if len(self._readers) >= _READERS:
            self._files.close(self._readers.pop(next(iter(self._readers))))
        try:
            fd = self._files.open(self.directory / file_name(segment), write=False)
        except OSError as error:
            raise self._unreadable(segment, 0, str(error)) from error
        self._readers[segment] = fd
        return fd

    def _unreadable(self, segment: int, offset: int, reason: str) -> JournalCorrupt:
        name = file_name(segment)
        return JournalCorrupt(
            f"a body at offset {offset} of {self.directory / name} cannot be read: {reason}. "
            "`stageflow journal verify` lists all damage",
            file=name,
            offset=offset,
            reason=reason,
        )

    @contextmanager
    def _fatal(self, what: str) -> Iterator[None]:
        """An error of the disk in here is the end of this journal; a full disk, before anything changed, is not."""
        if self._refusal:
            self._refuse()
        try:
            yield
        except JournalFull:
            raise
        except BaseException as error:  # noqa: BLE001 - goes up as it is, or as JournalFailed
            self._die(error, what)

    def _die(self, error: BaseException, what: str) -> NoReturn:
        """Whatever the error was (a Ctrl-C, too, may come between a write and its sync): no commit after it."""
        why = (
            error.strerror or errno.errorcode.get(error.errno or 0, str(error))
            if isinstance(error, OSError)
            else repr(error)
        )
        self._refusal = f"{what}: {why}. What is on disk is unknown, so end this process and start it again to recover"
        if isinstance(error, OSError):
            raise JournalFailed(self._refusal) from error
        raise error

    def _refuse(self) -> NoReturn:
        raise (JournalError if self._fd < 0 else JournalFailed)(self._refusal)

    def _release(self) -> None:
        for fd in (*self._readers.values(), self._fd):
            if fd >= 0:
                self._files.close(fd)
        self._readers.clear()
        self._fd = -1
