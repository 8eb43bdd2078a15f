"""Signals of a process and its threads: set at its start, never inherited from the program that starts it.

A program may ignore SIGCHLD or block SIGTERM, and each process that it starts would do so too. This module must not
decide what a process does on a signal.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["blocked_signals", "reset_signals"]

_IGNORED_BY_PYTHON = {signal.SIGPIPE, signal.SIGXFSZ}

_OF_THE_THREAD = {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGABRT,
    signal.SIGTRAP,
    signal.SIGSYS,
    signal.SIGPROF,
}
"""Signals that concern the thread that receives them."""


def reset_signals() -> None:
    """Give each signal its default action, except those that Python handles or ignores, and block none.

    Called in the main thread of a process that has just started.
    """
    for number in signal.valid_signals() - _IGNORED_BY_PYTHON:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Start a thread in this block: the signals of the process never interrupt it.

    Otherwise the thread could receive a signal for which the main thread waits, as with `signal.sigwait`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _OF_THE_THREAD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
