"""Workers that retire because they are no longer needed: none of their work is repeated."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from effect_log import note, noted

from stageflow_actors import Retry, Runtime, StageContext, Workflow


def did(context: dict[str, Any]) -> None:
    note("did", context["flow"], context["n"])


async def did_async(context: dict[str, Any]) -> None:
    note("did", context["flow"], context["n"])


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (did, {}),
    "threads": (did, {"concurrency": 3}),
    "tasks": (did_async, {"concurrency": 3}),
    "recycled": (did, {"max_tasks": 400}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_that_grows_and_shrinks_under_load_repeats_nothing(serve: Any, kind: str) -> None:
    handler, options = KINDS[kind]
    flow = Workflow(kind).add_stage(handler, id="s", actors=3, **options)
    runtime: Runtime = serve(flow)
    ended = 0
    for n, result in enumerate(runtime.map_unordered(flow, [{"flow": kind, "n": n} for n in range(6000)])):
        assert result.success, result.error
        ended += 1
        if n % 300 == 0:
            runtime.scale(flow, "s", (1, 3, 2)[n // 300 % 3])
    assert ended == 6000
    times = Counter(noted("did", kind))
    assert len(times) == 6000
    assert not {n: count for n, count in times.items() if count > 1}


@pytest.mark.parametrize("kind", ["plain", "threads", "tasks"])
def test_versions_that_are_registered_under_load_repeat_nothing(serve: Any, kind: str) -> None:
    handler, options = KINDS[kind]
    name = f"versions-{kind}"
    flow = Workflow(name).add_stage(handler, id="s", **options)
    runtime: Runtime = serve(flow)
    version = 1
    for n, result in enumerate(runtime.map_unordered(flow, [{"flow": name, "n": n} for n in range(2000)])):
        assert result.success, result.error
        if n % 400 == 200:
            version += 1
            runtime.register(Workflow(name, version=version).add_stage(handler, id="s", **options))
    assert version == 6
    times = Counter(noted("did", name))
    assert len(times) == 2000
    assert not {n: count for n, count in times.items() if count > 1}


def fails_twice(context: dict[str, Any], ctx: StageContext) -> None:
    note("tried", context["n"], ctx.attempt, type(ctx.previous_failure).__name__)
    if ctx.attempt < 3:
        raise ValueError("not yet")


def test_a_recycled_worker_whose_messages_had_all_failed_does_not_count_as_dead(serve: Any) -> None:
    flow = Workflow("recycled-failing").add_stage(fails_twice, id="s", max_tasks=1, retry=Retry.fixed(3, 0))
    runtime: Runtime = serve(flow)
    results = list(runtime.map(flow, [{"n": n} for n in range(10)]))
    assert [(result.status, result.stages[0].attempts) for result in results] == [("completed", 3)] * 10
    assert "WorkerDied" not in {words[2] for words in noted("tried")}
