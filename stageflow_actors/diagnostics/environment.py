"""Checks of the environment of a cluster, for `stageflow doctor`: lock, permissions, socket directory, free disk space.

This module must not take the lock and must not change anything, not even for a moment.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from stageflow_actors.core.invariants import ERROR, INFO, WARNING, Finding
from stageflow_actors.runtime.system.data_dir import ClusterRecord, DataDir, DataDirUnusable
from stageflow_actors.runtime.system.socket_dir import live_runtime_dir, runtime_path

__all__ = ["check_environment"]

MIN_FREE_BYTES = 256 << 20
"""Free space below which the doctor warns: the journal preallocates a segment of 64 MiB, and the history grows."""


def check_environment(data: DataDir) -> Iterator[Finding]:
    """Yield the findings in the environment of a data directory."""
    record = data.read_cluster()
    live = record is not None and data.is_live(record)
    if record is None and data.cluster.exists():
        what = "it cannot be decoded, so the program that runs on this directory is unknown"
        yield Finding(WARNING, "lock", str(data.cluster), what, f"rm {data.cluster}, if no cluster runs")
    yield from _check_lock(data, record, live)
    for path in (data.path, data.journal):
        yield from _check_access(path)
    for file in (data.history, data.lock, *data.journal.glob("*.journal")):
        yield from _check_access(file)
    try:
        sockets = _socket_dir(data, record)
    except DataDirUnusable as error:
        yield Finding(ERROR, "sockets", str(error.path), str(error), "set XDG_RUNTIME_DIR to a private directory")
    else:
        yield from _check_sockets(sockets, live)
    yield from _check_free_space(data.path)
    yield from _check_repair_copies(data.journal)


def _check_lock(data: DataDir, record: ClusterRecord | None, live: bool) -> Iterator[Finding]:
    where = str(data.lock)
    holders = data.holders() if data.lock.exists() else []
    if record is not None and record.is_elsewhere():
        if live:
            what = f"a cluster of another container (host name {record.host!r}) uses it: its processes are not checked"
            yield Finding(INFO, "lock", where, what)
        return
    if record is not None and live:
        own = {record.program, record.node}
        if not own.intersection(holders) and _can_read_descriptors(record.node or record.program):
            what = (
                f"the program with pid {record.program} runs on this directory without its lock: the lock file was "
                "removed or replaced, and a second cluster could start on the same journal"
            )
            yield Finding(ERROR, "lock", where, what, "restart that program")
        return
    if holders:
        pids = " ".join(map(str, holders))
        if record is None:
            what = f"processes {pids} have it open, and no cluster is recorded: a command runs, or a cluster starts"
            yield Finding(INFO, "lock", where, what)
        else:
            what = f"the program {record.program} has ended, but processes {pids} of its cluster still hold the lock"
            yield Finding(WARNING, "lock", where, what, f"kill {pids}")
    elif record is not None:
        what = f"the program {record.program} was killed; the next start removes what its cluster left"
        yield Finding(INFO, "lock", str(data.cluster), what)


def _can_read_descriptors(pid: int) -> bool:
    return os.access(f"/proc/{pid}/fd", os.R_OK)


def _check_access(path: Path) -> Iterator[Finding]:
    try:
        found = path.stat()
    except OSError:
        return
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        what = f"other users can write to it (mode {stat.S_IMODE(found.st_mode):o}): its content cannot be trusted"
        yield Finding(WARNING, "access", str(path), what, f"chmod go-w {path}")
    if found.st_uid != os.geteuid() and os.geteuid() != 0:
        what = f"it belongs to the user with id {found.st_uid}: only a cluster of that user can run on it"
        yield Finding(WARNING, "access", str(path), what, "run stageflow as that user")


def _socket_dir(data: DataDir, record: ClusterRecord | None) -> Path:
    """Return the socket directory of this or the next cluster. Raises `DataDirUnusable` if no place fits."""
    if record is not None and record.address is not None:
        return live_runtime_dir(record.address)
    return runtime_path(data.path)


def _check_sockets(path: Path, live: bool) -> Iterator[Finding]:
    try:
        found = path.lstat()
    except FileNotFoundError:
        if live:
            what = "the socket directory of the running cluster is missing: no other process can reach its broker"
            yield Finding(ERROR, "sockets", str(path), what, "restart the cluster")
        return
    advice = "stop the cluster" if live else f"rm -r {path}"
    if not stat.S_ISDIR(found.st_mode):
        yield Finding(ERROR, "sockets", str(path), "it is not a directory", advice)
    elif found.st_uid != os.geteuid() and os.geteuid() != 0:
        what = f"it belongs to the user with id {found.st_uid}, who could read messages and impersonate the broker"
        yield Finding(ERROR, "sockets", str(path), what, advice)
    elif found.st_mode & 0o077:
        what = f"other users have access to the broker's sockets (mode {stat.S_IMODE(found.st_mode):o}, must be 700)"
        yield Finding(ERROR, "sockets", str(path), what, f"chmod 700 {path}")
    elif not live:
        yield Finding(INFO, "sockets", str(path), "a killed cluster left it; the next one reuses it")


def _check_free_space(path: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(path).free
    if free < MIN_FREE_BYTES:
        what = (
            f"{free / 1e6:,.0f} MB are free on its disk: the broker will soon refuse new instances; running ones "
            "continue, but cannot be written to the history"
        )
        advice = "free space on that disk: `stageflow history prune --older-than 90d`, then `stageflow history vacuum`"
        yield Finding(WARNING, "room", str(path), what, advice)


def _check_repair_copies(journal: Path) -> Iterator[Finding]:
    for path in sorted(journal.glob("*.broken")):
        what = "a copy of the bytes after the last complete batch, which a crash or a truncated file left"
        yield Finding(INFO, "copies", str(path), what, f"rm {path}, when it is no longer needed")
    for path in sorted(journal.glob("repair*")):
        what = "a copy of the data that `stageflow journal repair` discarded"
        yield Finding(INFO, "copies", str(path), what, f"rm -r {path}, when it is no longer needed")
