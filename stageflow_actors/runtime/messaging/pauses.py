"""Pauses of queues: the facts that mark a pool's own pause, and the pause by a person.

A pause by a person outlives a restart of the cluster; a pause by a pool whose workers died too fast does not.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from stageflow_brokers.api import BrokerAdmin

__all__ = ["PAUSED_BY_POOL_FACT", "PAUSE_REASON_FACT", "pause"]

PAUSED_BY_POOL_FACT = "paused-by-pool:"
"""Prefix of the broker's fact that a queue was paused by its pool, whose workers died too fast, and not by a person."""

PAUSE_REASON_FACT = "why-paused-by-pool:"
"""Prefix of the broker's fact that says why; it counts only while the queue is paused by its pool."""


Ask = Callable[[Callable[[BrokerAdmin], Future[Any]]], Any]
"""Performs an operation of the broker and returns its answer."""


def pause(ask: Ask, queue: str) -> None:
    """Pause a queue for a person; `ask` performs an operation and waits for its answer."""
    ask(lambda admin: admin.pause(queue))
    # Its pool, had that paused it before, would open it at the next start.
    if ask(lambda admin: admin.get_fact(PAUSED_BY_POOL_FACT + queue)) == "yes":
        ask(lambda admin: admin.set_fact(PAUSED_BY_POOL_FACT + queue, "no"))
