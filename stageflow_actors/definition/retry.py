"""Retry policies: whether a failed attempt is followed by another, and when.

A policy decides and does nothing else: it never sleeps, and the waiting is done by a timer of the broker. All of
a policy is checked when it is made, so that a mistake shows at the definition and not at the first failure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import random as _random
from typing import Any, Protocol, runtime_checkable

from stageflow_actors.definition.callables import check_function
from stageflow_actors.definition.duration import Duration, seconds
from stageflow_actors.errors import StageError, WorkflowDefinitionError

__all__ = ["Condition", "Retry", "RetryPolicy", "check_policy"]

Condition = type[BaseException] | Callable[[Any], Any] | Sequence["type[BaseException] | Callable[[Any], Any]"]
"""An exception type, a predicate on the error, or a sequence of these (any of them may match)."""


@runtime_checkable
class RetryPolicy(Protocol):
    """What a stage asks after a failed attempt; any object of this shape will do."""

    def next_delay(self, attempt: int, error: Exception, /) -> float | None:
        """Seconds to wait after failed attempt number `attempt` (from 1), or None to give up."""


class Retry:
    """Attempt a stage again after `exponential`, `linear` or `fixed` delays.

    `retry_on` and `abort_on` take an exception type, a predicate on the error, or a sequence of these; `abort_on`
    wins. Timeouts arrive as `StageTimeout`, worker deaths as `WorkerDied`. A `StageError` speaks for itself:
    `retryable=True` is retried unless `abort_on` matches, `retryable=False` only where `retry_on` names
    `StageError` (or a subclass, or is a predicate that accepts it), so not by default.
    """

    __slots__ = ("_abort", "_kind", "_random", "_retry", "factor", "initial", "jitter", "max_attempts", "maximum")

    def __init__(
        self,
        kind: str,
        *,
        max_attempts: int,
        initial: Duration,
        maximum: Duration,
        factor: float = 1.0,
        jitter: bool = False,
        retry_on: Condition = Exception,
        abort_on: Condition = (),
        random: Callable[[], float] | None = None,
    ) -> None:
        if kind not in _DELAYS:
            raise WorkflowDefinitionError(
                f"Retry has no kind {kind!r}: use Retry.exponential, Retry.linear or Retry.fixed"
            )
        name = f"Retry.{kind}"
        if isinstance(max_attempts, bool) or not isinstance(max_attempts, int) or max_attempts < 1:
            raise WorkflowDefinitionError(
                f"max_attempts of {name} must be an integer from 1, the first attempt included, not {max_attempts!r}"
            )
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 <= factor < float("inf"):
            raise WorkflowDefinitionError(f"factor of {name} must be a number from 1, not {factor!r}")
        if not isinstance(jitter, bool):
            raise WorkflowDefinitionError(f"jitter of {name} must be True or False, not {jitter!r}")
        if random is not None and not callable(random):
            raise WorkflowDefinitionError(f"random of {name} must be a function returning a number in [0, 1)")
        self._kind = kind
        self.max_attempts = max_attempts
        self.initial = seconds(initial, f"{'delay' if kind == 'fixed' else 'initial'} of {name}")
        self.maximum = seconds(maximum, f"maximum of {name}")
        if self.maximum < self.initial:
            raise WorkflowDefinitionError(
                f"maximum of {name} ({self.maximum:g} s) must not be less than initial ({self.initial:g} s)"
            )
        self.factor = float(factor)
        self.jitter = jitter
        self._retry = _conditions(retry_on, f"retry_on of {name}")
        self._abort = _conditions(abort_on, f"abort_on of {name}")
        if not self._retry:
            raise WorkflowDefinitionError(
                f"retry_on of {name} is empty, so nothing would be retried: leave out the policy"
            )
        self._random = random

    @classmethod
    def exponential(
        cls,
        max_attempts: int,
        initial: Duration,
        maximum: Duration,
        factor: float = 2.0,
        jitter: bool = True,
        retry_on: Condition = Exception,
        abort_on: Condition = (),
        *,
        random: Callable[[], float] | None = None,
    ) -> Retry:
        """Delays of `initial`, `initial * factor`, … seconds, at most `maximum`.

        `jitter` shortens each by a random part of up to a half, so that what failed together does not return
        together; `random` gives numbers in [0, 1) in place of `random.random`.
        """
        return cls(
            "exponential",
            max_attempts=max_attempts,
            initial=initial,
            maximum=maximum,
            factor=factor,
            jitter=jitter,
            retry_on=retry_on,
            abort_on=abort_on,
            random=random,
        )

    @classmethod
    def linear(
        cls,
        max_attempts: int,
        initial: Duration,
        maximum: Duration,
        *,
        retry_on: Condition = Exception,
        abort_on: Condition = (),
    ) -> Retry:
        """Delays of `initial`, `2 * initial`, `3 * initial`, … seconds, at most `maximum`."""
        return cls(
            "linear", max_attempts=max_attempts, initial=initial, maximum=maximum, retry_on=retry_on, abort_on=abort_on
        )

    @classmethod
    def fixed(
        cls, max_attempts: int, delay: Duration, *, retry_on: Condition = Exception, abort_on: Condition = ()
    ) -> Retry:
        """The same `delay` in seconds between all attempts."""
        return cls(
            "fixed", max_attempts=max_attempts, initial=delay, maximum=delay, retry_on=retry_on, abort_on=abort_on
        )

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        """Seconds to wait after failed attempt number `attempt` (from 1) before the next; None to give up.

        What a predicate raises goes through.
        """
        if attempt >= self.max_attempts or not self._wants(error):
            return None
        delay = min(_DELAYS[self._kind](self, attempt), self.maximum)
        if self.jitter:
            # The generator is looked up at each call: one stored here would be copied into each worker, and all
            # of them would draw the same numbers.
            delay *= 1.0 - (self._random or _random)() / 2
        return delay

    def _wants(self, error: Exception) -> bool:
        if any(_matches(condition, error) for condition in self._abort):
            return False
        if isinstance(error, StageError):
            if error.retryable:
                return True
            return any(_matches(c, error) for c in self._retry if not _covers_stage_error(c))
        return any(_matches(condition, error) for condition in self._retry)

    def __repr__(self) -> str:
        if self._kind == "fixed":
            return f"Retry.fixed(max_attempts={self.max_attempts}, delay={self.initial:g})"
        return (
            f"Retry.{self._kind}(max_attempts={self.max_attempts}, initial={self.initial:g}, maximum={self.maximum:g})"
        )


def check_policy(policy: object, what: str) -> RetryPolicy | None:
    """`policy` if it is None or can be asked for delays; `what` names its place in the error."""
    if policy is None:
        return None
    if isinstance(policy, type) or not callable(getattr(policy, "next_delay", None)):
        raise WorkflowDefinitionError(
            f"{what} must be a Retry such as Retry.fixed(max_attempts=3, delay=1), "
            f"or an object with next_delay(attempt, error), not {policy!r}"
        )
    assert isinstance(policy, RetryPolicy)
    check_function(policy.next_delay, f"next_delay of {what}", ("attempt", "error"))
    return policy


def _exponential(retry: Retry, attempt: int) -> float:
    try:
        return float(retry.initial * retry.factor ** (attempt - 1))
    except OverflowError:
        return retry.maximum


_DELAYS: dict[str, Callable[[Retry, int], float]] = {
    "exponential": _exponential,
    "linear": lambda retry, attempt: retry.initial * attempt,
    "fixed": lambda retry, attempt: retry.initial,
}


def _conditions(given: Any, what: str) -> tuple[Any, ...]:
    conditions = tuple(given) if isinstance(given, (tuple, list, set, frozenset)) else (given,)
    for condition in conditions:
        fits = issubclass(condition, BaseException) if isinstance(condition, type) else callable(condition)
        if not fits:
            raise WorkflowDefinitionError(
                f"{what} takes exception types and predicates such as `lambda error: …`, not {condition!r}"
            )
        if not isinstance(condition, type):
            check_function(condition, f"a predicate in {what}", ("error",))
    return conditions


def _matches(condition: Any, error: Exception) -> bool:
    if isinstance(condition, type):
        return isinstance(error, condition)
    return bool(condition(error))


def _covers_stage_error(condition: Any) -> bool:
    """Whether a type takes in `StageError` only by being wider, as `Exception` does."""
    return isinstance(condition, type) and issubclass(StageError, condition) and condition is not StageError
