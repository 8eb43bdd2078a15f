"""Retry policies: they decide whether and when another attempt follows a failed one.

A policy only decides; it never sleeps. The wait is a timer of the broker. The constructors validate all options, so
that a mistake is reported at the definition and not at the first failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import random as _random
from typing import Any, Protocol, runtime_checkable

from stageflow_actors.definition.callables import check_function
from stageflow_actors.definition.duration import Duration, seconds
from stageflow_actors.definition.guesses import adapts
from stageflow_actors.errors import StageError, WorkflowDefinitionError

__all__ = ["Condition", "Retry", "RetryPolicy", "check_policy"]

Condition = type[BaseException] | Callable[[Any], Any] | Sequence["type[BaseException] | Callable[[Any], Any]"]
"""An exception type, a predicate on the error, or a sequence of these (any of them may match).

Of a group of exceptions, the exceptions in it are compared, not the group, unless the type is one of groups.
"""


@runtime_checkable
class RetryPolicy(Protocol):
    """The interface of retry policies: an object with a method `next_delay`.

    `Retry` implements it. Any other object that has the method is accepted wherever a stage, a compensation or a
    workflow takes `retry`. It is sent to worker processes, so it must be picklable.

    Example:
        >>> from stageflow_actors import RetryPolicy, Workflow
        >>> from stageflow_actors.testing import run
        >>> class OnceMore:
        ...     def next_delay(self, attempt, error):
        ...         return 0.5 if attempt == 1 else None
        >>> isinstance(OnceMore(), RetryPolicy)
        True
        >>> flow = Workflow("orders").add_stage(lambda order: 1 / 0, retry=OnceMore())
        >>> run(flow, {}).stages[0].attempts
        2
    """

    def next_delay(self, attempt: int, error: Exception, /) -> float | None:
        """Return how long to wait before the next attempt, or None to give up.

        Args:
            attempt: Number of the attempt that failed, from 1.
            error: The exception that the handler raised, or `StageTimeout`, or `WorkerDied`.

        Returns:
            Seconds until the next attempt, or None if the failure is final.
        """


_SHAPE = "Retry.exponential(max_attempts=3, initial=1, maximum=30) or Retry.fixed(max_attempts=3, delay=1)"


def _refuse_without_kind(policy: Retry, *args: Any, **options: Any) -> None:
    """Refuse `Retry(max_attempts=3)`, which does not choose the delays between attempts."""
    if not args and "kind" not in options:
        raise WorkflowDefinitionError(f"Retry(...) does not choose the delays between attempts: write {_SHAPE}")


class Retry:
    """A policy that retries failed attempts after growing or constant delays.

    Make one with `Retry.exponential`, `Retry.linear` or `Retry.fixed`. The error of an attempt is an exception of
    the handler, `StageTimeout` after a timeout, or `WorkerDied` after the death of a worker. A `StageError` with
    `retryable=True` is retried unless `abort_on` matches; with `retryable=False` it is retried only where `retry_on`
    names `StageError`, a subclass, or a predicate that accepts it. A group of exceptions, as `asyncio.TaskGroup` raises
    it, is retried if each exception in it would be, and is final if one of them matches `abort_on`.

    Args:
        kind: `exponential`, `linear` or `fixed`.
        max_attempts: Number of attempts in all, the first one included, from 1.
        initial: Seconds (or a `timedelta`) before the second attempt, from 0.
        maximum: Largest delay in seconds, from `initial`.
        factor: Growth of exponential delays, from 1. Default: 1.
        jitter: True to shorten each delay by a random part of up to a half. Default: False.
        retry_on: Errors to retry: an exception type, a predicate on the error, or a sequence of these.
                Default: Exception.
        abort_on: As `retry_on`, for errors that are final. It takes precedence over `retry_on`. Default: none.
        random: Function that returns a number in [0, 1), for tests of jitter. Default: `random.random`.

    Raises:
        WorkflowDefinitionError: If an option has a wrong type or value.

    Example:
        >>> from stageflow_actors import Retry
        >>> policy = Retry.exponential(4, initial=1, maximum=60, jitter=False, abort_on=PermissionError)
        >>> [policy.next_delay(attempt, OSError()) for attempt in (1, 2, 3, 4)]
        [1.0, 2.0, 4.0, None]
        >>> policy.next_delay(1, PermissionError()) is None
        True
    """

    __slots__ = ("_abort", "_kind", "_random", "_retry", "factor", "initial", "jitter", "max_attempts", "maximum")

    @adapts(_SHAPE, _refuse_without_kind)
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
    @adapts("Retry.exponential(max_attempts=3, initial=1, maximum=30)")
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
        """Return a policy with delays that grow by a factor.

        The delays are `initial`, `initial * factor`, `initial * factor ** 2`, … seconds, at most `maximum`.

        Args:
            max_attempts: Number of attempts in all, the first one included, from 1.
            initial: Seconds (or a `timedelta`) before the second attempt, from 0.
            maximum: Largest delay in seconds, from `initial`.
            factor: Growth of the delay, from 1. Default: 2.
            jitter: True to shorten each delay by a random part of up to a half, so that instances that failed together
                do not retry together. Default: True.
            retry_on: Errors to retry: an exception type, a predicate on the error, or a sequence of these.
                Default: Exception.
            abort_on: As `retry_on`, for errors that are final; it takes precedence. Default: none.
            random: Function that returns a number in [0, 1), for tests of jitter. Default: `random.random`.

        Returns:
            The policy.

        Raises:
            WorkflowDefinitionError: If an option has a wrong type or value.

        Example:
            >>> from stageflow_actors import Retry
            >>> policy = Retry.exponential(max_attempts=5, initial=2, maximum=5, random=lambda: 0.5)
            >>> [policy.next_delay(attempt, OSError()) for attempt in (1, 2, 3)]
            [1.5, 3.0, 3.75]
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
    @adapts("Retry.linear(max_attempts=3, initial=1, maximum=30)")
    def linear(
        cls,
        max_attempts: int,
        initial: Duration,
        maximum: Duration,
        *,
        retry_on: Condition = Exception,
        abort_on: Condition = (),
    ) -> Retry:
        """Return a policy with delays that grow by a constant.

        The delays are `initial`, `2 * initial`, `3 * initial`, … seconds, at most `maximum`.

        Args:
            max_attempts: Number of attempts in all, the first one included, from 1.
            initial: Seconds (or a `timedelta`) before the second attempt, from 0.
            maximum: Largest delay in seconds, from `initial`.
            retry_on: Errors to retry: an exception type, a predicate on the error, or a sequence of these.
                Default: Exception.
            abort_on: As `retry_on`, for errors that are final; it takes precedence. Default: none.

        Returns:
            The policy.

        Raises:
            WorkflowDefinitionError: If an option has a wrong type or value.

        Example:
            >>> from stageflow_actors import Retry
            >>> policy = Retry.linear(max_attempts=5, initial=1, maximum=3)
            >>> [policy.next_delay(attempt, OSError()) for attempt in (1, 2, 3, 4)]
            [1.0, 2.0, 3.0, 3.0]
        """
        return cls(
            "linear", max_attempts=max_attempts, initial=initial, maximum=maximum, retry_on=retry_on, abort_on=abort_on
        )

    @classmethod
    @adapts("Retry.fixed(max_attempts=3, delay=1)")
    def fixed(
        cls, max_attempts: int, delay: Duration, *, retry_on: Condition = Exception, abort_on: Condition = ()
    ) -> Retry:
        """Return a policy with the same delay between all attempts.

        Args:
            max_attempts: Number of attempts in all, the first one included, from 1.
            delay: Seconds (or a `timedelta`) between two attempts, from 0.
            retry_on: Errors to retry: an exception type, a predicate on the error, or a sequence of these.
                Default: Exception.
            abort_on: As `retry_on`, for errors that are final; it takes precedence. Default: none.

        Returns:
            The policy.

        Raises:
            WorkflowDefinitionError: If an option has a wrong type or value.

        Example:
            >>> from stageflow_actors import Retry
            >>> policy = Retry.fixed(max_attempts=3, delay=0.5, retry_on=(OSError, TimeoutError))
            >>> policy.next_delay(1, OSError()), policy.next_delay(3, OSError()), policy.next_delay(1, KeyError())
            (0.5, None, None)
        """
        return cls(
            "fixed", max_attempts=max_attempts, initial=delay, maximum=delay, retry_on=retry_on, abort_on=abort_on
        )

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        """Return the seconds until the next attempt, or None if the failure is final.

        An exception that a predicate in `retry_on` or `abort_on` raises is passed to the caller.

        Args:
            attempt: Number of the attempt that failed, from 1.
            error: Its error.

        Returns:
            Seconds from 0 to `maximum`, or None to give up.
        """
        if attempt >= self.max_attempts or not self._is_retried(error):
            return None
        delay = min(_DELAYS[self._kind](self, attempt), self.maximum)
        if self.jitter:
            # The generator is looked up at each call: a stored one would be copied into each worker, and all workers
            # would draw the same numbers.
            delay *= 1.0 - (self._random or _random)() / 2
        return delay

    def _is_retried(self, error: BaseException) -> bool:
        leaves = _leaves_of(error)
        if _names_group(self._abort, error) or any(_matches(c, leaf) for leaf in leaves for c in self._abort):
            return False
        return _names_group(self._retry, error) or all(map(self._is_leaf_retried, leaves))

    def _is_leaf_retried(self, error: BaseException) -> bool:
        if isinstance(error, StageError):
            if error.retryable:
                return True
            return any(_matches(c, error) for c in self._retry if not _is_base_of_stage_error(c))
        return any(_matches(condition, error) for condition in self._retry)

    def __repr__(self) -> str:
        if self._kind == "fixed":
            return f"Retry.fixed(max_attempts={self.max_attempts}, delay={self.initial:g})"
        return (
            f"Retry.{self._kind}(max_attempts={self.max_attempts}, initial={self.initial:g}, maximum={self.maximum:g})"
        )


def check_policy(policy: object, what: str) -> RetryPolicy | None:
    """Return `policy` if it is None or has a method `next_delay`; `what` names its place in the error."""
    if policy is None:
        return None
    if isinstance(policy, type) or not callable(getattr(policy, "next_delay", None)):
        raise WorkflowDefinitionError(
            f"{what} must be a Retry such as Retry.fixed(max_attempts=3, delay=1), "
            f"or an object with next_delay(attempt, error), not {policy!r}"
        )
    assert isinstance(policy, RetryPolicy)
    check_function(policy.next_delay, f"next_delay of {what}", ("attempt", "error"), ctx=False)
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
                + (": give the class itself, not its name" if isinstance(condition, str) else "")
            )
        if not isinstance(condition, type):
            check_function(condition, f"a predicate in {what}", ("error",), ctx=False)
    return conditions


def _leaves_of(error: BaseException) -> list[BaseException]:
    """Return the exceptions in a group that are no groups; of another exception, itself."""
    leaves, rest = [], [error]
    while rest:
        one = rest.pop()
        if isinstance(one, BaseExceptionGroup):
            rest.extend(reversed(one.exceptions))
        else:
            leaves.append(one)
    return leaves


def _names_group(conditions: Iterable[Any], error: BaseException) -> bool:
    """Return True if one of the conditions is a type of groups, and `error` is of that type."""
    return any(isinstance(c, type) and issubclass(c, BaseExceptionGroup) and isinstance(error, c) for c in conditions)


def _matches(condition: Any, error: BaseException) -> bool:
    if isinstance(condition, type):
        return isinstance(error, condition)
    return bool(condition(error))


def _is_base_of_stage_error(condition: Any) -> bool:
    """Return True if a type is a proper base class of `StageError`, as `Exception` is."""
    return isinstance(condition, type) and issubclass(StageError, condition) and condition is not StageError
