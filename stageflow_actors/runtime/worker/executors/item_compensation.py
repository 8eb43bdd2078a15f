"""`ItemCompensationState`: how far the items of a map stage are compensated.

The state is a step of the compensation's message. Items are identified by their numbers and tried in descending order.
This module calls nothing and stores nothing.
"""

from __future__ import annotations

from typing import Any

from stageflow_actors.core.failures import read_failure

__all__ = ["NO_ITEM", "ItemCompensationState"]

NO_ITEM = -1
"""The value of `current` while no item is marked as begun."""


class ItemCompensationState:
    """The progress of one compensation of items, over attempts and deaths of workers.

    `attempt` is the number of the policy's attempt. `one_by_one`: an unknown item ended the worker, so that each item
    is stored as `current` before it begins. `interruptions` are the broker's counts of attempts at which the message
    was redelivered only to continue behind an item that ended its worker; they are no attempts of the policy.
    `first_failure` is the number and failure of the first item that failed in this attempt.
    """

    def __init__(self, top: int) -> None:
        self.attempt = 0
        self.one_by_one = False
        self.current = NO_ITEM
        self.interruptions: list[int] = []
        self.first_failure: tuple[int, bytes] | None = None
        self._top = top
        self._low = self._reached = top
        self._failed: dict[int, None] = {}

    @classmethod
    def restore(cls, top: int, stored: Any) -> ItemCompensationState:
        """Return the state from the result of `dump`, or None at the beginning. All items have numbers below `top`."""
        state = cls(top)
        if stored is not None:
            attempt, one_by_one, current, interruptions, first, low, reached, failed = stored
            state.attempt, state.one_by_one, state.current = attempt, one_by_one, current
            state.interruptions, state._low, state._reached = list(interruptions), low, reached
            state.first_failure = None if first is None else (first[0], first[1])
            state._failed = dict.fromkeys(failed)
        return state

    def dump(self) -> list[Any]:
        """Return the state as plain values."""
        first = None if self.first_failure is None else list(self.first_failure)
        failed = list(self._failed)
        return [
            self.attempt,
            self.one_by_one,
            self.current,
            self.interruptions,
            first,
            self._low,
            self._reached,
            failed,
        ]

    def begin_again(self) -> None:
        """Forget the attempts of a message before this one: a retry of the instance tries the failed items again."""
        self.attempt, self.one_by_one, self.current = 0, False, NO_ITEM
        self.interruptions, self.first_failure = [], None

    def begin(self, attempts_made: int) -> int:
        """Begin or continue an attempt and return its number; the broker has counted `attempts_made` before."""
        attempt = attempts_made + 1 - sum(1 for count in self.interruptions if count < attempts_made)
        if attempt != self.attempt:
            self.attempt, self.first_failure = attempt, None
            self._reached = self._top
        return attempt

    def is_pending(self, number: int) -> bool:
        """Return True if this attempt has still to try the item."""
        return number < self._reached and (number < self._low or number in self._failed)

    def record(self, number: int, failure: bytes | None) -> None:
        """Record a tried item with its failure, or None if it is compensated."""
        self._reached, self._low, self.current = number, min(self._low, number), NO_ITEM
        if failure is None:
            self._failed.pop(number, None)
        else:
            self._failed[number] = None
            self.first_failure = self.first_failure or (number, failure)

    @property
    def failed_count(self) -> int:
        """The number of items that were tried and failed."""
        return len(self._failed)

    def record_death(self, attempts_made: int, failure: bytes) -> bool:
        """Record that an item ended the worker. Return True if the state changed, so that another delivery helps.

        The current item has failed if one is marked as begun; otherwise the next delivery goes one by one.
        """
        known = self.current != NO_ITEM
        if known:
            self.record(self.current, failure)
        elif self.one_by_one:
            return False
        self.one_by_one = True
        if attempts_made not in self.interruptions:
            self.interruptions.append(attempts_made)
        return True

    def describe_failures(self, stage_id: str, count: int) -> str | None:
        """Return an error text for the failed items of `count`, or None if there are none."""
        if not self._failed or self.first_failure is None:
            return None
        number, data = self.first_failure
        failure = read_failure(data)
        text = "" if failure is None else failure.message
        return (
            f"{len(self._failed)} of {count} items of {stage_id!r} could not be undone; "
            f"the first was item {number}: {text}"
        )
