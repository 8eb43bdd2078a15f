"""`stage_context`: what a handler sees in its unit test."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from stageflow_actors import InvalidContext, StageContext, StageError, StageTimeout
from stageflow_actors.testing import stage_context


def test_fields_are_as_given_and_have_defaults() -> None:
    ctx = stage_context()
    assert isinstance(ctx, StageContext)
    assert (ctx.workflow_id, ctx.instance_id, ctx.stage_id, ctx.attempt) == ("workflow", "instance", "stage", 1)
    assert (ctx.deadline, ctx.error, ctx.item, ctx.payload, ctx.previous_failure) == (None,) * 5
    assert (dict(ctx.results), ctx.cancelled, ctx.idempotency_key) == ({}, False, "workflow:instance:stage")
    assert ctx.logger.name == "stageflow.workflow.stage"
    ctx = stage_context(
        workflow_id="orders",
        instance_id="A-1",
        stage_id="pay",
        attempt=3,
        timeout=30,
        results={"price": {"total": 450}},
        payload=[1, 2],
        previous_failure=StageTimeout("late"),
        error="ValueError: boom",
        item=4,
        cancelled=True,
    )
    assert (ctx.idempotency_key, ctx.attempt, ctx.item, ctx.cancelled) == ("orders:A-1:pay[4]", 3, "4", True)
    assert ctx.deadline is not None
    assert 25 < ctx.deadline - time.monotonic() <= 30
    assert (dict(ctx.results), ctx.error) == ({"price": {"total": 450}}, "ValueError: boom")
    assert isinstance(ctx.previous_failure, StageTimeout)
    assert stage_context(payload=[1, 2]).payload == [1, 2]
    ctx = stage_context(deadline=5.0, idempotency_key="K-1")
    assert (ctx.deadline, ctx.idempotency_key) == (5.0, "K-1")


@pytest.mark.parametrize("item", [None, 2])
def test_steps_run_once_and_may_be_given(item: int | None) -> None:
    ctx = stage_context(steps={"charge": "R-1"}, item=item)
    assert ctx.is_step_completed("charge")
    assert ctx.step("charge", lambda: "R-2") == "R-1"
    assert ctx.step("ship", lambda: {"id": 7}) == {"id": 7}
    assert ctx.get_step_result("ship") == {"id": 7}
    with pytest.raises(StageError, match="twice in one attempt"):
        ctx.step("ship", lambda: 1)

    async def fetch(number: int) -> int:
        return number

    async def main() -> Any:
        return await ctx.step("fetch", fetch, 5)

    assert asyncio.run(main()) == 5
    ctx.progress(1, 2)
    assert ctx.request("stock", 1).endpoint == "stock"


def test_values_are_encoded_as_in_production() -> None:
    with pytest.raises(InvalidContext):
        stage_context(results={"price": object()})
    with pytest.raises(TypeError, match="reslts"):
        stage_context(reslts={})  # type: ignore[call-arg]
