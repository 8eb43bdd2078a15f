"""The journal: one writer commits batches, and every acknowledged batch is replayed after a restart.

The journal does not interpret the bytes. A batch is on disk when `commit` returns. After a failed write or sync this
process must never commit again, because the state on disk is unknown.

Only one thread may use a journal. It must not survive a fork: two processes would hold the lock.
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
    BATCH_HEADER_BYTES,
    SECTOR_BYTES,
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

logger = logging.getLogger(__name__)
_ZEROS = bytes(SECTOR_BYTES)
_SCATTER_BYTES = 256 << 10  # from this size, copying the pieces into one buffer costs more than passing each piece
_SCATTER_PIECE_BYTES = 2048  # the average size of a piece from which that is true
_MAX_READERS = 64  # sealed segments that stay open for reading
_MAX_CHECKED_BATCHES = 4096  # batches whose checksum is not computed again for another read


class BatchLocation(NamedTuple):
    """The place of a committed batch: the file of `segment`, at offset `batch`.

    The blob of record i begins at `blob_offsets[i]` in that file.
    """

    segment: int
    blob_offsets: list[int]
    batch: int


class SegmentInfo(NamedTuple):
    """A segment: `used` of `size` bytes hold batches, from number `first` on. A sealed one gets no more batches."""

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
    """A journal that is open for writing. Create it with `open`, use it from one thread, and `close` it."""

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
        self._checked_batches: dict[tuple[int, int], int] = {}  # (segment, batch) → end of the batch
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
        warn: Callable[[str], None] = logger.warning,
    ) -> Self:
        """Take the lock, recover the journal, and open it for writing.

        With durability "write" a commit survives the end of any process, but not a crash of the machine, which may keep
        later batches and lose earlier ones. The next start then refuses the journal as damaged; `repair` makes it
        usable again.

        Args:
            directory: Directory of the journal; created if it is missing.
            replay: Called with every intact batch in order. An error that it raises closes the journal.
            files: The file system. Default: that of the operating system.
            durability: "fsync" syncs each commit, "write" does not. Default: "fsync".
            segment_bytes: Size of a segment once the journal has grown. Default: 64 MiB.
            warn: Called with a sentence if a torn end was cut off. Default: a log message.

        Raises:
            JournalLocked: Another process uses the directory.
            JournalCorrupt: Acknowledged data is damaged.
            JournalVersion: A newer program wrote the journal.
            JournalFull: The disk has no space for the first segment.
            JournalFailed: The disk failed.
            JournalError: The directory cannot be used.
        """
        if segment_bytes < 4 * SECTOR_BYTES:
            raise ValueError(f"segment_bytes is {segment_bytes}: give at least {4 * SECTOR_BYTES}")
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
            self._begin(number=1, needed=2 * SECTOR_BYTES)
        else:
            for each in found[:-1]:
                self._seal(SegmentInfo(each.header.number, each.header.first, each.end, each.size, sealed=True))
                if not each.followed:  # the process ended before it wrote the mark, or an earlier release wrote none
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
        """Allocate blocks for the whole open segment: the file may be shorter, or a sparse copy."""
        try:
            self._files.fallocate(self._fd, size)
        except OSError as error:
            if not is_full(error):
                raise
            self._capacity = self._end  # write nothing here without reserved blocks; the next commit uses the spare
            return
        self._capacity = max(size, self._files.size(self._fd) // SECTOR_BYTES * SECTOR_BYTES)
        if not marked and self._end + SECTOR_BYTES <= self._capacity:
            write_at(self._files, self._fd, [encode_end(self._next - 1, self._salt)], SECTOR_BYTES, self._end)
        self._files.fsync(self._fd)

    def commit(self, records: Sequence[Record], wall: float) -> BatchLocation:
        """Write one batch, and sync it with durability "fsync". `wall` is the time in seconds since 1970.

        Raises JournalFull (nothing was written; try again when the disk has space), PayloadTooLarge or struct.error
        (the records are invalid), and JournalFailed (end this process).
        """
        if self._refusal:
            self._raise_refusal()
        if not records:
            raise ValueError("cannot commit a batch without records")
        pieces, length, offsets = encode_payload(records, self._end + BATCH_HEADER_BYTES)
        total = span(length)
        if self._end + total + SECTOR_BYTES > self._capacity:
            before = self._end
            self._rotate(total + SECTOR_BYTES)
            moved = self._end - before
            offsets = [offset + moved for offset in offsets]
        number, salt, end = self._next, self._salt, self._end
        if length < _SCATTER_BYTES or length < _SCATTER_PIECE_BYTES * len(pieces):
            pieces = [b"".join(pieces)]
        header = encode_header(number, salt, wall, pieces, length, len(records))
        padding = _ZEROS[: total - BATCH_HEADER_BYTES - length] + encode_end(number, salt)
        try:
            write_at(self._files, self._fd, [header, *pieces, padding], total + SECTOR_BYTES, end)
            failpoint("journal.written")
            if self._sync:
                self._files.fdatasync(self._fd)
            failpoint("journal.synced")
        except BaseException as error:  # noqa: BLE001 - raised again, or as JournalFailed
            self._fail(error, f"batch {number} could not be written to {file_name(self._segment)}")
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
            end = self._checked_batches.get((segment, batch))
            if end is None:
                end = self._verify(fd, segment, batch)
            if not batch + BATCH_HEADER_BYTES <= offset <= offset + size <= end:
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
        if len(self._checked_batches) >= _MAX_CHECKED_BATCHES:
            del self._checked_batches[next(iter(self._checked_batches))]
        self._checked_batches[segment, batch] = end
        return end

    def segments(self) -> list[SegmentInfo]:
        """Return all segments, oldest first; the last one is the open one."""
        return [*self._sealed, SegmentInfo(self._segment, self._first, self._end, self._capacity, sealed=False)]

    @property
    def last_batch(self) -> int:
        """The number of the last batch that was committed or replayed; 0 if there is none."""
        return self._next - 1

    @property
    def free_space(self) -> FreeSpace:
        """The bytes that can be written before the journal needs another segment from the disk."""
        allocator = self._allocator
        open_bytes = max(0, self._capacity - SECTOR_BYTES - self._end)
        return FreeSpace(allocator.spare_bytes > 0, allocator.is_low, open_bytes, allocator.spare_bytes)

    @property
    def is_space_low(self) -> bool:
        """True if the disk has no space for a spare segment: starts should be refused, work in hand goes on."""
        return self._allocator.is_low

    @property
    def disk_free_bytes(self) -> int:
        """Bytes free on the disk of the journal, as far as known."""
        return self._files.free_bytes(self.directory)

    def prepare(self, at_least: int = 0) -> bool:
        """Make sure that a spare segment of at least `at_least` bytes exists; return False without space for it.

        Cheap if there is one.
        """
        with self._fatal("a spare segment could not be prepared"):
            return self._allocator.prepare(self._in_use, at_least)

    def seal(self) -> None:
        """Close the open segment and begin the next one. Raises JournalFull, with nothing changed."""
        if self._refusal:
            self._raise_refusal()
        self._rotate(2 * SECTOR_BYTES)

    def drop_oldest(self) -> None:
        """Release the oldest sealed segment. Commit its live records again before.

        No other segment can be dropped: messages whose end it records would come back from the older segments.
        Raises JournalError if only the open segment remains.
        """
        if self._refusal:
            self._raise_refusal()
        if not self._sealed:
            raise JournalError(f"{file_name(self._segment)} is open and the only segment: seal it before dropping it")
        oldest = self._sealed[0]
        with self._fatal(f"{file_name(oldest.number)} could not be released"):
            if (fd := self._readers.pop(oldest.number, None)) is not None:
                self._files.close(fd)
            self._allocator.release(oldest.number, oldest.size)
        del self._sealed[0]
        del self._salts[oldest.number]
        self._sealed_bytes -= oldest.used
        self._checked_batches = {
            batch: end for batch, end in self._checked_batches.items() if batch[0] != oldest.number
        }

    def close(self) -> None:
        """Close the files and release the lock. A second call does nothing."""
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
        self._fd, header = self._allocator.create(number, self._next, needed, self._in_use)
        self._segment, self._salt, self._first, self._capacity = header
        self._salts[number] = self._salt
        self._end = SECTOR_BYTES

    def _rotate(self, needed: int) -> None:
        """Continue in a new segment with space for `needed` bytes, including the end mark."""
        sealed = SegmentInfo(self._segment, self._first, self._end, self._capacity, sealed=True)
        with self._fatal(f"the segment after {file_name(self._segment)} could not be created"):
            if not self._sync:
                self._files.fdatasync(self._fd)  # recovery relies on sealed segments being synced
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
        """Write and sync the followed mark of the segment that ends at `end` with batch `last`.

        It is synced with every durability: without the mark, the loss of the newest segment would look like a clean
        end. A segment without space for an end mark gets none; the name of its successor has to suffice.
        """
        if end + SECTOR_BYTES <= size:
            write_at(self._files, fd, [encode_end(last, salt, followed=True)], SECTOR_BYTES, end)
            self._files.fdatasync(fd)

    @property
    def _in_use(self) -> int:
        """Bytes of the batches in all segments once the open one is full."""
        return self._sealed_bytes + self._capacity

    def _reader(self, segment: int) -> int:
        if segment == self._segment and self._fd >= 0:
            return self._fd
        if (fd := self._readers.get(segment)) is not None:
            return fd
        if not any(info.number == segment for info in self._sealed):
            raise JournalError(f"{file_name(segment)} is no longer part of the journal")
        if len(self._readers) >= _MAX_READERS:
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
            f"a body at offset {offset} of {self.directory / name} cannot be read: {reason}; "
            "`stageflow journal verify` lists all damage",
            file=name,
            offset=offset,
            reason=reason,
        )

    @contextmanager
    def _fatal(self, what: str) -> Iterator[None]:
        """Make this journal unusable if the block raises an error other than JournalFull."""
        if self._refusal:
            self._raise_refusal()
        try:
            yield
        except JournalFull:
            raise
        except BaseException as error:  # noqa: BLE001 - raised again, or as JournalFailed
            self._fail(error, what)

    def _fail(self, error: BaseException, what: str) -> NoReturn:
        """Refuse all further commits, whatever the error was: a Ctrl-C, too, may come between a write and its sync."""
        reason = (
            error.strerror or errno.errorcode.get(error.errno or 0, str(error))
            if isinstance(error, OSError)
            else repr(error)
        )
        self._refusal = (
            f"{what}: {reason}. The state on disk is unknown, so end this process and start it again to recover"
        )
        if isinstance(error, OSError):
            raise JournalFailed(self._refusal) from error
        raise error

    def _raise_refusal(self) -> NoReturn:
        raise (JournalError if self._fd < 0 else JournalFailed)(self._refusal)

    def _release(self) -> None:
        for fd in (*self._readers.values(), self._fd):
            if fd >= 0:
                self._files.close(fd)
        self._readers.clear()
        self._fd = -1
