"""Where segments come from and where they go: preallocation, the spare, recycling.

One segment is kept ready beside the open one, whenever the disk permits, so that the work in hand and the compaction
that frees room can always be written. A segment that is given back becomes the spare: its blocks have been written
before and sync faster. Nothing here knows what is in a segment or decides which one may go.

A segment gets its name only when its header is on disk, and a batch only when its name is: each step here is synced
before the next, whatever the durability of commits.
"""

from pathlib import Path

from brokers.errors import JournalFull
from brokers.journal.files import Files, is_full, write_at
from brokers.journal.format import SECTOR, SegmentHeader, encode_end, encode_segment, file_name

__all__ = ["SMALLEST", "SPARE", "TEMPORARY", "Supply"]

SPARE = "spare"
TEMPORARY = ".tmp"
SMALLEST = 4 << 20  # the first segment; each one doubles until `segment_bytes`, so that small journals stay small


class Supply:
    """The segments to come, of `segment_bytes` each once the journal has grown."""

    def __init__(self, files: Files, directory: Path, segment_bytes: int) -> None:
        self.low = False  # the last attempt to have a spare failed for want of room
        self.spare_bytes = 0
        self._files = files
        self._directory = directory
        self._segment_bytes = -(-segment_bytes // SECTOR) * SECTOR
        self._spare = directory / SPARE
        if SPARE in files.listdir(directory):
            fd = files.open(self._spare)
            self.spare_bytes = files.size(fd)
            files.close(fd)

    def size_of(self, number: int) -> int:
        """How large segment `number` is to be, in bytes."""
        return min(self._segment_bytes, SMALLEST << min(number - 1, 40))

    def prepare(self, number: int) -> bool:
        """Have a spare that becomes segment `number`; false if there is no room. A smaller one is kept meanwhile.

        Any error but a full disk goes up.
        """
        size = self.size_of(number)
        if self.spare_bytes != size:
            try:
                temporary, fd = self._allocate(SPARE, size)
            except JournalFull:
                self.low = self.spare_bytes == 0
                return not self.low
            try:
                self._files.fsync(fd)
            finally:
                self._files.close(fd)
            self._files.rename(temporary, self._spare)
            self.spare_bytes = size
            self._files.fsync_dir(self._directory)
        self.low = False
        return True

    def make(self, number: int, first: int, needed: int) -> tuple[int, SegmentHeader]:
        """Segment `number`, ready for batch `first` of up to `needed` bytes: its descriptor, and what its header says.

        Raises JournalFull, with nothing changed.
        """
        files = self._files
        at_least = SECTOR + -(-needed // SECTOR) * SECTOR
        if self.spare_bytes >= at_least:
            source, size = self._spare, self.spare_bytes
            fd = files.open(source)
            self.spare_bytes = 0
        else:
            size = max(self.size_of(number), at_least)
            source, fd = self._allocate(file_name(number), size)
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
        if self.spare_bytes <= size <= self._segment_bytes:
            self._files.rename(path, self._spare)
            self.spare_bytes = size
            self.low = False
        else:
            self._files.unlink(path)
        self._files.fsync_dir(self._directory)

    def surrender(self) -> bool:
        """Give the room of the spare back to the disk; false if there was none."""
        if not self.spare_bytes:
            return False
        self._files.unlink(self._spare)
        self.spare_bytes = 0
        return True

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
