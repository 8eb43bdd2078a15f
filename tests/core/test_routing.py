"""The transition after a stage or a compensation, decided without a clock, a queue or a process."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stageflow_actors import Workflow
from stageflow_actors.core.coordination import UnknownPlan, decide
from stageflow_actors.core.envelope import (
    EMPTY_TRAIL,
    CompensationRecord,
    CompensationTask,
    Envelope,
    Failure,
    Outcome,
    StageRecord,
    append_record,
    decode_envelope,
    decode_outcome,
    decode_trail,
    encode,
    raw,
)
from stageflow_actors.core.plan import COMPENSATE, DEAD, FAILED, FINISHED, Naming, WorkflowPlan, compile_plan
from stageflow_actors.core.routing import (
    Publish,
    Transition,
    begin_compensation,
    completed_stages,
    continue_compensation,
    fail_stage,
    leave_stage,
    missing_dependencies,
    report_failure,
)
from stageflow_actors.core.status import WorkflowStatus

NAMING = Naming()
COMPENSATED = WorkflowStatus.compensated


def nothing(context: dict[str, Any]) -> None:
    """Does it."""


def make_plan(*stages: str, on_failure: Literal["compensate", "park"] = "compensate") -> WorkflowPlan:
    """Stages by id; one that ends in `?` is optional, one in capitals has no compensation."""
    flow = Workflow("flow", on_failure=on_failure)
    for stage in stages:
        id = stage.removesuffix("?")
        flow.add_stage(nothing, id=id, required=id == stage, compensation=None if id.isupper() else nothing)
    return compile_plan(flow, NAMING)


def make_envelope(stage_id: str, *trail: tuple[str, str]) -> Envelope:
    made = EMPTY_TRAIL
    for id, status in trail:
        made = append_record(made, StageRecord(id, status))
    return Envelope("flow", 1, stage_id, raw({"a": 1}), made, 5.0)


def completed(*ids: str) -> list[tuple[str, str]]:
    return [(id, "completed") for id in ids]


def planned(step: Publish) -> list[str]:
    task = decode_envelope(step.body).compensation
    assert task is not None
    return task.plan


def only(transition: Transition) -> Publish:
    assert (transition.opens, transition.arrivals) == ([], [])
    [step] = transition.publishes
    return step


def outcome_of(step: Publish) -> Outcome:
    assert (step.queue, step.label, step.terminal) == (NAMING.finished, FINISHED, True)
    return decode_outcome(step.body)


# stages


def test_behind_a_stage_comes_the_next_one_in_its_queue() -> None:
    plan = make_plan("a", "b")
    step = only(leave_stage(plan, plan.stages[0], make_envelope("a"), NAMING, 9.0))
    assert (step.queue, step.label, step.terminal) == ("stageflow.flow.stage1", "b", False)
    assert decode_envelope(step.body).stage_id == "b"


def test_behind_the_last_stage_comes_the_end() -> None:
    plan = make_plan("a", "b")
    outcome = outcome_of(only(leave_stage(plan, plan.stages[1], make_envelope("b", *completed("a", "b")), NAMING, 9.0)))
    assert (outcome.status, outcome.started_at, outcome.finished_at) == ("completed", 5.0, 9.0)
    assert completed_stages(outcome.trail) == ["a", "b"]


def test_a_required_stage_that_fails_goes_to_the_coordinator_and_an_optional_one_goes_on() -> None:
    plan = make_plan("a", "b?", "c")
    lost = StageRecord("a", "failed", error="ValueError: no")
    step = only(fail_stage(plan, plan.stages[0], make_envelope("a"), lost, NAMING, 9.0))
    assert (step.queue, step.label, step.terminal) == (NAMING.coordinator, FAILED, False)
    failed = decode_envelope(step.body)
    assert (failed.failed_stage, failed.error) == ("a", "ValueError: no")
    skipped = StageRecord("b", "failed", error="ValueError: no")
    step = only(fail_stage(plan, plan.stages[1], make_envelope("b"), skipped, NAMING, 9.0))
    assert step.label == "c"
    gone_on = decode_envelope(step.body)
    assert (gone_on.failed_stage, gone_on.error) == (None, None)
    assert [record.status for record in decode_trail(gone_on.trail)] == ["failed"]


STATUSES = st.sampled_from(["completed", "failed", "skipped"])
TRAILS = st.lists(st.tuples(st.sampled_from("abcdef"), STATUSES), max_size=10)


@given(TRAILS)
def test_completed_stages_are_those_in_the_trail_that_completed_in_that_order(trail: list[tuple[str, str]]) -> None:
    found = completed_stages(make_envelope("x", *trail).trail)
    assert len(found) == len(set(found))
    assert set(found) == {id for id, status in trail if status == "completed"}
    firsts = [trail.index((id, "completed")) for id in found]
    assert firsts == sorted(firsts)


@given(TRAILS, st.lists(st.sampled_from("abcdef"), unique=True))
def test_unmet_is_what_has_not_completed(trail: list[tuple[str, str]], after: list[str]) -> None:
    envelope = make_envelope("x", *trail)
    assert missing_dependencies(after, envelope.trail) == [id for id in after if (id, "completed") not in trail]


# compensation


def test_after_an_optional_failure_exactly_the_completed_stages_are_planned_in_reverse() -> None:
    plan = make_plan("a", "b?", "C", "d?", "e", "f")
    trail = [("a", "completed"), ("b", "failed"), ("C", "completed"), ("d", "skipped"), ("e", "completed")]
    envelope = make_envelope("f", *trail, ("f", "failed"))
    step = begin_compensation(plan, envelope, NAMING, 9.0, COMPENSATED)
    assert planned(step) == ["e", "a"]
    assert (step.queue, step.label) == ("stageflow.compensation.flow", COMPENSATE + "e")


def test_compensation_by_index_would_undo_what_never_happened() -> None:
    plan = make_plan("a", "b?", "c", "d")
    trail = [("c", "completed"), ("a", "completed"), ("b", "failed"), ("d", "failed")]
    envelope = make_envelope("d", *trail)
    by_index = [stage.id for stage in reversed(plan.stages[: plan.stages[3].index])]
    assert by_index == ["c", "b", "a"]
    assert planned(begin_compensation(plan, envelope, NAMING, 9.0, COMPENSATED)) == ["a", "c"]


@given(TRAILS)
def test_a_plan_is_the_reverse_of_what_completed_and_can_be_undone(trail: list[tuple[str, str]]) -> None:
    flow = Workflow("flow")
    for id in "abcdef":
        flow.add_stage(nothing, id=id, compensation=nothing if id in "ace" else None)
    plan = compile_plan(flow, NAMING)
    envelope = make_envelope("x", *trail)
    expected = [id for id in reversed(completed_stages(envelope.trail)) if id in "ace"]
    step = begin_compensation(plan, envelope, NAMING, 9.0, COMPENSATED)
    if expected:
        assert planned(step) == expected
    else:
        assert outcome_of(step).status == "failed"


@pytest.mark.parametrize(("wanted", "status"), [("compensated", "failed"), ("cancelled", "cancelled")])
def test_with_nothing_to_undo_the_instance_ends_at_once(wanted: str, status: str) -> None:
    plan = make_plan("A", "b")
    envelope = make_envelope("b", *completed("A"), ("b", "failed"))
    assert outcome_of(begin_compensation(plan, envelope, NAMING, 9.0, WorkflowStatus(wanted))).status == status


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.sampled_from(["compensated", "cancelled"]))
def test_the_end_names_each_compensation_and_never_hides_one_that_failed(well: list[bool], wanted: str) -> None:
    ids = [f"s{n}" for n in range(len(well))]
    plan = make_plan(*ids)
    envelope = make_envelope("x", *completed(*ids))
    step = begin_compensation(plan, envelope, NAMING, 9.0, WorkflowStatus(wanted))
    ran = []
    for goes_well in well:
        assert not step.terminal
        envelope = decode_envelope(step.body)
        assert envelope.compensation is not None
        id = envelope.compensation.plan[0]
        assert step.label == COMPENSATE + id
        assert envelope.stage_id == id
        ran.append(id)
        record = CompensationRecord(id, "completed") if goes_well else CompensationRecord(id, "failed", "OSError: no")
        step = continue_compensation(plan, envelope, record, NAMING, 9.0)
    outcome = outcome_of(step)
    assert ran == list(reversed(ids))
    assert [(record.stage_id, record.status) for record in outcome.compensations] == [
        (id, "completed" if goes_well else "failed") for id, goes_well in zip(ran, well, strict=True)
    ]
    assert outcome.status == (wanted if all(well) else "compensation_failed")


# the coordinator


def test_a_failed_event_begins_the_compensation() -> None:
    plan = make_plan("a", "b")
    failed = report_failure(make_envelope("b", *completed("a")), "b", StageRecord("b", "failed", error="E: x"), NAMING)
    step = only(decide(failed.label, failed.body, None, 1, {("flow", 1): plan}, NAMING, 9.0))
    assert planned(step) == ["a"]


def test_a_dead_letter_of_a_required_stage_is_its_failure_with_the_attempts_it_had() -> None:
    plan = make_plan("a", "b")
    envelope = make_envelope("b", *completed("a"))
    died = Failure("died", "WorkerDied: SIGSEGV", "WorkerDied")
    step = only(decide(DEAD, encode(envelope), died, 4, {("flow", 1): plan}, NAMING, 9.0))
    assert planned(step) == ["a"]
    undoing = decode_envelope(step.body)
    assert (undoing.error, undoing.failed_stage) == ("WorkerDied: SIGSEGV", "b")
    last = decode_trail(undoing.trail)[-1]
    assert (last.stage_id, last.status, last.attempts, last.error) == ("b", "failed", 4, "WorkerDied: SIGSEGV")


def test_a_dead_letter_of_an_optional_stage_goes_on_without_it() -> None:
    plan = make_plan("a", "b?", "c")
    step = only(decide(DEAD, encode(make_envelope("b", *completed("a"))), None, 3, {("flow", 1): plan}, NAMING, 9.0))
    assert (step.queue, step.label) == ("stageflow.flow.stage2", "c")
    assert completed_stages(decode_envelope(step.body).trail) == ["a"]


def test_a_dead_letter_of_a_compensation_counts_as_failed_and_the_others_go_on() -> None:
    plan = make_plan("a", "b", "c")
    envelope = make_envelope("b", *completed("a", "b"), ("c", "failed"))
    envelope.compensation = CompensationTask(["b", "a"], [], "compensated")
    step = only(decide(DEAD, encode(envelope), None, 1, {("flow", 1): plan}, NAMING, 9.0))
    assert planned(step) == ["a"]
    step = continue_compensation(plan, decode_envelope(step.body), CompensationRecord("a", "completed"), NAMING, 9.0)
    outcome = outcome_of(step)
    assert outcome.status == "compensation_failed"
    assert [(record.stage_id, record.status) for record in outcome.compensations] == [
        ("b", "failed"),
        ("a", "completed"),
    ]


def test_an_event_of_an_unregistered_version_or_stage_is_not_guessed() -> None:
    plans = {("flow", 2): make_plan("a")}
    with pytest.raises(UnknownPlan, match="version 1 of workflow 'flow' is not registered"):
        decide(FAILED, encode(make_envelope("a")), None, 1, plans, NAMING, 9.0)
    with pytest.raises(UnknownPlan, match="has no stage 'gone'"):
        decide(DEAD, encode(make_envelope("gone")), None, 1, {("flow", 1): make_plan("a")}, NAMING, 9.0)
    with pytest.raises(ValueError, match="unknown event ':other'"):
        decide(":other", encode(make_envelope("a")), None, 1, {("flow", 1): make_plan("a")}, NAMING, 9.0)
