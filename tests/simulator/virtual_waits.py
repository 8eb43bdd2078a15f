"""The waiting times of messages with a time to live, to compare with the broker's expiry.

The broker is never asked: a message is entered when its record is on disk, and checked when it is delivered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import inf
from typing import NamedTuple

from virtual_world import World

from stageflow_actors.core.envelope import decode_envelope
from stageflow_actors.core.failures import EXPIRED, read_failure
from stageflow_brokers.api import DeliveryItem

SLACK = 1e-5
"""Seconds by which two clocks may disagree that add up the same in another order."""

_failure = read_failure(EXPIRED)
assert _failure is not None
EXPIRED_TEXT = _failure.message


class Wait(NamedTuple):
    """A message that waits: since when, in virtual seconds, and for how long it may. `recovered`: the time is that of
    a clock which may have been set since."""

    since: float
    ttl: float
    recovered: bool


class Waits:
    """All waits of a run. `ttls`: how long messages may wait, by queue. What contradicts the book is a crime.

    `expired` counts what came too late, by instance, epoch and queue.
    """

    def __init__(self, world: World, ttls: Mapping[str, float], crimes: list[str]) -> None:
        self.expired: Counter[tuple[str, int, str]] = Counter()
        self.ttls = ttls
        self._world = world
        self._crimes = crimes
        self._waits: dict[int, Wait] = {}

    def published(self, message_id: int, queue: str, wall: float, *, recovered: bool) -> None:
        """A message is on disk since that time."""
        ttl = self.ttls.get(queue)
        if ttl is not None:
            self._waits[message_id] = Wait(wall - self._world.ahead, ttl, recovered)

    def forgive(self, message_id: int) -> None:
        """It is tried again, and waits without a limit."""
        if message_id in self._waits:
            self._waits[message_id] = self._waits[message_id]._replace(ttl=inf)

    def delivered(self, queue: str, items: Sequence[DeliveryItem], bodies: Sequence[bytes], decided: float) -> None:
        """Check the messages delivered to a worker, as the broker decided at that time."""
        if queue not in self.ttls:
            return
        for item, body in zip(items, bodies, strict=True):
            extra, wait = item.extra, self._waits.get(item.id)
            if extra is not None and (extra.parts is not None or extra.cancelled is not None):
                continue
            late = extra is not None and extra.fresh and extra.failure == EXPIRED
            if late:
                self.expired[item.group, item.epoch, queue] += 1
                self._world.say(f"expired: message {item.id} of {item.group}")
            tried = extra is not None and (extra.attempts or extra.deaths or extra.fresh)
            if wait is None:
                self._crime(item, "was never seen on disk")
            elif late:
                self._not_early(item, wait, decided)
            elif not tried:
                self._not_late(item, wait, decided, body)

    def _not_early(self, item: DeliveryItem, wait: Wait, decided: float) -> None:
        jumps = self._world.jumps
        if wait.recovered:
            astray = sum(abs(by) for _, by in jumps)
        else:
            astray = sum(by for at, by in jumps if by > 0 and wait.since <= at <= decided)
        waited = decided - wait.since + astray
        if waited < wait.ttl - SLACK:
            self._crime(item, f"has expired after {waited:.4f} s of {wait.ttl:g}")
        if item.extra is not None and (item.extra.attempts or item.extra.deaths):
            self._crime(item, "has expired, and had begun to be tried")

    def _not_late(self, item: DeliveryItem, wait: Wait, decided: float, body: bytes) -> None:
        """One that begins to be tried; what asks again, and the first of a run after the first, never expires."""
        jumped = any(wait.recovered or wait.since <= at <= decided for at, _ in self._world.jumps)
        waited = decided - wait.since
        if waited > wait.ttl + SLACK and not jumped and item.epoch == 1 and not decode_envelope(body).attempts:
            self._crime(item, f"is tried after a wait of {waited:.4f} s of {wait.ttl:g}")

    def _crime(self, item: DeliveryItem, what: str) -> None:
        self._crimes.append(f"message {item.id} of {item.group} {what}")


__all__ = ["EXPIRED_TEXT", "Waits"]
