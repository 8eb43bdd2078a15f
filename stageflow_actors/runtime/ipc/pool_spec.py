"""Pool specifications: the code that workers run, and the plan by which they route.

Code travels as one opaque blob: `definition.pickling` writes it in the program and the worker reads it. The node and
the zygote must pass it on without unpickling it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct, structs

from stageflow_actors.core.plan import (
    ENDPOINT,
    ITEM,
    MAP,
    STAGE,
    CompensationPlan,
    Naming,
    StagePlan,
    WorkflowPlan,
    breaker_of,
)
from stageflow_actors.core.value_codec import reply_place
from stageflow_actors.definition.handler import HandlerSpec
from stageflow_actors.definition.kept_types import check_kept
from stageflow_actors.definition.pickling import Script, dumps
from stageflow_actors.definition.result_types import item_result_type, payload_type, resolvable, result_types
from stageflow_actors.definition.retry import RetryPolicy
from stageflow_actors.definition.services import ServiceSource, select_services
from stageflow_actors.definition.stage import Compensation, Stage
from stageflow_actors.definition.steps import Branch, MapStage, Parallel, Signal, Step
from stageflow_actors.definition.type_hints import classes_in, first_parameter_type, needs_type, return_type
from stageflow_actors.definition.workflow import Workflow
from stageflow_actors.errors import WorkflowDefinitionError

__all__ = [
    "CompensationCode",
    "PoolSpec",
    "StageCode",
    "VersionCode",
    "WorkerPayload",
    "compensated_item_types",
    "endpoint_code",
    "endpoint_spec",
    "limit_concurrency",
    "merge_pools",
    "pool_specs",
    "stage_codes",
]


@dataclass
class StageCode:
    """The code of one place of one version, pickled as a whole.

    Attributes:
        place: The id of the place in the plan.
        stage: Its handler and options; None for a place without a handler.
        parts: Functions and options of a parallel, branch, map or signal stage, by name.
        services: The services that the handler takes, by parameter name, each behind those that its factory takes.
        interceptors: The interceptors around each attempt.
        retry: The policy that decides on failures at this place.
        result_types: The annotated types of the results that code at this place returns or reads, by stage id.
    """

    workflow_id: str
    version: int
    context: type[Any]
    place: str
    stage: Stage | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    services: dict[str, ServiceSource] = field(default_factory=dict)
    interceptors: tuple[Any, ...] = ()
    retry: RetryPolicy | None = None
    result_types: dict[str, Any] = field(default_factory=dict)

    @property
    def handlers(self) -> list[HandlerSpec]:
        """The handlers that take the services."""
        return [] if self.stage is None else [self.stage.spec]


@dataclass
class CompensationCode:
    """The code of all compensations of one version, pickled as a whole.

    `items` holds the item type that the compensation of each map stage takes, by stage id.
    """

    workflow_id: str
    version: int
    context: type[Any]
    compensations: dict[str, Compensation]
    services: dict[str, ServiceSource] = field(default_factory=dict)
    interceptors: tuple[Any, ...] = ()
    items: dict[str, Any] = field(default_factory=dict)
    result_types: dict[str, Any] = field(default_factory=dict)

    @property
    def handlers(self) -> list[HandlerSpec]:
        """The handlers that take the services."""
        return [compensation.spec for compensation in self.compensations.values()]


class VersionCode(Struct):
    """One version of a workflow at a queue: its code, which the node never opens, and its plan."""

    version: int
    code: bytes
    plan: WorkflowPlan


class PoolSpec(Struct):
    """One pool as the node starts it.

    Attributes:
        queue: The queue that its workers consume.
        workflow_id: The workflow of the queue; `endpoint` for an endpoint.
        stage_id: The stage, or the endpoint; empty for compensations.
        kind: `stage`, `compensation` or `endpoint`.
        actors: Number of workers.
        env: Environment variables that are added for each worker.
        programs: The code of each registered version that has a place at the queue, the latest last.
        max_tasks: Messages after which a worker is replaced; 0 for no limit.
        evidence: True if the coordinator takes over when a message causes too many worker deaths, so that its dead
            letter cannot be requeued; False if the dead letter waits for a person.
        max_length: Messages that may wait in the queue; 0 for no limit.
        concurrency: Messages in work at once in one worker.
        most: Messages in work at once in the pool; 0 for no limit.
        max_deaths: Worker deaths that one message may cause; 0 for any number.
        max_memory: Bytes of memory that a worker may use; 0 for no limit.
        has_set_up: True if its workers make services, so that even one that is starting may have some to close.
    """

    queue: str
    workflow_id: str
    stage_id: str
    kind: str
    actors: int
    env: dict[str, str]
    programs: list[VersionCode]
    max_tasks: int = 0
    evidence: bool = True
    max_length: int = 0
    concurrency: int = 1
    most: int = 0
    max_deaths: int = 0
    max_memory: int = 0
    has_set_up: bool = False

    @property
    def title(self) -> str:
        """What the pool serves, for people: "stage 'pay' of workflow 'orders'"."""
        if self.kind == "endpoint":
            return f"endpoint {self.stage_id!r}"
        if self.kind == "compensation":
            return f"compensations of workflow {self.workflow_id!r}"
        return f"stage {self.stage_id!r} of workflow {self.workflow_id!r}"


class WorkerPayload(Struct):
    """The start parameters of one worker process, sent through the zygote."""

    address: str
    peer: int
    worker_id: str
    kind: str
    queue: str
    programs: list[VersionCode]
    naming: Naming
    max_message_bytes: int
    max_tasks: int = 0
    log_level: str = "WARNING"
    lanes: int = 1
    max_deaths: int = 0
    initializer: bytes = b""
    log_fd: int = -1
    levels_fd: int = -1
    pause_fd: int = -1
    pause_flag: int = 0


def pool_specs(
    workflow: Workflow[Any],
    plan: WorkflowPlan,
    services: Mapping[str, ServiceSource],
    *,
    max_queue_length: int = 0,
    max_concurrency: int | None = None,
    max_deaths: int = 0,
    interceptors: Sequence[Any] = (),
    script: Script | None = None,
    endpoints: Sequence[Stage] = (),
) -> list[PoolSpec]:
    """Return the pools that run a workflow. `endpoints` are those whose replies its stages may receive.

    Raises `WorkflowDefinitionError` for code that cannot be pickled.
    """
    specs = []
    for program, planned in stage_codes(workflow, plan, endpoints):
        if program.stage is not None:
            taken = program.stage.spec.services_among(services)
            program.services = select_services([name for name in services if name in taken], services)
            program.stage = program.stage.replace(compensation=None)
            program.interceptors = tuple(interceptors)
        actors, concurrency = limit_concurrency(planned, max_concurrency)
        what = f"stage {planned.id!r} of workflow {workflow.id!r}"
        code = dumps(program, (workflow.context, *_types_of(program)), what=what, script=script)
        specs.append(
            PoolSpec(
                planned.queue,
                workflow.id,
                planned.id,
                "stage",
                actors,
                planned.env,
                [VersionCode(workflow.version, code, plan)],
                planned.max_tasks or 0,
                not (planned.required and workflow.on_failure == "park"),
                max_queue_length if planned.index == 0 else 0,
                concurrency,
                max_concurrency or 0,
                max_deaths,
                planned.max_memory,
                has_set_up=bool(program.services),
            )
        )
    compensations = {s.id: s.compensation for s in workflow.stages if s.compensation is not None}
    if compensations:
        items = compensated_item_types(workflow)
        names = {name for one in compensations.values() for name in one.spec.services_among(services)}
        undo = CompensationCode(
            workflow.id,
            workflow.version,
            workflow.context,
            compensations,
            select_services([name for name in services if name in names], services),
            tuple(interceptors),
            items,
            result_types(workflow),
        )
        kinds = [kind for hint in (*items.values(), *undo.result_types.values()) for kind in classes_in(hint)]
        what = f"compensations of workflow {workflow.id!r}"
        code = dumps(undo, (workflow.context, *kinds), what=what, script=script)
        specs.append(
            PoolSpec(
                plan.compensation.queue,
                workflow.id,
                "",
                "compensation",
                plan.compensation.actors,
                {},
                [VersionCode(workflow.version, code, plan)],
                has_set_up=bool(undo.services),
            )
        )
    return specs


def merge_pools(specs: Iterable[PoolSpec]) -> list[PoolSpec]:
    """Return one pool per queue: the versions of a workflow share pools.

    A shared pool has the options of the latest version, and the largest number of actors of all versions. The places of
    the versions at a queue need not be the same place, nor of one kind.
    """
    by_queue: dict[str, list[PoolSpec]] = {}
    for spec in specs:
        by_queue.setdefault(spec.queue, []).append(spec)
    pools = []
    for same in by_queue.values():
        same.sort(key=lambda spec: spec.programs[-1].version)
        programs = [program for spec in same for program in spec.programs]
        latest = same[-1]
        actors = max(spec.actors for spec in same)
        if latest.most:
            actors = min(actors, latest.most // latest.concurrency)
        has_set_up = any(spec.has_set_up for spec in same)
        pools.append(structs.replace(latest, programs=programs, actors=actors, has_set_up=has_set_up))
    return pools


def limit_concurrency(place: StagePlan, most: int | None) -> tuple[int, int]:
    """Return the actors and the concurrency of a place.

    Both are reduced until at most `most` messages are in work at once.
    """
    concurrency = place.concurrency if place.kind in (STAGE, ITEM, ENDPOINT) else 1
    if most is None or place.actors * concurrency <= most:
        return place.actors, concurrency
    actors = min(place.actors, most)
    return actors, min(concurrency, most // actors)


def endpoint_spec(
    stage: Stage,
    naming: Naming,
    services: Mapping[str, ServiceSource],
    *,
    max_concurrency: int | None = None,
    max_deaths: int = 0,
    interceptors: Sequence[Any] = (),
    script: Script | None = None,
) -> PoolSpec:
    """Return the pool of an endpoint. Raises `WorkflowDefinitionError` as `pool_specs` does."""
    missing = sorted(stage.services - set(services))
    if missing:
        raise WorkflowDefinitionError(
            f"endpoint {stage.id!r} needs the service {missing[0]!r}, which is not provided: "
            f"add services={{{missing[0]!r}: factory}} to the Runtime, or give the parameter a default"
        )
    program, plan = endpoint_code(stage, naming, services)
    program.interceptors = tuple(interceptors)
    (place,) = plan.stages
    actors, concurrency = limit_concurrency(place, max_concurrency)
    return PoolSpec(
        place.queue,
        "endpoint",
        stage.id,
        "endpoint",
        actors,
        place.env,
        [VersionCode(1, dumps(program, tuple(_types_of(program)), what=f"endpoint {stage.id!r}", script=script), plan)],
        stage.max_tasks or 0,
        concurrency=concurrency,
        most=max_concurrency or 0,
        max_deaths=max_deaths,
        max_memory=place.max_memory,
        has_set_up=bool(program.services),
    )


def endpoint_code(
    stage: Stage, naming: Naming, services: Mapping[str, ServiceSource]
) -> tuple[StageCode, WorkflowPlan]:
    """Return the code of an endpoint, and a plan with only this place.

    The code has no interceptors yet. Raises `WorkflowDefinitionError` for options that only stages of a workflow have.
    """
    misplaced = {"required": not stage.required, "after": stage.after, "when": stage.when, "ttl": stage.ttl}
    for option, given in misplaced.items():
        if given:
            raise WorkflowDefinitionError(
                f"endpoint {stage.id!r} cannot have {option}, which only stages of a workflow have: remove it; the "
                "caller sets how long it waits for an answer with request(..., timeout=...)"
            )
    place = StagePlan(
        stage.id,
        0,
        naming.endpoint(stage.id),
        actors=stage.actors,
        env=dict(stage.env),
        timeout=stage.timeout,
        max_tasks=stage.max_tasks,
        kind=ENDPOINT,
        breaker=breaker_of(stage),
        concurrency=stage.concurrency,
        max_memory=stage.max_memory or 0,
    )
    plan = WorkflowPlan("endpoint", 1, "", "compensate", [place], CompensationPlan(""))
    function = stage.spec.function
    named = f"endpoint {stage.id!r}"
    check_kept(first_parameter_type(function, stage.spec.before_context), f"the first parameter of {named}")
    check_kept(return_type(function), f"the return annotation of {named}")
    parts = {
        "item_type": resolvable(first_parameter_type(function, stage.spec.before_context)),
        "result_type": resolvable(return_type(function)),
    }
    names = stage.spec.services_among(services)
    taken = select_services([name for name in services if name in names], services)
    return StageCode("endpoint", 1, dict, stage.id, stage, parts, taken), plan


def stage_codes(
    workflow: Workflow[Any], plan: WorkflowPlan, endpoints: Sequence[Stage] = ()
) -> Iterator[tuple[StageCode, StagePlan]]:
    """Yield the code of each place that has a pool, without services.

    `endpoints` are those whose replies its stages may receive.
    """
    types = result_types(workflow)
    types |= {reply_place(endpoint.id): resolvable(return_type(endpoint.spec.function)) for endpoint in endpoints}
    current = {stage.id: stage for stage in workflow.stages}
    steps = {step.id: step for step in workflow.steps}
    for planned in plan.stages:
        if not planned.has_pool:
            continue
        step = steps.get(planned.joins if planned.kind == ITEM else planned.id)
        stage: Stage | None = None
        if planned.kind == ITEM:
            stage = current[planned.joins]
        elif planned.kind == STAGE:
            stage = current[planned.id]
        program = StageCode(
            workflow.id, workflow.version, workflow.context, planned.id, stage, _parts(step, workflow.context)
        )
        program.retry = current[planned.id].retry if planned.kind == MAP else workflow.retry
        program.result_types = {id: hint for id, hint in types.items() if id == planned.id or needs_type(hint)}
        yield program, planned


def compensated_item_types(workflow: Workflow[Any]) -> dict[str, Any]:
    """Return the item type that the compensation of each map stage takes, by stage id."""
    return {
        step.id: first_parameter_type(stage.compensation.spec.function, stage.compensation.spec.before_context)
        for step in workflow.steps
        if isinstance(step, MapStage)
        for stage in workflow.stages
        if stage.id == step.id and stage.compensation is not None
    }


def _types_of(program: StageCode) -> list[type[Any]]:
    """Return the classes, other than the context, that values of this place are decoded to."""
    hints = [program.parts.get(name) for name in ("item_type", "result_type", "payload_type", "reply_type")]
    hints.extend(program.result_types.values())
    return [kind for hint in hints for kind in classes_in(hint)]


def _parts(step: Step | None, context: type[Any]) -> dict[str, Any]:
    """Return the user's functions of a step.

    Nothing else of the step: everything that the functions close over is pickled with them.
    """
    if isinstance(step, Parallel):
        return {"merge": step.merge}
    if isinstance(step, Branch):
        return {"selector": step.selector, "default": step.default}
    if isinstance(step, MapStage):
        return {
            "over": step.over,
            "when": step.item.when,
            "into": step.into,
            "max_failures": step.max_failures,
            "undo": step.item.compensation is not None,
            "item_type": first_parameter_type(step.item.spec.function, step.item.spec.before_context),
            "result_type": item_result_type(step, context),
        }
    if isinstance(step, Signal):
        return {
            "on_signal": step.on_signal,
            "on_timeout": step.on_timeout_spec,
            "payload_type": payload_type(step),
        }
    return {}
