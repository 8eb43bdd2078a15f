"""Failures, retries and compensations in `stageflow_actors.testing.run`."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from stageflow_actors import Compensation, Retry, StageContext, StageError, Workflow, WorkflowFailed, WorkflowStatus
from stageflow_actors.testing import run

# attempts


def test_two_failed_attempts_and_a_success_are_three_calls_and_three_attempts() -> None:
    calls: list[tuple[int, str]] = []
    flow = Workflow("flow")

    @flow.stage(retry=Retry.fixed(max_attempts=3, delay=3600))
    def shaky(context: dict[str, Any], ctx: StageContext) -> None:
        calls.append((ctx.attempt, repr(ctx.previous_failure)))
        if len(calls) < 3:
            raise ConnectionError(f"try {len(calls)}")

    result = run(flow, {})
    assert result.status == "completed"
    assert result.stages[0].attempts == 3
    assert calls == [
        (1, "None"),
        (2, "StageFlowError('ConnectionError: try 1')"),
        (3, "StageFlowError('ConnectionError: try 2')"),
    ]


def test_what_a_failed_attempt_did_to_the_context_is_gone() -> None:
    flow = Workflow("flow")

    @flow.stage(retry=Retry.fixed(max_attempts=2, delay=1))
    def shaky(context: dict[str, Any], ctx: StageContext) -> None:
        context["tries"].append(ctx.attempt)
        if ctx.attempt == 1:
            context["half done"] = True
            raise ValueError("boom")

    given = {"tries": []}  # type: ignore[var-annotated]
    assert run(flow, given).context == {"tries": [2]}
    assert given == {"tries": []}


def test_what_the_last_failed_attempt_did_to_the_context_is_gone_too() -> None:
    flow = Workflow("flow")

    @flow.stage
    def spoils(context: dict[str, Any]) -> None:
        context["spoilt"] = True
        raise ValueError("boom")

    assert run(flow, {"a": 1}).context == {"a": 1}


# failure and compensation


def test_an_optional_failure_then_a_required_one_compensates_exactly_what_completed() -> None:
    undone: list[tuple[str, Any]] = []
    flow = Workflow("flow")

    def add(name: str, **options: Any) -> None:
        def handler(context: dict[str, Any]) -> str:
            if name in ("mail", "ship"):
                raise OSError(f"no {name}")
            return f"{name} done"

        def undo(context: dict[str, Any], ctx: StageContext) -> None:
            undone.append((ctx.stage_id, ctx.results[ctx.stage_id]))

        flow.add_stage(handler, id=name, compensation=undo, **options)

    add("reserve")
    add("mail", required=False)
    add("pay", required=False)
    add("print", when=lambda context: False)
    add("ship")
    add("thank")
    result = run(flow, {})
    assert result.status is WorkflowStatus.compensated
    assert result.failed_stage == "ship"
    assert result.error == "OSError: no ship"
    assert undone == [("pay", "pay done"), ("reserve", "reserve done")]
    assert [(s.stage_id, str(s.status)) for s in result.stages] == [
        ("reserve", "compensated"),
        ("mail", "failed"),
        ("pay", "compensated"),
        ("print", "skipped"),
        ("ship", "failed"),
        ("thank", "pending"),
    ]


def test_a_failure_with_nothing_to_compensate_is_failed() -> None:
    flow = Workflow("flow").add_stage(lambda context: None).add_stage(lambda context: 1 / 0)
    result = run(flow, {})
    assert result.status is WorkflowStatus.failed
    assert result.error == "ZeroDivisionError: division by zero"
    with pytest.raises(WorkflowFailed, match="ended failed at stage 'stage-2'"):
        result.raise_for_status()


def test_a_required_stage_with_an_unmet_after_fails_without_being_called() -> None:
    called: list[str] = []
    flow = (
        Workflow("flow")
        .add_stage(lambda context: None, id="book", compensation=lambda context: called.append("unbook"))
        .add_stage(lambda context: 1 / 0, id="pick", required=False)
        .add_stage(lambda context: called.append("pack"), id="pack", required=False, after=["pick"])
        .add_stage(
            lambda context: called.append("ship"), id="ship", after=["pick", "pack"], retry=Retry.fixed(3, delay=1)
        )
    )
    result = run(flow, {})
    assert result.status is WorkflowStatus.compensated
    assert result.failed_stage == "ship"
    assert result.error == "StageError: stage 'ship' needs 'pick', 'pack' to have completed"
    assert [str(s.status) for s in result.stages] == ["compensated", "failed", "skipped", "failed"]
    assert called == ["unbook"]


def test_a_compensation_that_fails_stops_no_other_and_is_never_called_compensated() -> None:
    tries: list[str] = []
    flow = Workflow("flow")
    flow.add_stage(lambda context: None, id="one", compensation=lambda context: tries.append("one"))

    def stuck(context: dict[str, Any], ctx: StageContext) -> None:
        tries.append(f"two {ctx.attempt}")
        context["half undone"] = True
        raise OSError("stuck")

    flow.add_stage(lambda context: None, id="two", compensation=Compensation(stuck, retry=Retry.fixed(2, delay=60)))
    flow.add_stage(lambda context: 1 / 0, id="three")
    result = run(flow, {})
    assert result.status is WorkflowStatus.compensation_failed
    assert not result.success
    assert tries == ["two 1", "two 2", "one"]
    assert [(c.stage_id, str(c.status), c.error) for c in result.compensations] == [
        ("two", "failed", "OSError: stuck"),
        ("one", "completed", None),
    ]
    assert [str(s.status) for s in result.stages] == ["compensated", "completed", "failed"]
    assert result.context == {}
    assert result.error == "ZeroDivisionError: division by zero"


def test_what_a_compensation_changes_is_seen_by_the_next_and_in_the_result() -> None:
    flow = Workflow("flow")
    flow.add_stage(lambda c: None, id="one", compensation=lambda c: c.update(seen=c["left"]))
    flow.add_stage(lambda c: None, id="two", compensation=lambda c: c.update(left="by two"))
    flow.add_stage(lambda c: 1 / 0, id="three")
    assert run(flow, {}).context == {"left": "by two", "seen": "by two"}


def test_on_failure_park_gives_a_parked_result_that_can_be_looked_at() -> None:
    flow = Workflow("flow", on_failure="park")
    flow.add_stage(lambda c: c.update(done=True), id="one", compensation=lambda c: c.update(undone=True))

    @flow.stage
    def two(context: dict[str, Any]) -> None:
        context["spoilt"] = True
        raise ValueError("boom")

    result = run(flow, {})
    assert result.status is WorkflowStatus.parked
    assert not result.status.terminal
    assert result.failed_stage == "two"
    assert result.error == "ValueError: boom"
    assert result.context == {"done": True}
    assert [(s.stage_id, str(s.status)) for s in result.stages] == [("one", "completed"), ("two", "failed")]
    assert result.finished_at >= result.started_at


def test_a_retryable_stage_error_asks_the_policy_and_is_final_without_one() -> None:
    calls: list[int] = []

    def busy(context: dict[str, Any], ctx: StageContext) -> None:
        calls.append(ctx.attempt)
        raise StageError("busy", retryable=True)

    assert run(Workflow("flow").add_stage(busy), {}).stages[0].attempts == 1
    policy = Retry.fixed(3, delay=60, retry_on=OSError)
    assert run(Workflow("flow").add_stage(busy, retry=policy), {}).stages[0].attempts == 3
    assert calls == [1, 1, 2, 3]


@pytest.mark.parametrize("delay", ["soon", object(), [1], -1, float("inf"), float("nan")])
def test_a_policy_that_answers_nonsense_fails_the_stage_with_that_reason(delay: Any) -> None:
    class Odd:
        def next_delay(self, attempt: int, error: Exception) -> Any:
            return delay

    flow = Workflow("flow").add_stage(lambda context: 1 / 0, retry=Odd())
    result = run(flow, {})
    assert result.status == "failed"
    assert result.error is not None
    assert result.error.startswith("ZeroDivisionError: division by zero (and its retry policy failed: ")


def test_a_policy_that_raises_fails_the_compensation_with_that_reason() -> None:
    class Broken:
        def next_delay(self, attempt: int, error: Exception) -> float | None:
            raise LookupError("no such policy")

    undo = Compensation(lambda context: 1 / 0, retry=Broken())
    flow = Workflow("flow").add_stage(lambda context: None, compensation=undo).add_stage(lambda context: 1 / 0)
    result = run(flow, {})
    assert result.status == "compensation_failed"
    assert result.compensations[0].error == (
        "ZeroDivisionError: division by zero (and its retry policy failed: LookupError: no such policy)"
    )


def test_an_error_text_that_no_encoder_takes_is_kept_escaped() -> None:
    def missing(context: dict[str, Any]) -> None:
        raise FileNotFoundError("caf\udce9.txt")

    result = run(Workflow("flow").add_stage(missing), {})
    assert result.error == "FileNotFoundError: caf\\udce9.txt"


def test_sys_exit_in_a_handler_is_the_failure_of_its_stage() -> None:
    result = run(Workflow("flow").add_stage(lambda context: sys.exit(3), id="quits"), {})
    assert result.status == "failed"
    assert result.error == "SystemExit: 3"


def test_a_result_that_holds_itself_fails_its_stage_with_a_reason() -> None:
    def circle(context: Any) -> Any:
        inner: list[Any] = []
        inner.append(inner)
        return inner

    error = run(Workflow("flow").add_stage(circle, id="s"), {}).error
    assert error is not None
    assert "the result of stage 's': value[0] refers to itself" in error


def test_an_object_with_compensate_is_undone_by_it() -> None:
    class Pay:
        def execute(self, order: dict[str, Any]) -> None:
            order["paid"] = True

        def compensate(self, order: dict[str, Any]) -> None:
            order["paid"] = False

    def fails(order: dict[str, Any]) -> None:
        raise ValueError("boom")

    for handler in (Pay, Pay()):
        result = run(Workflow("flow").add_stage(handler, id="pay").add_stage(fails), {})
        assert (result.status, result.context) == ("compensated", {"paid": False})
