"""An instance whose stage fails: compensations, optional stages, `after`, and its final status."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from constructs_fixtures import statuses
from effect_log import note, noted

from stageflow_actors import (
    Compensation,
    Config,
    Replace,
    Retry,
    Runtime,
    StageContext,
    StageStatus,
    Workflow,
    WorkflowFailed,
)


def misbehave(what: str) -> None:
    """Fail in the way that is asked for."""
    if what == "raise":
        raise ValueError("boom failed")
    if what == "die":
        os._exit(5)
    if what == "hang":
        time.sleep(60)
    if what == "exit":
        raise SystemExit("bye")


def stage(name: str) -> Any:
    def run(context: dict[str, Any], ctx: StageContext) -> dict[str, str]:
        note("did", ctx.instance_id, name, ctx.attempt)
        context.setdefault("done", []).append(name)
        misbehave(context.get("fail", {}).get(name, ""))
        return {"by": name}

    return run


def undo(name: str) -> Any:
    def run(context: dict[str, Any], ctx: StageContext) -> dict[str, str]:
        result = ctx.results[name]
        note("undid", ctx.instance_id, name, ctx.attempt, result["by"], ctx.error, ",".join(context.get("undone", [])))
        context.setdefault("undone", []).append(name)
        plan = context.get("fail", {}).get(f"undo-{name}", [])
        misbehave(plan[ctx.attempt - 1] if ctx.attempt <= len(plan) else "")
        return {"ignored": "a compensation has no result"}

    return run


def saga(name: str, **options: Any) -> Workflow[dict[str, Any]]:
    """Five stages: b is optional, d has no compensation."""
    return (
        Workflow(name, **options)
        .add_stage(stage("a"), id="a", compensation=undo("a"))
        .add_stage(stage("b"), id="b", compensation=undo("b"), required=False, timeout=0.3)
        .add_stage(stage("c"), id="c", compensation=Compensation(undo("c"), timeout=0.3))
        .add_stage(stage("d"), id="d")
        .add_stage(stage("e"), id="e", compensation=undo("e"), timeout=0.3)
    )


orders = saga("orders")
patient = (
    Workflow("patient")
    .add_stage(stage("a"), id="a", compensation=Compensation(undo("a"), timeout=0.3, retry=Retry.fixed(3, 0.01)))
    .add_stage(stage("e"), id="e")
)
needy = (
    Workflow("needy")
    .add_stage(stage("a"), id="a", compensation=undo("a"))
    .add_stage(stage("b"), id="b", compensation=undo("b"), required=False)
    .add_stage(stage("o"), id="o", compensation=undo("o"), required=False, after=["a", "b"])
    .add_stage(stage("e"), id="e", compensation=undo("e"), after=["b"])
)


class Again:
    """Tries everything again, also what says that it is final."""

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        return 0.0 if attempt < 3 else None


expiring = (
    Workflow("expiring")
    .add_stage(stage("b"), id="b", required=False)
    .add_stage(stage("e"), id="e", after=["b"], ttl=0.1, retry=Again())
)
bare = Workflow("bare").add_stage(stage("d"), id="d").add_stage(stage("e"), id="e")


def bad_undo(context: dict[str, Any]) -> None:
    context["bad"] = {1, 2}


def replacing_undo(context: dict[str, Any]) -> Replace:
    return Replace({"replaced": sorted(context)})


mixed = (
    Workflow("mixed")
    .add_stage(stage("first"), id="first", compensation=replacing_undo)
    .add_stage(stage("second"), id="second", compensation=bad_undo)
    .add_stage(stage("e"), id="e")
)


class Rude(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


def odd_errors(context: dict[str, Any]) -> None:
    errors: dict[str, Exception] = {
        "bytes": OSError(f"no file {os.fsdecode(b'caf' + bytes([0xE9]))}"),
        "long": ValueError("x" * 1_000_000),
        "rude": Rude(),
        "empty": KeyError(),
    }
    raise errors[context["kind"]]


def grow(context: dict[str, Any]) -> None:
    context["blob"] = b"x" * (17 << 20)


odd = Workflow("odd").add_stage(odd_errors)
growing = (
    Workflow("growing")
    .add_stage(stage("a"), id="a", compensation=undo("a"))
    .add_stage(stage("b"), id="b", compensation=grow)
    .add_stage(odd_errors)
)
large_step = Workflow("large-step").add_stage(
    lambda context, ctx: ctx.step("big", bytes, 17 << 20) and None, id="stepper"
)


@pytest.fixture(scope="module")
def runtime(serve: Any) -> Runtime:
    return serve(
        orders, patient, needy, expiring, bare, mixed, odd, growing, large_step, config=Config(max_stage_retries=3)
    )


number = iter(range(1000))


def run(runtime: Runtime, workflow: Any, **fail: Any) -> tuple[Any, list[str], list[tuple[str, ...]]]:
    """The result, which stages ran, and what each compensation noted."""
    instance_id = f"{workflow.id}-{next(number)}"
    plan = {name.replace("_", "-"): what for name, what in fail.items()}
    result = runtime.execute(workflow, {"fail": plan}, instance_id=instance_id, timeout=25)
    return result, [name for name, _ in noted("did", instance_id)], noted("undid", instance_id)


@pytest.mark.parametrize(("how", "error"), [("raise", "ValueError: boom failed"), ("exit", "SystemExit: bye")])
def test_completed_stages_are_compensated_in_reverse_once_each(runtime: Runtime, how: str, error: str) -> None:
    result, did, undid = run(runtime, orders, e=how)
    assert did == ["a", "b", "c", "d", "e"]
    assert [name for name, *_ in undid] == ["c", "b", "a"]
    assert all(attempt == "1" for _, attempt, *_ in undid)
    assert (result.status, result.success) == ("compensated", False)
    assert (result.error, result.failed_stage) == (error, "e")
    assert [(c.stage_id, c.status, c.error) for c in result.compensations] == [
        ("c", StageStatus.completed, None),
        ("b", StageStatus.completed, None),
        ("a", StageStatus.completed, None),
    ]
    assert statuses(result) == {"a": "compensated", "b": "compensated", "c": "compensated", "d": "completed"} | {
        "e": "failed"
    }
    with pytest.raises(WorkflowFailed) as raised:
        result.raise_for_status()
    assert (raised.value.failed_stage, raised.value.result) == ("e", result)


def test_a_compensation_is_given_the_result_it_undoes_and_the_error(runtime: Runtime) -> None:
    _, _, undid = run(runtime, orders, e="raise")
    assert [(name, by, error) for name, _, by, error, _ in undid] == [
        (name, name, "ValueError: boom failed") for name in "cba"
    ]


def test_what_a_compensation_changes_is_seen_by_the_next_and_in_the_result(runtime: Runtime) -> None:
    result, _, undid = run(runtime, orders, e="raise")
    assert [seen for *_, seen in undid] == ["", "c", "c,b"]
    assert result.context["undone"] == ["c", "b", "a"]
    assert result.context["done"] == ["a", "b", "c", "d"], "what the failed stage did is not in it"


@pytest.mark.parametrize("how", ["raise", "die", "hang"])
def test_an_optional_stage_fails_and_the_workflow_goes_on_without_it(runtime: Runtime, how: str) -> None:
    result, did, undid = run(runtime, orders, b=how)
    assert result.success
    assert did == ["a", *["b"] * (3 if how == "die" else 1), "c", "d", "e"]
    assert not undid
    assert statuses(result) == {"a": "completed", "b": "failed", "c": "completed", "d": "completed", "e": "completed"}
    assert result.stages[1].error is not None
    assert (result.error, result.failed_stage) == (None, None)
    assert result.context["done"] == ["a", "c", "d", "e"]


@pytest.mark.parametrize("how", ["raise", "die", "hang"])
def test_after_a_failed_optional_stage_exactly_the_completed_ones_are_compensated(runtime: Runtime, how: str) -> None:
    result, _, undid = run(runtime, orders, b=how, e=how)
    assert result.status == "compensated"
    assert result.failed_stage == "e"
    assert [name for name, *_ in undid] == ["c", "a"]
    assert statuses(result) == {"a": "compensated", "b": "failed", "c": "compensated", "d": "completed", "e": "failed"}


def test_the_status_is_failed_where_there_was_nothing_to_compensate(runtime: Runtime) -> None:
    first, _, undid = run(runtime, orders, a="raise")
    assert (first.status, first.failed_stage, first.compensations, undid) == ("failed", "a", [], [])
    later, did, _ = run(runtime, bare, e="raise")
    assert (later.status, later.failed_stage, did) == ("failed", "e", ["d", "e"])
    assert statuses(later) == {"d": "completed", "e": "failed"}


def test_an_unmet_required_after_fails_the_instance_and_compensates(runtime: Runtime) -> None:
    result, did, undid = run(runtime, needy, b="raise")
    assert did == ["a", "b"]
    assert (result.status, result.failed_stage) == ("compensated", "e")
    assert result.error == "StageError: stage 'e' needs 'b' to have completed"
    assert [name for name, *_ in undid] == ["a"]
    assert statuses(result) == {"a": "compensated", "b": "failed", "o": "skipped", "e": "failed"}


def test_an_unmet_after_of_a_message_that_expired_before_is_the_failure_of_its_second_attempt(
    runtime: Runtime, eventually: Any
) -> None:
    queue = "stageflow.expiring.stage1"
    runtime.pause(queue)
    instance = runtime.submit(expiring, {"fail": {"b": "raise"}})
    eventually(lambda: runtime.queues(queue)[0].oldest > 0.2, "the end of its time")
    runtime.resume(queue)
    result = instance.result(timeout=30)
    assert result.error == "StageError: stage 'e' needs 'b' to have completed"
    assert [one.attempts for one in result.stages if one.stage_id == "e"] == [2]


def test_a_met_after_lets_the_stage_run(runtime: Runtime) -> None:
    result, did, _ = run(runtime, needy)
    assert result.success
    assert did == ["a", "b", "o", "e"]


@pytest.mark.parametrize(
    ("how", "attempts", "error"),
    [
        ("raise", 1, "ValueError: boom failed"),
        ("exit", 1, "SystemExit: bye"),
        ("hang", 1, "StageTimeout: "),
        ("die", 3, "WorkerDied: "),
    ],
)
def test_a_compensation_that_fails_hangs_or_dies_does_not_stop_the_others(
    runtime: Runtime, how: str, attempts: int, error: str
) -> None:
    result, _, undid = run(runtime, orders, e="raise", undo_c=[how] * 9)
    assert result.status == "compensation_failed"
    assert [name for name, *_ in undid] == ["c"] * attempts + ["b", "a"]
    assert [(c.stage_id, str(c.status)) for c in result.compensations] == [
        ("c", "failed"),
        ("b", "completed"),
        ("a", "completed"),
    ]
    assert result.compensations[0].error.startswith(error)
    assert "c" in result.compensations[0].error or how in ("raise", "exit")
    assert statuses(result) == {"a": "compensated", "b": "compensated", "c": "completed", "d": "completed"} | {
        "e": "failed"
    }
    assert result.error == "ValueError: boom failed", "what failed the workflow, not what failed its undoing"
    assert result.context["undone"] == ["b", "a"], "what the failed compensation did to the context is gone"


def test_several_compensations_may_fail_and_each_is_named(runtime: Runtime) -> None:
    result, _, _ = run(runtime, orders, e="raise", undo_c=["raise"], undo_a=["exit"])
    assert result.status == "compensation_failed"
    assert [c.stage_id for c in result.compensations if c.status == "failed"] == ["c", "a"]


@pytest.mark.parametrize(
    ("plan", "status", "attempts"),
    [
        (["raise", "raise"], "compensated", 3),
        (["hang", "die"], "compensated", 3),
        (["raise"] * 3, "compensation_failed", 3),
        (["die"] * 3, "compensation_failed", 3),
    ],
)
def test_a_compensation_is_tried_again_by_its_own_policy(
    runtime: Runtime, plan: list[str], status: str, attempts: int
) -> None:
    result, _, undid = run(runtime, patient, e="raise", undo_a=plan)
    assert result.status == status
    assert [attempt for _, attempt, *_ in undid] == [str(n + 1) for n in range(attempts)]
    if status == "compensated":
        assert result.context["undone"] == ["a"], "failed attempts leave no trace in the context"


def test_a_death_at_the_limit_is_a_dead_letter_as_evidence_that_cannot_be_requeued(runtime: Runtime) -> None:
    result, did, undid = run(runtime, orders, c="die")
    assert (result.status, result.failed_stage) == ("compensated", "c")
    assert did == ["a", "b", "c", "c", "c"]
    assert [name for name, *_ in undid] == ["b", "a"]
    assert result.error.startswith("WorkerDied: the worker died while running stage 'c'")
    assert result.stages[2].attempts == 3
    [queue] = runtime.queues("stageflow.orders.stage2")
    assert queue.dead >= 1
    dead = runtime._session.ask(lambda admin: admin.peek("dlq.stageflow.orders.stage2", 0, 100))
    mine = [message for message in dead if message["group"] == result.instance_id]
    assert len(mine) == 1
    assert b"WorkerDied" in mine[0]["reason"]
    with pytest.raises(Exception, match="evidence"):
        runtime._session.ask(lambda admin: admin.requeue("dlq.stageflow.orders.stage2", [mine[0]["id"]]))
    assert runtime.instance(result.instance_id).status() == "compensated"


def test_a_stage_that_failed_without_deaths_leaves_no_dead_letter(runtime: Runtime) -> None:
    before = sum(queue.dead for queue in runtime.queues())
    run(runtime, orders, e="raise")
    run(runtime, orders, e="hang")
    assert sum(queue.dead for queue in runtime.queues()) == before


def test_a_compensation_may_replace_the_context_and_one_that_spoils_it_has_failed(runtime: Runtime) -> None:
    result, _, _ = run(runtime, mixed, e="raise")
    assert result.status == "compensation_failed"
    assert [(c.stage_id, str(c.status)) for c in result.compensations] == [("second", "failed"), ("first", "completed")]
    assert "context.bad" in result.compensations[0].error
    assert "second" in result.compensations[0].error
    assert result.context == {"replaced": ["done", "fail"]}


def test_an_error_whose_text_cannot_be_made_is_still_reported(runtime: Runtime) -> None:
    results = {kind: runtime.execute(odd, {"kind": kind}, timeout=20) for kind in ("bytes", "long", "rude", "empty")}
    assert results["bytes"].error == "OSError: no file caf\\udce9"
    assert results["long"].error.startswith("ValueError: xxxx")
    assert len(results["long"].error) < 3000
    assert results["rude"].error == "Rude: (str() failed)"
    assert results["empty"].error == "KeyError"


def test_a_compensation_that_outgrows_the_limit_has_failed_and_the_others_go_on(runtime: Runtime) -> None:
    result = runtime.execute(growing, {}, timeout=30)
    assert result.status == "compensation_failed"
    assert [(c.stage_id, str(c.status)) for c in result.compensations] == [("b", "failed"), ("a", "completed")]
    assert result.compensations[0].error.startswith("PayloadTooLarge: ")
    assert "'b'" in result.compensations[0].error
    assert "max_message_bytes" in result.compensations[0].error
    assert "blob" not in result.context


def test_a_step_that_outgrows_the_limit_fails_the_stage_with_its_name(runtime: Runtime) -> None:
    result = runtime.execute(large_step, {}, timeout=30)
    assert result.status == "failed"
    assert "'big'" in result.error
    assert "max_message_bytes" in result.error


def test_many_sagas_failing_at_once_end_each_in_its_own_way(runtime: Runtime) -> None:
    plans = [{}, {"e": "raise"}, {"b": "raise"}, {"a": "raise"}, {"e": "raise", "undo-b": ["raise"]}]
    ends = ["completed", "compensated", "completed", "failed", "compensation_failed"]
    contexts = [{"fail": plans[n % 5], "n": n} for n in range(500)]
    results = list(runtime.map(orders, contexts))
    assert [str(result.status) for result in results] == [ends[n % 5] for n in range(500)]
    assert [result.context["n"] for result in results] == list(range(500))
    for result in results:
        undone = [name for name, *_ in noted("undid", result.instance_id)] if result.context["n"] < 25 else None
        completed = [s.stage_id for s in result.stages if s.status in ("completed", "compensated")]
        if undone is not None:
            due = [s for s in reversed(completed) if s != "d"] if not result.success else []
            assert undone == due
