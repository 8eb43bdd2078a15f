"""Memory use of workers with their child processes, and the kernel's count of OOM kills.

Memory is measured at most ten times per second, and only for a stage with `max_memory`. This module must never decide
which message is responsible.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from stageflow_actors.runtime.system.processes import descendants

__all__ = ["OomKills", "count_oom_kills", "memory_above"]


def memory_above(pid: int, limit: int) -> int:
    """Return the bytes used by `pid` and its descendants if above `limit`, else 0.

    A process without descendants counts by its RSS. Processes of one family share pages (after a fork, all of them), so
    that the sum of their RSS is too high: if only the sum is above the limit, PSS is measured, which divides a shared
    page among its users but is slower to read.
    """
    own = _rss(pid)
    if own > limit:
        return own
    family = descendants(pid)
    if not family or own + sum(map(_rss, family)) <= limit:
        return 0
    shared = _pss(pid) + sum(map(_pss, family))
    return shared if shared > limit else 0


def _rss(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _pss(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_full_info().pss)
    except psutil.Error:
        return 0


class OomKills:
    """Matches exits of workers with kills by the kernel's OOM killer: each kill is claimed once. Thread-safe."""

    def __init__(self, count: Callable[[], int | None] | None = None) -> None:
        self._count = count_oom_kills if count is None else count
        self._lock = threading.Lock()
        self._claimed = self._count()

    def claim(self) -> bool | None:
        """Claim one OOM kill. Return True if there was an unclaimed one; None if the kernel has no counter."""
        with self._lock:
            now = self._count()
            if now is None or self._claimed is None:
                return None
            if now <= self._claimed:
                return False
            self._claimed += 1
            return True


def count_oom_kills(root: Path = Path("/")) -> int | None:
    """Return the number of OOM kills in our control group, or on the machine if the group has no counter."""
    for path in _counters(root):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == "oom_kill" and value.isdecimal():
                return int(value)
    return None


def _counters(root: Path) -> Sequence[Path]:
    found = []
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        groups = []
    for group in groups:
        _, controllers, path = [*group.split(":", 2), "", ""][:3]
        if not controllers and path != "/":
            found.append(root / "sys/fs/cgroup" / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            found.append(root / "sys/fs/cgroup/memory" / path.lstrip("/") / "memory.oom_control")
    # In a container the root of the control groups is the container's own group.
    found.append(root / "sys/fs/cgroup/memory.events")
    found.append(root / "proc/vmstat")
    return found
