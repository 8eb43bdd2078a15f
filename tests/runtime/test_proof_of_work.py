"""A worker counts as working once user code has returned or raised in it, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import Raw

from stageflow_actors import Retry, StageContext, Workflow
from stageflow_actors.core.envelope import Command, CompensationTask, decode_envelope, encode
from stageflow_actors.core.plan import Naming, compile_plan
from stageflow_actors.definition.stage import Compensation, Stage
from stageflow_actors.runtime.client.workflow_ref import WorkflowRef
from stageflow_actors.runtime.ipc.pool_spec import CompensationCode, endpoint_code, stage_codes
from stageflow_actors.runtime.ipc.slots import SlotTable
from stageflow_actors.runtime.messaging.settlements import Settlement
from stageflow_actors.runtime.worker.executors.base import ExecutorEnvironment
from stageflow_actors.runtime.worker.executors.compensation import CompensationExecutor
from stageflow_actors.runtime.worker.executors.endpoint import EndpointExecutor
from stageflow_actors.runtime.worker.executors.registry import EXECUTORS
from stageflow_brokers.types import DeliveryExtra, DeliveryItem

Flow = Workflow[Any]
FIRST = None
FRESH = DeliveryExtra(attempts=1, deaths=1, fresh=True)
CANCELLED = DeliveryExtra(cancelled="not wanted", epoch_now=2)


def well(context: Any) -> None:
    pass


def badly(context: Any) -> None:
    raise ValueError("no")


def asking(context: Any, ctx: StageContext) -> Any:
    return ctx.request("desk", {})


def environment(slots: SlotTable) -> ExecutorEnvironment:
    store: Any = SimpleNamespace(keep=lambda name, value: None, report=lambda progress: None)
    return ExecutorEnvironment(naming=Naming(), services={}, slot=slots[0], step_store=lambda item: store)


def at_stage(flow: Flow, extra: DeliveryExtra | None, change: Callable[[Any], None] = lambda envelope: None) -> bool:
    """Whether a delivery to the first place of `flow` counts, handed on plainly or otherwise."""
    plan = compile_plan(flow, Naming())
    program, planned = next(iter(stage_codes(flow, plan)))
    known = WorkflowRef(plan, dict)
    envelope = decode_envelope(known.body(known.prepare({"n": 1}), 0.0, 1 << 20))
    change(envelope)
    body = encode(envelope)
    slots = SlotTable.create(1)
    work: Any = EXECUTORS[planned.kind](program, plan, environment(slots))
    result = work(DeliveryItem(1, 2, len(body), "g", 1, extra), body)
    del work
    slots.close()
    return result.user_code_ran if isinstance(result, Settlement) else True


def staged(handler: Any, **options: Any) -> Flow:
    return Workflow("w").add_stage(handler, id="s", **options)


RAN = {
    "returned": staged(well),
    "returned, and something else than one plain message follows": staged(well).add_signal("go"),
    "raised": staged(badly),
    "raised, and is tried again": staged(badly, retry=Retry.fixed(3, 1)),
    "raised, and is parked": Workflow("w", on_failure="park").add_stage(badly, id="s"),
    "asked an endpoint": staged(asking),
    "was not wanted": staged(well, when=lambda context: False),
    "split": Workflow("w").add_map("s", well, over=lambda context: [1, 2]),
}


@pytest.mark.parametrize("flow", RAN.values(), ids=RAN.keys())
def test_a_stage_that_ran_counts(flow: Flow) -> None:
    assert at_stage(flow, FIRST)


@pytest.mark.parametrize("extra", [FRESH, CANCELLED], ids=["a death to be judged", "an instance that is cancelled"])
@pytest.mark.parametrize("flow", RAN.values(), ids=RAN.keys())
def test_what_is_settled_in_place_of_running_does_not_count(flow: Flow, extra: DeliveryExtra) -> None:
    assert not at_stage(flow, extra)


def test_a_message_that_is_not_known_here_does_not_count() -> None:
    def of_another_version(envelope: Any) -> None:
        envelope.version = 9

    assert not at_stage(staged(well), FIRST, of_another_version)


@pytest.mark.parametrize("handler", [well, badly])
@pytest.mark.parametrize("retry", [None, Retry.fixed(1, 0), Retry.fixed(2, 0)], ids=["none", "once", "twice"])
@pytest.mark.parametrize("extra", [FIRST, FRESH], ids=["first", "fresh"])
def test_a_compensation_counts_when_it_ran(handler: Any, retry: Retry | None, extra: DeliveryExtra | None) -> None:
    undo = Compensation(handler, retry=retry)
    flow: Flow = Workflow("w").add_stage(well, id="s", compensation=undo)
    plan = compile_plan(flow, Naming())
    known = WorkflowRef(plan, dict)
    envelope = decode_envelope(known.body(known.prepare({}), 0.0, 1 << 20))
    envelope.compensation = CompensationTask(["s"], [], "compensated")
    envelope.error, envelope.context = "no", Raw(encode({}))
    body = encode(envelope)
    slots = SlotTable.create(1)
    program = CompensationCode("w", 1, dict, {"s": undo})
    work = CompensationExecutor(program, plan, environment(slots))
    assert work(DeliveryItem(1, 2, len(body), "g", 1, extra), body).user_code_ran == (extra is FIRST)
    del work
    slots.close()


@pytest.mark.parametrize("handler", [well, badly])
@pytest.mark.parametrize("extra", [FIRST, FRESH, CANCELLED], ids=["first", "fresh", "cancelled"])
def test_an_endpoint_counts_when_it_ran(handler: Any, extra: DeliveryExtra | None) -> None:
    program, plan = endpoint_code(Stage(handler, id="desk", retry=Retry.fixed(1, 0)), Naming(), {})
    body = encode(Command("key", Raw(encode({})), "w", "s", 0))
    slots = SlotTable.create(1)
    work = EndpointExecutor(program, plan, environment(slots))
    result = work(DeliveryItem(1, 2, len(body), "g", 1, extra), body)
    assert isinstance(result, Settlement)
    assert result.user_code_ran == (extra is FIRST)
    del work
    slots.close()
