"""A workflow as data: what routing, the coordinator and the node need to know of it, without any of its code.

A plan is made where the definition is and travels as msgpack. Routing goes by stage id and version; an index only
names a queue.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from stageflow_actors.definition.workflow import Workflow

__all__ = ["CompensationPlan", "Naming", "StagePlan", "WorkflowPlan", "compile_plan"]

COMPENSATE = "compensate:"
"""Label prefix of compensation messages; no stage id holds a colon."""
FAILED = ":failed"
"""Label of the event that a required stage has failed."""
DEAD = ":dead"
"""Label of the event that a message has been dead-lettered for its deaths."""
FINISHED = ":finished"
"""Label of the event that an instance has ended."""


class Naming(Struct, frozen=True):
    """How queues are called."""

    stage_prefix: str = "stageflow."
    compensation_prefix: str = "stageflow.compensation."

    @property
    def finished(self) -> str:
        """The queue of ended instances, on their way into the history."""
        return "stageflow.finished"

    @property
    def coordinator(self) -> str:
        """The queue of failed stages and dead letters."""
        return "stageflow.coordinator"

    def stage(self, workflow_id: str, index: int) -> str:
        """The queue of a stage."""
        return f"{self.stage_prefix}{workflow_id}.stage{index}"

    def compensation(self, workflow_id: str) -> str:
        """The queue of a workflow's compensations."""
        return f"{self.compensation_prefix}{workflow_id}"


class StagePlan(Struct):
    """One stage as routing sees it. `timeout` seconds; `ttl` seconds in the queue, 0 for any time."""

    id: str
    index: int
    queue: str
    required: bool = True
    compensated: bool = False
    after: tuple[str, ...] = ()
    actors: int = 1
    env: dict[str, str] = {}
    timeout: float | None = None
    ttl: float = 0.0
    max_tasks: int | None = None


class CompensationPlan(Struct):
    """The pool of a workflow's compensations."""

    queue: str
    actors: int = 1


class WorkflowPlan(Struct):
    """One version of a workflow as data."""

    id: str
    version: int
    fingerprint: str
    on_failure: str
    stages: list[StagePlan]
    compensation: CompensationPlan

    def stage(self, stage_id: str) -> StagePlan | None:
        """The stage of that id."""
        return next((stage for stage in self.stages if stage.id == stage_id), None)

    def following(self, stage_id: str) -> StagePlan | None:
        """The stage behind that one; None behind the last."""
        stage = self.stage(stage_id)
        if stage is None or stage.index + 1 >= len(self.stages):
            return None
        return self.stages[stage.index + 1]


def compile_plan(workflow: Workflow[Any], naming: Naming, *, default_ttl: float = 0.0) -> WorkflowPlan:
    """The plan of a validated workflow."""
    stages = [
        StagePlan(
            stage.id,
            index,
            naming.stage(workflow.id, index),
            stage.required,
            stage.compensation is not None,
            tuple(stage.after),
            stage.actors,
            dict(stage.env),
            stage.timeout,
            stage.ttl or default_ttl,
            stage.max_tasks,
        )
        for index, stage in enumerate(workflow.stages)
    ]
    actors = max((s.compensation.actors for s in workflow.stages if s.compensation is not None), default=1)
    return WorkflowPlan(
        workflow.id,
        workflow.version,
        workflow.fingerprint(),
        workflow.on_failure,
        stages,
        CompensationPlan(naming.compensation(workflow.id), actors),
    )
