"""`QueueInfo`: the state and the counts of one queue, as `Client.queues` returns them."""

from __future__ import annotations

from dataclasses import dataclass

from stageflow_brokers.types import BrokerStats

__all__ = ["QueueInfo", "queue_infos"]


@dataclass(frozen=True, kw_only=True)
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
        state: `open`; `paused`; `failing` while its workers cannot start, which are tried again without end; or
            `closed` until its workers have registered.
        breaker: Empty for a stage without a breaker; else `closed` (normal), `open` (its messages wait) or
            `half-open` (one message is tried).
        reason: Why its workers cannot start, in one line; empty if they can. A paused queue has it too.
        next_start_at: The time of their next try, in seconds since the Unix epoch; in the past while a try is under
            way, None if none is due.

    Example:
        >>> from stageflow_actors import QueueInfo
        >>> def overloaded(queues: list[QueueInfo]) -> list[str]:
        ...     return [queue.name for queue in queues if queue.oldest > 60]
        >>> queue = QueueInfo(
        ...     name="stageflow.orders.stage1", ready=9, leased=2, delayed=0, dead=0, oldest=75.0,
        ...     actors=2, busy=2, state="open",
        ... )
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
    reason: str = ""
    next_start_at: float | None = None


def queue_infos(stats: BrokerStats) -> list[QueueInfo]:
    """Return the queues in a broker's statistics."""
    return [
        QueueInfo(
            name=queue["name"],
            ready=queue["ready"],
            leased=queue["leased"],
            delayed=queue["delayed"],
            dead=queue["dead"],
            oldest=queue["oldest"],
            actors=queue["consumers"],
            busy=queue["busy"],
            state=queue["state"],
            breaker=queue["breaker"],
            reason=queue["reason"],
            next_start_at=queue["next_start_at"] or None,
        )
        for queue in stats["queues"]
    ]
