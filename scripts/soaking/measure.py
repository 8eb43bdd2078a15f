"""One sample of a cluster from outside: its processes, its journal and its temporary files."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import psutil

from cluster_tree import BELOW_A_PROGRAM, add_node

__all__ = ["KINDS", "Sample", "take"]

KINDS = ("program", *BELOW_A_PROGRAM)


@dataclass
class Sample:
    """`at`: seconds on the monotonic clock; `figures` by (what, which); sizes in bytes.

    Of the workers `rss` is the mean of all, `descriptors` and `threads` those of the worker that has most.
    """

    at: float
    figures: dict[tuple[str, str], float] = field(default_factory=dict)


def take(program: int, data: Path) -> Sample | None:
    """Return a sample of the cluster of a program, or None while it is incomplete, as just after a death."""
    sample = Sample(time.monotonic())
    figures = sample.figures
    try:
        for kind, processes in _processes(program).items():
            if not processes:
                return None
            figures["rss", kind] = mean(process.memory_info().rss for process in processes)
            figures["descriptors", kind] = max(process.num_fds() for process in processes)
            figures["threads", kind] = max(process.num_threads() for process in processes)
            figures["processes", kind] = len(processes)
    except psutil.Error:
        return None
    figures["disk", "journal"] = sum(_bytes(path) for path in (data / "journal").iterdir())
    figures["disk", "history"] = sum(_bytes(path) for path in data.glob("history.db*"))
    places = _ours(Path(tempfile.gettempdir()), "stageflow-") + _ours(Path("/dev/shm"), "stageflow")
    figures["entries", "temporary places"] = len(places)
    figures["entries", "sockets"] = sum(len(os.listdir(path)) for path in places if _is_ours(path, program, data))
    return sample


def _processes(program: int) -> dict[str, list[psutil.Process]]:
    found: dict[str, list[psutil.Process]] = {kind: [] for kind in KINDS}
    found["program"].append(psutil.Process(program))
    for node in found["program"][0].children():
        if not any("stageflow_actors.runtime.node.main" in word for word in node.cmdline()):
            continue
        add_node(node, found)
    return found


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0  # deleted in between


def _ours(place: Path, beginning: str) -> list[Path]:
    try:
        names = os.listdir(place)
    except OSError:
        return []
    return [place / name for name in names if name.startswith(beginning)]


def _is_ours(path: Path, program: int, data: Path) -> bool:
    """Return True if it is the socket directory of this cluster, not of another on the same machine."""
    try:
        return path.is_dir() and str(path) in (data / "cluster.json").read_text()
    except OSError:
        return False
