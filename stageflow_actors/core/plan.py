"""`WorkflowPlan`: a workflow as data for routing, coordinator and node, without user code.

`compile_plan` makes it in the process that has the definition; it is sent as msgpack, so its field names are part of
the format. Routing uses stage ids and versions; an index is only part of a queue name.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from stageflow_actors.core.envelope import Layout, StagePlace
from stageflow_actors.core.schema import derive_schema
from stageflow_actors.definition.stage import Stage
from stageflow_actors.definition.steps import Branch, Delay, MapStage, Parallel, Signal
from stageflow_actors.definition.workflow import Workflow
from stageflow_actors.errors import StageFlowError

__all__ = [
    "DLQ_PREFIX",
    "CompensationPlan",
    "Naming",
    "StagePlan",
    "WorkflowPlan",
    "breaker_of",
    "compile_plan",
    "item_id",
]

COMPENSATE = "compensate:"
"""Label prefix of compensation messages. No stage id contains a colon."""
FAILED = ":failed"
"""Label of the event: a required stage has failed."""
DEAD = ":dead"
"""Label of the event: a message is a dead letter, because its workers died."""
UNANSWERED = ":unanswered"
"""Label of the event: a request is a dead letter, because its workers died; its sender receives an error reply."""
FINISHED = ":finished"
"""Label of the event: an instance has ended."""
BEGIN = ":begin"
"""Label of the event: an instance starts at a stage that needs more than one message to one queue."""
CANCELLED = ":cancelled"
"""Label of the event: a cancelled instance has reached a point where none of its stages runs."""
TIMEOUT = ":timeout"
"""Label of the event, and key of the gather: an instance has reached the timeout of its workflow."""
RESUME = ":resume"
"""Label of the event: a wait that needs no user code is over."""

STAGE, PARALLEL, BRANCH, MAP, ITEM, DELAY, SIGNAL = "stage", "parallel", "branch", "map", "item", "delay", "signal"
ENDPOINT = "endpoint"
"""Kinds of a `StagePlan`."""


COORDINATOR = "stageflow.coordinator"

DLQ_PREFIX = "dlq."
"""Queue `q` has its dead letters in `dlq.q`. The broker defines the same prefix, but `core` must not import it."""


class Naming(Struct, frozen=True):
    """The names of queues."""

    stage_prefix: str = "stageflow."
    compensation_prefix: str = "stageflow.compensation."

    def branch(self, workflow_id: str, index: int, stage_id: str) -> str:
        """Return the queue of a stage inside a parallel, branch or map stage."""
        return f"{self.stage(workflow_id, index)}.{stage_id}"

    def endpoint(self, name: str) -> str:
        """Return the queue of an endpoint; stage queues have another form, because they end in a number."""
        return f"{self.stage_prefix}endpoint.{name}"

    @property
    def finished(self) -> str:
        """The queue of the outcomes that the history stores."""
        return "stageflow.finished"

    @property
    def coordinator(self) -> str:
        """The queue of the coordinator's events: failed stages, dead letters, waits."""
        return COORDINATOR

    def stage(self, workflow_id: str, index: int) -> str:
        """Return the queue of a stage."""
        return f"{self.stage_prefix}{workflow_id}.stage{index}"

    def compensation(self, workflow_id: str) -> str:
        """Return the queue of a workflow's compensations."""
        return f"{self.compensation_prefix}{workflow_id}"


class StagePlan(Struct):
    """One stage of a workflow as routing sees it. All times are in seconds.

    `following` is the id of the next stage ("" at the end); `joins` is set instead for branches and items: the parallel
    or map stage whose gather they arrive at. `branches` are the stages of a parallel stage, `arms` the first stage of
    each arm of a branch by key. `ttl`: maximum time of a message in the queue, 0 for no limit. `seconds`: duration of a
    delay, or timeout of a signal. `timeout`: limit of one attempt of the handler, or of one call of another user
    function of the stage: `over` of a map, the selector of a branch, the merge of a parallel stage, `on_signal` and
    `on_timeout`. `breaker`: failures in a row before the queue is stopped, and seconds until it is tried again; (0, 0)
    for no breaker. `max_memory`: limit of a worker in bytes, 0 for no limit. `when_uncertain`: a stage or item that
    failed with its effect unknown is compensated too.
    """

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
    kind: str = STAGE
    following: str = ""
    joins: str = ""
    branches: list[str] = []
    arms: dict[str, str] = {}
    seconds: float = 0.0
    signal: str = ""
    concurrency: int = 1
    breaker: tuple[int, float] = (0, 0.0)
    max_memory: int = 0
    when_uncertain: bool = False

    @property
    def has_pool(self) -> bool:
        """True if a pool of workers consumes its queue; a stage that only waits belongs to the coordinator."""
        return self.queue != COORDINATOR

    @property
    def takes_plain_message(self) -> bool:
        """True if one message to its queue starts it; other kinds open a gather, or wait at the coordinator."""
        return self.kind in (STAGE, BRANCH, MAP)


class CompensationPlan(Struct):
    """The pool of a workflow's compensations."""

    queue: str
    actors: int = 1


class WorkflowPlan(Struct):
    """One version of a workflow as data. `shape` is the `ContextSchema` of its context type, or None."""

    id: str
    version: int
    fingerprint: str
    on_failure: str
    stages: list[StagePlan]
    compensation: CompensationPlan
    timeout: float = 0.0
    shape: Any = None

    def stage(self, stage_id: str) -> StagePlan | None:
        """Return the stage with that id, or None."""
        return next((stage for stage in self.stages if stage.id == stage_id), None)

    def next_stage(self, stage: StagePlan) -> StagePlan | None:
        """Return the stage after that one, or None."""
        return self.stage(stage.following) if stage.following else None

    def check_signal(self, name: str) -> None:
        """Raise `StageFlowError` for a signal that no stage of this workflow waits for."""
        awaited = dict.fromkeys(stage.signal for stage in self.stages if stage.kind == SIGNAL)
        if name not in awaited:
            names = f"it waits for {', '.join(map(repr, awaited))}" if awaited else "it waits for no signal"
            raise StageFlowError(
                f"workflow {self.id!r} version {self.version} never waits for a signal {name!r}: {names}"
            )

    @property
    def layout(self) -> Layout:
        """The stages in order of definition, for results."""
        inside: dict[str, tuple[str, str | None]] = {}
        by_id = {stage.id: stage for stage in self.stages}
        for outer in self.stages:
            for stage_id in outer.branches:
                inside[stage_id] = outer.id, None
            for key, stage_id in outer.arms.items():
                while stage_id != outer.following:
                    inside[stage_id] = outer.id, key
                    stage_id = by_id[stage_id].following
        places = [StagePlace(stage.id, *inside.get(stage.id, ())) for stage in self.stages if stage.kind != ITEM]
        return Layout(self.id, self.version, places)


def breaker_of(stage: Stage) -> tuple[int, float]:
    """Return the breaker of a stage as `StagePlan.breaker` has it."""
    return (0, 0.0) if stage.breaker is None else (stage.breaker.failures, stage.breaker.reset)


ITEM_SUFFIX = "[item]"


def item_id(map_id: str) -> str:
    """Return the id of the stage that handles one item of a map stage; user code cannot define such an id."""
    return map_id + ITEM_SUFFIX


def compile_plan(workflow: Workflow[Any], naming: Naming, *, default_ttl: float = 0.0) -> WorkflowPlan:
    """Return the plan of a validated workflow."""
    steps = workflow.steps
    stages = {stage.id: stage for stage in workflow.stages}
    plans: list[StagePlan] = []
    for index, step in enumerate(steps):
        following = steps[index + 1].id if index + 1 < len(steps) else ""
        queue = naming.stage(workflow.id, index)

        def plan_stage(stage: Stage, queue: str, at: int = index, **fields: Any) -> StagePlan:
            return StagePlan(
                stage.id,
                at,
                queue,
                stage.required,
                stage.compensation is not None,
                tuple(stage.after),
                stage.actors,
                dict(stage.env),
                stage.timeout,
                stage.ttl or default_ttl,
                stage.max_tasks,
                concurrency=stage.concurrency,
                breaker=breaker_of(stage),
                max_memory=stage.max_memory or 0,
                when_uncertain=stage.required and stage.compensation is not None and stage.compensation.when_uncertain,
                **fields,
            )

        if isinstance(step, Stage):
            plans.append(plan_stage(step, queue, following=following))
        elif isinstance(step, Parallel):
            ids = [stage.id for stage in step.branches]
            parallel_plan = StagePlan(step.id, index, queue, kind=PARALLEL, following=following, branches=ids)
            parallel_plan.timeout = workflow.stage_timeout
            plans.append(parallel_plan)
            for name in ids:
                own = naming.branch(workflow.id, index, name)
                plans.append(plan_stage(stages[name], own, joins=step.id))
        elif isinstance(step, Branch):
            arms = {key: arm[0].id if arm else following for key, arm in step.arms.items()}
            branch_plan = StagePlan(step.id, index, queue, kind=BRANCH, following=following, arms=arms)
            branch_plan.timeout = workflow.stage_timeout
            plans.append(branch_plan)
            for arm in step.arms.values():
                for place, stage in enumerate(arm):
                    next_id = arm[place + 1].id if place + 1 < len(arm) else following
                    own = naming.branch(workflow.id, index, stage.id)
                    plans.append(plan_stage(stages[stage.id], own, following=next_id))
        elif isinstance(step, MapStage):
            item = stages[step.id]
            map_plan = plan_stage(item, queue, kind=MAP, following=following)
            map_plan.breaker, map_plan.when_uncertain = (0, 0.0), False
            map_plan.actors, map_plan.max_tasks, map_plan.env, map_plan.max_memory = 1, None, {}, 0
            item_plan = plan_stage(item, naming.branch(workflow.id, index, step.id), kind=ITEM, joins=step.id)
            item_plan.id, item_plan.after, item_plan.compensated = item_id(step.id), (), False
            plans += [map_plan, item_plan]
        elif isinstance(step, Delay):
            plans.append(
                StagePlan(step.id, index, naming.coordinator, kind=DELAY, following=following, seconds=step.seconds)
            )
        else:
            assert isinstance(step, Signal)
            # A signal without user code needs no pool, unless it may be parked: only a worker can park a message.
            may_park = step.timeout is not None and workflow.on_failure == "park"
            without_code = step.on_signal is None and step.on_timeout is None and not may_park
            own = naming.coordinator if without_code else queue
            plans.append(
                StagePlan(
                    step.id,
                    index,
                    own,
                    timeout=None if without_code else workflow.stage_timeout,
                    kind=SIGNAL,
                    following=following,
                    seconds=step.timeout or 0.0,
                    signal=step.name,
                )
            )
    actors = max((s.compensation.actors for s in workflow.stages if s.compensation is not None), default=1)
    return WorkflowPlan(
        workflow.id,
        workflow.version,
        workflow.fingerprint(),
        workflow.on_failure,
        plans,
        CompensationPlan(naming.compensation(workflow.id), actors),
        workflow.timeout or 0.0,
        derive_schema(workflow.context),
    )
