"""`StageContext`: its fields, and its steps, which run once per instance and stage."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass
from threading import Lock
from typing import Any

import pytest
from effect_log import note, noted

from stageflow_actors import Retry, Runtime, StageContext, StageError, Workflow


@dataclass
class Trip:
    name: str
    fail: str = ""


def first(context: dict[str, Any]) -> dict[str, int]:
    return {"answer": 42}


def optional_loss(context: dict[str, Any]) -> None:
    raise ValueError("lost")


def tell(context: dict[str, Any], ctx: StageContext) -> dict[str, Any]:
    left = None if ctx.deadline is None else ctx.deadline - time.monotonic()
    failure = ctx.previous_failure
    return {
        "workflow_id": ctx.workflow_id,
        "instance_id": ctx.instance_id,
        "stage_id": ctx.stage_id,
        "attempt": ctx.attempt,
        "left": left,
        "key": ctx.idempotency_key,
        "results": dict(ctx.results),
        "payload": ctx.payload,
        "previous_failure": None if failure is None else [type(failure).__name__, str(failure)],
        "logger": ctx.logger.name,
        "cancelled": ctx.cancelled,
    }


def tell_without_limit(context: dict[str, Any], ctx: StageContext) -> bool:
    return ctx.deadline is None


def attempts(context: dict[str, Any], ctx: StageContext) -> list[Any]:
    failure = ctx.previous_failure
    note("attempt", ctx.instance_id, ctx.attempt, ctx.idempotency_key, f"{type(failure).__name__}|{failure}")
    if ctx.attempt == 1:
        raise ValueError("boom 1")
    if ctx.attempt == 2:
        os._exit(3)
    if ctx.attempt == 3:
        time.sleep(60)
    return [ctx.attempt]


def charge(name: str, amount: int) -> dict[str, Any]:
    note("charged", name, amount, os.getpid())
    return {"receipt": f"R-{amount}", "pid": os.getpid()}


def book(trip: Trip, ctx: StageContext) -> dict[str, Any]:
    """Two steps; what befalls the worker between them must not run the first again."""
    note("book", trip.name, ctx.attempt, ctx.is_step_completed("flight"), ctx.is_step_completed("hotel"))
    flight = ctx.step("flight", charge, trip.name, 100)
    assert ctx.is_step_completed("flight")
    assert ctx.get_step_result("flight") == flight
    with pytest.raises(StageError, match="uses the step 'flight' twice in one attempt"):
        ctx.step("flight", charge, trip.name, 999)
    if trip.fail == "raise" and ctx.attempt < 3:
        raise ValueError("between")
    if trip.fail == "die" and ctx.attempt < 3:
        os._exit(9)
    if trip.fail == "hang" and ctx.attempt < 2:
        time.sleep(60)
    hotel = ctx.step("hotel", charge, trip.name, 200)
    return {"flight": flight, "hotel": hotel["receipt"]}


def by_hand(trip: Trip, ctx: StageContext) -> list[Any]:
    if not ctx.is_step_completed("mark"):
        note("mark", trip.name)
        ctx.checkpoint_step("mark")
    if not ctx.is_step_completed("value"):
        ctx.store_step_result("value", {"n": 1})
    seen = [ctx.get_step_result("mark"), ctx.get_step_result("value"), ctx.get_step_result("never")]
    if ctx.attempt == 1:
        raise ValueError("again, please")
    return seen


def undo_book(trip: Trip, ctx: StageContext) -> None:
    ctx.step("refund", note, "refunded", trip.name, ctx.results["book"]["hotel"], ctx.idempotency_key)
    if trip.name.endswith("dies") and ctx.attempt == 1:
        os._exit(9)


def confirm(trip: Trip) -> None:
    if trip.name.startswith("undo"):
        raise RuntimeError("not confirmed")


def bad_steps(context: dict[str, Any], ctx: StageContext) -> list[str]:
    told = []
    for name, function in (("", dict), (5, dict), ("counter", lambda: Counter("a")), ("lock", Lock)):
        try:
            ctx.step(name, function)  # type: ignore[arg-type]
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    try:
        ctx.step("raises", lambda: 1 / 0)
    except ZeroDivisionError:
        told.append(f"completed: {ctx.is_step_completed('raises')}")
    return told


again = Retry.fixed(5, 0)
telling = (
    Workflow("telling")
    .add_stage(first)
    .add_stage(optional_loss, required=False)
    .add_stage(tell, timeout=30)
    .add_stage(tell_without_limit)
)
attempting = Workflow("attempting").add_stage(attempts, retry=again, timeout=0.3)
booking = Workflow("booking", context=Trip)
booking.add_stage(book, retry=again, timeout=0.5, compensation=undo_book).add_stage(confirm)
marking = Workflow("marking", context=Trip).add_stage(by_hand, retry=again)
stepping = Workflow("stepping").add_stage(bad_steps)


@pytest.fixture(scope="module")
def runtime(serve: Any) -> Runtime:
    return serve(telling, attempting, booking, marking, stepping)


def test_the_stage_context_shows_where_a_handler_runs(runtime: Runtime) -> None:
    result = runtime.execute(telling, {}, instance_id="told-1", timeout=20)
    told = result.stages[2].data
    left = told.pop("left")
    assert 20 < left <= 30
    assert told == {
        "workflow_id": "telling",
        "instance_id": "told-1",
        "stage_id": "tell",
        "attempt": 1,
        "key": "telling:told-1:tell",
        "results": {"first": {"answer": 42}},
        "payload": None,
        "previous_failure": None,
        "logger": "stageflow.telling.tell",
        "cancelled": False,
    }
    assert result.stages[3].data is True


def test_each_attempt_is_numbered_keeps_its_key_and_receives_the_failure_of_the_one_before(runtime: Runtime) -> None:
    result = runtime.execute(attempting, {}, instance_id="a", timeout=20)
    assert result.success
    assert result.stages[0].attempts == 4
    assert result.stages[0].data == [4]
    told = noted("attempt", "a")
    assert [number for number, _, _ in told] == ["1", "2", "3", "4"]
    assert {key for _, key, _ in told} == {"attempting:a:attempts"}
    failures = [failure for _, _, failure in told]
    assert failures[0] == "NoneType|None"
    assert "ValueError: boom 1" in failures[1]
    assert failures[2].startswith("WorkerDied|")
    assert "'attempts'" in failures[2]
    assert failures[3].startswith("StageTimeout|")
    assert "0.3 s" in failures[3]


@pytest.mark.parametrize("fail", ["", "raise", "die", "hang"])
def test_a_step_runs_once_whatever_befalls_the_attempt(runtime: Runtime, fail: str) -> None:
    name = f"trip-{fail}"
    result = runtime.execute(booking, Trip(name, fail), timeout=20)
    result.raise_for_status()
    charges = noted("charged", name)
    assert [amount for amount, _ in charges] == ["100", "200"]
    data = result.stages[0].data
    assert data["flight"] == {"receipt": "R-100", "pid": int(charges[0][1])}
    assert data["hotel"] == "R-200"
    runs = noted("book", name)
    assert len(runs) == {"": 1, "raise": 3, "die": 3, "hang": 2}[fail] == result.stages[0].attempts
    assert [flight for _, flight, _ in runs] == ["False"] + ["True"] * (len(runs) - 1)
    if fail in ("die", "hang"):
        assert charges[0][1] != charges[1][1], "another worker went on where the dead one stopped"


def test_steps_by_hand_are_durable_when_the_call_returns(runtime: Runtime) -> None:
    result = runtime.execute(marking, Trip("m"), timeout=20)
    assert result.stages[0].data == [None, {"n": 1}, None]
    assert noted("mark", "m") == [()]


def test_a_compensation_has_steps_and_results_of_its_own(runtime: Runtime) -> None:
    result = runtime.execute(booking, Trip("undo-dies"), instance_id="undone", timeout=20)
    assert result.status == "compensated"
    assert noted("refunded", "undo-dies") == [("R-200", "booking:undone:book")]


def test_what_a_step_cannot_keep_is_refused_by_name_and_a_step_that_raises_is_not_done(runtime: Runtime) -> None:
    result = runtime.execute(stepping, {}, timeout=20)
    told = result.stages[0].data
    assert told[0] == "ValueError: a step needs a name that is a string, not ''"
    assert told[1] == "ValueError: a step needs a name that is a string, not 5"
    assert "the result of step 'counter' of stage 'bad-steps'" in told[2]
    assert told[3].startswith("InvalidContext: the result of step 'lock'")
    assert told[4] == "completed: False"
