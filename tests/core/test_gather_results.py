"""The decision about a dead-lettered gathered message, without a worker."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from stageflow_actors import Stage, Workflow
from stageflow_actors.core.coordination import decide
from stageflow_actors.core.envelope import (
    EMPTY_TRAIL,
    NIL,
    Envelope,
    Failure,
    ItemEnd,
    StageRecord,
    append_record,
    decode_envelope,
    decode_item_end,
    decode_trail,
    encode,
    raw,
)
from stageflow_actors.core.gather_results import RequestState, UnpublishedItems, decode_unpublished
from stageflow_actors.core.plan import COMPENSATE, DEAD, Naming, compile_plan
from stageflow_actors.core.routing import Transition

NAMING = Naming()
DIED = Failure("died", "WorkerDied: SIGSEGV", "WorkerDied")


def nothing(context: Any) -> None:
    """Does it."""


def stage(name: str, **options: Any) -> Stage:
    return Stage(nothing, id=name, compensation=nothing, **options)


FLOW = (
    Workflow("flow")
    .add_stage(stage("first"))
    .add_parallel("p", [stage("a"), stage("b"), stage("c", required=False)], merge=lambda base, branches: base)
    .add_map("m", nothing, over=list, compensation=nothing)
    .add_map("o", nothing, over=list, compensation=nothing, required=False)
    .add_remote_stage("r", endpoint="e", command=nothing, required=False)
    .add_stage(stage("last"))
)
PLAN = compile_plan(FLOW, NAMING)


def envelope(stage_id: str, context: Any = None, *records: StageRecord, **more: Any) -> Envelope:
    trail = append_record(EMPTY_TRAIL, StageRecord("first", "completed"))
    for record in records:
        trail = append_record(trail, record)
    return Envelope("flow", 1, stage_id, raw({"x": 0} if context is None else context), trail, 5.0, **more)


def dead(base: Envelope, arrivals: list[tuple[str, bytes]] | None, attempts: int = 3) -> Transition:
    return decide(DEAD, encode(base), DIED, attempts, {("flow", 1): PLAN}, NAMING, 9.0, None, arrivals)


def undoing(transition: Transition) -> Envelope:
    (step,) = transition.publishes
    assert step.label.startswith(COMPENSATE)
    return decode_envelope(step.body)


def plan_of(one: Envelope) -> list[str]:
    assert one.compensation is not None
    return one.compensation.plan


def branch(name: str, status: str, **context: Any) -> tuple[str, bytes]:
    return name, encode(envelope(name, {"x": 0, **context}, StageRecord(name, status, error=f"E: {name}")))


def test_of_a_join_the_branches_that_completed_are_undone_with_what_they_changed() -> None:
    base = envelope("p", since=6.0)
    one = undoing(
        dead(base, [branch("b", "completed", b=1), branch("c", "failed", c=1), branch("a", "completed", a=1)])
    )
    assert plan_of(one) == ["a", "b", "first"]
    assert (one.error, one.failed_stage) == (DIED.message, "p")
    assert msgspec.msgpack.decode(one.context) == {"x": 0, "a": 1, "b": 1}
    last = decode_trail(one.trail)[-1]
    assert (last.stage_id, last.status, last.attempts, last.started_at, last.duration) == ("p", "failed", 3, 6.0, 3.0)


def test_a_join_that_died_of_branches_of_which_one_had_failed_fails_by_that() -> None:
    one = undoing(dead(envelope("p"), [branch("b", "failed"), branch("a", "completed"), branch("c", "completed")]))
    assert (one.error, one.failed_stage, plan_of(one)) == ("E: b", "b", ["c", "a", "first"])


def item(number: int, **end: Any) -> tuple[str, bytes]:
    return str(number), encode(ItemEnd(**end))


def test_of_a_map_the_items_that_are_done_are_undone_in_their_order() -> None:
    arrivals = [item(2, result=raw("two"), item=raw(22)), item(1, error="E: one"), item(0, result=raw(0), item=raw(20))]
    one = undoing(dead(envelope("m"), arrivals))
    assert (plan_of(one), one.failed_stage) == (["m", "first"], "m")
    done = next(record for record in decode_trail(one.trail) if record.stage_id == "m[item]")
    assert msgspec.msgpack.decode(done.undo) == [[0, 20, 0], [2, 22, "two"]]


def test_of_an_optional_map_nothing_is_undone_and_the_workflow_goes_on() -> None:
    (step,) = dead(envelope("o"), [item(0, result=raw(0), item=raw(20))]).publishes
    assert step.label == "r"
    assert [(r.stage_id, r.status) for r in decode_trail(decode_envelope(step.body).trail)] == [
        ("first", "completed"),
        ("o", "failed"),
    ]


def test_of_a_request_the_stage_goes_on_or_fails_with_the_context_that_it_was_given() -> None:
    request_state = RequestState(2, 4.0, "e", 60.0, raw({"x": 0}), raw("handed on"))
    (step,) = dead(envelope("r", {"x": 1}, payload=raw(request_state)), [("reply", encode(1))]).publishes
    after = decode_envelope(step.body)
    assert (step.label, msgspec.msgpack.decode(after.context), bytes(after.payload)) == ("last", {"x": 0}, bytes(NIL))
    last = decode_trail(after.trail)[-1]
    assert (last.status, last.attempts, last.started_at) == ("failed", 4, 4.0)


@given(st.integers(0, 5), st.lists(st.integers(0, 99), min_size=1, max_size=5), st.booleans())
def test_a_carrier_that_died_ends_the_items_that_it_brought(first: int, items: list[int], odd: bool) -> None:
    numbers = [7 * n for n in range(len(items))] if odd else None
    rest = UnpublishedItems(first, [raw(one) for one in items], numbers)
    carrier = Envelope("flow", 1, "m", NIL, EMPTY_TRAIL, 5.0, raw(rest))
    transition = dead(carrier, None)
    assert (transition.publishes, transition.opens) == ([], [])
    ends = {arrival.slot: decode_item_end(arrival.body).error for arrival in transition.arrivals}
    wanted = numbers or range(first, first + len(items))
    assert ends == {str(number): DIED.message for number in wanted}
    assert {arrival.key for arrival in transition.arrivals} == {"m"}


@given(st.integers(0, 5), st.lists(st.integers(0, 99), max_size=6), st.integers(0, 7), st.booleans())
def test_a_rest_is_split_into_two_that_are_the_whole(first: int, items: list[int], count: int, odd: bool) -> None:
    numbers = [7 * n for n in range(len(items))] if odd else None
    steps = [{"s": b"x"} if n % 2 else None for n in range(len(items))] if odd else None
    rest = UnpublishedItems(first, [raw(one) for one in items], numbers, steps)
    parts = [decode_unpublished(encode(part)) for part in rest.split(count)]
    assert [n for part in parts for n in part.all_numbers] == list(rest.all_numbers)
    assert [bytes(one) for part in parts for one in part.items] == [bytes(one) for one in rest.items]
    assert [one for part in parts for one in part.steps or []] == (steps or [])
    assert len(parts[0].items) == min(count, len(items))
