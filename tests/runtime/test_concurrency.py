"""Several messages of one actor at once: tasks of one loop, threads, timeouts, and the message charged by a death."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from effect_log import note, noted

from stageflow_actors import (
    Compensation,
    Config,
    Retry,
    Runtime,
    StageContext,
    StageError,
    StageTimeout,
    WorkerDied,
    Workflow,
    WorkflowStatus,
)
from stageflow_actors.core.plan import StagePlan
from stageflow_actors.runtime.ipc.pool_spec import limit_concurrency

Context = dict[str, Any]

TOGETHER = 8

arrived = 0
"""In a worker: how many handlers have begun."""
most = 0
inside = 0


async def meet(context: Context) -> Context:
    """Ends once as many as may be in work at once have begun."""
    global arrived
    arrived += 1
    while arrived < TOGETHER:  # noqa: ASYNC110 - an event would have to be made on the worker's loop
        await asyncio.sleep(0.001)
    return {"pid": os.getpid(), "loop": id(asyncio.get_running_loop())}


async def count(context: Context) -> int:
    """How many were in work, at most, up to now."""
    global inside, most
    inside += 1
    most = max(most, inside)
    await asyncio.sleep(0.002)
    inside -= 1
    return most


async def leave_a_task_behind(context: Context) -> None:
    async def later() -> None:
        await asyncio.sleep(0.05)
        note("later", context["id"])

    context["task"] = str(kept.append(asyncio.create_task(later())))


kept: list[asyncio.Task[None]] = []

meeting = Workflow("meeting").add_stage(meet, concurrency=TOGETHER)
counting = Workflow("counting").add_stage(count, concurrency=3)
leaving = Workflow("leaving").add_stage(leave_a_task_behind)

barrier = threading.Barrier(TOGETHER)


def meet_in_threads(context: Context) -> Context:
    barrier.wait(20)
    return {"pid": os.getpid(), "main": threading.current_thread() is threading.main_thread()}


class Counter:
    """A class handler: one of it, whatever the number of threads."""

    def __init__(self) -> None:
        note("counter-made", os.getpid())

    def execute(self, context: Context) -> str:
        time.sleep(0.002)
        return threading.current_thread().name


blocking = Workflow("blocking").add_stage(meet_in_threads, concurrency=TOGETHER)
classy = Workflow("classy").add_stage(Counter, concurrency=3, compensation=lambda context: None)


async def late(context: Context, ctx: StageContext) -> str:
    if context["late"] and ctx.attempt == 1:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            note("cancelled", context["id"])
            raise
    return f"{os.getpid()} {type(ctx.previous_failure).__name__}"


async def swallow(context: Context) -> str:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        return "as if nothing had happened"
    return "slept"


async def stubborn(context: Context) -> int:
    if context["stubborn"]:
        time.sleep(60)  # noqa: ASYNC251 - a handler that does not know better
    return os.getpid()


late_flow = Workflow("late").add_stage(late, timeout=0.2, concurrency=4)
retried_flow = Workflow("retried").add_stage(
    late, timeout=0.2, concurrency=4, retry=Retry.fixed(max_attempts=2, delay=0)
)
swallowing = Workflow("swallowing").add_stage(swallow, timeout=0.1)
stubborn_flow = Workflow("stubborn").add_stage(stubborn, timeout=0.1)


async def undo_late(context: Context) -> None:
    note("undone", context["id"])
    await asyncio.sleep(60)


def refuse(context: Context) -> None:
    raise ValueError("refused")


def charge(context: Context) -> None:
    pass


def release(context: Context) -> None:
    note("released", context["id"], os.getpid())


undoing = (
    Workflow("undoing")
    .add_stage(charge, compensation=release)
    .add_stage(lambda context: None, id="reserve", compensation=Compensation(undo_late, timeout=0.1))
    .add_stage(refuse)
)


def wait_for(path: str) -> None:
    """Wait in a handler until this file exists."""
    while not Path(path).exists():
        time.sleep(0.002)


async def wait_for_noted(*words: object) -> None:
    while not noted(*words):  # noqa: ASYNC110 - a file cannot be awaited
        await asyncio.sleep(0.002)


async def deadly(context: Context, ctx: StageContext) -> str:
    """`killer` ends the process while `neighbour` runs; what waits behind them has not begun."""
    name, run = context["name"], context["run"]
    first = not noted("begun", run, name)
    note("begun", run, name)
    if name == "killer" and ctx.attempt == 1:
        await wait_for_noted("begun", run, "neighbour")
        if run == "in a callback":
            asyncio.get_running_loop().call_later(0.01, os._exit, 3)
            await asyncio.sleep(60)
        os._exit(3)
    if name == "neighbour" and first:
        await asyncio.sleep(60)
    return f"{ctx.attempt} {type(ctx.previous_failure).__name__}"


async def poison(context: Context) -> int:
    """Ends every process that touches it, as soon as others are in work there."""
    if context["poison"]:
        await asyncio.sleep(0.02)
        os._exit(4)
    await asyncio.sleep(0.2)
    return os.getpid()


deadly_flow = Workflow("deadly").add_stage(deadly, concurrency=2)
poisoned = Workflow("poisoned").add_stage(poison, concurrency=4)


def block(context: Context, ctx: StageContext) -> str:
    note("block", context["name"])
    if context["name"] == "late" and ctx.attempt == 1:
        time.sleep(60)
    if ctx.attempt == 1 and not noted("block", "again"):
        note("block", "again")
        time.sleep(60)
    return f"{ctx.attempt} {type(ctx.previous_failure).__name__}"


blocked = Workflow("blocked").add_stage(block, concurrency=2, timeout=0.5, retry=Retry.fixed(max_attempts=2, delay=0))


async def pid(context: Context) -> int:
    await asyncio.sleep(0.001)
    return os.getpid()


recycled = Workflow("recycled").add_stage(pid, concurrency=4, max_tasks=5)


def until_cancelled(context: Context, ctx: StageContext) -> None:
    note("waiting", context["id"])
    while not ctx.cancelled:
        time.sleep(0.002)
    note("noticed", context["id"])
    raise StageError("left off")


async def until_thrown(context: Context) -> None:
    note("waiting", context["id"])
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        note("thrown", context["id"])
        raise


async def stepwise(context: Context, ctx: StageContext) -> list[Any]:
    async def draw() -> int:
        note("drawn", ctx.instance_id)
        return 42

    value = await ctx.step("draw", draw)
    if ctx.attempt == 1:
        raise ValueError("once more")
    return [value, ctx.get_step_result("draw")]


def tell(context: Context, ctx: StageContext) -> None:
    for done in range(1, 1_001):
        ctx.progress(done, 2_000, "half way" if done == 1 else "")
    ctx.progress(2_000, 2_000)
    wait_for(context["until"])


noticing = Workflow("noticing").add_stage(until_cancelled, concurrency=2)
noticing_alone = Workflow("noticing-alone").add_stage(until_cancelled)
thrown = Workflow("thrown").add_stage(until_thrown, concurrency=2)
stepping = Workflow("stepping").add_stage(stepwise, retry=Retry.fixed(max_attempts=2, delay=0))
telling = Workflow("telling").add_stage(tell)


@pytest.fixture(scope="module")
def runtime(serve: Callable[..., Runtime]) -> Runtime:
    return serve(
        meeting,
        counting,
        leaving,
        blocking,
        classy,
        late_flow,
        retried_flow,
        swallowing,
        stubborn_flow,
        undoing,
        deadly_flow,
        blocked,
        recycled,
        noticing,
        noticing_alone,
        thrown,
        stepping,
        telling,
    )


def run_all(runtime: Runtime, workflow: Workflow[Context], contexts: list[Context]) -> list[Any]:
    """The data of the only stage of each instance."""
    instances = runtime.submit_many(workflow, contexts)
    results = [instance.result(30) for instance in instances]
    assert {result.status for result in results} == {WorkflowStatus.completed}
    return [result.stages[0].data for result in results]


# async handlers


def test_async_handlers_of_one_actor_run_together_on_one_loop(runtime: Runtime) -> None:
    data = run_all(runtime, meeting, [{} for _ in range(TOGETHER)])
    assert len({(each["pid"], each["loop"]) for each in data}) == 1


def test_no_more_run_at_once_than_concurrency_allows(runtime: Runtime) -> None:
    assert max(run_all(runtime, counting, [{} for _ in range(60)])) == 3


def test_the_loop_runs_on_between_messages(runtime: Runtime, eventually: Callable[..., Any]) -> None:
    runtime.execute(leaving, {"id": "x"}, timeout=20)
    eventually(lambda: noted("later", "x"), "the task that a handler left behind")


def test_an_async_handler_past_its_timeout_is_cancelled_and_its_worker_lives_on(runtime: Runtime) -> None:
    first = runtime.execute(late_flow, {"late": False, "id": "before"}, timeout=20)
    slow = runtime.execute(late_flow, {"late": True, "id": "slow"}, timeout=20)
    after = runtime.execute(late_flow, {"late": False, "id": "after"}, timeout=20)
    assert slow.status == WorkflowStatus.failed
    assert slow.error == "StageTimeout: stage 'late' ran longer than its timeout of 0.2 s"
    assert noted("cancelled", "slow") == [()]
    assert first.stages[0].data == after.stages[0].data


def test_a_policy_receives_the_timeout_and_so_does_the_next_attempt(runtime: Runtime) -> None:
    result = runtime.execute(retried_flow, {"late": True, "id": "again"}, timeout=20)
    assert result.stages[0].attempts == 2
    assert result.stages[0].data.split()[1] == StageTimeout.__name__


def test_a_handler_that_swallows_its_cancellation_has_still_timed_out(runtime: Runtime) -> None:
    result = runtime.execute(swallowing, {}, timeout=20)
    assert result.error == "StageTimeout: stage 'swallow' ran longer than its timeout of 0.1 s"


def test_an_async_handler_that_does_not_end_when_it_is_cancelled_is_killed(runtime: Runtime) -> None:
    before = runtime.execute(stubborn_flow, {"stubborn": False}, timeout=20)
    killed = runtime.execute(stubborn_flow, {"stubborn": True}, timeout=20)
    after = runtime.execute(stubborn_flow, {"stubborn": False}, timeout=20)
    assert killed.error is not None
    assert killed.error.endswith("ran longer than its timeout of 0.1 s and did not end when it was cancelled")
    assert before.stages[0].data != after.stages[0].data


def test_an_async_compensation_past_its_timeout_is_cancelled_and_the_others_go_on(runtime: Runtime) -> None:
    result = runtime.execute(undoing, {"id": "undo"}, timeout=20)
    assert result.status == WorkflowStatus.compensation_failed
    assert [(each.stage_id, each.status.value) for each in result.compensations] == [
        ("reserve", "failed"),
        ("charge", "completed"),
    ]
    assert (
        result.compensations[0].error
        == "StageTimeout: a compensation of 'undoing' ran longer than its timeout of 0.1 s"
    )
    assert len(noted("undone", "undo")) == 1


def test_a_step_with_an_async_function_is_awaited_and_runs_once(runtime: Runtime) -> None:
    instance = runtime.submit(stepping, {})
    assert instance.result(20).stages[0].data == [42, 42]
    assert len(noted("drawn", instance.id)) == 1


def test_a_worker_with_several_messages_in_work_is_recycled_without_losing_any(runtime: Runtime) -> None:
    pids = run_all(runtime, recycled, [{} for _ in range(23)])
    assert len(set(pids)) == 5


# threads


def test_blocking_handlers_of_one_actor_run_in_threads_beside_each_other(runtime: Runtime) -> None:
    data = run_all(runtime, blocking, [{} for _ in range(TOGETHER)])
    assert len({each["pid"] for each in data}) == 1
    assert not any(each["main"] for each in data)


def test_a_class_handler_is_made_once_for_all_threads(runtime: Runtime) -> None:
    names = run_all(runtime, classy, [{} for _ in range(30)])
    assert 1 < len(set(names)) <= 3
    assert len(noted("counter-made")) == 1


def test_a_thread_past_its_timeout_costs_its_neighbours_a_new_start_and_no_attempt(runtime: Runtime) -> None:
    slow, neighbour = runtime.submit_many(blocked, [{"name": "late"}, {"name": "other"}])
    assert slow.result(20).stages[0].data == "2 StageTimeout"
    assert neighbour.result(20).status == WorkflowStatus.completed


# deaths


def test_what_was_running_when_a_worker_died_is_charged_and_what_waited_is_not(runtime: Runtime) -> None:
    contexts = [{"name": name, "run": "in a callback"} for name in ("killer", "neighbour", "waiting")]
    killer, neighbour, waiting = run_all(runtime, deadly_flow, contexts)
    assert killer == neighbour == f"2 {WorkerDied.__name__}", "no coroutine was resumed at that time"
    assert waiting == "1 NoneType"


def test_a_coroutine_in_which_a_worker_died_is_charged_alone(runtime: Runtime) -> None:
    contexts = [{"name": name, "run": "in a coroutine"} for name in ("killer", "neighbour", "waiting")]
    killer, neighbour, waiting = run_all(runtime, deadly_flow, contexts)
    assert killer == f"2 {WorkerDied.__name__}"
    assert neighbour == waiting == "1 NoneType"


def test_a_message_that_runs_beside_a_poisoned_one_outlives_it(serve: Callable[..., Runtime]) -> None:
    runtime = serve(poisoned)
    contexts = [{"poison": number == 1} for number in range(6)]
    results = [instance.result(30) for instance in runtime.submit_many(poisoned, contexts)]
    assert [result.status.value for result in results].count("completed") == 5
    assert results[1].status == WorkflowStatus.failed
    assert results[1].error is not None
    assert "died" in results[1].error


# limits


@pytest.mark.parametrize(
    ("actors", "concurrency", "most", "expected"),
    [
        (4, 1, None, (4, 1)),
        (4, 5, None, (4, 5)),
        (4, 5, 20, (4, 5)),
        (4, 5, 19, (4, 4)),
        (4, 5, 4, (4, 1)),
        (4, 5, 3, (3, 1)),
        (1, 10, 3, (1, 3)),
    ],
)
def test_max_stage_concurrency_bounds_actors_times_concurrency(
    actors: int, concurrency: int, most: int | None, expected: tuple[int, int]
) -> None:
    place = StagePlan("a", 0, "q", actors=actors, concurrency=concurrency)
    assert limit_concurrency(place, most) == expected


def test_a_stage_never_has_more_in_work_than_max_stage_concurrency(serve: Callable[..., Runtime]) -> None:
    runtime = serve(counting, config=Config(max_stage_concurrency=2))
    assert max(run_all(runtime, counting, [{} for _ in range(40)])) == 2


# cancellation and progress


@pytest.mark.parametrize(
    ("workflow", "word"), [(noticing, "noticed"), (noticing_alone, "noticed"), (thrown, "thrown")], ids=lambda w: str(w)
)
def test_a_cancelled_instance_is_noticed_by_the_stage_that_runs(
    runtime: Runtime, eventually: Callable[..., Any], workflow: Workflow[Context], word: str
) -> None:
    name = workflow.id
    instance = runtime.submit(workflow, {"id": name})
    eventually(lambda: noted("waiting", name), "the stage in work")
    instance.cancel("no longer wanted")
    assert instance.result(20).status == WorkflowStatus.cancelled
    assert noted(word, name) == [()]


def test_progress_shows_while_the_stage_runs_and_is_gone_with_it(
    runtime: Runtime, eventually: Callable[..., Any], tmp_path: Path
) -> None:
    until = tmp_path / "until"
    instance = runtime.submit(telling, {"until": str(until)})
    eventually(lambda: instance.progress() == (2_000, 2_000, ""), "the last report")
    assert runtime.instance(instance.id).progress() == (2_000, 2_000, "")
    until.touch()
    instance.result(20)
    assert instance.progress() is None
