"""`QueueInfo`: the figures of one queue, as users see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["QueueInfo", "queue_infos"]


@dataclass(frozen=True)
class QueueInfo:
    """One queue. `oldest`: seconds that the first ready message has waited; `actors`: workers that consume it, of
    which `busy` have a message; `state`: `open`, `paused`, or `closed` while workers announce themselves; `breaker`:
    empty for a stage without one, `closed` when all is well, `open` while its messages wait, `half-open` when one of
    them is tried."""

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


def queue_infos(stats: dict[str, Any]) -> list[QueueInfo]:
    """The queues in a broker's statistics."""
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
