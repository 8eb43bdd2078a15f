"""How far the items of a map stage have been undone, as it is kept beside the message of their compensation.

Items are known by their numbers and tried last one first. Nothing is called and nothing is stored here.
"""

from __future__ import annotations

from typing import Any

from stageflow_actors.core.failures import read_failure

__all__ = ["ItemCompensationState"]

NONE = -1


class ItemCompensationState:
    """`attempt` counts those of the policy; `at` is the item that was said to be begun, while one at a time is
    (`careful`), because nobody knows which of them ended the worker before.

    `cuts` are the counts of attempts under which the message was given back only to go on behind an item that had
    ended its worker; `first` is the number and failure of the first item that failed in this attempt.
    """

    def __init__(self, top: int) -> None:
        self.attempt = 0
        self.careful = False
        self.at = NONE
        self.cuts: list[int] = []
        self.first: tuple[int, bytes] | None = None
        self._top = top
        self._low = self._reached = top
        self._failed: dict[int, None] = {}

    @classmethod
    def read(cls, top: int, kept: Any) -> ItemCompensationState:
        """From what `state` gave; None at the beginning. `top`: no item has this number or a higher one."""
        undoing = cls(top)
        if kept is not None:
            attempt, careful, at, cuts, first, low, reached, failed = kept
            undoing.attempt, undoing.careful, undoing.at = attempt, careful, at
            undoing.cuts, undoing._low, undoing._reached = list(cuts), low, reached
            undoing.first = None if first is None else (first[0], first[1])
            undoing._failed = dict.fromkeys(failed)
        return undoing

    def state(self) -> list[Any]:
        """All of it, as it can be stored."""
        first = None if self.first is None else list(self.first)
        failed = list(self._failed)
        return [self.attempt, self.careful, self.at, self.cuts, first, self._low, self._reached, failed]

    def begin(self, made: int) -> int:
        """The message has `made` attempts behind it: the number of the one that begins, or goes on, now."""
        attempt = made + 1 - sum(1 for cut in self.cuts if cut < made)
        if attempt != self.attempt:
            self.attempt, self.first = attempt, None
            self._reached = self._top
        return attempt

    def is_left(self, number: int) -> bool:
        """Whether that item is still to be tried in this attempt."""
        return number < self._reached and (number < self._low or number in self._failed)

    def tried(self, number: int, failure: bytes | None) -> None:
        """The item has been tried: it is undone, or why not."""
        self._reached, self._low, self.at = number, min(self._low, number), NONE
        if failure is None:
            self._failed.pop(number, None)
        else:
            self._failed[number] = None
            self.first = self.first or (number, failure)

    @property
    def failed(self) -> int:
        """How many items have been tried and are not undone."""
        return len(self._failed)

    def cut(self, made: int, failure: bytes) -> bool:
        """The worker was ended by an item, after `made` attempts: whether anything is known now that was not before.

        If it was said which item that was, it has failed; else it will be said from now on.
        """
        known = self.at != NONE
        if known:
            self.tried(self.at, failure)
        elif self.careful:
            return False
        self.careful = True
        if made not in self.cuts:
            self.cuts.append(made)
        return True

    def described(self, stage_id: str, count: int) -> str | None:
        """What to say of the items that are not undone, of `count`; None when all are."""
        if not self._failed or self.first is None:
            return None
        number, data = self.first
        failure = read_failure(data)
        text = "" if failure is None else failure.message
        return (
            f"{len(self._failed)} of {count} items of {stage_id!r} could not be undone; "
            f"the first was item {number}: {text}"
        )
