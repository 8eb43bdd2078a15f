"""The premises of a cluster: its data directory and what surrounds it, as far as they can be looked at from outside.

Who holds the lock, who else could write, where the sockets lie, how much room is left. It takes no lock and changes
nothing, not even for a moment.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from stageflow_actors.core.invariants import ERROR, INFO, WARNING, Finding
from stageflow_actors.runtime.system.data_dir import ClusterRecord, DataDir, DataDirUnusable, runtime_path

__all__ = ["check_environment"]

MIN_FREE_BYTES = 256 << 20
"""Bytes free below which it is time to do something: the journal keeps a segment of 64 MiB in hand, and the history
grows meanwhile."""


def check_environment(data: DataDir) -> Iterator[Finding]:
    """What is to be said of the surroundings of the cluster in `data`."""
    record = data.read_cluster()
    live = record is not None and record.is_program_alive()
    if record is None and data.cluster.exists():
        what = "it cannot be read, so nobody can tell who serves this directory"
        yield Finding(WARNING, "lock", str(data.cluster), what, f"rm {data.cluster}, if nothing runs")
    yield from _of_lock(data, record, live)
    for path in (data.path, data.journal):
        yield from _of_access(path)
    for file in (data.history, data.lock, *data.journal.glob("*.journal")):
        yield from _of_access(file)
    try:
        sockets = _sockets(data, record)
    except DataDirUnusable as error:
        yield Finding(ERROR, "sockets", str(error.path), str(error), "set XDG_RUNTIME_DIR to a private directory")
    else:
        yield from _of_sockets(sockets, live)
    yield from _of_room(data.path)
    yield from _of_copies(data.journal)


def _of_lock(data: DataDir, record: ClusterRecord | None, live: bool) -> Iterator[Finding]:
    where = str(data.lock)
    holders = data.holders() if data.lock.exists() else []
    if record is not None and live:
        own = {record.program, record.node}
        if not own.intersection(holders) and _may_look_into(record.node or record.program):
            what = (
                f"the program with pid {record.program} serves this directory and does not hold its lock: the file "
                "was removed or replaced, and a second cluster could start on the same journal"
            )
            yield Finding(ERROR, "lock", where, what, "stop that program, and start it again")
        return
    if holders:
        pids = " ".join(map(str, holders))
        if record is None:
            what = f"processes {pids} have it open, and nobody is on record: a command at work, or a cluster starting"
            yield Finding(INFO, "lock", where, what)
        else:
            what = f"the program {record.program} has ended, and processes {pids} of its cluster still hold the lock"
            yield Finding(WARNING, "lock", where, what, f"kill {pids}")
    elif record is not None:
        what = f"the program {record.program} was killed; the next start puts its cluster's remains away"
        yield Finding(INFO, "lock", str(data.cluster), what)


def _may_look_into(pid: int) -> bool:
    return os.access(f"/proc/{pid}/fd", os.R_OK)


def _of_access(path: Path) -> Iterator[Finding]:
    try:
        found = path.stat()
    except OSError:
        return
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        what = f"others may write to it (mode {stat.S_IMODE(found.st_mode):o}): what it holds cannot be trusted"
        yield Finding(WARNING, "access", str(path), what, f"chmod go-w {path}")
    if found.st_uid != os.geteuid() and os.geteuid() != 0:
        what = f"it belongs to the user with id {found.st_uid}: the cluster of that user serves it, not yours"
        yield Finding(WARNING, "access", str(path), what)


def _sockets(data: DataDir, record: ClusterRecord | None) -> Path:
    """Where the sockets are, or the next cluster will make them. Raises `DataDirUnusable` if there is no place."""
    if record is not None and record.address is not None:
        return Path(record.address.removeprefix("ipc://")).parent
    return runtime_path(data.path)


def _of_sockets(path: Path, live: bool) -> Iterator[Finding]:
    try:
        found = path.lstat()
    except FileNotFoundError:
        if live:
            what = "the directory of the cluster's sockets is gone: nobody else can reach its broker"
            yield Finding(ERROR, "sockets", str(path), what, "restart the cluster")
        return
    advice = "stop the cluster" if live else f"rm -r {path}"
    if not stat.S_ISDIR(found.st_mode):
        yield Finding(ERROR, "sockets", str(path), "it is not a directory", advice)
    elif found.st_uid != os.geteuid() and os.geteuid() != 0:
        what = f"it belongs to the user with id {found.st_uid}, who could read and answer for the broker"
        yield Finding(ERROR, "sockets", str(path), what, advice)
    elif found.st_mode & 0o077:
        what = f"others have access to the broker's sockets (mode {stat.S_IMODE(found.st_mode):o}, must be 700)"
        yield Finding(ERROR, "sockets", str(path), what, f"chmod 700 {path}")
    elif not live:
        yield Finding(INFO, "sockets", str(path), "a killed cluster has left it; the next one uses it again")


def _of_room(path: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(path).free
    if free < MIN_FREE_BYTES:
        what = (
            f"{free / 1e6:,.0f} MB are free on its disk: new instances will soon be refused, "
            "while those in work go on and the history waits"
        )
        advice = "free space there; `stageflow history prune --older-than 90d`, `stageflow history vacuum`"
        yield Finding(WARNING, "room", str(path), what, advice)


def _of_copies(journal: Path) -> Iterator[Finding]:
    for path in sorted(journal.glob("*.broken")):
        what = "what lay behind the last whole batch: the incomplete one of a crash, or the rest of a file that was cut"
        yield Finding(INFO, "copies", str(path), what, f"rm {path}, once nobody wants to look at it")
    for path in sorted(journal.glob("repair*")):
        what = "what `stageflow journal repair` has given up"
        yield Finding(INFO, "copies", str(path), what, f"rm -r {path}, once nobody wants to look at it")
