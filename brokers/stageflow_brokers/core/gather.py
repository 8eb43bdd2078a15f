"""A gather: the broker waits for a number of arrivals and publishes once they are there.

Joins, maps, signals and replies are all this. A slot counts once from one opening to the next, so that a duplicate
changes nothing, and who comes by again waits for all anew; arrivals may come before the gather is opened, and those
beyond `need` stay for the next opening, first in, first out.
"""

from __future__ import annotations

from collections.abc import Iterable

from stageflow_brokers.core.message import RecordLocation

__all__ = ["MAX_GATHERED_BYTES", "Gather"]

MAX_GATHERED_BYTES = 256 << 20
"""Most bytes of bodies at one gather: they become one message, and no frame is larger."""


class Gather:
    """State of one key of one group. `need` is None until somebody opens it. `wait` is the deadline in seconds from the
    opening, at `due` on the monotonic clock; 0 for none. `priority` is that of the message that opened it. `weight` is
    how many bytes of bodies are kept here."""

    __slots__ = (
        "arrivals",
        "base",
        "due",
        "due_wall",
        "epoch",
        "key",
        "label",
        "location",
        "need",
        "priority",
        "queue",
        "seen",
        "wait",
        "weight",
    )

    def __init__(self, key: str, location: RecordLocation) -> None:
        self.key = key
        self.location = location
        self.need: int | None = None
        self.queue = ""
        self.label = ""
        self.epoch = 0
        self.base = b""
        self.due = 0.0
        self.due_wall = 0.0
        self.wait = 0.0
        self.priority = 0
        self.arrivals: dict[str, bytes] = {}
        self.seen: set[str] = set()
        self.weight = 0

    def open(self, *, need: int, queue: str, label: str, epoch: int, base: bytes, priority: int) -> None:
        """Begin to wait for `need` arrivals, with no end to the wait; those already here count."""
        self.seen = set(self.arrivals)
        self.need = need
        self.queue = queue
        self.label = label
        self.epoch = epoch
        self.weight += len(base) - len(self.base)
        self.base = base
        self.priority = priority
        self.due = self.due_wall = self.wait = 0.0

    def arrive(self, slot: str, body: bytes) -> bool:
        """Store one arrival; False when this slot has been here before.

        What would make more of it than one message can be arrives with an empty body, which says so.
        """
        if slot in self.seen:
            return False
        if self.weight + len(body) > MAX_GATHERED_BYTES:
            body = b""
        self.seen.add(slot)
        self.arrivals[slot] = body
        self.weight += len(body)
        return True

    def restore(self, base: bytes, arrivals: Iterable[tuple[str, bytes]], seen: Iterable[str]) -> None:
        """All that is kept here, as it was recorded."""
        self.base, self.arrivals, self.seen = base, dict(arrivals), set(seen)
        self.weight = len(base) + sum(map(len, self.arrivals.values()))

    def reset(self) -> None:
        """Nobody waits any longer, and what has arrived for who did is void. What came early stays, and any slot that
        is not among it may come again."""
        if self.need is not None:
            self.arrivals.clear()
        self.need, self.base = None, b""
        self.weight = sum(map(len, self.arrivals.values()))
        self.due = self.due_wall = self.wait = 0.0
        self.seen = set(self.arrivals)

    @property
    def is_complete(self) -> bool:
        """Whether it is open and all it needs has arrived."""
        return self.need is not None and len(self.arrivals) >= self.need

    def take(self) -> tuple[bytes, list[tuple[str, int]]]:
        """Close it: the body (base, then what arrived) and its parts as (slot, size); the base is ("", size)."""
        need = len(self.arrivals) if self.need is None else min(self.need, len(self.arrivals))
        slots = list(self.arrivals)[:need]
        parts = [("", len(self.base))]
        bodies = [self.base]
        for slot in slots:
            body = self.arrivals.pop(slot)
            parts.append((slot, len(body)))
            bodies.append(body)
        self.need = None
        self.base = b""
        self.weight -= sum(map(len, bodies))
        self.due = self.due_wall = self.wait = 0.0
        return b"".join(bodies), parts
