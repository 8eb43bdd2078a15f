"""Recalls: ask consumers to release messages that they hold and have not begun.

A consumer holds more messages than it works on, so that it never waits for the broker. What it has not begun is shared
again when a message of a higher priority waits, when another consumer is idle, when the queue is paused, or when its
breaker opens. The consumer answers with a release: its messages return to the head of their queue, in order, and no
attempt is counted. A recall crosses settlements and deaths without harm, because a release is checked like any other
frame: a message that was settled or began before it arrived is not released.

Nothing is recorded: a recall that is lost with a connection is repeated when it is still needed.
"""

from __future__ import annotations

from itertools import islice

from stageflow_brokers.core.outbox import Outbox
from stageflow_brokers.core.queue import Queue
from stageflow_brokers.core.sessions import Consumer
from stageflow_brokers.core.state import SHARE_TIMER, BrokerState

__all__ = ["MIXED_PREFETCH", "Recalls"]

SHARE_SECONDS = 0.025
"""Seconds for which a message may wait with a busy consumer while another one is idle, before it is recalled."""

MIXED_PREFETCH = 64
"""The most messages of one consumer while messages of different priorities meet in its queue: each message of a higher
priority recalls those that wait."""

MIXED_SECONDS = 1.0
"""Seconds for which `MIXED_PREFETCH` holds after such a meeting."""


class Recalls:
    """The recalls of one machine."""

    def __init__(self, state: BrokerState, outbox: Outbox) -> None:
        self._state = state
        self._outbox = outbox

    def recall(self, consumer: Consumer) -> None:
        """Ask a consumer for the messages that it has not begun, once for each of its deliveries."""
        if _may_release(consumer):
            consumer.recalled_lease = self._state.next_lease
            self._outbox.add_notice(consumer.session, "recall", None)

    def recall_all(self, queue: Queue) -> None:
        """Ask all consumers of a queue that delivers nothing for now.

        Also one that holds a single message: it may not have begun.
        """
        for consumer in queue.consumers:
            if consumer.held or consumer.removed_ids:
                consumer.recalled_lease = self._state.next_lease
                self._outbox.add_notice(consumer.session, "recall", None)

    def select_for_priority(self, queue: Queue, free: list[Consumer], priority: int) -> list[Consumer]:
        """Return the free consumers that begin a message of this priority before any of a lower one.

        The others are asked to release those that they have not begun: the message waits in the broker until the first
        message in work ends, wherever that is.
        """
        behind = [c for c in queue.consumers if len(c.held) > c.concurrency and c.lowest_priority < priority]
        if behind:
            queue.mixed_until = self._state.now + MIXED_SECONDS
            for consumer in behind:
                self.recall(consumer)
        return [c for c in free if len(c.held) < c.concurrency or c.lowest_priority >= priority]

    def limit_mixed(self, queue: Queue, consumer: Consumer) -> int:
        """Return the credit of a consumer, which is small while messages of different priorities meet."""
        if queue.mixed_until <= self._state.now:
            return consumer.credit
        return min(consumer.credit, max(MIXED_PREFETCH, consumer.concurrency) - len(consumer.held))

    def watch_share(self, queue: Queue) -> None:
        """Begin to watch the messages that wait with busy consumers, while another one is idle."""
        if queue.share_lease or not any(len(c.held) > c.concurrency and _may_release(c) for c in queue.consumers):
            return
        queue.share_lease = self._state.next_lease
        self._state.set_timer(self._state.now + SHARE_SECONDS, SHARE_TIMER, "", queue.name)

    def share(self, name: str) -> None:
        """Recall messages that have waited since `watch_share`, if a consumer is idle now."""
        queue = self._state.queues.get(name)
        if queue is None:
            return
        lease, queue.share_lease = queue.share_lease, 0
        if queue.paused or not any(c.is_idle for c in queue.consumers):
            return
        for consumer in queue.consumers:
            waiting = next(islice(consumer.held.values(), consumer.concurrency, None), None)
            if waiting is not None and waiting.lease < lease:
                self.recall(consumer)
        self._state.changed_queues[queue] = None  # others may have begun to wait in between


def _may_release(consumer: Consumer) -> bool:
    """True if something was delivered to the consumer since it was last asked to release."""
    newest = next(reversed(consumer.held.values()), None)
    return newest is not None and newest.lease >= consumer.recalled_lease
