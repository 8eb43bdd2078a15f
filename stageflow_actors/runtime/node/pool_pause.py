"""`PoolPause`: the pause that a pool sets on its own queue when its workers die too fast.

It lasts until a person resumes the queue, or until the cluster restarts. A pause that a person has set outlives a
restart: this module must never lift one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from stageflow_actors.runtime.messaging.pauses import PAUSE_REASON_FACT, PAUSED_BY_POOL_FACT
from stageflow_brokers.api import Broker

__all__ = ["PoolPause"]

CHECK_INTERVAL_SECONDS = 1.0
"""Seconds between checks whether a person has resumed the queue."""


class PoolPause:
    """The pause of one pool: begins when its workers die too fast, ends when a person resumes the queue.

    `notify` receives notices for the user. All methods except `lift_earlier` are called by one thread; `now` is
    monotonic, in seconds.
    """

    def __init__(self, broker: Broker, queue: str, notify: Callable[[str], None]) -> None:
        self._broker = broker
        self._queue = queue
        self._notify = notify
        self._checked_at: float | None = None

    @property
    def is_active(self) -> bool:
        """True while the pool starts no workers because of the pause."""
        return self._checked_at is not None

    def begin(self, why: str, now: float) -> None:
        """Pause the queue for the reason `why`; without effect during a pause.

        A worker that was started before the pause can die during it.
        """
        if self.is_active:
            return
        broker, queue = self._broker, self._queue
        self._checked_at = now

        def keep_earlier(stats: Future[Any]) -> None:
            if stats.exception() is None and _state_in(stats.result(), queue) == "paused":
                # A person had paused the queue already: only a person may resume it.
                broker.admin.set_fact(PAUSED_BY_POOL_FACT + queue, "no")

        before = broker.admin.stats(queue)
        broker.admin.pause(queue)
        broker.admin.set_fact(PAUSED_BY_POOL_FACT + queue, "yes")
        broker.admin.set_fact(PAUSE_REASON_FACT + queue, why)
        before.add_done_callback(keep_earlier)
        self._notify(
            f"pool {queue} is paused: {why}; fix the cause (see the workers' output on stderr above), then resume it "
            f"with `stageflow queue resume {queue}` or runtime.resume({queue!r})"
        )

    def check_resumed(self, now: float, resumed: Callable[[], None]) -> None:
        """Check from time to time if the queue is open again; if so, call `resumed` on the broker's thread."""
        if self._checked_at is None or now - self._checked_at <= CHECK_INTERVAL_SECONDS:
            return
        self._checked_at = now

        def on_stats(stats: Future[Any]) -> None:
            if stats.exception() is None and _state_in(stats.result(), self._queue) not in (None, "paused"):
                resumed()

        self._broker.admin.stats(self._queue).add_done_callback(on_stats)

    def end(self) -> bool:
        """End the pause: the queue has been resumed. Return False if it had ended before."""
        if not self.is_active:
            return False
        self._checked_at = None
        self._broker.admin.set_fact(PAUSED_BY_POOL_FACT + self._queue, "no")
        return True

    def lift_earlier(self) -> None:
        """Lift the pause that a pool of this queue has set under an earlier node: the cause may have been fixed."""
        broker, queue = self._broker, self._queue

        def on_fact(fact: Future[Any]) -> None:
            if fact.exception() is None and fact.result() == "yes":
                broker.admin.resume(queue)
                broker.admin.set_fact(PAUSED_BY_POOL_FACT + queue, "no")

        broker.admin.get_fact(PAUSED_BY_POOL_FACT + queue).add_done_callback(on_fact)


def _state_in(stats: dict[str, Any], queue: str) -> str | None:
    """Return the state of one queue in the broker's statistics, or None."""
    return next((each["state"] for each in stats["queues"] if each["name"] == queue), None)
