"""`RestartLimit`: the number of restarts within a period after which a process counts as broken.

The restart intensity of an OTP supervisor, `StartLimitBurst` of systemd.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from stageflow_actors.errors import BrokerUnavailable

__all__ = ["MAX_RESTARTS", "PERIOD_SECONDS", "RestartLimit"]

MAX_RESTARTS = 20
"""Restarts within `PERIOD_SECONDS`: far more than accidents cause, far fewer than a crash loop causes."""
PERIOD_SECONDS = 60.0


class RestartLimit:
    """A counter of the restarts of one process, which `what` names in the error."""

    def __init__(
        self,
        what: str,
        *,
        max_restarts: int = MAX_RESTARTS,
        period_seconds: float = PERIOD_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = what
        self._max_restarts = max_restarts
        self._period_seconds = period_seconds
        self._clock = clock
        self._times: list[float] = []

    def record(self) -> None:
        """Count a restart. Raises `BrokerUnavailable` if there were too many within the period."""
        now = self._clock()
        self._times = [at for at in self._times if now - at < self._period_seconds] + [now]
        if len(self._times) > self._max_restarts:
            raise BrokerUnavailable(
                f"the {self._what} ended {len(self._times)} times within {self._period_seconds:g} s and is not "
                "restarted; its stderr, above, shows the cause: fix it, and start the cluster again"
            )
