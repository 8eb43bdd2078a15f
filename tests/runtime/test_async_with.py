"""`async with Runtime(...)`: starting, waiting and stopping leave the event loop free."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors import Runtime, Workflow, WorkflowDefinitionError
from stageflow_actors.errors import BrokerUnavailable


def work(context: dict[str, Any]) -> int:
    time.sleep(context["seconds"])
    return 1


flow = Workflow("flow").add_stage(work)


def is_running(runtime: Runtime) -> bool:
    try:
        return runtime.node_pid > 0
    except BrokerUnavailable:
        return False


async def longest_pause(ends: asyncio.Event) -> float:
    longest, last = 0.0, time.monotonic()
    while not ends.is_set():
        await asyncio.sleep(0.01)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    return longest


def test_the_loop_goes_on_while_the_runtime_starts_drains_and_stops(tmp_path: Path) -> None:
    async def main() -> None:
        ends = asyncio.Event()
        pause = asyncio.ensure_future(longest_pause(ends))
        runtime = Runtime(flow, data_dir=tmp_path)
        async with runtime as entered:
            assert entered is runtime
            done = await runtime.submit(flow, {"seconds": 0})
            assert done.stages[0].data == 1
            left = runtime.submit(flow, {"seconds": 0.6})
            with pytest.raises(
                WorkflowDefinitionError, match="stage 'late' is added to workflow 'flow' while it runs in"
            ):
                flow.add_stage(work, id="late")
        assert left.done(), "leaving the block waits for it"
        ends.set()
        assert await pause < 0.5
        assert [stage.id for stage in flow.stages] == ["work"]
        with pytest.raises(BrokerUnavailable):
            runtime.submit(flow, {"seconds": 0})

    asyncio.run(main())


def test_a_cancelled_task_waits_only_for_the_stages_in_work(tmp_path: Path) -> None:
    async def main() -> None:
        runtime = Runtime(flow, data_dir=tmp_path)

        inside = asyncio.Event()

        async def use() -> None:
            async with runtime:
                inside.set()
                runtime.submit_many(flow, [{"seconds": 0.3}] * 100)
                await asyncio.sleep(0.2)

        using = asyncio.ensure_future(use())
        await inside.wait()
        await asyncio.sleep(0.6)
        using.cancel()
        with pytest.raises(asyncio.CancelledError):
            await using
        assert not is_running(runtime)

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 15, "30 s of stages are left for the next start"
