"""Failures as values: which parts of an exception are kept, and the exception that a policy receives."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stageflow_actors.core.envelope import Failure
from stageflow_actors.core.failures import (
    EXPIRED,
    MAX_ERROR_CHARACTERS,
    STDERR_HEADING,
    UNDECIDED,
    describe_error,
    exception_of,
    failure_of,
    read_failure,
    shorten_failure,
    undecided_failure,
    write_failure,
)
from stageflow_actors.errors import StageError, StageFlowError, StageTimeout, WorkerDied


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not a word")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("boom failed"), "ValueError: boom failed"),
        (ValueError(), "ValueError"),
        (KeyError("name"), "KeyError: 'name'"),
        (SystemExit(3), "SystemExit: 3"),
        (StageError("no stock"), "StageError: no stock"),
        (Unspeakable(), "Unspeakable: (str() failed)"),
        (OSError("caf\udce9"), "OSError: caf\\udce9"),
    ],
)
def test_an_error_is_described_the_way_a_traceback_ends(error: BaseException, text: str) -> None:
    assert describe_error(error) == text


def test_a_text_that_is_too_long_is_cut() -> None:
    text = describe_error(ValueError("x" * (MAX_ERROR_CHARACTERS * 10)))
    assert text == "ValueError: " + "x" * MAX_ERROR_CHARACTERS + " …"


@given(st.text())
def test_any_exception_text_can_be_attached_to_a_message(text: str) -> None:
    failure = failure_of(ValueError(text))
    assert read_failure(write_failure(failure)) == failure


@pytest.mark.parametrize("retryable", [True, False])
def test_a_stage_error_comes_back_with_its_words_and_its_wish(retryable: bool) -> None:
    back = exception_of(failure_of(StageError("busy", retryable=retryable)))
    assert type(back) is StageError
    assert str(back) == "busy"
    assert back.retryable is retryable


def test_an_exception_comes_back_as_a_description_and_never_as_its_type() -> None:
    back = exception_of(failure_of(ValueError("boom")))
    assert type(back) is StageFlowError
    assert str(back) == "ValueError: boom"


@pytest.mark.parametrize(
    ("failure", "kind", "text"),
    [
        (Failure("timeout", "StageTimeout: too slow", "StageTimeout"), StageTimeout, "too slow"),
        (Failure("died", "WorkerDied: SIGSEGV", "WorkerDied"), WorkerDied, "SIGSEGV"),
        (Failure("died", "WorkerDied: SIGSEGV"), WorkerDied, "WorkerDied: SIGSEGV"),
        (Failure("expired", "StageError: waited", "StageError"), StageError, "waited"),
    ],
)
def test_deaths_timeouts_and_expiry_arrive_as_their_own_types(
    failure: Failure, kind: type[Exception], text: str
) -> None:
    made = exception_of(failure)
    assert type(made) is kind
    assert str(made) == text


def test_an_expired_message_carries_a_failure_from_the_broker() -> None:
    failure = read_failure(EXPIRED)
    assert failure is not None
    assert failure.kind == "expired"
    assert isinstance(exception_of(failure), StageError)


def test_no_failure_is_no_failure_and_damage_is_refused() -> None:
    assert read_failure(None) is None
    with pytest.raises(msgspec.MsgspecError):
        read_failure(b"\xc1")


@given(st.text(max_size=400), st.text(max_size=300), st.integers(200, 1_000))
def test_a_failure_fits_where_there_is_little_room(text: str, error_type: str, size: int) -> None:
    data = shorten_failure(Failure("exception", text, error_type, True), size)
    assert len(data) <= size
    kept = read_failure(data)
    assert kept is not None
    assert (kept.kind, kept.retryable) == ("exception", True)
    assert kept.message == text.partition(STDERR_HEADING)[0] or kept.message.endswith(" …")


def test_a_failure_without_a_policy_decision_is_reported_once_with_the_reason() -> None:
    died = Failure("died", f"WorkerDied: exit code 3{STDERR_HEADING}Traceback", "WorkerDied")
    failure = undecided_failure(shorten_failure(died, 1_000), "ran longer than a second")
    text = "WorkerDied: exit code 3 (and its retry policy ran longer than a second)"
    assert failure == Failure(UNDECIDED, text, "WorkerDied")
    assert undecided_failure(b"\xc1", "ran longer than a second") is None
