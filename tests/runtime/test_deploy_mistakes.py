"""Deploy mistakes: data that today's code cannot decode parks its instance until code that can decode it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from effect_log import note, noted

from stageflow_actors import InstanceParked, Runtime, StageContext, Workflow


@dataclass
class Old:
    id: str
    amount: int


@dataclass
class New:
    id: str
    total_cents: int


def pay(context: Any, ctx: StageContext) -> str:
    note(ctx.workflow_id, "pay")
    return "paid"


def refund(context: Any, ctx: StageContext) -> None:
    note(ctx.workflow_id, "refund")


def ship(context: Any, ctx: StageContext) -> None:
    note(ctx.workflow_id, "ship")


def waiting(context: Any) -> list[Workflow[Any]]:
    return [
        Workflow("undone", context=context)
        .add_stage(pay, compensation=refund)
        .add_signal("go")
        .add_stage(ship, required=False),
        Workflow("parks", context=context, on_failure="park").add_signal("go").add_stage(ship),
    ]


def reason_of(runtime: Runtime, instance_id: str) -> str:
    with pytest.raises(InstanceParked) as parked:
        runtime.instance(instance_id).result(timeout=60)
    return parked.value.reason or ""


def test_a_context_of_another_definition_parks_its_instance_until_the_definition_is_back(
    serve: Any, tmp_path: Path, eventually: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    runtime = serve(*waiting(Old), data_dir=tmp_path)
    for workflow_id in ("undone", "parks"):
        runtime.submit(workflow_id, {"id": "A", "amount": 5}, instance_id=workflow_id)
    eventually(lambda: len(runtime.instances(status="waiting")) == 2, "both to wait for the signal")
    runtime.stop()
    runtime = serve(*waiting(New), data_dir=tmp_path)
    for workflow_id, before in (("undone", [("pay",)]), ("parks", [])):
        runtime.instance(workflow_id).signal("go")
        reason = reason_of(runtime, workflow_id)
        assert f"stage 'ship' of workflow '{workflow_id}' version 1 cannot decode its data" in reason
        assert "context.total_cents is missing: New requires it" in reason
        assert noted(workflow_id) == before, "neither shipped, nor skipped, nor compensated"
    runtime.stop()
    capfd.readouterr()
    again = serve(*waiting(New), data_dir=tmp_path)
    assert "total_cents is missing" in reason_of(again, "undone"), "it is tried once per start, and parked again"
    again.stop()
    last = serve(*waiting(Old), data_dir=tmp_path)
    for workflow_id, before in (("undone", [("pay",)]), ("parks", [])):
        result = last.instance(workflow_id).result(timeout=60)
        assert (str(result.status), result.compensations) == ("completed", [])
        assert noted(workflow_id) == [*before, ("ship",)]
        assert result.stages[-1].attempts == 1, "parking counts no attempt"
    said = capfd.readouterr().err
    assert said.count("resuming 1 instance of undone parked because the code that ran before could not decode") == 2
