"""What waits is shared: priority, pause and scale act on messages that workers hold and have not begun."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import run
from typing import Any

import effect_log
import pytest
from polling import wait_until

from stageflow_actors import Breaker, Runtime, Workflow
from stageflow_actors.runtime.client.client import Client

WARM_UP = 1_500
HELD = 300


def begin(context: dict[str, Any]) -> None:
    """Note the start; a warm-up takes microseconds, so that the worker holds hundreds of messages next."""
    if "warm-up" not in context:
        effect_log.note(context["case"], context["number"], time.monotonic_ns(), os.getpid())
        gate = context.get("gate")
        while gate is not None and not Path(gate).exists():
            time.sleep(0.001)
        if context.get("fails"):
            raise ConnectionError("not now")


def work(context: dict[str, Any]) -> None:
    begin(context)
    time.sleep(context.get("seconds", 0))


async def work_async(context: dict[str, Any]) -> None:
    begin(context)
    await asyncio.sleep(context.get("seconds", 0))


plain = Workflow("plain").add_stage(work)
threads = Workflow("threads").add_stage(work, concurrency=4)
tasks = Workflow("tasks").add_stage(work_async, concurrency=4)
items = Workflow("items").add_map("each", work, over=lambda context: context["each"])
pair = Workflow("pair").add_stage(work, actors=2)
recycled = Workflow("recycled").add_stage(work, max_tasks=400)
guarded = Workflow("guarded").add_stage(work, breaker=Breaker(failures=3, reset=600))
WORKFLOWS = (plain, threads, tasks, items, pair, recycled, guarded)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with Runtime(*WORKFLOWS, data_dir=tmp_path_factory.mktemp("data")) as started:
        yield started
        started.stop(grace=0.0)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


def warm_up(runtime: Runtime, workflow: Workflow[Any], count: int = WARM_UP) -> None:
    """Run so many short messages that each worker holds many."""
    if workflow is items:
        runtime.execute(items, {"each": [{"warm-up": 1}] * WARM_UP}, timeout=60)
        return
    for _ in runtime.map_unordered(workflow, ({"warm-up": 1} for _ in range(count))):
        pass


def started(case: str) -> list[tuple[int, int]]:
    """Return (number, time in ns) of each handler that has begun, in order of time."""
    return [(int(number), int(at)) for number, at, *_ in effect_log.noted(case)]


def submit(runtime: Runtime, workflow: Workflow[Any], case: str, count: int = HELD, **more: Any) -> list[Any]:
    contexts = [{"case": case, "number": number, **more} for number in range(count)]
    if workflow is items:
        return [runtime.submit(items, {"each": contexts})]
    return list(runtime.submit_many(workflow, contexts))


def queue_of(workflow: Workflow[Any]) -> str:
    return f"stageflow.{workflow.id}.stage0" + (".each" if workflow is items else "")


def pause_by_runtime(runtime: Runtime, queue: str) -> None:
    runtime.pause(queue)


def pause_by_client(runtime: Runtime, queue: str) -> None:
    client: Client
    with Runtime.connect(runtime.data_dir) as client:
        client.pause(queue)


def pause_by_command(runtime: Runtime, queue: str) -> None:
    command = [sys.executable, "-c", "from stageflow_actors.cli.main import main; main()"]
    run([*command, "queue", "pause", queue, "--data", str(runtime.data_dir)], check=True, timeout=60)


@pytest.mark.parametrize(
    ("workflow", "pause"),
    [
        (plain, pause_by_runtime),
        (plain, pause_by_client),
        (plain, pause_by_command),
        (threads, pause_by_runtime),
        (tasks, pause_by_runtime),
        (items, pause_by_runtime),
    ],
    ids=lambda value: value.id if isinstance(value, Workflow) else value.__name__,
)
def test_after_a_pause_has_returned_nothing_begins(
    runtime: Runtime, workflow: Workflow[Any], pause: Callable[[Runtime, str], None], case: str, tmp_path: Path
) -> None:
    warm_up(runtime, workflow)
    gate, queue = tmp_path / "gate", queue_of(workflow)
    # The first messages are in work until the gate opens, and hundreds wait behind them in their worker.
    instances = submit(runtime, workflow, case, gate=str(gate))
    in_work = 4 if workflow in (threads,) else 1
    wait_until(lambda: len(started(case)) >= in_work, "the first messages")
    pause(runtime, queue)
    paused_at = time.monotonic_ns()
    gate.touch()
    wait_until(lambda: _figures(runtime, queue)["leased"] == 0, "the end of the messages in work")
    figures = _figures(runtime, queue)
    late = [(number, at) for number, at in started(case) if at > paused_at]
    assert late == []
    assert figures["state"] == "paused"
    assert figures["ready"] == HELD - len(started(case))
    begun = len(started(case))
    runtime.resume(queue)
    for instance in instances:
        assert instance.result(60).success
    numbers = [number for number, _ in started(case)]
    assert sorted(numbers) == list(range(HELD)), "each has run once"
    if in_work == 1 and workflow is not tasks:
        assert numbers[begun:] == list(range(begun, HELD)), "in their order"


def _figures(runtime: Runtime, queue: str) -> dict[str, Any]:
    [found] = [info for info in runtime.queues(queue) if info.name == queue]
    return {"leased": found.leased, "ready": found.ready, "state": found.state}


def test_an_urgent_message_begins_after_those_in_work(runtime: Runtime, case: str, tmp_path: Path) -> None:
    warm_up(runtime, pair)
    first, second = tmp_path / "first", tmp_path / "second"
    contexts = [{"case": case, "number": number, "gate": str(first)} for number in range(HELD)]
    instances = runtime.submit_many(pair, contexts)
    wait_until(lambda: len(started(case)) == 2, "two messages in work")
    urgent = runtime.submit(pair, {"case": case, "number": 999, "gate": str(second)}, priority=9)
    first.touch()
    wait_until(lambda: any(number == 999 for number, _ in started(case)), "the urgent message")
    order = [number for number, _ in started(case)]
    second.touch()
    # Each of the two workers may begin one more before its recall reaches it.
    assert order.index(999) <= 4
    assert urgent.result(60).success
    assert all(instance.result(60).success for instance in instances)


def test_workers_that_are_added_take_their_share(runtime: Runtime, case: str) -> None:
    runtime.scale(pair, "work", 1)
    wait_until(lambda: _workers(runtime, pair) == 1, "one worker")
    warm_up(runtime, pair)
    instances = submit(runtime, pair, case, 120, seconds=0.03)
    wait_until(lambda: started(case), "the first message")
    runtime.scale(pair, "work", 4)
    for instance in instances:
        assert instance.result(60).success
    workers = [pid for *_, pid in effect_log.noted(case)]
    counts = sorted(workers.count(pid) for pid in set(workers))
    assert len(counts) == 4
    assert counts[0] > 5, counts
    runtime.scale(pair, "work", 2)


def _workers(runtime: Runtime, workflow: Workflow[Any]) -> int:
    [found] = [info for info in runtime.queues(queue_of(workflow)) if info.name == queue_of(workflow)]
    return found.actors


def test_what_waits_behind_a_long_message_runs_in_the_worker_that_is_free(
    runtime: Runtime, case: str, tmp_path: Path
) -> None:
    wait_until(lambda: _workers(runtime, pair) == 2, "two workers")
    warm_up(runtime, pair)
    gate = tmp_path / "gate"
    contexts = [{"case": case, "number": 0, "gate": str(gate)}]
    contexts += [{"case": case, "number": number} for number in range(1, 200)]
    long, *others = runtime.submit_many(pair, contexts)
    for instance in others:
        assert instance.result(20).success
    assert not long.done()
    gate.touch()
    assert long.result(20).success


def test_a_worker_that_is_recycled_hands_on_what_it_has_not_begun(runtime: Runtime, case: str) -> None:
    warm_up(runtime, recycled, 300)
    for instance in submit(runtime, recycled, case, 300):
        assert instance.result(60).success
    numbers = [number for number, _ in started(case)]
    assert numbers == list(range(300)), "in their order, each once"
    workers = [pid for *_, pid in effect_log.noted(case)]
    assert [workers.count(pid) for pid in dict.fromkeys(workers)] == [100, 200]


def test_an_open_breaker_stops_also_what_its_worker_holds(runtime: Runtime, case: str) -> None:
    warm_up(runtime, guarded, 100)
    submit(runtime, guarded, case, 100, fails=True)
    wait_until(lambda: _figures(runtime, queue_of(guarded))["leased"] == 0 and len(started(case)) >= 3, "the breaker")
    assert len(started(case)) == 3
    assert _figures(runtime, queue_of(guarded))["ready"] == 97
