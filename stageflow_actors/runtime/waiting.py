"""`StopNotes`: what a stop waits for, said when it has taken a while, so that nobody takes patience for a hang.

Only words: whether the stop goes on is decided elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from stageflow_actors.core.counted import counted
from stageflow_actors.runtime.processes import is_stopped
from stageflow_actors.runtime.slots import Slot

__all__ = ["StopNotes", "in_work", "silent"]

FIRST = 4.0
"""Seconds of a stop before it says what it waits for."""
AGAIN = 60.0
"""Seconds before it says so once more."""
MOST_QUEUES = 5


class StopNotes:
    """The notes of one stop, which begins now; `say` is given sentences for people."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._next = time.monotonic() + FIRST

    def wait_for(self, what: Callable[[], str]) -> None:
        """The stop goes on waiting, for that: empty where there is nothing to say of it."""
        if time.monotonic() < self._next:
            return
        words = what()
        if words:
            self._next = time.monotonic() + AGAIN
            self._say(
                f"stopping waits for {words}; Ctrl-C ends all at once, and what is unfinished goes on at the next start"
            )


def in_work(lanes: Mapping[str, Sequence[Slot]], now: int) -> str:
    """The messages in work, by queue; `now` is monotonic, in ns."""
    found = []
    for queue, theirs in list(lanes.items()):
        since = [state.since_ns for state in (lane.read() for lane in theirs) if state.busy]
        if since:
            found.append((min(since), f"{queue} ({counted(len(since), 'message')}, for {_age(now - min(since))})"))
    words = [text for _, text in sorted(found)]
    more = f" and {counted(len(words) - MOST_QUEUES, 'more queue')}" if len(words) > MOST_QUEUES else ""
    return f"what is in work: {', '.join(words[:MOST_QUEUES])}{more}" if words else "what workers have not settled yet"


def silent(what: str, pid: int) -> str:
    """A process that does not answer."""
    if is_stopped(pid):
        return f"{what} (process {pid}), which is stopped: `kill -CONT {pid}` lets it go on"
    return f"{what} (process {pid}), which does not answer"


def _age(nanoseconds: int) -> str:
    return f"{max(0, nanoseconds) / 1e9:,.0f} s"
