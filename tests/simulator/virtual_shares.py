"""The book of what waits in a simulated cluster: priority, pause and idle workers act on what workers have taken.

It reads the broker's state after each round, and is told when messages begin. After an accident nothing is demanded for
a while: what was said may have been lost.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice

from virtual_world import World

from stageflow_brokers.core.machine import Machine
from stageflow_brokers.core.queue import Queue

DISTURBED_SECONDS = 1.5
"""How long an accident may last: a stopped process is stopped for at most a second."""
PRIORITY_SECONDS = 0.1
"""Until then the messages of a lower priority have been recalled from all workers."""
SHARE_SECONDS = 0.1
"""Until then what waits with a busy worker has gone to an idle one: 25 ms, twice, and the way."""


class Shares:
    """All queues of a run. `seen` counts how often a law has applied."""

    def __init__(self, world: World, crimes: list[str]) -> None:
        self.paused: dict[str, int] = {}
        self.seen: Counter[str] = Counter()
        self._world = world
        self._crimes = crimes
        self._calm_from = world.now + DISTURBED_SECONDS
        self._first: dict[str, tuple[int, int, float]] = {}
        self._idle: dict[str, tuple[int, float]] = {}

    def disturb(self) -> None:
        """An accident has happened."""
        self._calm_from = self._world.now + DISTURBED_SECONDS
        self._first.clear()
        self._idle.clear()

    def after_round(self, machine: Machine) -> None:
        """Note the first ready message of each queue, and what waits while a worker is idle."""
        for queue in machine.state.queues.values():
            if queue.paused or queue.awaited_peers or not machine.leases.workers_known:
                self._first.pop(queue.name, None)
                self._idle.pop(queue.name, None)
                continue
            self._note_first(queue)
            self._note_idle(queue)

    def _note_first(self, queue: Queue) -> None:
        ready = next(queue.iterate_ready(), None) if queue.has_priorities else None
        if ready is None:
            self._first.pop(queue.name, None)
        elif self._first.get(queue.name, (0,))[0] != ready.id:
            self._first[queue.name] = (ready.id, ready.priority, self._world.now)

    def _note_idle(self, queue: Queue) -> None:
        waiting = None
        if any(consumer.is_idle for consumer in queue.consumers):
            for consumer in queue.consumers:
                waiting = waiting or next(islice(consumer.held.values(), consumer.concurrency, None), None)
        if waiting is None:
            self._idle.pop(queue.name, None)
            return
        id, since = self._idle.get(queue.name, (0, 0.0))
        if id != waiting.id:
            self._idle[queue.name] = (waiting.id, self._world.now)
            self.seen["waits beside an idle worker"] += 1
        elif since >= self._calm_from and self._world.now - since > SHARE_SECONDS:
            told = f"message {id} has waited in {queue.name} for {self._world.now - since:.3f} s, and a worker is idle"
            self._crimes.append(told)

    def begins(self, queue: str, message_id: int, priority: int) -> None:
        """A message begins: none of a higher priority has waited long enough to be known to this worker."""
        id, first, since = self._first.get(queue, (0, priority, 0.0))
        if first > priority:
            self.seen["a higher priority waits"] += 1
            if since >= self._calm_from and self._world.now - since > PRIORITY_SECONDS:
                told = f"message {message_id} of priority {priority} begins in {queue}, before {id} of {first}"
                self._crimes.append(told)

    def handles(self, queue: str, message_id: int) -> None:
        """User code begins: not after a pause was answered."""
        if queue in self.paused:
            self._crimes.append(f"{queue} is paused, and message {message_id} begins")
