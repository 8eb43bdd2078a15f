"""`StopNotes`: notices of a slow stop.

They name the work or the process that the stop waits for. This module must not decide whether the stop continues.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from stageflow_actors.core.plural import pluralize
from stageflow_actors.runtime.ipc.slots import Slot
from stageflow_actors.runtime.system.processes import is_stopped

__all__ = ["StopNotes", "describe_ends", "describe_unresponsive", "describe_work"]

FIRST_NOTE_SECONDS = 4.0
"""Time from the beginning of a stop to its first note."""
NOTE_INTERVAL_SECONDS = 60.0
"""Time between two notes."""
MAX_QUEUES_NAMED = 5


class StopNotes:
    """The notes of one stop, which begins at construction; `notify` receives each note as text."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify = notify
        self._next_note_at = time.monotonic() + FIRST_NOTE_SECONDS

    def wait_for(self, what: Callable[[], str]) -> None:
        """Send a note if one is due.

        `what` returns a description of the cause, or an empty text if there is none.
        """
        if time.monotonic() < self._next_note_at:
            return
        cause = what()
        if cause:
            self._next_note_at = time.monotonic() + NOTE_INTERVAL_SECONDS
            self._notify(
                f"the stop waits for {cause}; Ctrl-C kills all workers now, and unfinished instances continue at the "
                "next start"
            )


def describe_work(lanes: Mapping[str, Sequence[Slot]], now_ns: int) -> str:
    """Return a description of the messages in work, by queue.

    `now_ns` is `CLOCK_MONOTONIC` in nanoseconds.
    """
    found = []
    for queue, slots in list(lanes.items()):
        since = [state.since_ns for state in (lane.read() for lane in slots) if state.is_busy]
        if since:
            found.append((min(since), f"{queue} ({pluralize(len(since), 'message')}, for {_age(now_ns - min(since))})"))
    parts = [text for _, text in sorted(found)]
    more = f" and {pluralize(len(parts) - MAX_QUEUES_NAMED, 'more queue')}" if len(parts) > MAX_QUEUES_NAMED else ""
    return (
        f"running handlers: {', '.join(parts[:MAX_QUEUES_NAMED])}{more}"
        if parts
        else "messages that workers have not settled yet"
    )


def describe_ends(lanes: Mapping[str, Sequence[Slot]]) -> str:
    """Return a description of the workers that are ending, by queue and by the step of the end that is running."""
    found: dict[str, int] = {}
    for queue, theirs in list(lanes.items()):
        for lane in theirs:
            if lane.ending_since_ns:
                step = f"{queue} ({lane.step})"
                found[step] = found.get(step, 0) + 1
    words = [step if count == 1 else f"{count} of {step}" for step, count in found.items()]
    more = f" and {pluralize(len(words) - MAX_QUEUES_NAMED, 'more')}" if len(words) > MAX_QUEUES_NAMED else ""
    return f"workers that are ending: {', '.join(words[:MAX_QUEUES_NAMED])}{more}" if words else "workers to end"


def describe_unresponsive(what: str, pid: int) -> str:
    """Return a description of a process that does not answer."""
    if is_stopped(pid):
        return f"{what} (process {pid}), which is stopped: `kill -CONT {pid}` resumes it"
    return f"{what} (process {pid}), which does not answer"


def _age(nanoseconds: int) -> str:
    return f"{max(0, nanoseconds) / 1e9:,.0f} s"
