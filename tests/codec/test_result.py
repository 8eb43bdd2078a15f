"""A workflow's result, decoded from the bytes of its outcome."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import pytest
from msgspec import DecodeError, Raw

from stageflow_actors.core.codec import ContextCodec
from stageflow_actors.core.envelope import (
    EMPTY_TRAIL,
    CompensationRecord,
    Layout,
    Outcome,
    StagePlace,
    StageRecord,
    append_record,
    encode,
    raw,
)
from stageflow_actors.core.result import (
    CompensationResult,
    StageResult,
    parked_result,
    result_of_outcome,
)
from stageflow_actors.core.status import StageStatus, WorkflowStatus
from stageflow_actors.errors import WorkflowFailed


@dataclass
class Order:
    order_id: str
    paid: bool = False


CODEC = ContextCodec(Order)


def layout(*stages: str, version: int = 1) -> Layout:
    return Layout("orders", version, [StagePlace(stage) for stage in stages])


def trail(*records: StageRecord) -> bytes:
    made = EMPTY_TRAIL
    for record in records:
        made = append_record(made, record)
    return made


def outcome(**changes: object) -> bytes:
    facts: dict[str, object] = {
        "workflow_id": "orders",
        "version": 1,
        "status": "completed",
        "context": Raw(CODEC.encode(Order("A", True))),
        "trail": trail(StageRecord("reserve", "completed", 2, 10.5, 0.25, None, raw({"shelf": 3}))),
        "started_at": 10.0,
        "finished_at": 12.5,
        **changes,
    }
    return encode(Outcome(**facts))  # type: ignore[arg-type]


FAILED = {
    "status": "compensation_failed",
    "error": "ValueError: boom failed",
    "failed_stage": "ship",
    "trail": trail(
        StageRecord("pay", "completed"),
        StageRecord("reserve", "completed"),
        StageRecord("mail", "failed", error="OSError: no"),
        StageRecord("ship", "failed", error="ValueError: boom failed"),
    ),
    "compensations": [
        CompensationRecord("reserve", "completed", None, 0.5),
        CompensationRecord("pay", "failed", "KeyError: 1", 0.1),
    ],
}


def test_a_completed_instance_is_read_as_a_success() -> None:
    result = result_of_outcome("i-1", outcome(), CODEC, layout("reserve"))
    assert result.instance_id == "i-1"
    assert result.workflow_id == "orders"
    assert result.status is WorkflowStatus.completed
    assert result.success
    assert result.context == Order("A", True)
    assert result.error is None
    assert result.failed_stage is None
    assert (result.started_at, result.finished_at, result.duration) == (10.0, 12.5, 2.5)
    assert result.stages == [
        StageResult(
            stage_id="reserve",
            status=StageStatus.completed,
            attempts=2,
            started_at=10.5,
            duration=0.25,
            data={"shelf": 3},
        )
    ]
    assert result.compensations == []
    result.raise_for_status()


def test_a_failed_instance_lists_what_was_compensated_and_what_was_not() -> None:
    result = result_of_outcome("i-1", outcome(**FAILED), CODEC, layout("reserve", "mail", "pay", "ship"))
    assert [(s.stage_id, s.status) for s in result.stages] == [
        ("reserve", StageStatus.compensated),
        ("mail", StageStatus.failed),
        ("pay", StageStatus.completed),
        ("ship", StageStatus.failed),
    ]
    assert result.compensations == [
        CompensationResult(stage_id="reserve", status=StageStatus.completed, duration=0.5),
        CompensationResult(stage_id="pay", status=StageStatus.failed, error="KeyError: 1", duration=0.1),
    ]
    assert not result.success
    with pytest.raises(WorkflowFailed, match=r"'i-1' of 'orders' ended compensation_failed at stage 'ship': Val") as c:
        result.raise_for_status()
    assert c.value.result is result
    assert c.value.failed_stage == "ship"


def test_a_stage_that_failed_before_it_completed_counts_once() -> None:
    twice = trail(StageRecord("a", "failed", error="x"), StageRecord("a", "completed", attempts=2))
    result = result_of_outcome("i", outcome(trail=twice), CODEC, layout("a"))
    assert [(s.stage_id, s.status, s.error) for s in result.stages] == [("a", StageStatus.completed, None)]


def test_stages_that_the_definition_no_longer_names_come_last() -> None:
    both = trail(StageRecord("old", "completed"), StageRecord("a", "completed"))
    result = result_of_outcome("i", outcome(trail=both), CODEC, layout("a"))
    assert [s.stage_id for s in result.stages] == ["a", "old"]


def test_the_stages_of_another_version_are_not_added() -> None:
    failed = trail(StageRecord("a", "failed", error="x"))
    result = result_of_outcome("i", outcome(status="failed", trail=failed), CODEC, layout("a", "b", version=2))
    assert [s.stage_id for s in result.stages] == ["a"]
    stored = outcome(status="failed", trail=failed, places=layout("a", "mine").places)
    result = result_of_outcome("i", stored, CODEC, layout("a", "b", version=2))
    assert [(s.stage_id, str(s.status)) for s in result.stages] == [("a", "failed"), ("mine", "pending")]


def test_stages_of_an_arm_are_skipped_once_their_branch_has_chosen_another() -> None:
    places = [StagePlace("b"), StagePlace("x1", "b", "x"), StagePlace("x2", "b", "x"), StagePlace("y1", "b", "")]
    for chosen, expected in (("x", "pending pending skipped"), ("", "skipped skipped pending")):
        made = trail(StageRecord("b", "completed", data=raw(chosen)))
        result = result_of_outcome("i", outcome(status="cancelled", trail=made, places=places), CODEC)
        assert " ".join(str(stage.status) for stage in result.stages[1:]) == expected, chosen
    result = result_of_outcome("i", outcome(status="cancelled", trail=trail(), places=places), CODEC)
    assert {str(stage.status) for stage in result.stages} == {"pending"}


def test_a_branch_of_a_parallel_stage_without_a_record_is_not_called_pending() -> None:
    places = [StagePlace("p"), StagePlace("p1", "p"), StagePlace("p2", "p"), StagePlace("late")]
    begun = [StageRecord("p", "failed", error="clash"), StageRecord("p1", "completed")]
    result = parked_result("i", "orders", CODEC, records=begun, layout=Layout("orders", 1, places))
    assert [(stage.stage_id, str(stage.status)) for stage in result.stages] == [
        ("p", "failed"),
        ("p1", "completed"),
        ("late", "pending"),
    ]


def test_nothing_is_decoded_before_it_is_asked_for() -> None:
    result = result_of_outcome("i", b"not an outcome", CODEC)
    assert result.instance_id == "i"
    with pytest.raises(DecodeError, match="Expected `array`"):
        _ = result.status


def test_what_was_read_once_is_kept() -> None:
    result = result_of_outcome("i", outcome(), CODEC)
    assert result.context is result.context
    assert result.stages is result.stages


def test_results_are_equal_when_their_contents_are() -> None:
    one = result_of_outcome("i", outcome(), CODEC)
    assert one == result_of_outcome("i", Raw(outcome()), CODEC)
    assert one != result_of_outcome("j", outcome(), CODEC)
    assert one != result_of_outcome("i", outcome(status="failed"), CODEC)
    assert one != "i"
    assert len({one, result_of_outcome("i", outcome(), CODEC)}) == 1


def test_a_result_and_its_error_survive_pickling() -> None:
    result = result_of_outcome("i", outcome(**FAILED), CODEC, layout("reserve"))
    assert pickle.loads(pickle.dumps(result)) == result
    error = pickle.loads(pickle.dumps(WorkflowFailed(result)))
    assert error.result == result
    assert str(error) == str(WorkflowFailed(result))


def test_its_repr_shows_the_outcome() -> None:
    assert repr(result_of_outcome("i", outcome(), CODEC)) == "WorkflowResult('i', 'orders', completed)"
    assert "failed_stage='ship'" in repr(result_of_outcome("i", outcome(**FAILED), CODEC))


def test_a_parked_instance_is_a_result_too() -> None:
    result = parked_result(
        "i",
        "orders",
        CODEC,
        error="ValueError: no",
        failed_stage="pay",
        context=CODEC.encode(Order("A")),
        records=[StageRecord("reserve", "completed"), StageRecord("pay", "failed", 2)],
        layout=layout("reserve", "gift", "pay", "ship"),
    )
    assert result.status is WorkflowStatus.parked
    assert not result.success
    assert not result.status.terminal
    assert result.context == Order("A")
    assert [(stage.stage_id, str(stage.status), stage.attempts) for stage in result.stages] == [
        ("reserve", "completed", 1),
        ("gift", "pending", 0),
        ("pay", "failed", 2),
        ("ship", "pending", 0),
    ]
    with pytest.raises(WorkflowFailed, match="parked at stage 'pay': ValueError: no"):
        result.raise_for_status()


def test_a_parked_instance_without_a_known_context_has_none() -> None:
    assert parked_result("i", "orders", CODEC).context is None


def test_exactly_the_ended_statuses_are_terminal() -> None:
    assert {s.value for s in WorkflowStatus if s.terminal} == {
        "completed",
        "failed",
        "compensated",
        "compensation_failed",
        "cancelled",
    }
    assert {s.value for s in StageStatus if not s.terminal} == {"pending", "running"}
    assert f"{WorkflowStatus.compensation_failed}" == "compensation_failed"
