"""A map parked because too many items failed runs only those again when it is requeued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from constructs_fixtures import does, done, note, noted

from stageflow_actors import InstanceParked, Runtime, StageContext, Workflow
from stageflow_actors.testing import run


def pick(item: dict[str, Any] | None, ctx: StageContext) -> Any:
    if item is None:
        note(ctx.instance_id, "none")
        return "none"
    number = item["n"]
    ctx.step("begin", note, ctx.instance_id, "began", number)
    note(ctx.instance_id, "item", number, ctx.idempotency_key)
    if not Path(item["gate"]).exists() and number in item["failing"]:
        raise ValueError(f"not {number}")
    if number in item.get("always", ()):
        raise ValueError(f"never {number}")
    return number * 10


parking = (
    Workflow("parking", on_failure="park")
    .add_map("picks", pick, over=lambda context: context["items"], into="picked", max_failures=1)
    .add_stage(does("after"), id="after")
)


def items(gate: Path, count: int, failing: list[int], **more: Any) -> list[Any]:
    return [{"n": n, "gate": str(gate), "failing": failing, **more} for n in range(count)]


def test_only_the_items_that_failed_are_done_once_more(runtime: Runtime, gate: Path) -> None:
    instance = runtime.submit(parking, {"items": items(gate, 5, [1, 3, 4])})
    for _ in range(2):
        with pytest.raises(InstanceParked, match=r"dlq\.stageflow\.parking\.stage0: .*3 of 5 items .*item 1: .*not 1"):
            instance.result(timeout=30)
        assert done(instance.id) == []
        if len(noted(instance.id, "item")) == 5:
            instance.retry()
    gate.touch()
    result = instance.retry().result(timeout=30)
    assert (result.status, result.context["picked"]) == ("completed", [0, 10, 20, 30, 40])
    ran = [words[0] for words in noted(instance.id, "item")]
    assert {n: ran.count(n) for n in "01234"} == {"0": 1, "1": 3, "2": 1, "3": 3, "4": 3}
    assert len({words[1] for words in noted(instance.id, "item")}) == 5, "each under the key that it had"
    assert sorted(noted(instance.id, "began")) == [(n,) for n in "01234"], "and with the steps that it had completed"


def test_as_many_may_fail_as_before(runtime: Runtime, gate: Path) -> None:
    instance = runtime.submit(parking, {"items": [*items(gate, 4, [0, 2], always=[2]), None]})
    with pytest.raises(InstanceParked, match="2 of 5 items"):
        instance.result(timeout=30)
    gate.touch()
    result = instance.retry().result(timeout=30)
    assert (result.status, result.context["picked"]) == ("completed", [0, 10, None, 30, "none"])
    assert len(noted(instance.id, "none")) == 1


def test_it_may_be_retried_with_another_context(runtime: Runtime, gate: Path) -> None:
    instance = runtime.submit(parking, {"items": items(gate, 3, [0, 1])})
    with pytest.raises(InstanceParked):
        instance.result(timeout=30)
    gate.touch()
    result = instance.retry(context={"items": "of before", "new": 1}).result(timeout=30)
    assert (result.context["picked"], result.context["new"]) == ([0, 10, 20], 1)


def test_one_that_is_parked_can_be_cancelled(runtime: Runtime, gate: Path) -> None:
    instance = runtime.submit(parking, {"items": items(gate, 3, [0, 1])})
    with pytest.raises(InstanceParked):
        instance.result(timeout=30)
    assert instance.cancel() == "cancelled"


def test_it_is_a_parked_result_in_this_process(gate: Path) -> None:
    result = run(parking, {"items": items(gate, 3, [0, 1])})
    assert (result.status, result.failed_stage) == ("parked", "picks")
    assert "2 of 3 items" in str(result.error)
