"""`Compensation(when_uncertain=True)` without a cluster: which failures leave an unknown effect, and what is undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from stageflow_actors import (
    Compensation,
    Retry,
    Stage,
    StageContext,
    StageTimeout,
    WorkerDied,
    Workflow,
    WorkflowDefinitionError,
    WorkflowResult,
)
from stageflow_actors.testing import run


def does(context: dict[str, Any], ctx: StageContext) -> str:
    return "done"


def fails_with(*errors: Exception) -> Callable[..., Any]:
    """A handler whose attempts raise these errors, one after the other."""

    def handle(context: dict[str, Any], ctx: StageContext) -> None:
        raise errors[ctx.attempt - 1]

    return handle


def undo(context: dict[str, Any], ctx: StageContext) -> None:
    context["undone"] = [*context.get("undone", []), [ctx.stage_id, sorted(ctx.results), ctx.error]]


UNCERTAIN = Compensation(undo, when_uncertain=True)


def undone(result: WorkflowResult[Any]) -> list[str]:
    names = [stage_id for stage_id, _, _ in result.context.get("undone", [])]
    assert [one.stage_id for one in result.compensations] == names
    return names


def ending(handler: Any, **options: Any) -> WorkflowResult[Any]:
    flow = Workflow("flow").add_stage(does, id="a", compensation=undo).add_stage(does, id="b", compensation=undo)
    return run(flow.add_stage(handler, id="pay", **options), {})


@pytest.mark.parametrize("error", [StageTimeout("late"), WorkerDied("gone")], ids=["timeout", "death"])
def test_a_stage_whose_effect_is_unknown_is_undone_first_and_without_a_result(error: Exception) -> None:
    result = ending(fails_with(error), compensation=UNCERTAIN)
    assert (str(result.status), undone(result)) == ("compensated", ["pay", "b", "a"])
    assert result.context["undone"][0] == ["pay", ["a", "b"], result.error]
    assert [(stage.stage_id, str(stage.status)) for stage in result.stages] == [
        ("a", "compensated"),
        ("b", "compensated"),
        ("pay", "failed"),
    ]


def test_without_the_option_it_is_not_undone() -> None:
    assert undone(ending(fails_with(StageTimeout("late")), compensation=undo)) == ["b", "a"]


def test_a_failure_whose_effect_is_known_is_not_undone() -> None:
    assert undone(ending(fails_with(ValueError("no")), compensation=UNCERTAIN)) == ["b", "a"]


def test_an_earlier_attempt_of_unknown_effect_counts_too() -> None:
    late = fails_with(StageTimeout("late"), ValueError("no"))
    result = ending(late, compensation=UNCERTAIN, retry=Retry.fixed(2, 0))
    assert (result.error, undone(result)) == ("ValueError: no", ["pay", "b", "a"])


def test_a_stage_that_completed_after_an_uncertain_attempt_is_undone_once_in_its_place() -> None:
    def slow_once(context: dict[str, Any], ctx: StageContext) -> str:
        if ctx.attempt == 1:
            raise StageTimeout("late")
        return "done"

    flow = Workflow("flow").add_stage(does, id="a", compensation=undo)
    flow.add_stage(slow_once, id="pay", compensation=UNCERTAIN, retry=Retry.fixed(2, 0))
    flow.add_stage(does, id="b", compensation=undo).add_stage(fails_with(ValueError("no")), id="last")
    result = run(flow, {})
    assert undone(result) == ["b", "pay", "a"]
    assert result.context["undone"][1][1] == ["a", "b", "pay"]


def test_an_optional_stage_is_never_undone() -> None:
    flow = Workflow("flow").add_stage(does, id="a", compensation=undo)
    flow.add_stage(fails_with(StageTimeout("late")), id="pay", compensation=UNCERTAIN, required=False)
    assert undone(run(flow.add_stage(fails_with(ValueError("no")), id="last"), {})) == ["a"]


def test_it_is_the_only_compensation_where_no_stage_has_completed() -> None:
    flow = Workflow("flow").add_stage(fails_with(WorkerDied("gone")), id="pay", compensation=UNCERTAIN)
    result = run(flow, {})
    assert (str(result.status), undone(result)) == ("compensated", ["pay"])


def test_branches_of_unknown_effect_are_undone_before_the_completed_ones() -> None:
    flow = Workflow("flow").add_stage(does, id="a", compensation=undo)
    flow.add_parallel(
        "both",
        [
            Stage(fails_with(StageTimeout("late")), id="x", compensation=UNCERTAIN),
            Stage(does, id="y", compensation=undo),
            Stage(fails_with(StageTimeout("late")), id="z", compensation=UNCERTAIN, required=False),
        ],
    )
    result = run(flow, {})
    assert (result.failed_stage, undone(result)) == ("x", ["x", "y", "a"])


@pytest.mark.parametrize("max_failures", [0, 1])
def test_items_of_unknown_effect_are_undone_with_the_completed_ones(max_failures: int) -> None:
    seen: list[Any] = []

    def pick(item: int) -> int:
        if item == 1:
            raise StageTimeout("late")
        return 10 * item

    def put_back(item: int, ctx: StageContext) -> None:
        seen.append((item, ctx.results.get("m", "unknown")))

    flow = Workflow("flow").add_map(
        "m",
        pick,
        over=lambda context: [0, 1, 2],
        compensation=Compensation(put_back, when_uncertain=True),
        max_failures=max_failures,
    )
    result = run(flow.add_stage(fails_with(ValueError("no"))), {})
    assert (str(result.status), seen) == ("compensated", [(2, 20), (1, "unknown"), (0, 0)])
    assert [one.stage_id for one in result.compensations] == ["m"]


def test_a_request_that_is_not_answered_has_an_unknown_effect() -> None:
    flow = Workflow("flow").add_remote_stage(
        "ask", endpoint="silent", command=lambda context: {}, compensation=UNCERTAIN, retry=Retry.fixed(2, 0)
    )
    assert undone(run(flow, {})) == ["ask"]


def test_a_parked_instance_is_not_undone() -> None:
    flow = Workflow("flow", on_failure="park")
    result = run(flow.add_stage(fails_with(StageTimeout("late")), id="pay", compensation=UNCERTAIN), {})
    assert (str(result.status), result.compensations) == ("parked", [])


def test_a_class_may_set_it_and_another_value_is_refused() -> None:
    class Refund:
        when_uncertain = True

        def compensate(self, context: dict[str, Any]) -> None:
            pass

    assert Compensation(Refund).when_uncertain is True
    assert Compensation(undo).when_uncertain is False
    with pytest.raises(WorkflowDefinitionError, match="when_uncertain of compensation 'undo' must be True or False"):
        Compensation(undo, when_uncertain="yes")  # type: ignore[arg-type]
