"""A circuit breaker: it stops the deliveries of a queue after failures.

After several failed attempts in a row the queue delivers nothing for a while, then one message.

States: `closed` (messages are delivered, and failures in a row are counted), `open` (no message is delivered until
`open_until`), `half-open` (one message is delivered, the probe; its result decides the next state). Results of attempts
that began before the breaker opened are ignored.

A breaker is a value. It must not use a clock or the queue, and it is not recorded: after a restart it is closed. A
probe can end without a result (its worker was stopped, its instance was cancelled); then the next message becomes the
probe. The caller looks at the probe's message for this and is not notified, so no notification can be forgotten.
"""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["CLOSED", "HALF_OPEN", "OPEN", "Breaker"]

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half-open"


class Breaker:
    """The circuit breaker of one queue.

    Attributes:
        max_failures: Number of failures in a row that open the breaker.
        reset_seconds: Seconds for which it stays open.
        state: `CLOSED`, `OPEN` or `HALF_OPEN`.
        failure_count: Failures in a row while closed.
        open_until: End of the open state, on the monotonic clock.
        probe: The id of the message that is tried while half-open; 0 for none.
    """

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
        """How many messages one consumer may hold while the breaker is closed.

        After some failures in a row this is fewer: otherwise one failing consumer would hold many messages when the
        breaker opens.
        """
        return max(1, self.max_failures - self.failure_count)

    def record_failure(self, id: int, now: float) -> bool:
        """Record a failed attempt at message `id`.

        Return True if this opened the breaker.
        """
        if self.state == CLOSED:
            self.failure_count += 1
            if self.failure_count < self.max_failures:
                return False
        elif self.state == OPEN or id != self.probe:
            return False
        self.state, self.probe, self.open_until = OPEN, 0, now + self.reset_seconds
        return True

    def record_success(self, ids: Collection[int]) -> None:
        """Record successful attempts at these messages."""
        if self.state == CLOSED:
            self.failure_count = 0
        elif self.state == HALF_OPEN and self.probe in ids:
            self.state, self.failure_count, self.probe = CLOSED, 0, 0

    def advance(self, now: float) -> None:
        """Change from open to half-open if the time of the open state is over."""
        if self.state == OPEN and now >= self.open_until:
            self.state = HALF_OPEN
