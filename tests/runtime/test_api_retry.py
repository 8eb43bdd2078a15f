"""Retry policies at work: which failures are retried, when, and with which context."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from effect_log import note, noted

from stageflow_actors import Config, Retry, Runtime, StageContext, StageError, StageTimeout, WorkerDied, Workflow


class TransientError(Exception):
    pass


class ValidationError(ValueError):
    pass


class Stubborn:
    """A policy of the user's own: any object with `next_delay` will do."""

    def __init__(self, delays: list[float]) -> None:
        self.delays = delays

    def next_delay(self, attempt: int, error: Exception) -> float | None:
        note("asked", attempt, type(error).__name__, str(error))
        return self.delays[attempt - 1] if attempt <= len(self.delays) else None


class Broken:
    def next_delay(self, attempt: int, error: Exception) -> float | None:
        raise KeyError("no such policy")


def work(context: dict[str, Any], ctx: StageContext) -> int:
    """Does at attempt n what `context["plan"][n - 1]` says."""
    note("try", ctx.instance_id, ctx.attempt, time.time(), sorted(context))
    context[f"leak-{ctx.attempt}"] = True
    plan = context["plan"]
    what = plan[ctx.attempt - 1] if ctx.attempt <= len(plan) else "ok"
    if what == "transient":
        raise TransientError("try later")
    if what == "invalid":
        raise ValidationError("never right")
    if what == "stage-error":
        raise StageError("in my own words")
    if what == "retryable":
        raise StageError("please again", retryable=True)
    if what == "die":
        os._exit(7)
    if what == "hang":
        time.sleep(60)
    if what == "exit":
        raise SystemExit(4)
    return ctx.attempt


def flow(name: str, retry: Any = None, **options: Any) -> Workflow[dict[str, Any]]:
    return Workflow(name).add_stage(work, retry=retry, **options)


def plain_error(error: Exception) -> bool:
    return "later" in str(error)


flows = {
    "none": flow("none", timeout=0.3),
    "exponential": flow("exponential", Retry.exponential(4, 0.01, 0.02, jitter=False)),
    "linear": flow("linear", Retry.linear(3, timedelta(milliseconds=5), 1)),
    "fixed": flow("fixed", Retry.fixed(3, 0)),
    "typed": flow("typed", Retry.fixed(4, 0, retry_on=TransientError, abort_on=ValidationError)),
    "predicate": flow("predicate", Retry.fixed(4, 0, retry_on=plain_error)),
    "several": flow("several", Retry.fixed(6, 0, retry_on=[TransientError, lambda error: "right" in str(error)])),
    "abort": flow("abort", Retry.fixed(4, 0, abort_on=lambda error: "never" in str(error))),
    "named": flow("named", Retry.fixed(3, 0, retry_on=StageError)),
    "deaths-only": flow("deaths-only", Retry.fixed(3, 0, retry_on=(WorkerDied, StageTimeout)), timeout=0.3),
    "no-deaths": flow("no-deaths", Retry.fixed(9, 0, abort_on=(WorkerDied, StageTimeout)), timeout=0.3),
    "stubborn": flow("stubborn", Stubborn([0, 0.01, 0]), timeout=0.3),
    "broken": flow("broken", Broken()),
    "slow": flow("slow", Retry.fixed(2, 30)),
    "default": Workflow("default", retry=Retry.fixed(2, 0), stage_timeout=0.3).add_stage(work),
}


@pytest.fixture(scope="module")
def runtime(serve: Any) -> Runtime:
    return serve(*flows.values(), config=Config(max_stage_retries=3))


number = iter(range(1000))


def run(runtime: Runtime, name: str, *plan: str) -> tuple[Any, list[tuple[str, ...]]]:
    """The result, and what each attempt noted."""
    instance_id = f"{name}-{next(number)}"
    result = runtime.execute(flows[name], {"plan": list(plan)}, instance_id=instance_id, timeout=25)
    return result, noted("try", instance_id)


@pytest.mark.parametrize("name", ["exponential", "linear", "fixed", "stubborn", "default"])
def test_a_failed_attempt_is_followed_by_another(runtime: Runtime, name: str) -> None:
    result, tries = run(runtime, name, "transient")
    assert result.success
    assert result.stages[0].attempts == 2 == len(tries)
    assert result.stages[0].data == 2
    assert result.stages[0].error is None


@pytest.mark.parametrize(("name", "most"), [("exponential", 4), ("linear", 3), ("fixed", 3), ("default", 2)])
def test_attempts_end_at_max_attempts_with_the_last_error(runtime: Runtime, name: str, most: int) -> None:
    result, tries = run(runtime, name, *["transient"] * 9)
    assert result.status == "failed"
    assert result.error == "TransientError: try later"
    assert result.stages[0].attempts == most == len(tries)
    assert result.stages[0].error == "TransientError: try later"


def test_delays_are_waited_between_attempts(runtime: Runtime) -> None:
    _, tries = run(runtime, "exponential", *["transient"] * 9)
    times = [float(at) for _, at, _ in tries]
    gaps = [after - before for before, after in pairwise(times)]
    assert all(gap >= due for gap, due in zip(gaps, [0.01, 0.02, 0.02], strict=True)), gaps
    assert sum(gaps) < 2


def test_what_a_failed_attempt_did_to_its_context_is_gone(runtime: Runtime) -> None:
    result, tries = run(runtime, "exponential", "transient", "transient")
    assert [keys for _, _, keys in tries] == ["['plan']"] * 3
    assert result.context == {"plan": ["transient", "transient"], "leak-3": True}


@pytest.mark.parametrize(
    ("name", "plan", "attempts", "status"),
    [
        ("typed", ["transient", "transient"], 3, "completed"),
        ("typed", ["transient", "invalid"], 2, "failed"),
        ("typed", ["die"], 1, "failed"),
        ("predicate", ["transient"], 2, "completed"),
        ("predicate", ["invalid"], 1, "failed"),
        ("several", ["transient", "invalid", "transient"], 4, "completed"),
        ("abort", ["transient", "invalid"], 2, "failed"),
        ("abort", ["die"], 2, "completed"),
        ("fixed", ["stage-error"], 1, "failed"),
        ("fixed", ["retryable"], 2, "completed"),
        ("abort", ["retryable"], 2, "completed"),
        ("named", ["stage-error"], 2, "completed"),
        ("named", ["transient"], 1, "failed"),
        ("deaths-only", ["die", "hang"], 3, "completed"),
        ("deaths-only", ["transient"], 1, "failed"),
        ("no-deaths", ["die"], 1, "failed"),
        ("no-deaths", ["hang"], 1, "failed"),
        ("no-deaths", ["transient"], 2, "completed"),
        ("none", ["transient"], 1, "failed"),
        ("none", ["retryable"], 1, "failed"),
        ("none", ["hang"], 1, "failed"),
        ("none", ["die"], 2, "completed"),
        ("none", ["die", "die"], 3, "completed"),
        ("none", ["exit"], 1, "failed"),
        ("default", ["hang"], 2, "completed"),
    ],
)
def test_the_policy_decides_which_failure_is_retried(
    runtime: Runtime, name: str, plan: list[str], attempts: int, status: str
) -> None:
    result, tries = run(runtime, name, *plan)
    assert (result.status, result.stages[0].attempts, len(tries)) == (status, attempts, attempts)


@pytest.mark.parametrize(
    ("plan", "error"),
    [
        (["transient"], "TransientError: try later"),
        (["stage-error"], "StageError: in my own words"),
        (["retryable"], "StageError: please again"),
        (["exit"], "SystemExit: 4"),
        (["hang"], "StageTimeout: stage 'work' ran longer than its timeout of 0.3 s"),
    ],
)
def test_the_error_of_a_failed_instance_names_type_and_words(runtime: Runtime, plan: list[str], error: str) -> None:
    result, _ = run(runtime, "none", *plan)
    assert (result.error, result.failed_stage) == (error, "work")
    with pytest.raises(Exception, match="work") as raised:
        result.raise_for_status()
    assert raised.value.result is result


def test_deaths_stop_at_max_stage_retries_without_a_policy(runtime: Runtime) -> None:
    result, tries = run(runtime, "none", *["die"] * 9)
    assert result.status == "failed"
    assert len(tries) == 3
    assert result.stages[0].attempts == 3
    assert result.error.startswith("WorkerDied: ")
    assert "'work'" in result.error


def test_a_policy_decides_about_deaths_within_max_stage_retries(runtime: Runtime) -> None:
    result, tries = run(runtime, "no-deaths", "transient", "die")
    assert (result.status, len(tries)) == ("failed", 2)
    assert result.error.startswith("WorkerDied: ")
    unlimited, tries = run(runtime, "abort", *["die"] * 9)
    assert (unlimited.status, len(tries)) == ("failed", 3)


def test_a_policy_of_the_users_own_is_asked_about_each_failure(runtime: Runtime) -> None:
    before = len(noted("asked"))
    result, tries = run(runtime, "stubborn", "transient", "die", "hang")
    assert (result.status, len(tries)) == ("completed", 4)
    asked = noted("asked")[before:]
    assert [(attempt, kind) for attempt, kind, _ in asked] == [
        ("1", "TransientError"),
        ("2", "WorkerDied"),
        ("3", "StageTimeout"),
    ]
    assert [text.startswith(("StageTimeout", "WorkerDied")) for _, _, text in asked] == [False] * 3


def test_a_policy_that_raises_fails_the_stage_with_both_errors(runtime: Runtime) -> None:
    result, tries = run(runtime, "broken", "transient")
    assert (result.status, len(tries)) == ("failed", 1)
    assert "TransientError: try later" in result.error
    assert "KeyError" in result.error


def test_while_a_retry_waits_its_actor_is_free_for_others(runtime: Runtime, eventually: Any) -> None:
    waiting = runtime.submit(flows["slow"], {"plan": ["transient"]}, instance_id="waits")
    eventually(lambda: noted("try", "waits"), "the first attempt")
    others = list(runtime.map(flows["slow"], [{"plan": []}] * 20))
    assert all(other.success for other in others)
    queue = next(q for q in runtime.queues("stageflow.slow.stage0"))
    assert (queue.delayed, queue.busy, queue.leased) == (1, 0, 0)
    assert waiting.status() in ("running", "waiting")
    assert not waiting.done()
