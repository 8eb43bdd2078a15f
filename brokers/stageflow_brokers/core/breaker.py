"""A circuit breaker: after so many failed attempts in a row a queue delivers nothing for a while, then one message.

`closed`: messages are delivered, and failures in a row are counted. `open`: none is, until `until`. `half-open`: one,
the probe; how it ends decides. Attempts that began before the breaker opened say nothing any more.

A value without clock or queue, and without a memory beyond the process: after a restart the breaker is closed. A probe
that ends without a verdict (its worker was stopped, its instance cancelled) makes room for the next; that is found out
from the message itself, so that nothing needs to be told here and nothing can be forgotten.
"""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["CLOSED", "HALF_OPEN", "OPEN", "Breaker"]

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"


class Breaker:
    """The breaker of one queue: `failures` in a row open it for `reset` seconds. `probe` is the id of a message."""

    __slots__ = ("failure_count", "max_failures", "open_until", "probe", "reset_seconds", "state")

    def __init__(self, max_failures: int, reset_seconds: float) -> None:
        self.max_failures = max_failures
        self.reset_seconds = reset_seconds
        self.state = CLOSED
        self.failure_count = 0
        self.open_until = 0.0
        self.probe = 0

    @property
    def max_held(self) -> int:
        """How many messages a consumer may hold while closed: what it has begun to fail at is not worth more."""
        return max(1, self.max_failures - self.failure_count)

    def record_failure(self, id: int, now: float) -> bool:
        """An attempt at the message has failed. Whether that has opened the breaker, until `until`."""
        if self.state == CLOSED:
            self.failure_count += 1
            if self.failure_count < self.max_failures:
                return False
        elif self.state == OPEN or id != self.probe:
            return False
        self.state, self.probe, self.open_until = OPEN, 0, now + self.reset_seconds
        return True

    def record_success(self, ids: Collection[int]) -> None:
        """Attempts at these messages have gone well."""
        if self.state == CLOSED:
            self.failure_count = 0
        elif self.state == HALF_OPEN and self.probe in ids:
            self.state, self.failure_count, self.probe = CLOSED, 0, 0

    def check_open(self, now: float) -> bool:
        """Whether nothing is to be delivered now; an open one whose time has come is half-open from here on."""
        if self.state == OPEN and now >= self.open_until:
            self.state = HALF_OPEN
        return self.state == OPEN
