"""Processes: kill them, wait for their exit, describe it. Linux only.

A pidfd identifies a process, never its number alone, because the kernel assigns numbers again. This module does not
know what workers do, and must never kill a process other than those that the caller passes and what these started.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from collections.abc import Container, Iterable, Iterator
from typing import NoReturn, TextIO

__all__ = [
    "adopt_orphans",
    "child_pids",
    "descendants",
    "describe_exit",
    "exit_now",
    "has_exited",
    "is_stopped",
    "kill_group",
    "kill_groups",
    "kill_other_sessions",
    "name_process",
    "occupy_standard_descriptors",
    "parent_death_fd",
    "raise_oom_score",
    "reap_adopted",
    "resume_process",
    "session_members",
    "set_pdeathsig",
    "start_ticks",
    "wait_dead",
]

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36

MAX_KILL_ROUNDS = 100
"""Scans of the process table per kill. The limit keeps a process that forks without end from blocking the caller."""

OOM_SCORE_INCREASE = 300
"""Added to a worker's `oom_score_adj`, in thousandths of the machine's memory: the kernel's OOM killer then chooses a
worker before a broker that holds a million messages."""

_SIGNAL_WORDS = {
    signal.SIGSEGV: "segmentation fault",
    signal.SIGBUS: "bus error",
    signal.SIGABRT: "abort",
    signal.SIGFPE: "arithmetic error",
    signal.SIGILL: "illegal instruction",
    signal.SIGKILL: "out of memory, or killed by a person",
    signal.SIGTERM: "termination request",
    signal.SIGXCPU: "CPU time limit reached",
}


def describe_exit(status: int, *, out_of_memory: bool | None = None) -> str:
    """Return a description of how a process ended.

    `status` is as in `subprocess`: an exit code, or minus the number of a signal. `out_of_memory` is True if the
    kernel's OOM killer ran at about that time, None if that is unknown.
    """
    if status >= 0:
        return f"exit code {status}"
    try:
        which = signal.Signals(-status)
    except ValueError:
        return f"killed by signal {-status}"  # a real-time signal
    words = _SIGNAL_WORDS.get(which)
    if which == signal.SIGKILL and out_of_memory is not None:
        words = "by the kernel's OOM killer: out of memory" if out_of_memory else "not by the kernel's OOM killer"
    return f"killed by {which.name} ({words})" if words else f"killed by {which.name}"


def exit_now(code: int, words: str = "", stream: TextIO | None = None) -> NoReturn:
    """Exit this process at once, with `words` on stderr.

    Works with closed streams and with running threads.
    """
    try:
        stream = stream or sys.stderr
        stream.write(words)
        stream.flush()
    except (OSError, ValueError, AttributeError):
        pass  # a handler closed or removed the stream
    os._exit(code)


def occupy_standard_descriptors() -> None:
    """Open /dev/null for each of the descriptors 0 to 2 that is closed.

    A file that gets one of these numbers would be a standard stream of each child process.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one


def has_exited(pidfd: int) -> bool:
    """Return True if the process has ended, reaped or not."""
    return wait_dead(pidfd, 0)


def wait_dead(pidfd: int, timeout: float | None) -> bool:
    """Wait for the process; return True if it has ended.

    Waits at most `timeout` seconds; None is no limit.
    """
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(None if timeout is None else max(0.0, timeout) * 1000))


def is_stopped(pid: int) -> bool:
    """Return True if the process is stopped (SIGSTOP, a debugger).

    It does nothing until it receives SIGCONT.
    """
    return _read_stat(str(pid))[:1] in ([b"T"], [b"t"])


def resume_process(pid: int) -> None:
    """Send SIGCONT to the process if it is stopped."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return  # it has just ended
    try:
        if is_stopped(pid):
            _send(pidfd, signal.SIGCONT)
    finally:
        os.close(pidfd)


def kill_group(pid: int, pidfd: int) -> None:
    """Send SIGKILL to the process, its group, the session that it leads, and all its descendants.

    A descendant that has left the session is found only while all processes between it and `pid` live: a daemon
    survives. Returns at once; `wait_dead` waits for the end of the process itself. If the process has been reaped and
    its number belongs to another process, that process is not killed.
    """
    kill_groups([(pid, pidfd)])


def kill_groups(processes: Iterable[tuple[int, int]]) -> None:
    """Do `kill_group` for several `(pid, pidfd)`, with one scan of the process table for all of them."""
    sessions: set[int] = set()
    for pid, pidfd in processes:
        if not _is_unreaped(pidfd):
            # The leader has been reaped. Its number stays reserved while members of its session remain; if the number
            # is in use, it belongs to an unrelated process.
            if not os.path.exists(f"/proc/{pid}"):
                sessions.add(pid)
            continue
        try:
            if os.getsid(pid) == pid:
                sessions.add(pid)
                sessions.update(_sessions_of(descendants(pid)))
                os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # it has just ended, or we have no permission for any process of its group
        _send(pidfd, signal.SIGKILL)
    if sessions:
        _kill_sessions(sessions)


def kill_other_sessions() -> None:
    """Kill the descendants of this process that are not in its session, with their sessions.

    After the end of this process, nothing would connect them with it.
    """
    own = os.getsid(0)
    others = set(_sessions_of(descendants(os.getpid()))) - {own}
    if others:
        _kill_sessions(others)


def _kill_sessions(sessions: set[int]) -> None:
    """Kill all process groups of these sessions.

    Repeats while new processes appear, because the processes may fork.

    A whole group is killed as soon as one member of it is found: processes that fork continuously would otherwise be
    more at each scan. The kernel does not assign the number of a group again within that moment.
    """
    killed: set[int] = set()
    for _ in range(MAX_KILL_ROUNDS):
        seen: set[int] = set()
        for pid, group in _live_members(sessions):
            seen.add(pid)
            try:
                os.killpg(group, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass  # it has just ended, or we have no permission
        if seen <= killed:
            return
        killed |= seen


def _sessions_of(pids: Iterable[int]) -> Iterator[int]:
    """Yield the session of each of these processes.

    It is the session of the worker, or one that a process created itself.
    """
    for pid in pids:
        try:
            yield os.getsid(pid)
        except ProcessLookupError:
            continue


def _is_unreaped(pidfd: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, 0)  # signal 0 only checks
    except ProcessLookupError:
        return False
    return True


def _send(pidfd: int, which: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(pidfd, which)
    except ProcessLookupError:
        pass


def session_members(sessions: set[int]) -> list[int]:
    """Return the live processes of these sessions."""
    return [pid for pid, _ in _live_members(sessions)]


def _live_members(sessions: set[int]) -> Iterator[tuple[int, int]]:
    """Yield (process, its group) for each live process of these sessions, during the scan."""
    for name in os.listdir("/proc"):
        fields = _read_stat(name) if name.isdecimal() else []
        # A zombie has ended already.
        if fields and int(fields[3]) in sessions and fields[0] not in (b"Z", b"X"):
            yield int(name), int(fields[2])


def descendants(pid: int) -> list[int]:
    """Return the descendants of `pid`; empty if the kernel does not list children."""
    found: list[int] = []
    parents = [pid]
    while parents:
        parent = parents.pop()
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{task}/children") as file:
                    children = list(map(int, file.read().split()))
                found += children
                parents += children
        except OSError:
            continue  # it has just ended
    return found


def adopt_orphans() -> None:
    """Make this process the parent of each descendant whose own parent ends, in place of process 1.

    Process 1 of a container may be a program that does not expect them: they would stay zombies. This process has to
    reap them.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def child_pids() -> list[int]:
    """Return the children of this process, also those that have ended and are not reaped."""
    found: list[int] = []
    try:
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/children") as file:
                found += map(int, file.read().split())
    except OSError:
        pass  # the thread has just ended, or the kernel does not list children
    return found


def reap_adopted(names: Container[str] = ()) -> bool:
    """Reap the children that have ended and were not started by this process; return True if one of `names` runs.

    A child that this process has started is in its session, or leads one. So one in the session of another process was
    adopted, and so was one whose name is in `names`, which no program of this process has.
    """
    own, remaining = os.getsid(0), False
    for pid in child_pids():
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                content = file.read()
        except OSError:
            continue
        start, end = content.index(b"("), content.rindex(b")")
        fields = content[end + 2 :].split()
        name, session = content[start + 1 : end].decode(errors="replace"), int(fields[3])
        if name not in names and session in (own, pid):
            continue
        if fields[0] != b"Z":
            remaining = remaining or name in names
            continue
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            pass  # the program reaps all its children, or ignores SIGCHLD
    return remaining


def start_ticks(pid: int) -> int | None:
    """Return when `pid` started, in clock ticks since boot; None if it ended.

    Pid and ticks together identify a process.
    """
    fields = _read_stat(str(pid))
    return int(fields[19]) if fields and fields[0] not in (b"Z", b"X") else None


def _read_stat(pid: str) -> list[bytes]:
    """Return the fields of /proc/pid/stat from the state on; empty if the process does not exist."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            content = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return content[content.rindex(b")") + 2 :].split()  # the name before it may contain any character


def parent_death_fd(expected: int | None = None) -> int:
    """Return a pidfd that becomes readable when this process's parent ends.

    `expected` is the pid of the parent, if known. Raises `ProcessLookupError` if that parent has already ended, and
    this process has another parent.
    """
    parent = os.getppid() if expected is None else expected
    pidfd = os.pidfd_open(parent)
    if os.getppid() != parent:
        os.close(pidfd)
        raise ProcessLookupError(f"the parent process {parent} has ended")
    return pidfd


def set_pdeathsig(which: int = signal.SIGKILL) -> None:
    """Make the kernel send `which` to this process when the *thread* that created it ends.

    The parent may end before this call: compare `os.getppid()` afterwards. Child processes do not inherit the setting.
    """
    _prctl(_PR_SET_PDEATHSIG, int(which))


def raise_oom_score() -> None:
    """Make the kernel's OOM killer choose this process before others.

    Among processes of the same size; child processes inherit the score.
    """
    try:
        with open("/proc/self/oom_score_adj", "r+") as file:
            adjusted = min(1000, int(file.read()) + OOM_SCORE_INCREASE)
            file.seek(0)
            file.write(str(adjusted))
    except (OSError, ValueError):
        pass  # not permitted here: all processes keep equal scores


def name_process(name: str) -> None:
    """Set the name that `ps -o comm` and `top` show; the kernel keeps 15 bytes."""
    _prctl(_PR_SET_NAME, ctypes.create_string_buffer(name.encode()[:15]))


def _prctl(option: int, argument: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
