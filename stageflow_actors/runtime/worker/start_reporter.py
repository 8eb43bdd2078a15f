"""`StartReporter`: reports why this worker cannot start, to the node and not to stderr.

As many workers may have the same cause as there are: the node writes it once.
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import sys
import traceback
from typing import TextIO

from stageflow_actors.core.failures import describe_error
from stageflow_actors.runtime.ipc.slots import Slot
from stageflow_actors.runtime.ipc.start_report import DUMP_OFFSET, StartReport, write_report
from stageflow_actors.runtime.worker.output import MIN_OWN_DESCRIPTOR
from stageflow_actors.runtime.worker.traceback_text import format_traceback

__all__ = ["StartReporter"]


class StartReporter:
    """The file of `report_fd`, until the worker is ready. Without one, everything goes to stderr."""

    def __init__(self, report_fd: int, worker_id: str, slot: Slot) -> None:
        self._fd = report_fd
        self._worker_id = worker_id
        self._slot = slot
        if report_fd < 0:
            faulthandler.enable(all_threads=False)
            return
        try:
            self._fd = fcntl.fcntl(report_fd, fcntl.F_DUPFD_CLOEXEC, MIN_OWN_DESCRIPTOR)
            os.close(report_fd)
        except OSError:
            pass  # the limit of open files is lower
        os.lseek(self._fd, DUMP_OFFSET, os.SEEK_SET)
        faulthandler.enable(file=self._fd, all_threads=False)

    def write(self, step: str, error: BaseException) -> None:
        """Report that `step` has failed with `error`."""
        if self._fd < 0:
            traceback.print_exception(error)
            sys.stderr.write(f"stageflow: worker {self._worker_id} cannot start: {step}: {describe_error(error)}\n")
            return
        write_report(self._fd, StartReport(step, describe_error(error), format_traceback(error) or ""))

    def close(self, stderr: TextIO) -> None:
        """Close the file, because the worker is ready; from now on the interpreter writes of a crash to `stderr`."""
        if self._fd >= 0:
            # The descriptor is that of faulthandler too, which the user may have set up in another way.
            os.dup2(stderr.fileno(), self._fd, inheritable=False)
            self._fd = -1
