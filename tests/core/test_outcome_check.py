"""Stored outcomes: unreadable, contradictory and impossible ones are reported."""

from __future__ import annotations

import math

import pytest

from stageflow_actors.core.envelope import (
    EMPTY_TRAIL,
    CompensationRecord,
    Outcome,
    Raw,
    StageRecord,
    append_record,
    encode,
    raw,
)
from stageflow_actors.core.outcome_check import check_outcome


def trail_of(*stage_ids: str) -> bytes:
    trail = EMPTY_TRAIL
    for stage_id in stage_ids:
        trail = append_record(trail, StageRecord(stage_id, "completed"))
    return trail


def ended(status: str, *undone: tuple[str, ...], trail: bytes = EMPTY_TRAIL) -> Outcome:
    records = [CompensationRecord(stage_id, how, rerun=int(*rerun or "0")) for stage_id, how, *rerun in undone]
    return Outcome("orders", 2, status, raw({}), trail, 1.0, 2.0, compensations=records)


def judge(outcome: Outcome) -> str | None:
    columns = (outcome.workflow_id, outcome.version, outcome.status, outcome.error, outcome.failed_stage)
    return check_outcome(*columns, encode(outcome))


DONE = trail_of("a", "b", "c")


@pytest.mark.parametrize(
    "outcome",
    [
        ended("completed", trail=DONE),
        ended("failed"),
        ended("cancelled", trail=DONE),
        ended("cancelled", ("b", "completed"), ("a", "completed"), trail=DONE),
        ended("compensated", ("c", "completed"), ("a", "completed"), trail=DONE),
        ended("compensation_failed", ("c", "failed"), ("b", "completed"), trail=DONE),
        ended("compensated", ("each", "completed"), ("a", "completed"), trail=trail_of("a", "each")),
        ended("compensated", ("b", "completed"), ("c", "completed", "1"), ("a", "completed", "1"), trail=DONE),
    ],
)
def test_what_can_be_true_is_taken(outcome: Outcome) -> None:
    assert judge(outcome) is None


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        (ended("running"), "its status 'running' is not terminal"),
        (ended("completed", ("a", "completed"), trail=DONE), "its status is completed, but a was compensated"),
        (ended("compensated"), "its status is compensated, but no stage was"),
        (ended("compensated", ("b", "failed"), trail=DONE), "the compensation of b failed"),
        (ended("compensation_failed", ("b", "completed"), trail=DONE), "no compensation failed"),
        (ended("compensated", ("a", "completed"), ("b", "completed"), trail=DONE), "a, b, which is not the reverse"),
        (
            ended("compensated", ("d", "completed"), trail=DONE),
            "it compensated d, which is not the reverse order of completion",
        ),
        (ended("compensated", ("b", "completed"), ("b", "completed"), trail=DONE), "b, b, which is not the reverse"),
        (
            ended("compensated", ("b", "completed", "1"), ("c", "completed"), trail=DONE),
            "not in the order in which they ran",
        ),
        (ended("compensated", ("b", "completed"), ("b", "completed", "1"), trail=DONE), "lists a compensation twice"),
        (
            ended("compensated", ("b", "completed"), ("a", "completed", "1"), ("c", "completed", "1"), trail=DONE),
            "it compensated a, c, which is not the reverse",
        ),
    ],
)
def test_what_cannot_be_true_is_reported(outcome: Outcome, fault: str) -> None:
    assert fault in (judge(outcome) or "nothing")


def test_what_cannot_be_read_is_reported() -> None:
    whole = ended("completed")
    for outcome in (b"", b"\xc1", encode(whole)[:-1]):
        assert "its outcome cannot be read" in (
            check_outcome("orders", 2, "completed", None, None, outcome) or "nothing"
        )
    for change in ({"trail": b"\x91"}, {"context": Raw(b"\x81\xa1")}):
        broken = ended("completed")
        for name, value in change.items():
            setattr(broken, name, value)
        assert "cannot be read" in (judge(broken) or "nothing")
    whole.finished_at = math.nan
    assert "ended at nan" in (judge(whole) or "nothing")


def test_a_row_that_contradicts_its_outcome_is_reported() -> None:
    outcome = encode(ended("completed"))
    assert check_outcome("orders", 2, "completed", None, None, outcome) is None
    assert check_outcome("orders", 3, "completed", None, None, outcome) == "its row says version 3, its outcome 2"
    assert "failed stage 'a', its outcome None" in (check_outcome("orders", 2, "completed", None, "a", outcome) or "")
