"""Requests that fail in workflows that park: waiting callers are notified, and only a requeue asks again."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import Raw

from stageflow_actors import InstanceParked, Runtime, StageContext, Workflow, WorkflowStatus
from stageflow_actors.core.envelope import EMPTY_TRAIL, Envelope, Failure, decode_envelope, encode
from stageflow_actors.core.failures import write_failure
from stageflow_actors.core.plan import Naming, compile_plan
from stageflow_actors.runtime.ipc.pool_spec import stage_codes
from stageflow_actors.runtime.ipc.slots import SlotTable
from stageflow_actors.runtime.messaging.settlements import Settlement
from stageflow_actors.runtime.worker.executors.base import ExecutorEnvironment
from stageflow_actors.runtime.worker.executors.registry import EXECUTORS
from stageflow_brokers.api import ACK, DEAD_LETTER, RETRY, DeliveryItem
from stageflow_brokers.types import DeliveryExtra


def ask(context: dict[str, Any], ctx: StageContext) -> Any:
    return ctx.request("nobody", {"n": 1}, timeout=0.3)


unserved = Workflow("unserved", on_failure="park").add_stage(ask, id="ask")


def test_a_waiting_caller_is_notified_of_an_instance_parked_for_lack_of_an_endpoint(runtime: Runtime) -> None:
    instance = runtime.submit(unserved, {})
    with pytest.raises(InstanceParked, match=r"endpoint 'nobody' did not answer within 0\.3 s"):
        instance.result(timeout=20)
    assert instance.status() == WorkflowStatus.parked
    assert [result.status for result in runtime.map(unserved, [{}])] == ["parked"]


class Parking:
    """The work of a stage whose message was published in order to be parked, and the steps kept with that message."""

    def __init__(self) -> None:
        plan = compile_plan(unserved, Naming())
        program, planned = next(iter(stage_codes(unserved, plan)))
        self.kept: dict[str, bytes] = {}
        self._slots = SlotTable.create(1)
        environment = ExecutorEnvironment(
            naming=Naming(), services={}, slot=self._slots[0], step_store=lambda item: self
        )
        self._work: Any = EXECUTORS[planned.kind](program, plan, environment)
        failure = write_failure(Failure("timeout", "StageTimeout: nobody answered", "StageTimeout"))
        envelope = Envelope("unserved", 1, "ask", Raw(encode({})), EMPTY_TRAIL, 0.0, attempts=-1, failure=failure)
        self.body = encode(envelope)

    def keep(self, name: str, value: bytes) -> None:
        self.kept[name] = value

    def deliver(self, attempts: int) -> Settlement:
        """How it is settled when it is delivered after so many attempts, with the steps that have been kept."""
        extra = DeliveryExtra(attempts=attempts, steps=dict(self.kept) or None) if attempts or self.kept else None
        settled = self._work(DeliveryItem(7, 1, len(self.body), "one", 1, extra), self.body)
        assert isinstance(settled, Settlement)
        return settled


def test_a_message_to_be_parked_is_counted_then_marked_then_parked() -> None:
    parking = Parking()
    assert (parking.deliver(0).item.outcome, parking.kept) == (RETRY, {})
    assert (parking.deliver(1).item.outcome, list(parking.kept)) == (DEAD_LETTER, [":park"])


def test_a_crash_before_the_parking_is_no_requeue() -> None:
    parking = Parking()
    attempts = 0
    while not parking.kept:
        attempts += parking.deliver(attempts).item.outcome == RETRY
    assert parking.deliver(attempts).item.outcome == DEAD_LETTER


def test_a_requeue_which_forgets_the_attempts_restarts_the_stage() -> None:
    parking = Parking()
    parking.deliver(0)
    parking.deliver(1)
    settled = parking.deliver(0)
    assert settled.item.outcome == ACK
    assert [target.label for target, _ in settled.publishes] == ["ask"]
    assert decode_envelope(settled.bodies[0]).attempts == 0
