"""`shortage`: whether file descriptors and threads are left, before a library needs them.

ZeroMQ aborts the process when it gets none: it has no way to report that. A check before it makes one error of it.
"""

from __future__ import annotations

import _thread
import os
import resource
import time

__all__ = ["lower_descriptor_limit", "raise_descriptor_limit", "shortage"]


MAX_THREAD_END_SECONDS = 0.5
"""Longest wait for the end of the threads of a check."""


def shortage(what: str, *, descriptors: int, threads: int = 0) -> str:
    """Return a sentence if `what` cannot have as many more descriptors and threads; an empty text if it can."""
    free = _free_descriptors(descriptors)
    if free < descriptors:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"{what} needs {descriptors} file descriptors, and {free} are free of the {limit:,} that this process may "
            "have: close files, or raise the limit (`ulimit -n`, or LimitNOFILE= of a systemd unit)"
        )
    if not _can_start_threads(threads):
        return (
            f"{what} needs {threads} threads, and this process can start no more: raise the limit of processes and "
            "threads (`ulimit -u`, TasksMax= of a systemd unit, or the pids limit of a container), or of memory "
            "(`ulimit -v`)"
        )
    return ""


def raise_descriptor_limit(wanted: int) -> int:
    """Raise the soft limit of descriptors to `wanted`, as far as the hard one allows. Return the earlier soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reachable = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < reachable:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (reachable, hard))
        except (OSError, ValueError):
            pass
    return soft


def lower_descriptor_limit(soft: int) -> None:
    """Set the soft limit of descriptors to that of a program, which `raise_descriptor_limit` has returned."""
    present, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 < soft < present or (soft > 0 and present == resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _free_descriptors(wanted: int) -> int:
    """Return how many descriptors are free, `wanted` at most."""
    taken: list[int] = []
    try:
        taken.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        while len(taken) < wanted:
            taken.append(os.dup(taken[0]))
    except OSError:
        pass
    for fd in taken:
        os.close(fd)
    return len(taken)


def _can_start_threads(count: int) -> bool:
    """Return True if as many threads can run at the same time. None of them is left when this returns."""
    before = _count_threads()
    started = _thread.allocate_lock()

    def run() -> None:
        with started:
            pass  # until all of them have started

    possible = True
    with started:
        try:
            for _ in range(count):
                _thread.start_new_thread(run, ())
        except RuntimeError:
            possible = False
    deadline = time.monotonic() + MAX_THREAD_END_SECONDS
    while _count_threads() > before and time.monotonic() < deadline:
        time.sleep(0.0002)
    return possible


def _count_threads() -> int:
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 0
