"""How much memory a worker uses, with the processes it has started; and whether the kernel has killed for want of any.

Looked at ten times a second at most, and only where a stage has a `max_memory`. Must never decide who is to blame.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from stageflow_actors.runtime.system.processes import descendants

__all__ = ["OomKills", "count_oom_kills", "memory_above"]


def memory_above(pid: int, limit: int) -> int:
    """Bytes used by `pid` and its descendants if that is more than `limit`, else 0.

    One process counts by its RSS. Several share pages (a fork shares them all), so that the sum of their RSS says too
    much: where only the sum is over the limit, each shared page counts once (PSS), which is dearer to find out.
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
    """The kernel's count of processes killed for want of memory. Each is claimed once; from any thread."""

    def __init__(self, count: Callable[[], int | None] | None = None) -> None:
        self._count = count_oom_kills if count is None else count
        self._lock = threading.Lock()
        self._claimed = self._count()

    def claim(self) -> bool | None:
        """Whether one more has been counted than was claimed before; None where the kernel does not say."""
        with self._lock:
            now = self._count()
            if now is None or self._claimed is None:
                return None
            if now <= self._claimed:
                return False
            self._claimed += 1
            return True


def count_oom_kills(root: Path = Path("/")) -> int | None:
    """Processes of our control group (of the machine where it has none) that the kernel killed for want of memory."""
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
    # What a container sees as the root of its groups is its own.
    found.append(root / "sys/fs/cgroup/memory.events")
    found.append(root / "proc/vmstat")
    return found
