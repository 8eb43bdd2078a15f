"""A workflow as data: what routing, the coordinator and the node need to know of it, without any of its code.

A plan is made where the definition is and travels as msgpack. Routing goes by stage id and version; an index only
names a queue.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

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
"""Label prefix of compensation messages; no stage id holds a colon."""
FAILED = ":failed"
"""Label of the event that a required stage has failed."""
DEAD = ":dead"
"""Label of the event that a message has been dead-lettered for its deaths."""
UNANSWERED = ":unanswered"
"""Label of the event that a request has been dead-lettered for its deaths: whoever asked is told."""
FINISHED = ":finished"
"""Label of the event that an instance has ended."""
BEGIN = ":begin"
"""Label of the event that an instance begins at a place which is more than one message to one queue."""
CANCELLED = ":cancelled"
"""Label of the event that a cancelled instance has come to where nothing of it is in work any more."""
TIMEOUT = ":timeout"
"""Label of the event, and key of the gather, that an instance has run for as long as its workflow may."""
RESUME = ":resume"
"""Label of the event that a wait is over which needs no code of the user's."""

STAGE, PARALLEL, BRANCH, MAP, ITEM, DELAY, SIGNAL = "stage", "parallel", "branch", "map", "item", "delay", "signal"
ENDPOINT = "endpoint"
"""Kinds of a `StagePlan`."""


COORDINATOR = "stageflow.coordinator"

DLQ_PREFIX = "dlq."
"""The dead letters of queue `q` are the queue `dlq.q`. The broker has the same prefix, which `core` may not import."""


class Naming(Struct, frozen=True):
    """How queues are called."""

    stage_prefix: str = "stageflow."
    compensation_prefix: str = "stageflow.compensation."

    def branch(self, workflow_id: str, index: int, stage_id: str) -> str:
        """The queue of one stage of a parallel, branch or map stage."""
        return f"{self.stage(workflow_id, index)}.{stage_id}"

    def endpoint(self, name: str) -> str:
        """The queue of an endpoint; no workflow is called like it, for its stages end in a number."""
        return f"{self.stage_prefix}endpoint.{name}"

    @property
    def finished(self) -> str:
        """The queue of ended instances, on their way into the history."""
        return "stageflow.finished"

    @property
    def coordinator(self) -> str:
        """The queue of failed stages and dead letters."""
        return COORDINATOR

    def stage(self, workflow_id: str, index: int) -> str:
        """The queue of a stage."""
        return f"{self.stage_prefix}{workflow_id}.stage{index}"

    def compensation(self, workflow_id: str) -> str:
        """The queue of a workflow's compensations."""
        return f"{self.compensation_prefix}{workflow_id}"


class StagePlan(Struct):
    """One place of a workflow where something happens, as routing sees it. Seconds throughout.

    `following` is the place behind it ("" at the end); `joins` the parallel or map stage whose gather it reports to
    instead. `branches` are the stages of a parallel one, `arms` the first stage of each arm of a branch by key. `ttl`:
    how long a message may wait in the queue, 0 for any time; `seconds`: of a delay, or until a signal is given up.
    `timeout`: what one attempt of its handler may take, or one call of another function of the user's there: a map
    stage's `over`, what selects an arm, what merges branches, what takes in a signal or its absence.
    `breaker`: after how many failures in a row its queue waits, and for how many seconds; (0, 0) for never.
    `max_memory`: bytes that a worker may use; 0 for any number.
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

    @property
    def has_pool(self) -> bool:
        """Whether workers embody its queue; what only waits is the coordinator's."""
        return self.queue != COORDINATOR


class CompensationPlan(Struct):
    """The pool of a workflow's compensations."""

    queue: str
    actors: int = 1


class WorkflowPlan(Struct):
    """One version of a workflow as data. `shape` is that of its contexts, None where nothing can be told of it."""

    id: str
    version: int
    fingerprint: str
    on_failure: str
    stages: list[StagePlan]
    compensation: CompensationPlan
    timeout: float = 0.0
    shape: Any = None

    def stage(self, stage_id: str) -> StagePlan | None:
        """The stage of that id."""
        return next((stage for stage in self.stages if stage.id == stage_id), None)

    def next_stage(self, stage: StagePlan) -> StagePlan | None:
        """The place behind that one; None behind the last."""
        return self.stage(stage.following) if stage.following else None

    def check_signal(self, name: str) -> None:
        """Raise `StageFlowError` for a signal that no instance of this workflow ever waits for."""
        awaited = dict.fromkeys(stage.signal for stage in self.stages if stage.kind == SIGNAL)
        if name not in awaited:
            names = f"it waits for {', '.join(map(repr, awaited))}" if awaited else "it waits for no signal at all"
            raise StageFlowError(
                f"workflow {self.id!r} version {self.version} never waits for a signal {name!r}: {names}"
            )

    @property
    def order(self) -> list[str]:
        """The ids in order of definition, for results."""
        return [stage.id for stage in self.stages if stage.kind != ITEM]


def breaker_of(stage: Stage) -> tuple[int, float]:
    """The breaker of a stage as its place has it."""
    return (0, 0.0) if stage.breaker is None else (stage.breaker.failures, stage.breaker.reset)


ITEM_SUFFIX = "[item]"


def item_id(map_id: str) -> str:
    """The id of the place where one item of a map stage is handled; no stage of a user's can have it."""
    return map_id + ITEM_SUFFIX


def compile_plan(workflow: Workflow[Any], naming: Naming, *, default_ttl: float = 0.0) -> WorkflowPlan:
    """The plan of a validated workflow."""
    steps = workflow.steps
    stages = {stage.id: stage for stage in workflow.stages}
    places: list[StagePlan] = []
    for index, step in enumerate(steps):
        following = steps[index + 1].id if index + 1 < len(steps) else ""
        queue = naming.stage(workflow.id, index)

        def handled(stage: Stage, queue: str, at: int = index, **place: Any) -> StagePlan:
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
                **place,
            )

        if isinstance(step, Stage):
            places.append(handled(step, queue, following=following))
        elif isinstance(step, Parallel):
            ids = [stage.id for stage in step.branches]
            joined = StagePlan(step.id, index, queue, kind=PARALLEL, following=following, branches=ids)
            joined.timeout = workflow.stage_timeout
            places.append(joined)
            for name in ids:
                own = naming.branch(workflow.id, index, name)
                places.append(handled(stages[name], own, joins=step.id))
        elif isinstance(step, Branch):
            arms = {key: arm[0].id if arm else following for key, arm in step.arms.items()}
            choice = StagePlan(step.id, index, queue, kind=BRANCH, following=following, arms=arms)
            choice.timeout = workflow.stage_timeout
            places.append(choice)
            for arm in step.arms.values():
                for place, stage in enumerate(arm):
                    behind = arm[place + 1].id if place + 1 < len(arm) else following
                    own = naming.branch(workflow.id, index, stage.id)
                    places.append(handled(stages[stage.id], own, following=behind))
        elif isinstance(step, MapStage):
            item = stages[step.id]
            whole = handled(item, queue, kind=MAP, following=following)
            whole.breaker = (0, 0.0)
            whole.actors, whole.max_tasks, whole.env, whole.max_memory = 1, None, {}, 0
            one = handled(item, naming.branch(workflow.id, index, step.id), kind=ITEM, joins=step.id)
            one.id, one.after, one.compensated = item_id(step.id), (), False
            places += [whole, one]
        elif isinstance(step, Delay):
            places.append(
                StagePlan(step.id, index, naming.coordinator, kind=DELAY, following=following, seconds=step.seconds)
            )
        else:
            assert isinstance(step, Signal)
            # Only a worker can park a message; what asks for no code of the user's waits for none of them otherwise.
            parks = step.timeout is not None and workflow.on_failure == "park"
            bare = step.on_signal is None and step.on_timeout is None and not parks
            own = naming.coordinator if bare else queue
            places.append(
                StagePlan(
                    step.id,
                    index,
                    own,
                    timeout=None if bare else workflow.stage_timeout,
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
        places,
        CompensationPlan(naming.compensation(workflow.id), actors),
        workflow.timeout or 0.0,
        derive_schema(workflow.context),
    )
