"""Queues whose workers cannot start for a while, and how a pool has to behave then.

A pool tries again later each time, never pauses its queue, and the broker knows that it fails. The book is kept beside
the pools, which are never asked.
"""

from __future__ import annotations

from virtual_world import World

from stageflow_actors.runtime.node.start_back_off import FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS

UNLOADABLE = 78
"""How a worker exits that cannot start."""
EARLY = 1e-6


class _Tries:
    """The failed tries of one pool in a row, while it had no worker."""

    def __init__(self) -> None:
        self.rounds = 0
        self.failed_at: float | None = None


class Starts:
    """All starts of a run. What contradicts the back-off is a crime."""

    def __init__(self, world: World, crimes: list[str]) -> None:
        self.failures = 0
        self._world = world
        self._crimes = crimes
        self._cursed: dict[str, float] = {}
        self._tries: dict[str, _Tries] = {}

    def curse(self, queue: str, seconds: float) -> None:
        """No worker of the queue can start for that long."""
        self._cursed[queue] = self._world.now + seconds

    def fails(self, queue: str) -> bool:
        """Return True if a worker of the queue that is born now cannot start."""
        return self._world.now < self._cursed.get(queue, 0.0)

    def requested(self, queue: str, others: int) -> None:
        """A pool asks for a worker, beside `others`."""
        tries = self._tries.get(queue)
        if tries is None or tries.failed_at is None or others:
            return
        delay = min(MAX_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** (tries.rounds - 1))
        gap = self._world.now - tries.failed_at
        if gap < delay - EARLY:
            self._crimes.append(
                f"{queue} is tried again after {gap:.3f} s, in round {tries.rounds}: {delay:g} s are due"
            )
        tries.failed_at = None

    def failed(self, queue: str) -> None:
        """The node hears that a worker could not start."""
        self.failures += 1
        tries = self._tries.setdefault(queue, _Tries())
        if tries.failed_at is None:
            tries.rounds += 1
            tries.failed_at = self._world.now

    def started(self, queue: str) -> None:
        """A worker has started."""
        self._tries.pop(queue, None)

    def forget(self) -> None:
        """The node is gone, and all that it knew."""
        self._tries.clear()

    def check(self, queue: str, knows: bool) -> None:
        """The broker has heard all that the node has said: check what it `knows` of a pool without a worker."""
        if queue in self._tries and not knows:
            self._crimes.append(f"the broker does not know that {queue} is failing")


__all__ = ["UNLOADABLE", "Starts"]
