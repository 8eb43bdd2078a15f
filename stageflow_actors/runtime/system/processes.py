"""Deaths of processes: to cause them, to wait for them, to be told of them. Linux only.

A process is held by a pidfd, never by its number alone: numbers are used again. This module knows nothing of
workers' work, and never ends a process that it was not handed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import NoReturn, TextIO

__all__ = [
    "descendants",
    "describe_exit",
    "exit_now",
    "has_exited",
    "is_stopped",
    "kill_group",
    "kill_groups",
    "name_process",
    "parent_death_fd",
    "raise_oom_score",
    "resume_process",
    "session_members",
    "set_pdeathsig",
    "start_ticks",
    "wait_dead",
]

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15

MAX_KILL_ROUNDS = 100
"""Looks through the process table for what is to be killed: whoever kills has others to look after."""

OOM_SCORE_INCREASE = 300
"""Thousandths of the machine's memory by which a worker looks larger to the kernel than it is: a broker with a million
messages is still less worth ending."""

_SIGNAL_WORDS = {
    signal.SIGSEGV: "segmentation fault",
    signal.SIGBUS: "bus error",
    signal.SIGABRT: "abort",
    signal.SIGFPE: "arithmetic error",
    signal.SIGILL: "illegal instruction",
    signal.SIGKILL: "out of memory, or killed by hand",
    signal.SIGTERM: "asked to end",
    signal.SIGXCPU: "CPU time limit",
}


def describe_exit(status: int, *, out_of_memory: bool | None = None) -> str:
    """How a process ended, in words. `status` as in `subprocess`: an exit code, or minus the signal's number.

    `out_of_memory`: whether the kernel has killed a process for want of memory at about that time; None if unknown.
    """
    if status >= 0:
        return f"exit code {status}"
    try:
        which = signal.Signals(-status)
    except ValueError:
        return f"killed by signal {-status}"  # a real-time signal
    words = _SIGNAL_WORDS.get(which)
    if which == signal.SIGKILL and out_of_memory is not None:
        words = "out of memory: the kernel chose it" if out_of_memory else "by somebody: no memory was wanting"
    return f"killed by {which.name} ({words})" if words else f"killed by {which.name}"


def exit_now(code: int, words: str = "", stream: TextIO | None = None) -> NoReturn:
    """End this process, with `words` on stderr: whatever has become of its streams, and whatever threads are left."""
    try:
        stream = stream or sys.stderr
        stream.write(words)
        stream.flush()
    except (OSError, ValueError, AttributeError):
        pass  # closed, or taken away, by a handler
    os._exit(code)


def has_exited(pidfd: int) -> bool:
    """Whether the process has ended, be it reaped or not."""
    return wait_dead(pidfd, 0)


def wait_dead(pidfd: int, timeout: float | None) -> bool:
    """Waits until the process has ended, at most `timeout` seconds (None: for ever); whether it has."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(None if timeout is None else max(0.0, timeout) * 1000))


def is_stopped(pid: int) -> bool:
    """Whether somebody has stopped the process (SIGSTOP, a debugger): it does nothing until it is let go on."""
    return _stat(str(pid))[:1] in ([b"T"], [b"t"])


def resume_process(pid: int) -> None:
    """Undoes SIGSTOP; nothing happens to a process that is not stopped."""
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
    """SIGKILLs the process, its process group, everything else in the session that it leads, and what it has started.

    A process that has left the session is found only while all between it and the worker live: a daemon outlives.
    Returns at once; `wait_dead` tells when the process itself is gone. Nothing happens to strangers that were given
    the same number after the process had ended and been reaped.
    """
    kill_groups([(pid, pidfd)])


def kill_groups(processes: Iterable[tuple[int, int]]) -> None:
    """`kill_group` for several `(pid, pidfd)`, looking through the process table once."""
    sessions: set[int] = set()
    for pid, pidfd in processes:
        if not _is_unreaped(pidfd):
            # The leader is gone for good. Its number is taken only while members of its session remain, unless a
            # stranger carries it by now.
            if not os.path.exists(f"/proc/{pid}"):
                sessions.add(pid)
            continue
        try:
            if os.getsid(pid) == pid:
                sessions.add(pid)
                sessions.update(_sessions_of(descendants(pid)))
                os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # it has just gone, or its group consists of what we may not touch
        _send(pidfd, signal.SIGKILL)
    if sessions:
        _kill_sessions(sessions)


def _kill_sessions(sessions: set[int]) -> None:
    """What a handler started in process groups of its own; again while there are new ones, because they may fork.

    Each group is killed at one stroke, as soon as a member of it is seen: those that fork all the time would otherwise
    be more with each look. The number of a group is not given to another within that moment.
    """
    killed: set[int] = set()
    for _ in range(MAX_KILL_ROUNDS):
        seen: set[int] = set()
        for pid, group in _living(sessions):
            seen.add(pid)
            try:
                os.killpg(group, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass  # it has just gone, or may not be touched
        if seen <= killed:
            return
        killed |= seen


def _sessions_of(pids: Iterable[int]) -> Iterator[int]:
    """The sessions of what a worker has started: its own, or made since."""
    for pid in pids:
        try:
            yield os.getsid(pid)
        except ProcessLookupError:
            continue


def _is_unreaped(pidfd: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, 0)  # nought is no signal, only a question
    except ProcessLookupError:
        return False
    return True


def _send(pidfd: int, which: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(pidfd, which)
    except ProcessLookupError:
        pass


def session_members(sessions: set[int]) -> list[int]:
    """The living processes of these sessions."""
    return [pid for pid, _ in _living(sessions)]


def _living(sessions: set[int]) -> Iterator[tuple[int, int]]:
    """(process, its group) of each that lives in one of these sessions, as it is found."""
    for name in os.listdir("/proc"):
        fields = _stat(name) if name.isdecimal() else []
        # Zombies are dead already.
        if fields and int(fields[3]) in sessions and fields[0] not in (b"Z", b"X"):
            yield int(name), int(fields[2])


def descendants(pid: int) -> list[int]:
    """The processes that `pid` has started, and theirs; none where the kernel does not say."""
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


def start_ticks(pid: int) -> int | None:
    """When `pid` started, in clock ticks since boot; None if there is none. With the pid it names one process."""
    fields = _stat(str(pid))
    return int(fields[19]) if fields and fields[0] not in (b"Z", b"X") else None


def _stat(pid: str) -> list[bytes]:
    """The fields of /proc/pid/stat from the state on; empty when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            content = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return content[content.rindex(b")") + 2 :].split()  # the name before may hold anything


def parent_death_fd(expected: int | None = None) -> int:
    """A pidfd that turns readable when this process's parent ends.

    `expected` is the parent's pid where it is known. Raises `ProcessLookupError` if that parent has ended already:
    whoever is the parent now is somebody else.
    """
    parent = os.getppid() if expected is None else expected
    pidfd = os.pidfd_open(parent)
    if os.getppid() != parent:
        os.close(pidfd)
        raise ProcessLookupError(f"the parent process {parent} has ended")
    return pidfd


def set_pdeathsig(which: int = signal.SIGKILL) -> None:
    """Has the kernel send `which` to this process when the *thread* that made it ends.

    The parent may be dead before this is called: compare `os.getppid()` afterwards. A child does not inherit it.
    """
    _prctl(_PR_SET_PDEATHSIG, int(which))


def raise_oom_score() -> None:
    """When memory runs out, the kernel shall rather end this process, and what it starts, than others of its size."""
    try:
        with open("/proc/self/oom_score_adj", "r+") as file:
            adjusted = min(1000, int(file.read()) + OOM_SCORE_INCREASE)
            file.seek(0)
            file.write(str(adjusted))
    except (OSError, ValueError):
        pass  # not allowed here: then all are equal


def name_process(name: str) -> None:
    """Sets the name that `ps -o comm` and `top` show; the kernel keeps 15 bytes."""
    _prctl(_PR_SET_NAME, ctypes.create_string_buffer(name.encode()[:15]))


def _prctl(option: int, argument: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
