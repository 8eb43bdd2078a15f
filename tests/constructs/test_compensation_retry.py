"""`Instance.retry` of an instance whose compensations failed: they run again, and no other does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from effect_log import note, noted

from stageflow_actors import Compensation, Retry, Runtime, StageContext, StageFlowError, Workflow
from stageflow_actors.core.outcome_check import check_outcome
from stageflow_actors.core.status import WorkflowStatus


def does(context: dict[str, Any], ctx: StageContext) -> str:
    return f"result of {ctx.stage_id}"


def fails(context: dict[str, Any]) -> None:
    raise ValueError("no stock")


def undo(context: dict[str, Any], ctx: StageContext) -> None:
    note(ctx.instance_id, "undo", ctx.stage_id, ctx.results[ctx.stage_id], ctx.error, ctx.idempotency_key)
    if ctx.stage_id in context["closed"] and not Path(context["gate"], ctx.stage_id).exists():
        raise ConnectionError(f"{ctx.stage_id} is closed")
    context["undone"] = [*context.get("undone", []), ctx.stage_id]


three = (
    Workflow("three")
    .add_stage(does, id="a", compensation=undo)
    .add_stage(does, id="b", compensation=undo)
    .add_stage(does, id="c", compensation=undo)
    .add_stage(fails, id="d")
)
waits = Workflow("waits").add_stage(does, id="a", compensation=undo).add_signal("go")


def undo_item(item: int, ctx: StageContext) -> None:
    path = Path(os.environ["STAGEFLOW_TEST_EFFECTS"]).with_name(f"gate-{ctx.instance_id}")
    ctx.step("notify", note, ctx.instance_id, "notified", item)
    note(ctx.instance_id, "undo", item)
    if item % 2 and not path.exists():
        raise ConnectionError(f"{item} is closed")


mapped = (
    Workflow("mapped")
    .add_map("m", lambda item: item, over=lambda context: [0, 1, 2, 3, 4], compensation=undo_item)
    .add_stage(fails)
)


def kills(context: dict[str, Any], ctx: StageContext) -> None:
    note(ctx.instance_id, "undo")
    ctx.step("notify", note, ctx.instance_id, "notified")
    if not Path(context["gate"]).exists():
        os._exit(7)


deadly = (
    Workflow("deadly")
    .add_stage(does, id="a", compensation=Compensation(kills, retry=Retry.fixed(2, 0)))
    .add_stage(fails)
)


def compensations(result: Any) -> list[tuple[str, str, str | None]]:
    return [(one.stage_id, str(one.status), one.error) for one in result.compensations]


def is_true(result: Any) -> bool:
    """Whether `stageflow doctor` would accept the outcome."""
    read = result._outcome_read()
    facts = (read.workflow_id, read.version, read.status, read.error, read.failed_stage)
    return check_outcome(*facts, bytes(result._outcome)) is None


def test_the_failed_compensations_run_again_in_their_order_until_all_have_succeeded(
    runtime: Runtime, tmp_path: Path
) -> None:
    instance = runtime.submit(three, {"closed": ["a", "c"], "gate": str(tmp_path)})
    first = instance.result(timeout=30)
    assert str(first.status) == "compensation_failed"
    assert [words[0] for words in noted(instance.id, "undo")] == ["c", "b", "a"]
    Path(tmp_path, "a").touch()
    second = instance.retry().result(timeout=30)
    assert [words[0] for words in noted(instance.id, "undo")] == ["c", "b", "a", "c", "a"]
    closed = "ConnectionError: c is closed"
    assert str(second.status) == "compensation_failed"
    assert compensations(second) == [("b", "completed", None), ("c", "failed", closed), ("a", "completed", None)]
    assert second.compensations[1].traceback is not None
    Path(tmp_path, "c").touch()
    third = instance.retry().result(timeout=30)
    assert [words[0] for words in noted(instance.id, "undo")] == ["c", "b", "a", "c", "a", "c"]
    assert (str(third.status), third.error, third.failed_stage) == ("compensated", "ValueError: no stock", "d")
    assert compensations(third) == [(name, "completed", None) for name in "bac"]
    assert third.context["undone"] == ["b", "a", "c"], "each continues with the context that the last one left"
    assert [str(stage.status) for stage in third.stages] == ["compensated"] * 3 + ["failed"]
    assert third.started_at == first.started_at
    words = {name: {one[1:] for one in noted(instance.id, "undo", name)} for name in "abc"}
    assert all(len(each) == 1 for each in words.values()), "result, error and key are those of the first attempt"
    assert all(map(is_true, (first, second, third)))
    with pytest.raises(StageFlowError, match="is compensated: only an instance that is parked"):
        instance.retry()


def test_only_the_items_that_could_not_be_undone_are_undone_again(runtime: Runtime, effects: Path) -> None:
    instance = runtime.submit(mapped, {})
    assert "2 of 5 items of 'm' could not be undone" in str(instance.result(timeout=30).compensations[0].error)
    again = instance.retry().result(timeout=30)
    assert "2 of 5 items of 'm' could not be undone" in str(again.compensations[0].error)
    effects.with_name(f"gate-{instance.id}").touch()
    assert str(instance.retry().result(timeout=30).status) == "compensated"
    assert [int(words[0]) for words in noted(instance.id, "undo")] == [4, 3, 2, 1, 0, 3, 1, 3, 1]
    assert [int(words[0]) for words in noted(instance.id, "notified")] == [4, 3, 2, 1, 0], "steps are kept"


def test_a_compensation_that_killed_its_workers_runs_again_and_keeps_its_steps(runtime: Runtime, gate: Path) -> None:
    instance = runtime.submit(deadly, {"gate": str(gate)})
    assert str(instance.result(timeout=60).status) == "compensation_failed"
    before = len(noted(instance.id, "undo"))
    gate.touch()
    assert str(instance.retry().result(timeout=30).status) == "compensated"
    assert (len(noted(instance.id, "undo")), len(noted(instance.id, "notified"))) == (before + 1, 1)


def test_it_may_be_given_another_context(runtime: Runtime, tmp_path: Path) -> None:
    instance = runtime.submit(three, {"closed": ["b"], "gate": str(tmp_path)})
    assert str(instance.result(timeout=30).status) == "compensation_failed"
    result = instance.retry({"closed": [], "gate": "", "note": "by hand"}).result(timeout=30)
    assert (str(result.status), result.context["note"], result.context["undone"]) == ("compensated", "by hand", ["b"])


def test_an_instance_that_was_cancelled_ends_cancelled_once_its_compensations_succeed(
    runtime: Runtime, tmp_path: Path, eventually: Any
) -> None:
    instance = runtime.submit(waits, {"closed": ["a"], "gate": str(tmp_path)})
    eventually(lambda: instance.status() == WorkflowStatus.waiting, "the instance to wait")
    assert str(instance.cancel("not wanted")) == "compensation_failed"
    Path(tmp_path, "a").touch()
    result = instance.retry().result(timeout=30)
    assert (str(result.status), result.error) == ("cancelled", "cancelled: not wanted")


def test_it_can_be_retried_after_a_restart_and_not_without_the_compensation(serve: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    runtime = serve(three, data_dir=data)
    runtime.submit(three, {"closed": ["c"], "gate": str(tmp_path)}, instance_id="late").result(timeout=30)
    runtime.stop()
    without = Workflow("three").add_stage(does, id="a", compensation=undo).add_stage(does, id="b")
    runtime = serve(without.add_stage(does, id="c").add_stage(fails, id="d"), data_dir=data)
    with pytest.raises(StageFlowError, match="no longer has a compensation of stage 'c', which failed"):
        runtime.instance("late").retry()
    runtime.stop()
    Path(tmp_path, "c").touch()
    runtime = serve(three, data_dir=data)
    assert str(runtime.instance("late").retry().result(timeout=30).status) == "compensated"
    assert [words[0] for words in noted("late", "undo")] == ["c", "b", "a", "c"]
