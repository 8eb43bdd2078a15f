"""Retry policies: the time of the next attempt, or none."""

from __future__ import annotations

import pickle
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stageflow_actors.definition.retry import Retry, RetryPolicy, check_policy
from stageflow_actors.errors import StageError, StageTimeout, WorkerDied, WorkflowDefinitionError

BOOM = ValueError("boom")


class Busy(StageError):
    pass


def delays(policy: Retry, error: Exception = BOOM) -> list[float | None]:
    return [policy.next_delay(attempt, error) for attempt in range(1, policy.max_attempts + 2)]


def test_exponential_delays_grow_by_the_factor_up_to_the_maximum() -> None:
    policy = Retry.exponential(max_attempts=5, initial=1, maximum=5, jitter=False)
    assert delays(policy) == [1, 2, 4, 5, None, None]
    assert delays(Retry.exponential(4, 2, 100, factor=3, jitter=False)) == [2, 6, 18, None, None]


def test_linear_delays_grow_by_the_initial_one() -> None:
    assert delays(Retry.linear(max_attempts=5, initial=2, maximum=5)) == [2, 4, 5, 5, None, None]


def test_fixed_delays_stay_the_same() -> None:
    assert delays(Retry.fixed(max_attempts=3, delay=timedelta(seconds=1.5))) == [1.5, 1.5, None, None]


def test_a_single_attempt_is_never_followed_by_another() -> None:
    assert Retry.fixed(1, 0).next_delay(1, BOOM) is None


def test_a_delay_of_zero_is_not_giving_up() -> None:
    assert Retry.fixed(2, 0).next_delay(1, BOOM) == 0


@pytest.mark.parametrize(("drawn", "delay"), [(0.0, 4.0), (0.5, 3.0), (0.999999, 2.000002)])
def test_jitter_takes_away_up_to_half_by_its_random_number(drawn: float, delay: float) -> None:
    policy = Retry.exponential(9, 1, 30, random=lambda: drawn)
    assert policy.next_delay(3, BOOM) == pytest.approx(delay)


@given(st.integers(1, 10**6), st.floats(0, 1, exclude_max=True))
def test_no_delay_exceeds_the_maximum_however_late_the_attempt(attempt: int, drawn: float) -> None:
    policy = Retry.exponential(10**9, 0.5, 60, random=lambda: drawn)
    delay = policy.next_delay(attempt, BOOM)
    assert delay is not None
    assert 0.25 <= delay <= 60


@pytest.mark.parametrize(
    ("options", "error", "again"),
    [
        ({}, BOOM, True),
        ({}, StageTimeout("s", 1), True),
        ({}, WorkerDied("s", "SIGSEGV"), True),
        ({"retry_on": OSError}, BOOM, False),
        ({"retry_on": OSError}, ConnectionError(), True),
        ({"retry_on": (OSError, ValueError)}, BOOM, True),
        ({"retry_on": [OSError, lambda e: "boo" in str(e)]}, BOOM, True),
        ({"retry_on": lambda e: "foo" in str(e)}, BOOM, False),
        ({"abort_on": ValueError}, BOOM, False),
        ({"abort_on": (OSError, lambda e: str(e) == "boom")}, BOOM, False),
        ({"retry_on": ValueError, "abort_on": ValueError}, BOOM, False),
        ({"abort_on": WorkerDied}, WorkerDied("s", "SIGSEGV"), False),
        ({}, StageError("no"), False),
        ({}, StageError("busy", retryable=True), True),
        ({"retry_on": OSError}, StageError("busy", retryable=True), True),
        ({"abort_on": StageError}, StageError("busy", retryable=True), False),
        ({"retry_on": StageError}, StageError("no"), True),
        ({"retry_on": Busy}, Busy("no"), True),
        ({"retry_on": Busy}, StageError("no"), False),
        ({"retry_on": lambda e: True}, StageError("no"), True),
        ({"retry_on": (Exception, Busy)}, Busy("no"), True),
    ],
)
def test_which_errors_are_retried(options: dict[str, Any], error: Exception, again: bool) -> None:
    for policy in (
        Retry.fixed(3, 1, **options),
        Retry.linear(3, 1, 1, **options),
        Retry.exponential(3, 1, 1, **options),
    ):
        assert (policy.next_delay(1, error) is not None) is again


LEAVES = ExceptionGroup("two", [ConnectionError("bank"), ExceptionGroup("inner", [TimeoutError("late")])])


class Refused(ExceptionGroup[Exception]):
    pass


@pytest.mark.parametrize(
    ("options", "error", "again"),
    [
        ({}, LEAVES, True),
        ({"retry_on": OSError}, LEAVES, True),  # TimeoutError is an OSError
        ({"retry_on": ConnectionError}, LEAVES, False),
        ({"retry_on": (ConnectionError, TimeoutError)}, LEAVES, True),
        ({"retry_on": lambda e: isinstance(e, OSError)}, LEAVES, True),
        ({"retry_on": lambda e: "bank" in str(e)}, LEAVES, False),
        ({"abort_on": TimeoutError}, LEAVES, False),
        ({"abort_on": lambda e: str(e) == "late"}, LEAVES, False),
        ({"abort_on": KeyError}, LEAVES, True),
        ({"retry_on": ExceptionGroup}, LEAVES, True),
        ({"abort_on": ExceptionGroup}, LEAVES, False),
        ({"abort_on": Refused}, LEAVES, True),
        ({"abort_on": Refused}, Refused("no", [ConnectionError()]), False),
        ({}, ExceptionGroup("one", [StageError("no")]), False),
        ({}, ExceptionGroup("one", [StageError("busy", retryable=True), OSError()]), True),
        ({}, ExceptionGroup("one", [StageError("no"), OSError()]), False),
        ({"retry_on": OSError}, ExceptionGroup("one", [StageError("busy", retryable=True), OSError()]), True),
        ({}, BaseExceptionGroup("one", [OSError(), KeyboardInterrupt()]), False),
    ],
)
def test_a_group_is_retried_by_its_leaves(options: dict[str, Any], error: Exception, again: bool) -> None:
    assert (Retry.fixed(3, 1, **options).next_delay(1, error) is not None) == again


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Retry.fixed(0, 1), "max_attempts of Retry.fixed must be an integer from 1"),
        (lambda: Retry.fixed(2.5, 1), "max_attempts of Retry.fixed"),  # type: ignore[arg-type]
        (lambda: Retry.fixed(True, 1), "max_attempts of Retry.fixed"),
        (lambda: Retry.fixed(3, -1), "delay of Retry.fixed must be 0 or more"),
        (lambda: Retry.fixed(3, float("nan")), "delay of Retry.fixed must be finite"),
        (lambda: Retry.fixed(3, "1"), "delay of Retry.fixed must be a number of seconds or a timedelta"),  # type: ignore[arg-type]
        (lambda: Retry.linear(3, 10, 5), r"maximum of Retry.linear \(5 s\) must not be less than initial \(10 s\)"),
        (lambda: Retry.exponential(3, 1, 5, factor=0.5), "factor of Retry.exponential must be a number from 1"),
        (lambda: Retry.exponential(3, 1, 5, jitter=0.3), "jitter of Retry.exponential must be True or False"),  # type: ignore[arg-type]
        (lambda: Retry.exponential(3, 1, float("inf")), "maximum of Retry.exponential must be finite"),
        (
            lambda: Retry.fixed(3, 1, retry_on="ValueError"),
            "retry_on of Retry.fixed takes exception types and predicates",
        ),  # type: ignore[arg-type]
        (lambda: Retry.fixed(3, 1, abort_on=int), "abort_on of Retry.fixed takes exception types and predicates"),  # type: ignore[arg-type]
        (lambda: Retry.fixed(3, 1, retry_on=()), "retry_on of Retry.fixed is empty"),
        (lambda: Retry("cubic", max_attempts=3, initial=1, maximum=1), "use Retry.exponential, Retry.linear or"),
    ],
)
def test_a_mistaken_policy_is_refused_when_it_is_made(make: Any, message: str) -> None:
    with pytest.raises(WorkflowDefinitionError, match=message):
        make()


def test_any_object_with_next_delay_is_a_policy() -> None:
    class Mine:
        def next_delay(self, attempt: int, error: Exception) -> float | None:
            return 7.0 if attempt < 2 else None

    mine = Mine()
    assert check_policy(mine, "the retry of stage 'pay'") is mine
    assert isinstance(mine, RetryPolicy)


@pytest.mark.parametrize("wrong", [3, True, Retry, object(), "fixed"])
def test_what_is_no_policy_is_refused_with_an_example(wrong: Any) -> None:
    with pytest.raises(WorkflowDefinitionError, match=r"the retry of stage 'pay' must be a Retry such as Retry\.fixed"):
        check_policy(wrong, "the retry of stage 'pay'")


def test_a_policy_survives_pickling() -> None:
    policy = pickle.loads(pickle.dumps(Retry.exponential(4, 1, 30, jitter=False, retry_on=(OSError,))))
    assert policy.next_delay(2, OSError()) == 2
    assert policy.next_delay(2, BOOM) is None
    assert repr(policy) == "Retry.exponential(max_attempts=4, initial=1, maximum=30)"
