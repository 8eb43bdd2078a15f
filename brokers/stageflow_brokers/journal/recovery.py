"""From what is on disk to a journal that can be written again.

The law: what was acknowledged is replayed, or the start is refused. Only a torn end, which nobody was told of, is cut
off; it is copied aside before, and said. Nothing acknowledged is ever changed here.
"""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from stageflow_brokers.errors import JournalCorrupt, JournalFull
from stageflow_brokers.journal.filesystem import FileSystem, is_full, read_around, write_at
from stageflow_brokers.journal.format import SECTOR, Batch, encode_end, file_name
from stageflow_brokers.journal.scanner import Damage, JournalScanner, ScannedSegment, segment_numbers
from stageflow_brokers.journal.segment_allocator import TEMPORARY, SegmentAllocator

__all__ = ["clear_end", "copy_aside", "corrupt", "recover", "remove_leftovers", "unused"]

_CHUNK = 4 << 20


def recover(
    files: FileSystem,
    directory: Path,
    allocator: SegmentAllocator,
    replay: Callable[[Batch], None],
    warn: Callable[[str], None],
) -> list[ScannedSegment]:
    """Replay every whole batch in order and mend a torn end. The last segment returned is the one to go on with.

    Raises JournalCorrupt (then nothing on disk has changed), JournalVersion, JournalFull when a torn end cannot be
    copied aside.
    """
    files.fsync_dir(directory)  # a rename that a killed process did not live to sync
    for number in segment_numbers(files, directory)[-2:]:
        _settle(files, directory / file_name(number))
    survey = JournalScanner(files, directory)
    torn: Damage | None = None
    with closing(survey.read()) as items:
        for item in items:
            if isinstance(item, Batch):
                replay(item)
            elif item.fatal:
                raise corrupt(item, directory)
            else:
                torn = item
    if torn is not None:
        _cut(files, directory, allocator, torn, warn)
    return survey.segments


def corrupt(damage: Damage, directory: Path) -> JournalCorrupt:
    """The refusal, as advice."""
    return JournalCorrupt(
        f"{directory / damage.file} is damaged at offset {damage.offset}: {damage.reason}. Acknowledged batches lie "
        "here, so nothing has been changed. `stageflow journal verify` lists all damage; restore a backup, or let "
        "`stageflow journal repair` copy the files aside and give up what follows the damage",
        file=damage.file,
        offset=damage.offset,
        reason=damage.reason,
    )


def remove_leftovers(files: FileSystem, directory: Path) -> None:
    """Remove what was in the making when its process ended. Only under the lock."""
    for name in files.listdir(directory):
        if name.endswith(TEMPORARY):
            files.unlink(directory / name)


def _settle(files: FileSystem, path: Path) -> None:
    """What the last process wrote and did not sync must be on disk before anyone acts on it; what a failed sync left
    in memory must not be taken for it. Only the last segment can hold either, for a new one is begun after a sync; and
    the one before it, the mark that it is followed."""
    fd = files.open(path)
    try:
        files.fdatasync(fd)
        files.drop_cache(fd)
    finally:
        files.close(fd)


def _cut(
    files: FileSystem, directory: Path, allocator: SegmentAllocator, torn: Damage, warn: Callable[[str], None]
) -> None:
    path = directory / torn.file
    kept = "there was nothing left to copy"
    if torn.torn > torn.offset:
        target = unused(files, directory, f"{torn.segment:016d}.{torn.offset}", ".broken")
        try:
            zeros = copy_aside(files, path, torn.offset, torn.torn, target)
        except JournalFull:
            if not allocator.release_spare():
                raise
            zeros = copy_aside(files, path, torn.offset, torn.torn, target)
        kept = f"what stood there was copied to {target}"
        if zeros:
            kept += f", with zeros for {zeros} bytes that cannot be read"
    clear_end(files, path, torn.offset, torn.number, torn.salt, torn.torn)
    warn(f"{path} has no clean end at offset {torn.offset}: {torn.reason}; {kept}, and cut off")


def clear_end(
    files: FileSystem, path: Path, offset: int, following: int, salt: int, until: int, *, grow: bool = False
) -> None:
    """Put the end mark before batch `following` at `offset`, zeros from there to `until`, and sync.

    A file that ends before `offset` stays as it is, unless it may `grow`.
    """
    fd = files.open(path)
    try:
        size = files.size(fd)
        # Whole, also where the file ends within it: less than that would be damage again.
        mark = encode_end(following - 1, salt) if grow or size > offset else b""
        write_at(files, fd, [mark], len(mark), offset)
        at, until = offset + len(mark), min(until, size)
        while at < until:
            zeros = bytes(min(_CHUNK, until - at))
            write_at(files, fd, [zeros], len(zeros), at)
            at += len(zeros)
        files.fsync(fd)
    finally:
        files.close(fd)


def copy_aside(files: FileSystem, source: Path, start: int, end: int | None, target: Path) -> int:
    """Copy the bytes from `start` to `end` (None: to the last) into a new file, synced before it gets its name.

    Sectors that cannot be read are zeros in the copy; how many bytes these are is returned. Raises JournalFull, and
    leaves nothing behind.
    """
    temporary = target.with_name(target.name + TEMPORARY)
    reading = files.open(source, write=False)
    syncing = False
    zeros = 0
    try:
        end = files.size(reading) if end is None else end
        writing = files.open(temporary, create=True)
        try:
            at = start
            while at < end:
                chunk, bad = read_around(files, reading, min(_CHUNK, end - at), at)
                if not chunk:
                    break
                write_at(files, writing, [chunk], len(chunk), at - start)
                at += len(chunk)
                zeros += len(bad) * SECTOR
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
            f"no room to copy {source} to {target}: free some space", needed=(end or files.size(reading)) - start
        ) from error
    finally:
        files.close(reading)
    files.rename(temporary, target)
    files.fsync_dir(target.parent)
    return zeros


def unused(files: FileSystem, directory: Path, stem: str, suffix: str) -> Path:
    """A name that no earlier copy has: what it holds may be the only evidence."""
    taken = set(files.listdir(directory))
    name, count = stem + suffix, 1
    while name in taken:
        count += 1
        name = f"{stem}.{count}{suffix}"
    return directory / name
