"""The deaths of the simulated node by message, to compare with the broker's counts.

The broker is never asked: a death is entered when a worker dies, and removed if no message may be charged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from stageflow_actors.core.failures import read_failure
from stageflow_actors.core.plan import DEAD, UNANSWERED
from stageflow_brokers.api import DeliveryItem

DIED = "WorkerDied: the worker died while running "


class Death:
    """One worker's death. `sure`: it must be charged, because the worker was in the middle of the message."""

    __slots__ = ("group", "message_id", "sure")

    def __init__(self, message_id: int, group: str, sure: bool) -> None:
        self.message_id = message_id
        self.group = group
        self.sure = sure


class Deaths:
    """All deaths of a run. `most`: how many a message may cause. What contradicts the book is a crime.

    `cursed`: how many of the workers that begin a message of an instance, or of a queue, are to die of it.
    """

    def __init__(self, most: int, crimes: list[str]) -> None:
        self.most = most
        self.charged = 0
        self.buried = 0
        self.cursed: Counter[str] = Counter()
        self._crimes = crimes
        self._by_peer: dict[int, Death] = {}
        self._possible: Counter[int] = Counter()
        self._sure: Counter[int] = Counter()
        self._confirmed: Counter[int] = Counter()
        self._of_group: Counter[str] = Counter()

    def died(self, peer: int, message_id: int, group: str, *, busy: bool) -> None:
        """A worker has been killed by an accident, in the middle of a message or after it."""
        self._by_peer[peer] = Death(message_id, group, busy)
        self._possible[message_id] += 1
        self._of_group[group] += 1
        self._sure[message_id] += busy

    def caused_by(self, group: str) -> int:
        """How many workers have died while they had its messages."""
        return self._of_group[group]

    def doubt(self, peer: int) -> None:
        """That death need not be charged: its reporter is gone, or killed the worker on purpose."""
        death = self._by_peer.get(peer)
        if death is not None and death.sure:
            death.sure = False
            self._sure[death.message_id] -= 1

    def confirmed(self, peer: int, on_disk: Callable[[int], int | None]) -> None:
        """The broker has acknowledged the death: then it is on disk, unless the message is gone."""
        death = self._by_peer.pop(peer, None)
        if death is None or not death.sure:
            return
        self.charged += 1
        self._confirmed[death.message_id] += 1
        count, most = on_disk(death.message_id), self._confirmed[death.message_id]
        if count is not None and count < most:
            self._crimes.append(f"message {death.message_id} has {count} deaths on disk, and {most} were confirmed")

    def forgive(self, message_id: int) -> None:
        """It is tried again from the start."""
        self._sure[message_id] = self._confirmed[message_id] = 0

    def delivered(self, items: Sequence[DeliveryItem]) -> None:
        """Check the counts delivered to a worker."""
        for item in items:
            deaths = 0 if item.extra is None else item.extra.deaths
            least, most = self._sure[item.id], self._possible[item.id]
            if not least <= deaths <= most:
                between = str(most) if least == most else f"{least} to {most}"
                self._crimes.append(f"message {item.id} comes with {deaths} deaths, and has caused {between}")
            if deaths >= self.most and (item.extra is None or item.extra.cancelled is None):
                self._crimes.append(f"message {item.id} is given to another worker after {deaths} deaths")

    def reported(self, items: Sequence[DeliveryItem]) -> None:
        """Check the counts of dead letters delivered to the coordinator."""
        for item in items:
            extra = item.extra
            if extra is None or extra.label not in (DEAD, UNANSWERED):
                continue
            self.buried += 1
            if extra.deaths < self.most or self._of_group[item.group] < self.most:
                self._crimes.append(f"{item.group} is given up after {extra.deaths} deaths of {self.most}")
            self.named(f"what became of {item.group}", extra.failure)

    def parked(self, message_id: int, deaths: int, reason: bytes | None) -> None:
        """A dead letter that lies in the broker because of deaths."""
        if deaths < self.most or self._possible[message_id] < self.most:
            caused = self._possible[message_id]
            self._crimes.append(f"message {message_id} is a dead letter after {deaths} deaths, and has caused {caused}")
        self.named(f"dead letter {message_id}", reason)

    def named(self, what: str, reason: bytes | None) -> None:
        """A reported reason must match the event."""
        failure = read_failure(reason)
        if failure is None or failure.kind != "died" or not failure.message.startswith(DIED):
            self._crimes.append(f"{what} does not say who died of it: {failure}")


__all__ = ["DIED", "Deaths"]
