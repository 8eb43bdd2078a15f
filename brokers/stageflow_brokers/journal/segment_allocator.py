"""Where segments come from and where they go: preallocation, the spare, recycling.

One segment is kept ready beside the open one, whenever the disk permits, so that the work in hand and the compaction
that frees room can always be written. A segment that is given back becomes the spare: its blocks have been written
before and sync faster. Nothing here knows what is in a segment or decides which one may go.

A segment gets its name only when its header is on disk, and a batch only when its name is: each step here is synced
before the next, whatever the durability of commits.
"""

from pathlib import Path

from stageflow_brokers.errors import JournalFull
from stageflow_brokers.journal.filesystem import FileSystem, is_full, write_at
from stageflow_brokers.journal.format import SECTOR, SegmentHeader, encode_end, encode_segment, file_name

__all__ = ["MIN_SEGMENT_BYTES", "SPARE", "TEMPORARY", "SegmentAllocator"]

SPARE = "spare"
TEMPORARY = ".tmp"
MIN_SEGMENT_BYTES = 4 << 20  # the first segment; they double with what is in use, so that small journals stay small


class SegmentAllocator:
    """The segments to come, of `segment_bytes` each once the journal has grown."""

    def __init__(self, files: FileSystem, directory: Path, segment_bytes: int) -> None:
        self.is_low = False  # the last attempt to have a spare failed for want of room
        self.spare_bytes = 0
        self._files = files
        self._directory = directory
        self._segment_bytes = -(-segment_bytes // SECTOR) * SECTOR
        self._spare = directory / SPARE
        if SPARE in files.listdir(directory):
            fd = files.open(self._spare)
            self.spare_bytes = files.size(fd) // SECTOR * SECTOR
            files.close(fd)

    def size_of(self, in_use: int) -> int:
        """How large the next segment is to be beside so many bytes in use: 4, 8, 16 … MiB while each one is filled."""
        doublings = (in_use + MIN_SEGMENT_BYTES // 2) // MIN_SEGMENT_BYTES + 1
        return min(self._segment_bytes, MIN_SEGMENT_BYTES << doublings.bit_length() - 1)

    def prepare(self, in_use: int, at_least: int = 0) -> bool:
        """Have a spare for the next segment, of `at_least` so many bytes; false if there is no room for that.

        Where there is no room for a whole one a smaller one is kept or made meanwhile, down to the smallest; and some
        room is left to those who share the disk, such as the history: half of what is free, but where a small disk or
        work in hand needs more. Any error but a full disk goes up.
        """
        at_least = -(-at_least // SECTOR) * SECTOR
        size = max(self.size_of(in_use), at_least)
        while self.spare_bytes < size:
            if self._room_for(
                size - self.spare_bytes, max(MIN_SEGMENT_BYTES, at_least - self.spare_bytes)
            ) and self._reserve(size):
                break
            size //= 2
            if size < max(at_least, MIN_SEGMENT_BYTES, self.spare_bytes + 1):
                break
        self.is_low = self.spare_bytes == 0
        return self.spare_bytes >= max(at_least, 1)

    def _room_for(self, more: int, must: int) -> bool:
        """Whether so much more may be taken: up to `must` as it comes, beyond that half of what is free at most."""
        left_to_others = min(more, MIN_SEGMENT_BYTES) // 4 if more <= must else more
        return self._files.free_bytes(self._directory) >= more + left_to_others

    def _reserve(self, size: int) -> bool:
        """A spare of `size` bytes; one that is there grows in its place, for there may be no room for two."""
        if self.spare_bytes:
            fd = self._files.open(self._spare)
            try:
                try:
                    self._files.fallocate(fd, size)
                except OSError as error:
                    if not is_full(error):
                        raise
                    return False
                self._files.fsync(fd)  # whatever it says when it fails, it does not say that nothing has happened
            finally:
                self._files.close(fd)
            self.spare_bytes = size
            return True
        try:
            temporary, fd = self._allocate(SPARE, size)
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

    def make(self, number: int, first: int, needed: int, in_use: int) -> tuple[int, SegmentHeader]:
        """Segment `number`, ready for batch `first` of up to `needed` bytes with its end mark: its descriptor, and what
        its header says. `in_use`: bytes of those before it.

        Raises JournalFull, with nothing changed.
        """
        files = self._files
        at_least = SECTOR + -(-needed // SECTOR) * SECTOR
        if self.spare_bytes >= at_least:
            source, size = self._spare, self.spare_bytes
            fd = files.open(source)
            self.spare_bytes = 0
        else:
            size = max(self.size_of(in_use), at_least)
            # A disk without room for the first one has none for a journal.
            source, fd, size = self._find_room(file_name(number), size, at_least if number > 1 else size)
        try:
            header = SegmentHeader(number, files.random(), first, size)
            write_at(files, fd, [encode_segment(header), encode_end(first - 1, header.salt)], 2 * SECTOR, 0)
            files.fsync(fd)
            files.rename(source, self._directory / file_name(number))
            files.fsync_dir(self._directory)
        except BaseException:
            files.close(fd)
            raise
        return fd, header

    def give_back(self, number: int, size: int) -> None:
        """Segment `number` is needed no more. Before its bytes are used again, its name is gone for good."""
        path = self._directory / file_name(number)
        size = size // SECTOR * SECTOR
        if self.spare_bytes <= size <= self._segment_bytes:
            self._files.rename(path, self._spare)
            self.spare_bytes = size
            self.is_low = False
        else:
            self._files.unlink(path)
        self._files.fsync_dir(self._directory)

    def release_spare(self) -> bool:
        """Give the room of the spare back to the disk; false if there was none."""
        if not self.spare_bytes:
            return False
        self._files.unlink(self._spare)
        self.spare_bytes = 0
        return True

    def _find_room(self, name: str, size: int, at_least: int) -> tuple[Path, int, int]:
        """A new file of `size` bytes, or as much as there is of that, and how much it is. Raises JournalFull."""
        wanted: JournalFull | None = None
        while True:
            try:
                return *self._allocate(name, size), size
            except JournalFull as error:
                wanted = wanted or error
                if size <= at_least:
                    raise wanted from error.__cause__
                size = max(size // 2 // SECTOR * SECTOR, at_least)

    def _allocate(self, name: str, size: int) -> tuple[Path, int]:
        """A new file with blocks for `size` bytes, not yet synced. Raises JournalFull, and leaves nothing behind."""
        path = self._directory / (name + TEMPORARY)
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
                f"no room for a segment of {size} bytes in {self._directory}: free some space there", needed=size
            ) from error
        return path, fd
