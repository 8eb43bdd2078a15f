"""A gather: a number of arrivals for which the broker waits.

It publishes one message when they are complete. Joins, maps, signals and replies are gathers. Between two openings each
slot counts once; a second arrival in it is ignored. Arrivals may come before the opening; those beyond `need` stay for
the next opening, first in, first out. This module must not use a clock, the journal or queues.
"""

from __future__ import annotations

from collections.abc import Iterable

from stageflow_brokers.core.message import RecordLocation

__all__ = ["MAX_GATHERED_BYTES", "Gather"]

MAX_GATHERED_BYTES = 256 << 20
"""Limit of bytes of the bodies in one gather. They become one message, which must fit into a frame."""


class Gather:
    """The state of one gather of a group.

    Attributes:
        need: Number of arrivals to wait for; None while it is not open.
        base: The body that the opening brings; it comes first in the published message.
        due: Time of the deadline on the monotonic clock; 0 for none. `due_wall` is in seconds since the Unix epoch.
        wait: Seconds from the opening to the deadline; 0 for none.
        priority: The priority of the message that opened it.
        arrivals: The bodies that arrived, by slot.
        seen: The slots that have arrived since the last opening.
        weight: Bytes of the base and of all arrivals.
    """

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
        """Begin to wait for `need` arrivals without a deadline.

        Earlier arrivals count.
        """
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
        """Store one arrival. Return False if its slot has arrived before.

        A body that would exceed the limit is replaced by an empty one, by which the consumer notices it.
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
        """Set the bodies and slots from a record."""
        self.base, self.arrivals, self.seen = base, dict(arrivals), set(seen)
        self.weight = len(base) + sum(map(len, self.arrivals.values()))

    def reset(self) -> None:
        """Close the gather without publishing it, because its group is restarted.

        Arrivals of an open gather are dropped. Those of one that is not open stay, because they came early; every other
        slot may arrive again.
        """
        if self.need is not None:
            self.arrivals.clear()
        self.need, self.base = None, b""
        self.weight = sum(map(len, self.arrivals.values()))
        self.due = self.due_wall = self.wait = 0.0
        self.seen = set(self.arrivals)

    @property
    def is_complete(self) -> bool:
        """True if it is open and has all arrivals that it needs."""
        return self.need is not None and len(self.arrivals) >= self.need

    def take(self) -> tuple[bytes, list[tuple[str, int]]]:
        """Close the gather and return its body and parts.

        The body is the base and then the arrivals. Each part is (slot, size); the base is ("", size).
        """
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
