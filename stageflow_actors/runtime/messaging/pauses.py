"""Pauses of queues: the pause by a person, and the facts that mark a pause by a pool.

A pause by a person outlives a restart of the cluster; a pause by a pool whose workers died too fast does not.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from stageflow_brokers.api import BrokerAdmin

__all__ = ["PAUSED_BY_POOL_FACT", "PAUSE_REASON_FACT", "pause"]

PAUSED_BY_POOL_FACT = "paused-by-pool:"
"""Prefix of a fact in the broker: `yes` if the queue was paused by its pool, whose workers died too fast."""

PAUSE_REASON_FACT = "why-paused-by-pool:"
"""Prefix of a fact in the broker: the reason of the pool. It is valid only during a pause by the pool."""

Ask = Callable[[Callable[[BrokerAdmin], Future[Any]]], Any]
"""Performs an operation of the broker and returns its answer."""


def pause(ask: Ask, queue: str) -> None:
    """Pause a queue for a person; `ask` performs an operation and waits for its answer."""
    ask(lambda admin: admin.pause(queue))
    # Otherwise a pool that paused the queue before would resume it at the next start.
    if ask(lambda admin: admin.get_fact(PAUSED_BY_POOL_FACT + queue)) == "yes":
        ask(lambda admin: admin.set_fact(PAUSED_BY_POOL_FACT + queue, "no"))
