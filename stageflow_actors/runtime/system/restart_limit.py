"""`Intensity`: how often something may be started again before it counts as broken."""

from __future__ import annotations

import time
from collections.abc import Callable

from stageflow_actors.errors import BrokerUnavailable

__all__ = ["MOST", "PERIOD", "Intensity"]

MOST = 20
"""Restarts within `PERIOD` seconds: far more than accidents make, far fewer than a loop of crashes does."""
PERIOD = 60.0


class Intensity:
    """Counts the restarts of one thing. `what` names it in the error."""

    def __init__(
        self, what: str, *, most: int = MOST, period: float = PERIOD, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what = what
        self._most = most
        self._period = period
        self._clock = clock
        self._times: list[float] = []

    def one_more(self) -> None:
        """It has ended and is to be started again. Raises `BrokerUnavailable` if that has happened too often."""
        now = self._clock()
        self._times = [at for at in self._times if now - at < self._period] + [now]
        if len(self._times) > self._most:
            raise BrokerUnavailable(
                f"the {self._what} ended {len(self._times)} times within {self._period:g} s and is not started again; "
                "what it said is on stderr above"
            )
