"""A broker process whose disk fails on demand: `python failing_broker.py OPTIONS FILE`.

Only its seam to the operating system differs from a real broker. Each line of FILE names a call, such as `fdatasync`,
that fails with EIO once.
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path

from stageflow_brokers.journal import journal
from stageflow_brokers.journal.filesystem import OsFileSystem
from stageflow_brokers.zeromq.process import main


class FailingFiles(OsFileSystem):
    """What FILE names fails."""

    orders: Path

    def fdatasync(self, fd: int) -> None:
        """Fails if it is to fail."""
        if self.orders.exists() and "fdatasync" in self.orders.read_text().split():
            self.orders.write_text("failed")  # the disk works again at once: that must not matter
            raise OSError(errno.EIO, "Input/output error")
        super().fdatasync(fd)


if __name__ == "__main__":
    FailingFiles.orders = Path(sys.argv[2])
    journal.OsFileSystem = FailingFiles  # type: ignore[misc]
    sys.exit(main(sys.argv[1]))
