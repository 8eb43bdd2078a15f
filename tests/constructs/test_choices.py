"""Conditional stages and branches: skipped stages and chosen branches are recorded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
from constructs_fixtures import does, done, note, noted, stage_of, statuses, undoes, undone

from stageflow_actors import InstanceParked, Retry, Runtime, Stage, Workflow, WorkflowDefinitionError

# conditional stages


def large(context: dict[str, Any]) -> bool:
    note("asked", os.getpid())
    return context["total"] > 100


discounts = (
    Workflow("discounts")
    .add_stage(does("price"), id="price", compensation=undoes("price"))
    .add_conditional(does("discount"), large, id="discount", compensation=undoes("discount"))
    .add_conditional(
        Stage(does("gift"), id="gift", required=False, after=["discount"]), when=lambda context: context.get("gift")
    )
    .add_stage(does("pack"), id="pack", when=lambda context: {"any": "true value"}, required=False)
    .add_stage(does("ship"), id="ship")
)


def test_a_stage_runs_if_its_condition_holds(execute: Any) -> None:
    result = execute(discounts, {"total": 200, "gift": 1})
    assert result.status == "completed"
    assert set(statuses(result).values()) == {"completed"}
    assert done(result.instance_id) == ["price", "discount", "gift", "pack", "ship"]


def test_a_stage_whose_condition_does_not_hold_is_recorded_as_skipped(execute: Any) -> None:
    result = execute(discounts, {"total": 100})
    assert result.status == "completed"
    assert statuses(result) == {
        "price": "completed",
        "discount": "skipped",
        "gift": "skipped",
        "pack": "completed",
        "ship": "completed",
    }
    skipped = stage_of(result, "discount")
    assert (skipped.attempts, skipped.error, skipped.data) == (0, None, None)
    assert done(result.instance_id) == ["price", "pack", "ship"]


def test_a_skipped_stage_has_not_completed(execute: Any) -> None:
    result = execute(discounts, {"total": 100, "gift": 1})
    assert (result.status, statuses(result)["gift"]) == ("completed", "skipped")
    gift = stage_of(result, "gift")
    assert gift.error == "stage 'gift' needs 'discount' to have completed"


def test_a_skipped_stage_is_not_undone(execute: Any) -> None:
    result = execute(discounts, {"total": 1, "fail": {"ship": "raise"}})
    assert (result.status, undone(result.instance_id)) == ("compensated", ["price"])
    result = execute(discounts, {"total": 101, "fail": {"ship": "raise"}})
    assert (result.status, undone(result.instance_id)) == ("compensated", ["discount", "price"])


def test_a_condition_that_raises_is_the_failure_of_its_stage(execute: Any) -> None:
    result = execute(discounts, {"no": "total"})
    assert (result.status, result.failed_stage, result.error) == ("compensated", "discount", "KeyError: 'total'")
    assert undone(result.instance_id) == ["price"]


def test_a_condition_is_asked_in_a_worker_when_its_turn_comes(runtime: Runtime) -> None:
    before = len(noted("asked"))
    result = runtime.execute(discounts, {"total": 0, "set": {"price": {"total": 500}}}, timeout=20)
    assert statuses(result)["discount"] == "completed"
    (asked,) = noted("asked")[before:]
    assert int(asked[0]) != os.getpid()


def doubtful(context: dict[str, Any]) -> bool:
    context["seen"] = True
    return False


spoiling = Workflow("spoiling").add_stage(does("x"), id="x", when=doubtful).add_stage(does("y"), id="y")


def test_what_a_condition_does_to_the_context_is_gone(execute: Any) -> None:
    result = execute(spoiling, {})
    assert (result.status, result.context) == ("completed", {})


def test_a_condition_has_to_be_a_function() -> None:
    with pytest.raises(WorkflowDefinitionError, match="when of stage 'x' must be a function"):
        Workflow("w").add_stage(does("x"), id="x", when=True)  # type: ignore[arg-type]
    with pytest.raises(WorkflowDefinitionError, match=r"missing .*'when': write add_conditional\(handler, when="):
        Workflow("w").add_conditional(does("x"), id="x")  # type: ignore[call-arg]


# branches


def where(order: dict[str, Any]) -> str:
    note("selected", os.getpid())
    return order["to"]


shipping = (
    Workflow("shipping")
    .add_stage(does("pack"), id="pack", compensation=undoes("pack"))
    .add_branch(
        "route",
        where,
        {
            "abroad": [
                Stage(does("customs"), id="customs", compensation=undoes("customs"), retry=Retry.fixed(2, 0)),
                Stage(does("fly"), id="fly", compensation=undoes("fly"), after=["customs", "pack"]),
            ],
            "home": [Stage(does("drive"), id="drive", required=False)],
            "nowhere": [],
        },
    )
    .add_stage(does("bill"), id="bill", after=["route"])
)
lenient = Workflow("lenient").add_branch(
    "pick", lambda context: context["key"], {"a": [Stage(does("a"), id="a")], "b": [does("b")]}, default="a"
)


@pytest.mark.parametrize(
    ("key", "arm"), [("abroad", ["customs", "fly"]), ("home", ["drive"]), ("nowhere", [])], ids=str
)
def test_the_stages_of_the_chosen_arm_run_in_order_and_what_was_chosen_is_recorded(
    execute: Any, key: str, arm: list[str]
) -> None:
    result = execute(shipping, {"to": key})
    assert result.status == "completed"
    assert done(result.instance_id) == ["pack", *arm, "bill"]
    assert stage_of(result, "route").data == key
    assert statuses(result) == {
        name: "skipped" if name in {"customs", "fly", "drive"} - set(arm) else "completed"
        for name in ("pack", "route", "customs", "fly", "drive", "bill")
    }, "the stages of the other arms are skipped"


def test_stages_of_an_arm_retry_fail_and_are_undone_as_any_other(execute: Any) -> None:
    result = execute(shipping, {"to": "abroad", "fail": {"customs": ["raise"], "bill": "raise"}})
    assert result.status == "compensated"
    assert done(result.instance_id) == ["pack", "customs", "customs", "fly", "bill"]
    assert undone(result.instance_id) == ["fly", "customs", "pack"]
    result = execute(shipping, {"to": "abroad", "fail": {"fly": "raise"}})
    assert (result.status, result.failed_stage) == ("compensated", "fly")
    assert undone(result.instance_id) == ["customs", "pack"]


def test_an_optional_stage_of_an_arm_may_fail(execute: Any) -> None:
    result = execute(shipping, {"to": "home", "fail": {"drive": "raise"}})
    assert (result.status, statuses(result)["drive"]) == ("completed", "failed")


@pytest.mark.parametrize("key", ["mars", 5, None, ["home"]], ids=str)
def test_an_unknown_key_fails_the_instance_with_the_key_named(execute: Any, key: Any) -> None:
    result = execute(shipping, {"to": key})
    assert (result.status, result.failed_stage) == ("compensated", "route")
    assert result.error == (
        f"StageError: branch 'route' has no arm {key!r} and no default: its arms are 'abroad', 'home', 'nowhere'; "
        "add that arm, or a default"
    )
    assert undone(result.instance_id) == ["pack"]
    assert statuses(result) == {
        "pack": "compensated",
        "route": "failed",
        **dict.fromkeys(("customs", "fly", "drive", "bill"), "pending"),
    }


def test_a_selector_that_raises_is_the_failure_of_its_branch(execute: Any) -> None:
    result = execute(shipping, {})
    assert (result.status, result.failed_stage, result.error) == ("compensated", "route", "KeyError: 'to'")


def test_an_unknown_key_takes_the_default(execute: Any) -> None:
    result = execute(lenient, {"key": "mars"})
    assert (result.status, stage_of(result, "pick").data, done(result.instance_id)) == ("completed", "a", ["a"])
    result = execute(lenient, {"key": "b"})
    assert (result.status, stage_of(result, "pick").data, done(result.instance_id)) == ("completed", "b", ["b"])


def test_a_selector_runs_in_a_worker(runtime: Runtime) -> None:
    before = len(noted("selected"))
    assert runtime.execute(shipping, {"to": "home"}, timeout=20).success
    (asked,) = noted("selected")[before:]
    assert int(asked[0]) != os.getpid()


@dataclass
class Parcel:
    abroad: bool
    label: str = ""


def stamp(parcel: Parcel) -> None:
    parcel.label = "stamped"


def forbid(parcel: Parcel) -> Parcel:
    return Parcel(True, "forbidden")


parcels = Workflow("parcels", context=Parcel).add_branch(
    "kind", lambda parcel: "abroad" if parcel.abroad else "home", {"abroad": [forbid], "home": [stamp]}
)


def test_a_branch_may_be_first_and_last_and_of_a_typed_context(execute: Any) -> None:
    assert execute(parcels, Parcel(True)).context == Parcel(True, "forbidden")
    assert execute(parcels, Parcel(False)).context == Parcel(False, "stamped")


parked = Workflow("parked", on_failure="park").add_branch(
    "gate", lambda context: context["key"], {"a": [Stage(does("through"), id="through")]}
)


def test_a_branch_may_be_parked_and_resumes_with_another_context(runtime: Runtime) -> None:
    instance = runtime.submit(parked, {"key": "b"})
    with pytest.raises(InstanceParked, match="no arm 'b'"):
        instance.result(timeout=20)
    result = instance.retry(context={"key": "a"}).result(timeout=20)
    assert (result.status, stage_of(result, "gate").data) == ("completed", "a")


def test_what_no_branch_can_be_is_refused_when_it_is_written() -> None:
    with pytest.raises(WorkflowDefinitionError, match="takes a dict of arms"):
        Workflow("w").add_branch("b", where, {})
    with pytest.raises(WorkflowDefinitionError, match="strings as keys"):
        Workflow("w").add_branch("b", where, {1: [does("x")]})  # type: ignore[dict-item]
    with pytest.raises(WorkflowDefinitionError, match="'c', which is not one of its arms: a"):
        Workflow("w").add_branch("b", where, {"a": [does("x")]}, default="c")
