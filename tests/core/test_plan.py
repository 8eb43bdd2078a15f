"""A workflow as data: complete, without code, and equal after encoding."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stageflow_actors import Compensation, Workflow
from stageflow_actors.core.plan import (
    COMPENSATE,
    DEAD,
    DLQ_PREFIX,
    FAILED,
    FINISHED,
    Naming,
    WorkflowPlan,
    compile_plan,
)
from stageflow_actors.definition.stage import check_id
from stageflow_actors.errors import WorkflowDefinitionError
from stageflow_brokers.core.inspector import DLQ_PREFIX as BROKER_DLQ_PREFIX


def nothing(context: dict[str, Any]) -> None:
    """Does it."""


def sample() -> Workflow[dict[str, Any]]:
    return (
        Workflow("orders", version=3, on_failure="park", stage_timeout=30)
        .add_stage(nothing, id="reserve", compensation=Compensation(nothing, actors=2), actors=4, ttl=60)
        .add_stage(nothing, id="mail", required=False, env={"LANG": "C"}, max_tasks=100)
        .add_stage(nothing, id="ship", after=["reserve", "mail"], timeout=5, compensation=nothing)
    )


def test_a_plan_holds_all_that_routing_and_pools_need() -> None:
    plan = compile_plan(sample(), Naming(), default_ttl=9.0)
    assert (plan.id, plan.version, plan.on_failure) == ("orders", 3, "park")
    reserve, mail, ship = plan.stages
    assert [stage.index for stage in plan.stages] == [0, 1, 2]
    assert [stage.queue for stage in plan.stages] == [f"stageflow.orders.stage{n}" for n in range(3)]
    assert (reserve.actors, reserve.compensated, reserve.required, reserve.timeout) == (4, True, True, 30.0)
    assert (mail.required, mail.compensated, mail.env, mail.max_tasks) == (False, False, {"LANG": "C"}, 100)
    assert (ship.after, ship.timeout, ship.compensated) == (("reserve", "mail"), 5.0, True)
    assert [stage.ttl for stage in plan.stages] == [60.0, 9.0, 9.0]
    assert (plan.compensation.queue, plan.compensation.actors) == ("stageflow.compensation.orders", 2)


def test_a_plan_travels_as_msgpack_and_comes_back_equal() -> None:
    plan = compile_plan(sample(), Naming())
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=WorkflowPlan) == plan


def test_stages_are_found_by_id() -> None:
    plan = compile_plan(sample(), Naming())
    assert plan.stage("mail") is plan.stages[1]
    assert plan.stage("post") is None
    assert plan.next_stage(plan.stages[1]) is plan.stages[2]
    assert plan.next_stage(plan.stages[2]) is None


def test_a_workflow_without_compensations_still_names_its_queue() -> None:
    plan = compile_plan(Workflow("orders").add_stage(nothing), Naming("s.", "c."))
    assert plan.stages[0].queue == "s.orders.stage0"
    assert (plan.compensation.queue, plan.compensation.actors) == ("c.orders", 1)


@given(st.text(min_size=1, max_size=8) | st.text("abz09._-", min_size=1, max_size=8))
def test_no_stage_id_can_equal_an_internal_label(text: str) -> None:
    try:
        id = check_id(text, "a stage")
    except WorkflowDefinitionError:
        return
    assert id not in (FAILED, DEAD, FINISHED)
    assert not id.startswith(COMPENSATE)


@pytest.mark.parametrize("change", ["required", "after", "compensation", "order", "park"])
def test_the_fingerprint_distinguishes_plans_that_instances_in_flight_would_notice(change: str) -> None:
    def build(changed: str | None) -> str:
        ids = ["b", "a"] if changed == "order" else ["a", "b"]
        flow = Workflow("flow", on_failure="park" if changed == "park" else "compensate")
        flow.add_stage(nothing, id=ids[0], compensation=nothing if changed == "compensation" else None)
        flow.add_stage(nothing, id=ids[1], required=changed != "required", after=[ids[0]] if changed == "after" else [])
        return compile_plan(flow, Naming()).fingerprint

    assert build(None) == build(None)
    assert build(change) != build(None)


def test_the_dead_letter_prefix_is_the_one_of_the_broker() -> None:
    assert DLQ_PREFIX == BROKER_DLQ_PREFIX
