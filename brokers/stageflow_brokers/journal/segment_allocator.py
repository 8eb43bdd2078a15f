"""The segment allocator: preallocates segments, keeps a spare one, and recycles released ones.

While the disk permits, a spare segment exists beside the open one, so that work in hand and compaction can always be
written. A released segment becomes the spare: its blocks have been written before, so syncs are faster. The allocator
must not depend on the content of a segment, and does not decide which one is released.

Each step is synced before the next one, whatever the durability of commits: a segment gets its name only when its
header is on disk, and a batch is written only when the name is.
"""

from pathlib import Path

from stageflow_brokers.errors import JournalFull
from stageflow_brokers.journal.filesystem import FileSystem, is_full, write_at
from stageflow_brokers.journal.format import SECTOR_BYTES, SegmentHeader, encode_end, encode_segment, file_name

__all__ = ["MIN_SEGMENT_BYTES", "SPARE_NAME", "TEMPORARY_SUFFIX", "SegmentAllocator"]

SPARE_NAME = "spare"
TEMPORARY_SUFFIX = ".tmp"

MIN_SEGMENT_BYTES = 4 << 20
"""Size of the first segment. Sizes double with the bytes in use, so that small journals stay small."""


class SegmentAllocator:
    """Creates the segments of a journal, of `segment_bytes` each once the journal has grown."""

    def __init__(self, files: FileSystem, directory: Path, segment_bytes: int) -> None:
        self.is_low = False  # the last attempt to make a spare failed: the disk has no space
        self.spare_bytes = 0
        self._files = files
        self._directory = directory
        self._segment_bytes = -(-segment_bytes // SECTOR_BYTES) * SECTOR_BYTES
        self._spare = directory / SPARE_NAME
        if SPARE_NAME in files.listdir(directory):
            fd = files.open(self._spare)
            self.spare_bytes = files.size(fd) // SECTOR_BYTES * SECTOR_BYTES
            files.close(fd)

    def next_size(self, in_use: int) -> int:
        """Return the size of the next segment when `in_use` bytes are in use: 4, 8, 16 … MiB as the segments fill."""
        doublings = (in_use + MIN_SEGMENT_BYTES // 2) // MIN_SEGMENT_BYTES + 1
        return min(self._segment_bytes, MIN_SEGMENT_BYTES << doublings.bit_length() - 1)

    def prepare(self, in_use: int, at_least: int = 0) -> bool:
        """Make sure that a spare of at least `at_least` bytes exists; return False if the disk has no space for it.

        If the disk has no space for a full-size spare, a smaller one is kept or made, down to the smallest size. Half
        of the free space is left to other users of the disk, such as the history, unless work in hand or a small disk
        requires more. Every error except a full disk is raised.
        """
        at_least = -(-at_least // SECTOR_BYTES) * SECTOR_BYTES
        size = max(self.next_size(in_use), at_least)
        while self.spare_bytes < size:
            if self._has_space(
                size - self.spare_bytes, max(MIN_SEGMENT_BYTES, at_least - self.spare_bytes)
            ) and self._reserve(size):
                break
            size //= 2
            if size < max(at_least, MIN_SEGMENT_BYTES, self.spare_bytes + 1):
                break
        self.is_low = self.spare_bytes == 0
        return self.spare_bytes >= max(at_least, 1)

    def _has_space(self, more: int, required: int) -> bool:
        """True if `more` bytes may be allocated: up to `required` always, beyond that half of the free space."""
        left_to_others = min(more, MIN_SEGMENT_BYTES) // 4 if more <= required else more
        return self._files.free_bytes(self._directory) >= more + left_to_others

    def _reserve(self, size: int) -> bool:
        """Make a spare of `size` bytes. An existing one grows in place: the disk may have no space for two."""
        if self.spare_bytes:
            fd = self._files.open(self._spare)
            try:
                try:
                    self._files.fallocate(fd, size)
                except OSError as error:
                    if not is_full(error):
                        raise
                    return False
                self._files.fsync(fd)  # a failed fallocate may still have changed the file
            finally:
                self._files.close(fd)
            self.spare_bytes = size
            return True
        try:
            temporary, fd = self._allocate(SPARE_NAME, size)
        except JournalFull:
            return False
        try:
            self._files.fsync(fd)
        finally:
            self._files.close(fd)
        self._files.rename(temporary, self._spare)
        self.spare_bytes = size
        self._files.fsync_dir(self._directory)
        return True

    def create(self, number: int, first: int, needed: int, in_use: int) -> tuple[int, SegmentHeader]:
        """Create segment `number`; return its descriptor and its header.

        Raises JournalFull, with nothing changed.

        Args:
            number: Number of the segment.
            first: Number of its first batch.
            needed: Bytes of that batch with its end mark.
            in_use: Bytes in use in the earlier segments.
        """
        files = self._files
        at_least = SECTOR_BYTES + -(-needed // SECTOR_BYTES) * SECTOR_BYTES
        if self.spare_bytes >= at_least:
            source, size = self._spare, self.spare_bytes
            fd = files.open(source)
            self.spare_bytes = 0
        else:
            size = max(self.next_size(in_use), at_least)
            # The first segment must have its full size: a disk without space for it has none for a journal.
            source, fd, size = self._allocate_largest(file_name(number), size, at_least if number > 1 else size)
        try:
            header = SegmentHeader(number, files.random(), first, size)
            write_at(files, fd, [encode_segment(header), encode_end(first - 1, header.salt)], 2 * SECTOR_BYTES, 0)
            files.fsync(fd)
            files.rename(source, self._directory / file_name(number))
            files.fsync_dir(self._directory)
        except BaseException:
            files.close(fd)
            raise
        return fd, header

    def release(self, number: int, size: int) -> None:
        """Release segment `number`, which becomes the spare. Its name is durably gone before its bytes are reused."""
        path = self._directory / file_name(number)
        size = size // SECTOR_BYTES * SECTOR_BYTES
        if self.spare_bytes <= size <= self._segment_bytes:
            self._files.rename(path, self._spare)
            self.spare_bytes = size
            self.is_low = False
        else:
            self._files.unlink(path)
        self._files.fsync_dir(self._directory)

    def release_spare(self) -> bool:
        """Delete the spare to free disk space; return False if there was none."""
        if not self.spare_bytes:
            return False
        self._files.unlink(self._spare)
        self.spare_bytes = 0
        return True

    def _allocate_largest(self, name: str, size: int, at_least: int) -> tuple[Path, int, int]:
        """Allocate a file of up to `size` bytes; return its path, descriptor and size. Raises JournalFull."""
        first_error: JournalFull | None = None
        while True:
            try:
                return *self._allocate(name, size), size
            except JournalFull as error:
                first_error = first_error or error
                if size <= at_least:
                    raise first_error from error.__cause__
                size = max(size // 2 // SECTOR_BYTES * SECTOR_BYTES, at_least)

    def _allocate(self, name: str, size: int) -> tuple[Path, int]:
        """Create a file with blocks for `size` bytes, without a sync. Raises JournalFull, and leaves no file then."""
        path = self._directory / (name + TEMPORARY_SUFFIX)
        fd = -1
        try:
            fd = self._files.open(path, create=True)
            self._files.fallocate(fd, size)
        except OSError as error:
            if fd >= 0:
                self._files.close(fd)
                self._files.unlink(path)
            if not is_full(error):
                raise
            raise JournalFull(
                f"the disk has no space for a segment of {size} bytes in {self._directory}: free some space there",
                needed=size,
            ) from error
        return path, fd
