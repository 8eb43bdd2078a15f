"""Messages in work when the broker goes: only the worker that holds one may settle it."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from stageflow_actors import Runtime, Workflow
from stageflow_actors.runtime.messaging.connect import connect
from stageflow_brokers.api import Listener
from stageflow_brokers.offline.settlements import count_settlements

Row = dict[str, Any]

IN_FLIGHT = 1_000
AGAIN_WITHIN = 2.0
"""Seconds that workers get to announce what they hold, once a broker is there again."""


def note(log: str, what: int) -> None:
    with open(log, "a") as file:
        file.write(f"begin {what}\n")


many: Workflow[Row] = Workflow("many")


@many.stage(actors=2, concurrency=IN_FLIGHT // 2)
async def hold(context: Row) -> None:
    note(context["log"], context["n"])
    while not os.path.exists(context["gate"]):  # noqa: ASYNC110 - the gate is another process's
        await asyncio.sleep(0.2)


one: Workflow[Row] = Workflow("one")


@one.stage
def work(context: Row) -> dict[str, int]:
    note(context["log"], os.getpid())
    while not os.path.exists(context["gate"]):
        time.sleep(0.005)
    return {"by": os.getpid()}


def test_a_thousand_messages_in_flight_are_announced_to_a_new_broker_and_none_is_delivered_again(
    tmp_path: Path, cluster: Any, effects: Any, eventually: Callable[..., Any]
) -> None:
    gate = tmp_path / "gate"
    with Runtime(many, data_dir=tmp_path / "data") as runtime:
        rows = [{"log": effects.path, "gate": str(gate), "n": n} for n in range(IN_FLIGHT)]
        instances = runtime.submit_many(many, rows)
        eventually(lambda: len(effects("begin")) == IN_FLIGHT, "all of them in work")
        cluster(data=tmp_path / "data").brokers[0].kill()
        runtime.queues()  # answered by the next broker
        came_back = time.monotonic()
        eventually(lambda: runtime.queues("stageflow.many.stage0")[0].leased == IN_FLIGHT, "all announced")
        assert time.monotonic() - came_back < AGAIN_WITHIN
        gate.touch()
        assert all(instance.result(timeout=60).success for instance in instances)
    assert set(Counter(n for (n,) in effects("begin")).values()) == {1}, "none was given to anybody a second time"


def test_a_worker_that_was_stopped_replaced_and_continued_settles_nothing(
    tmp_path: Path, effects: Any, eventually: Callable[..., Any]
) -> None:
    gate, data = tmp_path / "gate", tmp_path / "data"
    with Runtime(one, data_dir=data) as runtime:
        instance = runtime.submit(one, {"log": effects.path, "gate": str(gate)})
        eventually(lambda: effects("begin"), "the stage in work")
        stopped = psutil.Process(int(effects("begin")[0][0]))
        stopped.suspend()
        try:
            runtime.scale(one, "work", 2)
            # An operator who takes it for dead says so, as the supervisor does.
            operator = connect(runtime._session.address, Listener(), role="supervisor", name="operator")
            peers = operator.admin.audit().result(10)["sessions"]
            (holder,) = (each["peer"] for each in peers if each["role"] == "worker" and each["held"])
            operator.admin.report_death(holder, [], False, False, b"").result(10)
            eventually(lambda: len(effects("begin")) == 2, "another worker at it")
            gate.touch()
            result = instance.result(timeout=20)
        finally:
            stopped.resume()
            gate.touch()
        heir = int(effects("begin")[1][0])
        assert (result.status, result.stages[0].data) == ("completed", {"by": heir})
        assert heir != stopped.pid
        operator.close()
        assert runtime.execute(one, {"log": effects.path, "gate": str(gate)}, timeout=20).success
        assert runtime.instance(instance.id).result(timeout=20).stages[0].data == {"by": heir}
    counted = count_settlements(data / "journal").settled
    assert counted[instance.id, 1, "work"] == 1, "one of the two settlements was accepted"
