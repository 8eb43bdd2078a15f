"""Recovery: open an existing journal for writing.

The rule: acknowledged data is replayed, or the start is refused. Only a torn end, which was never acknowledged, is cut
off; before that it is copied aside, and a warning reports it. Recovery must never change acknowledged data.
"""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from stageflow_brokers.errors import JournalCorrupt, JournalFull
from stageflow_brokers.journal.filesystem import FileSystem, is_full, read_around, write_at
from stageflow_brokers.journal.format import SECTOR_BYTES, Batch, encode_end, file_name
from stageflow_brokers.journal.scanner import Damage, JournalScanner, ScannedSegment, segment_numbers
from stageflow_brokers.journal.segment_allocator import TEMPORARY_SUFFIX, SegmentAllocator

__all__ = ["clear_end", "copy_aside", "corrupt_error", "recover", "remove_leftovers", "unused_path"]

_CHUNK_BYTES = 4 << 20


def recover(
    files: FileSystem,
    directory: Path,
    allocator: SegmentAllocator,
    replay: Callable[[Batch], None],
    warn: Callable[[str], None],
) -> list[ScannedSegment]:
    """Replay every intact batch in order and cut off a torn end. Return the segments; the last one stays open.

    Raises JournalCorrupt (then nothing on disk has changed), JournalVersion, and JournalFull if the disk has no space
    to copy a torn end aside.
    """
    files.fsync_dir(directory)  # a killed process may have renamed without a sync
    for number in segment_numbers(files, directory)[-2:]:
        _sync_tail(files, directory / file_name(number))
    scanner = JournalScanner(files, directory)
    torn: Damage | None = None
    with closing(scanner.read()) as items:
        for item in items:
            if isinstance(item, Batch):
                replay(item)
            elif item.fatal:
                raise corrupt_error(item, directory)
            else:
                torn = item
    if torn is not None:
        _cut_torn_end(files, directory, allocator, torn, warn)
    return scanner.segments


def corrupt_error(damage: Damage, directory: Path) -> JournalCorrupt:
    """Return the error that refuses the start, with advice."""
    return JournalCorrupt(
        f"{directory / damage.file} is damaged at offset {damage.offset}: {damage.reason}. The damage lies in "
        "acknowledged data, so nothing has been changed. `stageflow journal verify` lists all damage; restore a "
        "backup, or run `stageflow journal repair`, which copies the files aside and discards everything after the "
        "damage",
        file=damage.file,
        offset=damage.offset,
        reason=damage.reason,
    )


def remove_leftovers(files: FileSystem, directory: Path) -> None:
    """Remove the unfinished files of an earlier process. Call it only under the lock."""
    for name in files.listdir(directory):
        if name.endswith(TEMPORARY_SUFFIX):
            files.unlink(directory / name)


def _sync_tail(files: FileSystem, path: Path) -> None:
    """Sync a segment and drop its cached pages.

    Data that the last process wrote without a sync must be on disk before it is used, and data that a failed sync left
    only in the cache must not be used. Only the last segment can hold either, because a new one begins after a sync;
    the segment before it can hold an unsynced followed mark.
    """
    fd = files.open(path)
    try:
        files.fdatasync(fd)
        files.drop_cache(fd)
    finally:
        files.close(fd)


def _cut_torn_end(
    files: FileSystem, directory: Path, allocator: SegmentAllocator, torn: Damage, warn: Callable[[str], None]
) -> None:
    path = directory / torn.file
    kept = "it held no data to copy"
    if torn.torn_end > torn.offset:
        target = unused_path(files, directory, f"{torn.segment:016d}.{torn.offset}", ".broken")
        try:
            zeros = copy_aside(files, path, torn.offset, torn.torn_end, target)
        except JournalFull:
            if not allocator.release_spare():
                raise
            zeros = copy_aside(files, path, torn.offset, torn.torn_end, target)
        kept = f"its data was copied to {target}"
        if zeros:
            kept += f", with zeros for {zeros} unreadable bytes"
    clear_end(files, path, torn.offset, torn.number, torn.salt, torn.torn_end)
    warn(f"{path} has no clean end at offset {torn.offset}: {torn.reason}; {kept}, and the torn end was cut off")


def clear_end(
    files: FileSystem, path: Path, offset: int, following: int, salt: int, until: int, *, grow: bool = False
) -> None:
    """Write an end mark at `offset`, where batch `following` would begin, zeros from there to `until`, and sync.

    A file that ends before `offset` stays unchanged, unless `grow` is true.
    """
    fd = files.open(path)
    try:
        size = files.size(fd)
        # Write the whole mark even if the file ends within it: a part of it would count as damage again.
        mark = encode_end(following - 1, salt) if grow or size > offset else b""
        write_at(files, fd, [mark], len(mark), offset)
        at, until = offset + len(mark), min(until, size)
        while at < until:
            zeros = bytes(min(_CHUNK_BYTES, until - at))
            write_at(files, fd, [zeros], len(zeros), at)
            at += len(zeros)
        files.fsync(fd)
    finally:
        files.close(fd)


def copy_aside(files: FileSystem, source: Path, start: int, end: int | None, target: Path) -> int:
    """Copy the bytes from `start` to `end` (None: to the last) into a new file, synced before it gets its name.

    Unreadable sectors are zeros in the copy; the number of these bytes is returned. Raises JournalFull, and leaves no
    file then.
    """
    temporary = target.with_name(target.name + TEMPORARY_SUFFIX)
    reading = files.open(source, write=False)
    syncing = False
    zeros = 0
    try:
        end = files.size(reading) if end is None else end
        writing = files.open(temporary, create=True)
        try:
            at = start
            while at < end:
                chunk, bad = read_around(files, reading, min(_CHUNK_BYTES, end - at), at)
                if not chunk:
                    break
                write_at(files, writing, [chunk], len(chunk), at - start)
                at += len(chunk)
                zeros += len(bad) * SECTOR_BYTES
            syncing = True
            files.fsync(writing)
        finally:
            files.close(writing)
    except OSError as error:
        if syncing or not is_full(error):
            raise
        if temporary.name in files.listdir(target.parent):
            files.unlink(temporary)
        raise JournalFull(
            f"the disk has no space to copy {source} to {target}: free some space",
            needed=(end or files.size(reading)) - start,
        ) from error
    finally:
        files.close(reading)
    files.rename(temporary, target)
    files.fsync_dir(target.parent)
    return zeros


def unused_path(files: FileSystem, directory: Path, stem: str, suffix: str) -> Path:
    """Return a path that no earlier copy has: an earlier copy may be the only evidence."""
    taken = set(files.listdir(directory))
    name, count = stem + suffix, 1
    while name in taken:
        count += 1
        name = f"{stem}.{count}{suffix}"
    return directory / name
