"""Where a stage failed: `StageResult.traceback` and `CompensationResult.traceback`, over all kinds of stages."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import pytest

from stageflow_actors import (
    Compensation,
    Retry,
    Stage,
    StageContext,
    StageError,
    Workflow,
    WorkflowResult,
)
from stageflow_actors.runtime.worker.executors.base import ExecutorEnvironment
from stageflow_actors.testing import in_process, run

AT_ONCE = Retry.fixed(max_attempts=3, delay=0)


def deep_helper(order: dict[str, Any]) -> Any:
    return order["custmer"]


def traceback_of(result: WorkflowResult[Any], stage_id: str) -> str:
    text = result.stage(stage_id).traceback
    assert text is not None, result
    return text


def test_a_failed_stage_says_where_and_why() -> None:
    def handle(order: dict[str, Any]) -> None:
        try:
            deep_helper(order)
        except KeyError as error:
            error.add_note("order 17")
            raise ValueError("boom failed") from error

    result = run(Workflow("flow").add_stage(handle), {})
    assert result.stage("handle").error == result.error == "ValueError: boom failed"
    text = traceback_of(result, "handle")
    assert f'{__file__}", line {deep_helper.__code__.co_firstlineno + 1}, in deep_helper' in text
    assert "KeyError: 'custmer'\norder 17\n" in text
    assert text.endswith("ValueError: boom failed")
    assert "stageflow_actors/runtime" not in text


def test_a_stage_without_a_failed_attempt_has_no_traceback() -> None:
    result = run(Workflow("flow").add_stage(lambda order: None, compensation=lambda order: None).add_stage(fails), {})
    assert result.stages[0].traceback is None
    assert result.compensations[0].traceback is None


def fails(order: dict[str, Any]) -> None:
    deep_helper(order)


def test_the_last_failed_attempt_of_a_stage_that_completed_is_kept() -> None:
    flow = Workflow("flow")

    @flow.stage(retry=AT_ONCE)
    def shaky(order: dict[str, Any], ctx: StageContext) -> str:
        if ctx.attempt < 3:
            raise ConnectionError(f"try {ctx.attempt}")
        return "done"

    flow.add_stage(lambda order: None, id="next")
    result = run(flow, {})
    assert result.status == "completed"
    assert result.stage("shaky").attempts == 3
    assert result.stage("shaky").error is None
    assert traceback_of(result, "shaky").endswith("ConnectionError: try 2")
    assert result.stage("next").traceback is None


def test_the_last_stage_keeps_it_too() -> None:
    def shaky(order: dict[str, Any], ctx: StageContext) -> None:
        if ctx.attempt == 1:
            deep_helper(order)

    result = run(Workflow("flow").add_stage(shaky, retry=AT_ONCE), {})
    assert result.success
    assert "in deep_helper" in traceback_of(result, "shaky")


def test_an_optional_stage_that_failed_has_a_traceback() -> None:
    result = run(Workflow("flow").add_stage(fails, required=False).add_stage(lambda order: None, id="next"), {})
    assert result.success
    assert "in deep_helper" in traceback_of(result, "fails")


def test_the_branches_of_a_parallel_stage_keep_theirs() -> None:
    def shaky(order: dict[str, Any], ctx: StageContext) -> None:
        if ctx.attempt == 1:
            raise ConnectionError("left")

    flow = Workflow("flow", retry=AT_ONCE).add_parallel("both", [shaky, fine])
    result = run(flow.add_stage(lambda order: None, id="next"), {})
    assert result.success
    assert traceback_of(result, "shaky").endswith("ConnectionError: left")


def test_a_failed_branch_and_its_siblings_keep_theirs() -> None:
    flow = Workflow("flow").add_parallel("both", [fails, fine])
    result = run(flow, {})
    assert result.failed_stage == "fails"
    assert "in deep_helper" in traceback_of(result, "fails")


def test_a_merge_that_fails_is_located() -> None:
    def merge(order: dict[str, Any], branches: dict[str, Any]) -> None:
        deep_helper(order)

    flow = Workflow("flow").add_parallel("both", [fine, Stage(fine, id="other")], merge=merge)
    assert "in merge" in traceback_of(run(flow, {}), "both")


def fine(order: dict[str, Any]) -> None:
    return None


def test_a_failed_item_of_a_map_is_located() -> None:
    def pick(item: int) -> int:
        return 10 // item

    flow = Workflow("flow").add_map("picks", pick, over=lambda order: order["items"])
    text = traceback_of(run(flow, {"items": [1, 0, 2, 0]}), "picks")
    assert "in pick" in text
    assert "ZeroDivisionError" in text


def test_a_map_that_completed_in_spite_of_failed_items_has_a_traceback() -> None:
    def pick(item: int) -> int:
        return 10 // item

    flow = Workflow("flow").add_map("picks", pick, over=lambda order: order["items"], max_failures=2)
    result = run(flow, {"items": [1, 0, 2, 0]})
    assert result.success
    assert "in pick" in traceback_of(result, "picks")


def test_an_over_that_fails_is_located() -> None:
    flow = Workflow("flow").add_map("picks", lambda item: item, over=lambda order: deep_helper(order))
    assert "in deep_helper" in traceback_of(run(flow, {}), "picks")


def test_a_predicate_and_a_selector_that_fail_are_located() -> None:
    flow = Workflow("flow").add_conditional(fine, when=lambda order: deep_helper(order))
    assert "in deep_helper" in traceback_of(run(flow, {}), "fine")
    flow = Workflow("flow").add_branch("way", lambda order: deep_helper(order), {"a": [fine]})
    assert "in deep_helper" in traceback_of(run(flow, {}), "way")


def test_an_endpoint_that_fails_is_located_in_the_stage_that_asked_it() -> None:
    flow = Workflow("flow").add_remote_stage("stock", endpoint="stock", command=lambda order: {})
    result = run(flow, {}, endpoints={"stock": fails})
    assert "answered with an error: KeyError" in str(result.error)
    assert "in deep_helper" in traceback_of(result, "stock")


def test_a_reply_that_cannot_be_applied_is_located() -> None:
    def on_reply(order: dict[str, Any], reply: Any) -> None:
        deep_helper(reply)

    flow = Workflow("flow").add_remote_stage("stock", endpoint="stock", command=lambda order: {}, on_reply=on_reply)
    assert "in on_reply" in traceback_of(run(flow, {}, endpoints={"stock": lambda command: {}}), "stock")


def test_a_request_that_succeeds_at_its_second_attempt_keeps_the_traceback_of_the_first() -> None:
    calls: list[int] = []

    def stock(command: dict[str, Any]) -> int:
        calls.append(1)
        return len(calls) if len(calls) > 1 else deep_helper(command)  # type: ignore[no-any-return]

    flow = Workflow("flow", retry=AT_ONCE).add_remote_stage("stock", endpoint="stock", command=lambda order: {})
    result = run(flow.add_stage(fine), {}, endpoints={"stock": stock})
    assert result.success
    assert "in deep_helper" in traceback_of(result, "stock")


def test_a_signal_handler_that_fails_is_located() -> None:
    def on_signal(order: dict[str, Any], payload: Any) -> None:
        deep_helper(payload)

    flow = Workflow("flow").add_signal("approval", on_signal=on_signal)
    assert "in on_signal" in traceback_of(run(flow, {}, signals={"approval": {}}), "approval")


def test_an_async_stage_says_where() -> None:
    async def handle(order: dict[str, Any]) -> None:
        fails(order)

    assert "in deep_helper" in traceback_of(run(Workflow("flow").add_stage(handle), {}), "handle")


def test_a_failed_compensation_says_where() -> None:
    def undo(order: dict[str, Any]) -> None:
        deep_helper(order)

    result = run(Workflow("flow").add_stage(fine, compensation=undo).add_stage(fails), {})
    assert result.status == "compensation_failed"
    assert "in undo" in str(result.compensations[0].traceback)
    assert "in fails" in traceback_of(result, "fails")
    assert result.stage("fine").traceback is None


def test_a_compensation_that_succeeded_after_a_failed_attempt_keeps_its_traceback() -> None:
    def undo(order: dict[str, Any], ctx: StageContext) -> None:
        if ctx.attempt == 1:
            deep_helper(order)

    flow = Workflow("flow").add_stage(fine, compensation=Compensation(undo, retry=AT_ONCE)).add_stage(fails)
    result = run(flow, {})
    assert result.status == "compensated"
    assert "in undo" in str(result.compensations[0].traceback)


def test_a_retry_policy_that_fails_is_located_with_the_error_that_it_was_asked_about() -> None:
    class Policy:
        def next_delay(self, attempt: int, error: Exception) -> float | None:
            raise LookupError("no such policy")

    text = traceback_of(run(Workflow("flow").add_stage(fails, retry=Policy()), {}), "fails")
    assert text.index("in deep_helper") < text.index("in next_delay")
    assert text.endswith("LookupError: no such policy")


def test_a_stage_error_has_a_traceback_where_it_was_raised() -> None:
    def handle(order: dict[str, Any]) -> None:
        raise StageError("no stock")

    assert "in handle" in traceback_of(run(Workflow("flow").add_stage(handle), {}), "handle")


LIMIT = 3_000


@pytest.mark.parametrize("shape", ["plain", "last", "parallel", "map", "optional"])
def test_a_traceback_does_not_count_in_max_message_bytes(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        in_process, "ExecutorEnvironment", functools.partial(ExecutorEnvironment, max_message_bytes=LIMIT)
    )

    def shaky(order: dict[str, Any], ctx: StageContext) -> None:
        if ctx.attempt == 1 or not ctx.stage_id.startswith("shaky"):
            error = ConnectionError("bank closed")
            error.add_note("".join(map(str, range(900))))  # some 1,400 bytes compressed
            raise error

    flow = Workflow("flow", retry=Retry.fixed(2, 0, retry_on=ConnectionError))
    if shape == "parallel":
        flow.add_parallel("both", [shaky, fine])
    elif shape == "map":
        flow.add_map("picks", lambda item, ctx: shaky(item, ctx), over=lambda order: [1], max_failures=1)
    elif shape == "optional":
        flow.add_stage(shaky, id="hopeless", required=False)
    else:
        flow.add_stage(shaky)
    if shape != "last":
        flow.add_stage(fine, id="after").add_stage(fine, id="again")
    result = run(flow, {"filling": "x" * (LIMIT - 700)})
    assert result.success, result
    kept = [text for stage in result.stages if (text := stage.traceback) is not None]
    assert len(kept) == 1
    assert len(zlib.compress(kept[0].encode())) > 1_000, "it would not fit into the limit"


def test_a_context_over_the_limit_is_refused_with_a_traceback_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        in_process, "ExecutorEnvironment", functools.partial(ExecutorEnvironment, max_message_bytes=LIMIT)
    )

    def grow(order: dict[str, Any], ctx: StageContext) -> None:
        if ctx.attempt == 1:
            deep_helper(order)
        order["filling"] = "x" * LIMIT

    result = run(Workflow("flow").add_stage(grow, retry=Retry.fixed(2, 0)), {})
    assert str(result.error).startswith("PayloadTooLarge: stage 'grow'")


def test_an_unknown_stage_is_named_with_those_that_there_are() -> None:
    result = run(Workflow("flow").add_stage(fine), {})
    with pytest.raises(KeyError, match="has no stage 'other': its stages are 'fine'"):
        result.stage("other")
