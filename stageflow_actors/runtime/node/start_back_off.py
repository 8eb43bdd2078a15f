"""`StartBackOff`: when a pool whose workers cannot start tries again: after 0.1 s, doubling to 30 s, without end.

This module must never read a clock: `now` is monotonic, in seconds.
"""

from __future__ import annotations

__all__ = ["FIRST_DELAY_SECONDS", "LIVED_SECONDS", "MAX_DELAY_SECONDS", "StartBackOff"]

FIRST_DELAY_SECONDS = 0.1
MAX_DELAY_SECONDS = 30.0
LIVED_SECONDS = 60.0
"""The life of a worker after which the next failed start counts as the first one."""


class StartBackOff:
    """The back-off of one pool, however many workers it has.

    - `failures`: tries in a row that have failed
    - `failed_at`: the time of the last failure
    - `not_before`: the time of the next try; 0 if a worker may start at once
    """

    def __init__(self) -> None:
        self.failures = 0
        self.not_before = 0.0
        self.failed_at = 0.0

    def record_failure(self, started_at: float, now: float) -> None:
        """Delay the next start. Workers that were started before the last failure belong to the same try."""
        if self.failures and started_at < self.failed_at:
            return
        self.failures += 1
        self.failed_at = now
        self.not_before = now + min(MAX_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** min(self.failures - 1, 20))

    def record_life(self, started_at: float, settled: bool, now: float) -> None:
        """Forget the failures if a worker that was started after the last one has settled a message, or lived long.

        An older worker proves nothing: it was started before the cause.
        """
        if self.failures and started_at >= self.failed_at and (settled or now - started_at >= LIVED_SECONDS):
            self.reset()

    def start_now(self) -> None:
        """Allow a start at once, because a message and not the start has ended a worker; the next failure counts on."""
        self.not_before = 0.0

    def reset(self) -> None:
        """Forget the failures."""
        self.failures = 0
        self.not_before = 0.0
