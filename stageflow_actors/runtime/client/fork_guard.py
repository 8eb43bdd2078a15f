"""Sessions in a forked child of their process (`os.fork`, process pools of multiprocessing): no call may use them.

The child has copies of the descriptors of its parent but none of its threads: a call would wait forever, or write into
the connection of the parent. Each session is closed in the child, without a word to the broker or the node.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["disown_in_children"]


class _Disownable(Protocol):
    def disown(self, parent: int) -> None:
        """Close this session in a forked child of the process `parent`."""


_sessions: weakref.WeakSet[_Disownable] = weakref.WeakSet()
_pid = os.getpid()


def disown_in_children(session: _Disownable) -> None:
    """Call `session.disown` in each process that is forked from this one."""
    _sessions.add(session)


def _disown_all() -> None:
    global _pid
    parent, _pid = _pid, os.getpid()
    for session in list(_sessions):
        session.disown(parent)


os.register_at_fork(after_in_child=_disown_all)
