"""`breaker=`: a stage that keeps failing is paused, its messages wait, and it recovers automatically."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import effect_log
import pytest

from stageflow_actors import Breaker, Retry, Runtime, Stage, StageError, Workflow, WorkflowDefinitionError

Serve = Callable[..., Runtime]
Eventually = Callable[..., Any]

PATIENT = Retry.fixed(max_attempts=1000, delay=0.01)


def breaker_of(runtime: Runtime, queue: str) -> str:
    [found] = [info for info in runtime.queues(queue) if info.name == queue]
    return found.breaker


def depend_on(service: dict[str, str]) -> None:
    effect_log.note("tried")
    if Path(service["down"]).exists():
        raise ConnectionError("the service is down")


def test_messages_of_an_open_stage_wait_and_all_complete_once_it_is_well_again(
    serve: Serve, eventually: Eventually, tmp_path: Path
) -> None:
    flow = Workflow("flow").add_stage(depend_on, breaker=Breaker(failures=3, reset=0.2), retry=PATIENT)
    runtime = serve(flow)
    down = tmp_path / "down"
    down.touch()
    instances = runtime.submit_many(flow, [{"down": str(down)} for _ in range(30)])
    eventually(lambda: breaker_of(runtime, "stageflow.flow.stage0") == "open", "the breaker is open")
    assert not any(instance.done() for instance in instances)
    down.unlink()
    assert {instance.result(timeout=20).status.value for instance in instances} == {"completed"}
    assert breaker_of(runtime, "stageflow.flow.stage0") == "closed"


def test_no_more_is_tried_than_the_breaker_allows(serve: Serve, eventually: Eventually, tmp_path: Path) -> None:
    flow = Workflow("bounded").add_stage(depend_on, breaker=Breaker(failures=4, reset=600), retry=PATIENT)
    runtime = serve(flow)
    before = len(effect_log.noted("tried"))
    down = tmp_path / "down"
    down.touch()
    runtime.submit_many(flow, [{"down": str(down)} for _ in range(200)])
    eventually(lambda: breaker_of(runtime, "stageflow.bounded.stage0") == "open", "the breaker is open")
    [queue] = [info for info in runtime.queues() if info.name == "stageflow.bounded.stage0"]
    assert len(effect_log.noted("tried")) - before == 4
    assert queue.ready + queue.delayed == 200
    assert (queue.leased, queue.dead) == (0, 0)


def die(context: dict[str, Any]) -> None:
    os._exit(9)


def test_deaths_of_workers_open_it(serve: Serve, eventually: Eventually) -> None:
    flow = Workflow("deadly").add_stage(die, breaker=Breaker(failures=2, reset=600))
    runtime = serve(flow)
    runtime.submit_many(flow, [{}, {}])
    eventually(lambda: breaker_of(runtime, "stageflow.deadly.stage0") == "open", "the breaker is open")


def refuse(command: Any) -> None:
    raise StageError("no")


def test_a_remote_stage_whose_endpoint_keeps_failing_opens_its_own_and_that_of_the_endpoint(
    serve: Serve, eventually: Eventually
) -> None:
    flow = Workflow("remote").add_remote_stage(
        "ask", endpoint="oracle", command=lambda context: 1, breaker=Breaker(2, 600)
    )
    runtime = serve(flow)
    runtime.endpoint("oracle", refuse, breaker=Breaker(2, 600))
    runtime.submit_many(flow, [{}, {}])
    eventually(lambda: breaker_of(runtime, "stageflow.remote.stage0") == "open", "the stage's breaker is open")
    eventually(lambda: breaker_of(runtime, "stageflow.endpoint.oracle") == "open", "the endpoint's breaker is open")


def odd(item: int) -> int:
    if item % 2:
        raise ValueError("odd")
    return item


def test_items_of_a_map_and_branches_have_breakers_which_successes_keep_closed(serve: Serve) -> None:
    flow = (
        Workflow("many")
        .add_map("items", odd, over=lambda context: range(20), into="got", max_failures=10, breaker=Breaker(2, 600))
        .add_parallel(
            "both", [Stage(lambda context: None, id="left", breaker=Breaker(1, 600)), Stage(lambda c: 1, id="right")]
        )
    )
    runtime = serve(flow)
    result = runtime.execute(flow, {}, timeout=20)
    assert result.status.value == "completed"
    assert breaker_of(runtime, "stageflow.many.stage0.items") == "closed"
    assert breaker_of(runtime, "stageflow.many.stage0") == ""
    assert breaker_of(runtime, "stageflow.many.stage1.left") == "closed"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Breaker(failures=0), "failures of Breaker must be an integer from 1"),
        (lambda: Breaker(failures=True), "failures of Breaker must be an integer from 1"),
        (lambda: Breaker(reset=0), "reset of Breaker must be more than 0"),
        (lambda: Stage(odd, breaker=5), "the breaker of stage 'odd' must be a Breaker such as"),  # type: ignore[arg-type]
    ],
)
def test_a_breaker_that_makes_no_sense_is_refused_where_it_is_made(make: Callable[[], Any], why: str) -> None:
    with pytest.raises(WorkflowDefinitionError, match=why):
        make()
