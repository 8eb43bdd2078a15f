"""`QueueInfo`: the state and the counts of one queue, as `Client.queues` returns them."""

from __future__ import annotations

from dataclasses import dataclass

from stageflow_brokers.types import BrokerStats

__all__ = ["QueueInfo", "queue_infos"]


@dataclass(frozen=True)
class QueueInfo:
    """The state of one queue, as `Client.queues` returns it.

    Attributes:
        name: The name of the queue, as `stageflow.orders.stage1`.
        ready: Number of messages that wait for a worker.
        leased: Number of messages that workers hold.
        delayed: Number of messages that wait for a retry.
        dead: Number of dead letters in its dead-letter queue.
        oldest: Seconds that the oldest ready message has waited.
        actors: Number of workers that consume the queue.
        busy: Number of those workers that handle a message.
        state: `open`, `paused`, or `closed` until its workers have registered.
        breaker: Empty for a stage without a breaker; else `closed` (normal), `open` (its messages wait) or
            `half-open` (one message is tried).

    Example:
        >>> from stageflow_actors import QueueInfo
        >>> def overloaded(queues: list[QueueInfo]) -> list[str]:
        ...     return [queue.name for queue in queues if queue.oldest > 60]
        >>> queue = QueueInfo("stageflow.orders.stage1", 9, 2, 0, 0, 75.0, 2, 2, "open")
        >>> overloaded([queue])
        ['stageflow.orders.stage1']
    """

    name: str
    ready: int
    leased: int
    delayed: int
    dead: int
    oldest: float
    actors: int
    busy: int
    state: str
    breaker: str = ""


def queue_infos(stats: BrokerStats) -> list[QueueInfo]:
    """Return the queues in a broker's statistics."""
    return [
        QueueInfo(
            queue["name"],
            queue["ready"],
            queue["leased"],
            queue["delayed"],
            queue["dead"],
            queue["oldest"],
            queue["consumers"],
            queue["busy"],
            queue["state"],
            queue["breaker"],
        )
        for queue in stats["queues"]
    ]
