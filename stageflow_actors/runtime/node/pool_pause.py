"""`PoolPause`: the pause of a pool's own queue, from too many deaths of its workers until a person resumes it.

A pool's pause does not outlive a restart of the cluster; a person's does.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from stageflow_actors.runtime.messaging.pauses import PAUSE_REASON_FACT, PAUSED_BY_POOL_FACT
from stageflow_brokers.api import Broker

__all__ = ["PoolPause"]

CHECK_INTERVAL_SECONDS = 1.0
"""Time between checks whether a person has resumed the queue."""


class PoolPause:
    """The pause of a pool's own: begun when its workers die too fast, over when a person resumes the queue.

    `notify` is given sentences for people. All but `lift_earlier` is for one thread; `now` is monotonic, in seconds.
    """

    def __init__(self, broker: Broker, queue: str, notify: Callable[[str], None]) -> None:
        self._broker = broker
        self._queue = queue
        self._notify = notify
        self._checked_at: float | None = None

    @property
    def is_active(self) -> bool:
        """Whether the pool starts nothing because of it."""
        return self._checked_at is not None

    def begin(self, why: str, now: float) -> None:
        """Once: who dies of what it had begun before, or of a moment that a person has given it, changes nothing."""
        if self.is_active:
            return
        broker, queue = self._broker, self._queue
        self._checked_at = now

        def seen(stats: Future[Any]) -> None:
            if stats.exception() is None and _state_in(stats.result(), queue) == "paused":
                broker.admin.set_fact(PAUSED_BY_POOL_FACT + queue, "no")  # by a person, who shall end it too

        before = broker.admin.stats(queue)
        broker.admin.pause(queue)
        broker.admin.set_fact(PAUSED_BY_POOL_FACT + queue, "yes")
        broker.admin.set_fact(PAUSE_REASON_FACT + queue, why)
        before.add_done_callback(seen)
        self._notify(
            f"pool {queue} is paused: {why}; see what they said above, if they said anything, then resume it with "
            f"`stageflow queue resume {queue}` or runtime.resume({queue!r})"
        )

    def check_resumed(self, now: float, resumed: Callable[[], None]) -> None:
        """Now and then, whether the queue is open again: then `resumed` is called, on the broker's thread."""
        if self._checked_at is None or now - self._checked_at <= CHECK_INTERVAL_SECONDS:
            return
        self._checked_at = now

        def heard(stats: Future[Any]) -> None:
            if stats.exception() is None and _state_in(stats.result(), self._queue) not in (None, "paused"):
                resumed()

        self._broker.admin.stats(self._queue).add_done_callback(heard)

    def end(self) -> bool:
        """The queue has been resumed. False: the pool knew that already."""
        if not self.is_active:
            return False
        self._checked_at = None
        self._broker.admin.set_fact(PAUSED_BY_POOL_FACT + self._queue, "no")
        return True

    def lift_earlier(self) -> None:
        """That of an earlier pool of this queue ends with the node it was made in: what ailed may be mended."""
        broker, queue = self._broker, self._queue

        def heard(known: Future[Any]) -> None:
            if known.exception() is None and known.result() == "yes":
                broker.admin.resume(queue)
                broker.admin.set_fact(PAUSED_BY_POOL_FACT + queue, "no")

        broker.admin.get_fact(PAUSED_BY_POOL_FACT + queue).add_done_callback(heard)


def _state_in(stats: dict[str, Any], queue: str) -> str | None:
    """The state of one queue in a broker's statistics."""
    return next((found["state"] for found in stats["queues"] if found["name"] == queue), None)
