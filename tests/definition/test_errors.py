"""The tree of errors: one root, fields that survive pickling, messages with advice."""

from __future__ import annotations

import builtins
import pickle
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import pytest

from stageflow_actors import Config, Retry, Runtime, Stage, Workflow, errors
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


# where: the line of the program that made the mistake


def wrong_retry() -> Any:
    return Retry(max_attempts=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "mistake",
    [
        wrong_retry,
        lambda: Workflow(),
        lambda: Workflow("orders").add_stage([wrong_retry]),
        lambda: Workflow("orders").stage(timeout="3")(wrong_retry),
        lambda: Stage(lambda order: None, actors=0),
        lambda: Stage(lambda order: None, id="a", compensation=lambda: None),
        lambda: Workflow("orders").validate(),
        lambda: Runtime(Workflow("orders")).start(),
        lambda: Config(durabilty="fsync"),  # type: ignore[call-arg]
    ],
)
def test_a_mistake_in_a_definition_names_the_line_of_the_program(mistake: Callable[[], Any]) -> None:
    with pytest.raises(WorkflowDefinitionError) as caught:
        mistake()
    line = mistake.__code__.co_firstlineno + (mistake is wrong_retry)
    assert caught.value.place is not None
    assert caught.value.place.endswith(f"test_errors.py, line {line}")
    assert str(caught.value) == f"{caught.value.message} ({caught.value.place})"
    assert "\n" not in str(caught.value)


def test_a_mistake_that_is_found_through_another_one_names_its_line_once() -> None:
    with pytest.raises(WorkflowDefinitionError) as caught:
        Stage(print, id="a", compensation=lambda: None)
    assert str(caught.value).count("test_errors.py") == 1


def test_code_that_no_file_holds_has_no_place() -> None:
    code = compile("Workflow()", "<doctest README>", "exec")
    with pytest.raises(WorkflowDefinitionError) as caught:
        exec_in(code)
    assert caught.value.place is None
    assert str(caught.value) == caught.value.message


def test_a_notebook_cell_is_named_by_its_line() -> None:
    code = compile("\n\nWorkflow()", "/tmp/ipykernel_77/1234.py", "exec")
    with pytest.raises(WorkflowDefinitionError, match=r"\(line 3 of the cell\)$"):
        exec_in(code)


def exec_in(code: CodeType) -> None:
    FunctionType(code, {"Workflow": Workflow})()
