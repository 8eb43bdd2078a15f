"""The signals that stop a command: SIGTERM, Ctrl-C, and the end of its terminal.

A parent may have blocked or ignored them: the command is stopped by them nevertheless. Only `nohup` counts, which
ignores the end of the terminal.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

__all__ = ["on_stop_signals"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def on_stop_signals(call: Callable[[int, Any], Any], *, on_hangup: Callable[[int, Any], Any] | None = None) -> None:
    """Call `call` for each of these signals; `on_hangup` for the end of the terminal, if given."""
    for number in _SIGNALS:
        hangup = number is signal.SIGHUP
        if not (hangup and signal.getsignal(number) is signal.SIG_IGN):
            signal.signal(number, on_hangup if hangup and on_hangup is not None else call)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
