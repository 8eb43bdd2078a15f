"""`RestartLimit`: how often something may be started again before it counts as broken."""

from __future__ import annotations

import time
from collections.abc import Callable

from stageflow_actors.errors import BrokerUnavailable

__all__ = ["MAX_RESTARTS", "PERIOD_SECONDS", "RestartLimit"]

MAX_RESTARTS = 20
"""Restarts within `PERIOD_SECONDS` seconds: far more than accidents make, far fewer than a loop of crashes does."""
PERIOD_SECONDS = 60.0


class RestartLimit:
    """Counts the restarts of one thing. `what` names it in the error."""

    def __init__(
        self,
        what: str,
        *,
        most: int = MAX_RESTARTS,
        period: float = PERIOD_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = what
        self._most = most
        self._period = period
        self._clock = clock
        self._times: list[float] = []

    def record(self) -> None:
        """It has ended and is to be started again. Raises `BrokerUnavailable` if that has happened too often."""
        now = self._clock()
        self._times = [at for at in self._times if now - at < self._period] + [now]
        if len(self._times) > self._most:
            raise BrokerUnavailable(
                f"the {self._what} ended {len(self._times)} times within {self._period:g} s and is not started again; "
                "what it said is on stderr above"
            )
