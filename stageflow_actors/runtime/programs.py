"""What a worker is sent at its birth: the code it runs and the data it routes by.

Code travels as one opaque blob made by `definition.shipping` in the program and opened in the worker, and nowhere
between: the node and the zygote pass it on unread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from stageflow_actors.core.plan import Naming, WorkflowPlan
from stageflow_actors.definition.shipping import dumps
from stageflow_actors.definition.stage import Compensation, Stage
from stageflow_actors.definition.workflow import Workflow

__all__ = ["CompensationProgram", "PoolSpec", "StageProgram", "WorkerPayload", "pool_specs"]


@dataclass
class StageProgram:
    """The code of one stage of one version: pickled whole."""

    workflow_id: str
    version: int
    context: type[Any]
    stage: Stage
    factories: dict[str, Callable[[], Any]] = field(default_factory=dict)


@dataclass
class CompensationProgram:
    """The code of all compensations of one version: pickled whole."""

    workflow_id: str
    version: int
    context: type[Any]
    compensations: dict[str, Compensation]
    factories: dict[str, Callable[[], Any]] = field(default_factory=dict)


class PoolSpec(Struct):
    """One pool as the node starts it. `code` is opaque there."""

    queue: str
    workflow_id: str
    stage_id: str
    kind: str
    actors: int
    env: dict[str, str]
    code: bytes
    plan: WorkflowPlan
    max_tasks: int = 0
    evidence: bool = True
    max_length: int = 0


class WorkerPayload(Struct):
    """What one worker process is given."""

    address: str
    peer: int
    worker_id: str
    kind: str
    queue: str
    code: bytes
    plan: WorkflowPlan
    naming: Naming
    max_message_bytes: int
    max_tasks: int = 0
    log_level: str = "WARNING"


def pool_specs(
    workflow: Workflow[Any],
    plan: WorkflowPlan,
    services: Mapping[str, Callable[[], Any]],
    *,
    max_queue_length: int = 0,
    max_concurrency: int | None = None,
) -> list[PoolSpec]:
    """The pools that run a workflow. Raises `WorkflowDefinitionError` for code that cannot be sent to a process."""
    specs = []
    for stage, planned in zip(workflow.stages, plan.stages, strict=True):
        wanted = {name: services[name] for name in stage.services}
        program = StageProgram(
            workflow.id, workflow.version, workflow.context, stage.replace(compensation=None), wanted
        )
        actors = planned.actors if max_concurrency is None else min(planned.actors, max_concurrency)
        specs.append(
            PoolSpec(
                planned.queue,
                workflow.id,
                stage.id,
                "stage",
                actors,
                planned.env,
                dumps(program, (workflow.context,)),
                plan,
                planned.max_tasks or 0,
                not (planned.required and workflow.on_failure == "park"),
                max_queue_length if planned.index == 0 else 0,
            )
        )
    compensations = {s.id: s.compensation for s in workflow.stages if s.compensation is not None}
    if compensations:
        names = {name for s in workflow.stages for name in s.compensation_services}
        undo = CompensationProgram(
            workflow.id, workflow.version, workflow.context, compensations, {n: services[n] for n in names}
        )
        specs.append(
            PoolSpec(
                plan.compensation.queue,
                workflow.id,
                "",
                "compensation",
                plan.compensation.actors,
                {},
                dumps(undo, (workflow.context,)),
                plan,
            )
        )
    return specs
