"""`SourceWatch`: warns once of each module of the program that changes on disk while the cluster runs.

A worker that starts afterwards runs other code than the program and the workers that started before. Files are only
looked at, never read or imported.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence

from stageflow_actors.runtime.system.source_files import SourceFile

__all__ = ["SourceWatch"]

logger = logging.getLogger("stageflow_actors.node.source_watch")

CHECK_SECONDS = 5.0
"""Time between two checks of all files."""
START_CHECK_SECONDS = 0.5
"""Least time between two checks at the start of workers."""


class SourceWatch:
    """The source files of one program. Any thread may call it."""

    def __init__(self, sources: Sequence[SourceFile], clock: Callable[[], float] = time.monotonic) -> None:
        self._sources = {source.module: source for source in sources}
        self._reported: set[str] = set()
        self._clock = clock
        self._checked_at = clock()
        self._lock = threading.Lock()

    def add(self, sources: Sequence[SourceFile]) -> None:
        """Add the modules that the program has imported since its start."""
        with self._lock:
            for source in sources:
                self._sources.setdefault(source.module, source)

    def check(self, *, worker_starts: bool = False) -> None:
        """Look for changes if it is time; sooner if a worker starts, which imports the modules."""
        with self._lock:
            now = self._clock()
            if now - self._checked_at < (START_CHECK_SECONDS if worker_starts else CHECK_SECONDS):
                return
            self._checked_at = now
            changed = [s for s in self._sources.values() if s.module not in self._reported and s.has_changed()]
            self._reported.update(source.module for source in changed)
        for source in changed:
            logger.warning(
                "module %s (%s) has changed on disk while the cluster runs: workers that start from now on run the new "
                "code, the program and its other workers the old one; start the program again to use one version",
                source.module,
                os.fsdecode(source.path),
            )
