"""`Prefetch`: how many messages a worker holds, by the time that its messages take.

A worker holds the messages of a short time, so that it never waits for the broker, and no more: what waits in one
worker cannot be taken by another one, and stands before later messages of a higher priority.
"""

from __future__ import annotations

__all__ = ["LONG_SECONDS", "MAX_PREFETCH", "Prefetch"]

MAX_PREFETCH = 2_048
"""The most messages that wait in a worker: for stages that take microseconds."""

WORK_SECONDS = 0.02
"""The time that the waiting messages take."""

LONG_SECONDS = 0.05
"""A worker whose messages take this time holds none that waits: nothing waits longer than this with a busy worker."""

MEMORY = 0.7
"""The weight of earlier messages against those since the last measurement."""

MAX_GROWTH = 4
"""The most times that the prefetch grows at once: few messages are a weak measure."""


class Prefetch:
    """The prefetch of one worker that works on `lanes` messages at once.

    `limit` is the number of messages to hold, in work or waiting; `seconds` is the time that one message takes.
    """

    __slots__ = ("_count", "_lanes", "_last", "_seconds", "limit", "seconds")

    def __init__(self, lanes: int = 1) -> None:
        self._lanes = lanes
        self._seconds = self._count = self._last = 0.0
        self.limit = lanes
        self.seconds = 0.0

    def measure(self, seconds: float, count: int) -> None:
        """Record that `count` messages, at least one, took `seconds` in one lane.

        The mean counts, so that a long message among many short ones is remembered. When the messages become slow, two
        measurements in a row are enough; one alone may be a pause of the process.
        """
        each = seconds / count
        self._seconds = MEMORY * self._seconds + seconds
        self._count = MEMORY * self._count + count
        self.seconds = max(self._seconds / self._count, min(each, self._last))
        self._last = each
        lanes = self._lanes
        if self.seconds >= LONG_SECONDS:
            self.limit = lanes
            return
        fitting = int(WORK_SECONDS * lanes / self.seconds) if self.seconds > 0 else MAX_PREFETCH
        # At least one waits beside those in work, for the time in which the broker handles a settlement.
        self.limit = max(lanes + 1, min(fitting, self.limit * MAX_GROWTH, MAX_PREFETCH))

    def reset(self) -> None:
        """Hold only the messages in work until the next measurement."""
        self.limit = self._lanes

    def surplus(self, waiting: int) -> int:
        """Return how many of the waiting messages would wait too long, and should be released."""
        if waiting * self.seconds <= LONG_SECONDS * self._lanes:
            return 0
        return max(0, waiting - self.limit)
