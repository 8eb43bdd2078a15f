"""Stages that failed with their effect unknown, in the decisions of routing and coordinator."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from stageflow_actors import Compensation, Stage, Workflow
from stageflow_actors.core.coordination import decide
from stageflow_actors.core.envelope import (
    EMPTY_TRAIL,
    UNCERTAIN,
    Envelope,
    Failure,
    StageRecord,
    append_record,
    decode_envelope,
    decode_item_end,
    decode_outcome,
    encode,
    raw,
)
from stageflow_actors.core.failures import UNCERTAIN_MARK, AttemptCancelled, failure_of, is_uncertain
from stageflow_actors.core.plan import CANCELLED, DEAD, Naming, compile_plan, item_id
from stageflow_actors.core.routing import Transition, uncertain_stages
from stageflow_actors.errors import StageError, StageTimeout, WorkerDied

NAMING = Naming()
DIED = Failure("died", "WorkerDied: gone", "WorkerDied")
RAISED = Failure("exception", "ValueError: no", "ValueError")


def nothing(context: Any) -> None:
    """Does it."""


UNDO = Compensation(nothing, when_uncertain=True)
FLOW = (
    Workflow("flow")
    .add_stage(nothing, id="a", compensation=nothing)
    .add_stage(nothing, id="pay", compensation=UNDO)
    .add_stage(nothing, id="mail", compensation=UNDO, required=False)
    .add_parallel("both", [Stage(nothing, id="x", compensation=UNDO)])
    .add_map("m", nothing, over=nothing, compensation=UNDO)
)
PLAN = compile_plan(FLOW, NAMING)
PLANS = {("flow", 1): PLAN}


def after(label: str, stage_id: str, failure: Failure | None, *, marked: bool = False, payload: Any = 0) -> Transition:
    trail = append_record(EMPTY_TRAIL, StageRecord("a", "completed"))
    steps = {UNCERTAIN_MARK: b""} if marked else None
    envelope = Envelope("flow", 1, stage_id, raw({}), trail, 1.0, raw(payload), steps=steps)
    cancelled = "cancelled" if label == CANCELLED else None
    return decide(label, encode(envelope), failure, 1, PLANS, NAMING, 2.0, cancelled)


def planned(transition: Transition) -> list[str]:
    (publish,) = transition.publishes
    task = decode_envelope(publish.body).compensation
    assert task is not None
    return task.plan


@pytest.mark.parametrize(
    ("failure", "marked", "expected"),
    [(DIED, False, True), (RAISED, False, False), (RAISED, True, True), (None, False, False), (None, True, True)],
)
def test_a_cancelled_message_that_waits_is_undone_if_an_attempt_had_an_unknown_effect(
    failure: Failure | None, marked: bool, expected: bool
) -> None:
    assert planned(after(CANCELLED, "pay", failure, marked=marked)) == (["pay", "a"] if expected else ["a"])
    (end,) = after(CANCELLED, item_id("m"), failure, marked=marked).arrivals
    assert decode_item_end(end.body).uncertain is expected
    (branch,) = after(CANCELLED, "x", failure, marked=marked).arrivals
    assert uncertain_stages(decode_envelope(branch.body).trail) == (["x"] if expected else [])


def test_an_optional_stage_is_undone_neither_after_a_cancel_nor_after_deaths() -> None:
    assert planned(after(CANCELLED, "mail", DIED)) == ["a"]
    (following,) = after(DEAD, "mail", DIED).publishes
    assert uncertain_stages(decode_envelope(following.body).trail) == []


def test_a_dead_letter_of_unknown_effect_is_undone_first() -> None:
    assert planned(after(DEAD, "pay", DIED)) == ["pay", "a"]
    assert planned(after(DEAD, "pay", None)) == ["pay", "a"]
    (end,) = after(DEAD, item_id("m"), DIED).arrivals
    assert decode_item_end(end.body).uncertain is True


def test_the_last_record_of_a_stage_decides() -> None:
    trail = append_record(EMPTY_TRAIL, StageRecord("pay", "failed", undo=UNCERTAIN))
    assert uncertain_stages(trail) == ["pay"]
    assert uncertain_stages(append_record(trail, StageRecord("pay", "completed"))) == []
    both = append_record(trail, StageRecord("x", "failed", undo=UNCERTAIN))
    assert uncertain_stages(append_record(both, StageRecord("y", "failed"))) == ["x", "pay"], "the last first"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (StageTimeout("late"), True),
        (WorkerDied("gone"), True),
        (AttemptCancelled(), True),
        (StageError("no"), False),
        (TimeoutError("of the handler's own"), False),
    ],
)
def test_which_failures_leave_an_unknown_effect(error: Exception, expected: bool) -> None:
    assert is_uncertain(failure_of(error)) is expected
    assert is_uncertain(Failure("undecided", "its policy died", failure_of(error).error_type)) is (
        expected and not isinstance(error, AttemptCancelled)
    )


def test_records_of_earlier_releases_are_read() -> None:
    old = msgspec.msgpack.encode(["m", "completed", 1, 0.0, 0.0, None, None, [[0, "item", "result"]]])
    assert uncertain_stages(b"\xdd\x00\x00\x00\x01" + old) == []


def test_a_result_may_list_a_stage_that_failed_among_the_compensated_ones() -> None:
    from stageflow_actors.testing import run

    def late(context: Any) -> None:
        raise StageTimeout("late")

    result = run(Workflow("flow").add_stage(late, compensation=UNDO), {})
    assert [str(stage.status) for stage in result.stages] == ["failed"]
    assert decode_outcome(result._outcome).compensations[0].status == "completed"
