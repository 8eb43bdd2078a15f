"""The tree of errors: one root, fields that survive pickling, messages with advice."""

from __future__ import annotations

import builtins
import pickle

import pytest

from stageflow_actors import errors
from stageflow_actors.errors import (
    BrokerUnavailable,
    InstanceConflict,
    InstanceNotFound,
    InstanceParked,
    InvalidContext,
    JournalCorrupt,
    JournalLocked,
    PayloadTooLarge,
    QueueFull,
    StageError,
    StageFlowError,
    StageTimeout,
    WorkerDied,
    WorkflowDefinitionError,
)


class CardDeclined(StageError):
    """As a user would write one: a constructor of its own."""

    def __init__(self, code: int) -> None:
        super().__init__(f"declined with {code}", retryable=True)
        self.code = code


@pytest.mark.parametrize(
    "error",
    [
        StageFlowError("x"),
        WorkflowDefinitionError("x"),
        InvalidContext("x", stage="pay", field="total"),
        InstanceNotFound("i-1"),
        InstanceConflict("i-1"),
        InstanceParked("i-1", "dlq.q", "ValueError: no"),
        StageError("x", retryable=True),
        StageTimeout("pay", 30),
        StageTimeout("it took too long"),
        WorkerDied("pay", "killed by SIGSEGV", -11),
        WorkerDied("it died"),
        BrokerUnavailable("x"),
        QueueFull("x", queue="q", limit=5),
        PayloadTooLarge("x", size=10, limit=5),
        JournalCorrupt("x", file="0001.journal", offset=512),
        JournalLocked("x", data_dir="data", pid=7),
        CardDeclined(51),
    ],
    ids=lambda e: type(e).__name__,
)
def test_an_error_survives_pickling_with_its_message_and_fields(error: StageFlowError) -> None:
    error.add_note("seen at the till")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)
    assert isinstance(back, StageFlowError)


def test_no_error_shadows_a_builtin() -> None:
    assert not [name for name in errors.__all__ if hasattr(builtins, name)]


def test_the_docstring_draws_every_error() -> None:
    assert errors.__doc__ is not None
    assert all(name in errors.__doc__ for name in errors.__all__)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (StageTimeout("pay", 2.5), "stage 'pay' ran longer than its timeout of 2.5 s"),
        (StageTimeout("as told elsewhere"), "as told elsewhere"),
        (WorkerDied("pay", "SIGKILL"), "the worker died while running stage 'pay': SIGKILL"),
        (WorkerDied("as told elsewhere"), "as told elsewhere"),
        (
            InstanceParked("i", "dlq.q", "no"),
            "instance 'i' is parked in dlq.q: no; look at it with `stageflow dlq show`",
        ),
    ],
)
def test_messages_name_the_event_and_its_place(error: StageFlowError, message: str) -> None:
    assert str(error).startswith(message)


def test_a_timeout_made_of_a_message_claims_no_stage() -> None:
    assert StageTimeout("as told elsewhere").stage_id is None
    assert WorkerDied("as told elsewhere").stage_id is None
    assert WorkerDied("pay", "SIGSEGV", -11).exit_code == -11


def test_a_stage_error_is_final_unless_it_is_marked_otherwise() -> None:
    assert StageError("no").retryable is False
    assert StageError("busy", retryable=True).retryable is True
