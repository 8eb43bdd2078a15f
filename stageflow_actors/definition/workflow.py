"""`Workflow`: named stages in an order, over one type of context.

Building a workflow runs nothing and touches nothing; a mistake that one call can see is raised by that call, what
only the whole can show by `validate`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Generic, Literal, ParamSpec, TypeVar, Unpack, overload

import msgspec

from stageflow_actors.definition.callables import check_function
from stageflow_actors.definition.context_type import check_context_type, fields_of
from stageflow_actors.definition.decorator import CompensationDecorator, StageFunction
from stageflow_actors.definition.duration import Duration, optional_seconds
from stageflow_actors.definition.http import SECONDS, HttpCall
from stageflow_actors.definition.ids import check_id
from stageflow_actors.definition.retry import RetryPolicy, check_policy
from stageflow_actors.definition.stage import Compensation, Stage, StageOptions, check_count
from stageflow_actors.definition.steps import Branch, Delay, MapStage, Parallel, Signal, Step, shape_of, stages_of
from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["OnFailure", "Workflow"]

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")

OnFailure = Literal["compensate", "park"]


class Workflow(Generic[C]):
    """A workflow over contexts of one type.

    `id` and `version` name it (letters, digits, '-', '_', '.'; an integer from 1); `context` is dict, a dataclass,
    a msgspec Struct or a pydantic model; `timeout` (seconds) bounds a whole instance; `on_failure` says whether a
    failed instance is compensated or parked; `retry` and `stage_timeout` are for stages that set none of their own,
    and for each call of the functions of parallel, branch and signal stages, too.
    """

    @overload
    def __init__(
        self: Workflow[dict[str, Any]],
        id: str,
        *,
        name: str | None = None,
        version: int = 1,
        timeout: Duration | None = None,
        on_failure: OnFailure = "compensate",
        retry: RetryPolicy | None = None,
        stage_timeout: Duration | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        id: str,
        *,
        name: str | None = None,
        context: type[C],
        version: int = 1,
        timeout: Duration | None = None,
        on_failure: OnFailure = "compensate",
        retry: RetryPolicy | None = None,
        stage_timeout: Duration | None = None,
    ) -> None: ...

    def __init__(
        self,
        id: str,
        *,
        name: str | None = None,
        context: type[Any] = dict,
        version: int = 1,
        timeout: Duration | None = None,
        on_failure: OnFailure = "compensate",
        retry: RetryPolicy | None = None,
        stage_timeout: Duration | None = None,
    ) -> None:
        self.id: str = check_id(id, "the workflow")
        what = f"workflow {id!r}"
        if name is not None and not isinstance(name, str):
            raise WorkflowDefinitionError(f"the name of {what} must be a string, not {name!r}")
        if on_failure not in ("compensate", "park"):
            raise WorkflowDefinitionError(f"on_failure of {what} must be 'compensate' or 'park', not {on_failure!r}")
        self.name: str = name or id
        self.context: type[Any] = check_context_type(context, what)
        self.version: int = check_count(version, f"the version of {what}")
        self.timeout: float | None = optional_seconds(timeout, f"the timeout of {what}")
        self.on_failure: OnFailure = on_failure
        self.retry: RetryPolicy | None = check_policy(retry, f"the retry of {what}")
        self.stage_timeout: float | None = optional_seconds(stage_timeout, f"the stage_timeout of {what}")
        self._stages: dict[str, Stage] = {}
        self._steps: list[Step] = []
        self._ids: set[str] = set()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Every stage with a handler in order of definition, the workflow's defaults filled in.

        Those of parallel stages and branches are among them, and what a map stage does with one item.
        """
        return tuple(self._stages.values())

    @property
    def steps(self) -> tuple[Step, ...]:
        """What `stage` and the `add_*` methods appended, in order; each has an `id`."""
        return tuple(self._stages[step.id] if isinstance(step, Stage) else step for step in self._steps)

    @overload
    def stage(self, handler: Callable[P, R], /) -> StageFunction[P, R]: ...

    @overload
    def stage(self, /, **options: Unpack[StageOptions]) -> Callable[[Callable[P, R]], StageFunction[P, R]]: ...

    def stage(self, handler: Any = None, /, **options: Any) -> Any:
        """Decorator that appends a stage, as `@workflow.stage` or `@workflow.stage(timeout=30, ...)`.

        Gives the function itself back, so that it can be called and imported as before, with an attribute
        `compensation`: the decorator of the function that undoes it.
        """
        if handler is None:
            return lambda function: self._decorate(function, options)
        return self._decorate(handler, options)

    def add_stage(self, handler: Any, /, **options: Unpack[StageOptions]) -> Workflow[C]:
        """Append a stage, given as a handler with options or as a `Stage`; returns the workflow."""
        self._add(handler, options)
        return self

    def add_parallel(
        self,
        id: str,
        branches: Iterable[Any],
        *,
        merge: Callable[[Any, Mapping[str, Any]], Any] | None = None,
    ) -> Workflow[C]:
        """Append stages that run at the same time; see `Parallel`. Returns the workflow."""
        step = Parallel(id, branches, merge=merge)
        self._claim(step.id)
        for stage in step.branches:
            self._keep(stage)
        self._steps.append(step)
        return self

    def add_conditional(self, handler: Any, /, when: Callable[[Any], Any], **options: Any) -> Workflow[C]:
        """Append a stage that is skipped unless `when(context)` is true. Options as in `Stage`; gives the workflow."""
        if isinstance(handler, Stage):
            self._add(handler.replace(when=check_function(when, f"when of stage {handler.id!r}")), options)
        else:
            self._add(handler, {**options, "when": when})
        return self

    def add_branch(
        self,
        id: str,
        selector: Callable[[Any], Any],
        arms: Mapping[str, Iterable[Any]],
        *,
        default: str | None = None,
    ) -> Workflow[C]:
        """Append a choice between arms of stages; see `Branch`. Returns the workflow."""
        step = Branch(id, selector, arms, default=default)
        self._claim(step.id)
        for stages in step.arms.values():
            for stage in stages:
                self._keep(stage)
        self._steps.append(step)
        return self

    def add_map(
        self,
        id: str,
        handler: Any,
        *,
        over: Callable[[Any], Iterable[Any]],
        into: str | None = None,
        max_failures: int = 0,
        **options: Any,
    ) -> Workflow[C]:
        """Append a stage that handles each item of `over(context)`; see `MapStage`. Options as in `Stage`.

        Its compensation takes an item, with the item's result in `ctx.results[id]`. Returns the workflow.
        """
        step = MapStage(id, handler, over=over, into=into, max_failures=max_failures, **options)
        self._keep(step.item)
        self._steps.append(step)
        return self

    def add_remote_stage(
        self,
        id: str,
        *,
        endpoint: str,
        command: Callable[[Any], Any],
        on_reply: Callable[[Any, Any], Any] | None = None,
        timeout: Duration | None = None,
        **options: Any,
    ) -> Workflow[C]:
        """Append a stage that asks an endpoint; see `Stage.remote`. Returns the workflow."""
        self._check_options(options)
        stage = Stage.remote(id, endpoint=endpoint, command=command, on_reply=on_reply, timeout=timeout, **options)
        self._add(stage, {})
        return self

    def add_http_stage(
        self,
        id: str,
        *,
        url: str | Callable[[Any], str],
        method: str = "POST",
        request: Callable[[Any], Any] | None = None,
        on_response: Callable[[Any, Any], Any] | None = None,
        headers: Mapping[str, str] | Callable[[Any], Mapping[str, str]] | None = None,
        timeout: Duration | None = None,
        **options: Any,
    ) -> Workflow[C]:
        """Append a stage that asks a server over HTTP; see `Stage.http`. Returns the workflow.

        Needs httpx: `pip install 'stageflow-actors[http]'`.
        """
        self._check_options(options)
        stage = Stage.http(
            id,
            url=url,
            method=method,
            request=request,
            on_response=on_response,
            headers=headers,
            timeout=timeout,
            **options,
        )
        self._add(stage, {})
        return self

    def add_delay(self, id: str, duration: Duration) -> Workflow[C]:
        """Append a wait of `duration` seconds. Returns the workflow."""
        step = Delay(id, duration)
        self._claim(step.id)
        self._steps.append(step)
        return self

    def add_signal(
        self,
        id: str,
        *,
        name: str | None = None,
        timeout: Duration | None = None,
        on_signal: Callable[[Any, Any], Any] | None = None,
        on_timeout: Callable[[Any], Any] | None = None,
    ) -> Workflow[C]:
        """Append a wait for a signal; see `Signal`. Returns the workflow."""
        step = Signal(id, name=name, timeout=timeout, on_signal=on_signal, on_timeout=on_timeout)
        self._claim(step.id)
        self._steps.append(step)
        return self

    def validate(self, services: Collection[str] = ()) -> None:
        """Raise `WorkflowDefinitionError` for what makes the workflow as a whole impossible to run.

        `services` are the names that the runtime provides.
        """
        if not self._steps:
            raise WorkflowDefinitionError(
                f"workflow {self.id!r} has no stages: add one with @workflow.stage or add_stage(handler)"
            )
        before: set[str] = set()
        for step in self.steps:
            own = [self._stages[stage.id] for stage in stages_of(step)]
            parallel = isinstance(step, Parallel)
            for stage in own:
                for wanted in stage.after:
                    self._check_after(stage, wanted, before)
                self._check_services(stage, services)
                if not parallel:
                    before.add(stage.id)
            before.update(stage.id for stage in own)
            before.add(step.id)

    def fingerprint(self) -> str:
        """A hash (32 hex digits) of what instances in flight depend on; the same in every process.

        Ids, order, `required`, `after`, which stages are compensated, `on_failure` and the fields of the context
        count; how fast stages run (actors, timeouts, retries) and the code of the handlers do not.
        """
        parts = [
            self.id,
            self.on_failure,
            fields_of(self.context),
            [
                [s.id, s.required, sorted(s.after), s.compensation is not None, s.when is not None]
                for s in self._stages.values()
            ],
            *([[type(s).__name__, s.id, shape_of(s)] for s in self._steps if not isinstance(s, Stage)]),
        ]
        return hashlib.blake2b(msgspec.json.encode(parts), digest_size=16).hexdigest()

    def set_compensation(self, stage_id: str, compensation: Callable[..., Any] | Compensation) -> None:
        """Register what undoes the stage `stage_id`; a stage has one compensation."""
        stage = self._stages[stage_id]
        if stage.compensation is not None:
            raise WorkflowDefinitionError(
                f"stage {stage_id!r} of workflow {self.id!r} has a compensation already "
                f"({stage.compensation!r}): do what both do in one function"
            )
        made = compensation if isinstance(compensation, Compensation) else Compensation(compensation)
        self._stages[stage_id] = stage.replace(compensation=made)

    def _decorate(self, handler: Any, options: dict[str, Any]) -> Any:
        stage = self._add(handler, options)
        existing = getattr(handler, "compensation", None)
        places = existing.places if isinstance(existing, CompensationDecorator) else ()
        try:
            handler.compensation = CompensationDecorator((*places, (self, stage.id)))
        except (AttributeError, TypeError):
            pass  # bound methods and builtins take no attributes; compensation= is there for them
        return handler

    def _add(self, handler: Any, options: Any) -> Stage:
        stage = self._as_stage(handler, options)
        if not stage.id:
            stage = stage.replace(id=f"stage-{len(self._steps) + 1}")
        stage = self._keep(stage)
        self._steps.append(stage)
        return stage

    def _keep(self, stage: Stage) -> Stage:
        """A stage of this workflow, with the workflow's defaults filled in."""
        self._claim(stage.id)
        if isinstance(stage.handler, HttpCall):
            self._check_url(stage, stage.handler)
        if stage.retry is None and self.retry is not None:
            stage = stage.replace(retry=self.retry)
        if stage.timeout is None and self.stage_timeout is not None:
            stage = stage.replace(timeout=self.stage_timeout)
        if stage.timeout is None and isinstance(stage.handler, HttpCall):
            stage = stage.replace(timeout=SECONDS)
        self._stages[stage.id] = stage
        return stage

    def _claim(self, id: str) -> None:
        if id in self._ids:
            raise WorkflowDefinitionError(
                f"workflow {self.id!r} has a stage {id!r} already: give this one another id with id=..."
            )
        self._ids.add(id)

    def _as_stage(self, handler: Any, options: dict[str, Any]) -> Stage:
        if isinstance(handler, Stage):
            if options:
                raise WorkflowDefinitionError(
                    f"stage {handler.id!r} of workflow {self.id!r} was given as a Stage and with options "
                    f"({', '.join(options)}): give them to Stage(...)"
                )
            return handler
        self._check_options(options)
        return Stage(handler, **options)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        unknown = options.keys() - StageOptions.__annotations__.keys()
        if unknown:
            raise WorkflowDefinitionError(
                f"a stage of workflow {self.id!r} was given the unknown option {min(unknown)!r}: "
                f"there are {', '.join(sorted(StageOptions.__annotations__))}"
            )

    def _check_after(self, stage: Stage, wanted: str, before: set[str]) -> None:
        if wanted in before:
            return
        what = f"stage {stage.id!r} of workflow {self.id!r}"
        if wanted == stage.id:
            raise WorkflowDefinitionError(f"{what} names itself in after: remove {wanted!r}")
        if wanted in self._stages:
            raise WorkflowDefinitionError(
                f"{what} names {wanted!r} in after, which comes later and cannot have completed: "
                f"add {wanted!r} before {stage.id!r}"
            )
        raise WorkflowDefinitionError(
            f"{what} names {wanted!r} in after, which is no stage of it: the stages are {', '.join(self._stages)}"
        )

    def _check_url(self, stage: Stage, call: HttpCall) -> None:
        if self.context is dict:
            return
        known = fields_of(self.context)[1:]
        for name in call.fields():
            if name not in known and not hasattr(self.context, name):
                raise WorkflowDefinitionError(
                    f"the url of HTTP stage {stage.id!r} names {{{name}}}, and {self.context.__name__} has no such "
                    f"field: it has {', '.join(known)}"
                )

    def _check_services(self, stage: Stage, provided: Collection[str]) -> None:
        for needed, what in (
            (stage.services, f"stage {stage.id!r}"),
            (stage.compensation_services, f"the compensation of stage {stage.id!r}"),
        ):
            missing = sorted(needed - set(provided))
            if missing:
                name = missing[0]
                raise WorkflowDefinitionError(
                    f"{what} of workflow {self.id!r} needs the service {name!r}, which nobody provides: "
                    f"add services={{{name!r}: factory}} to the Runtime, or give the parameter a default"
                )

    def __repr__(self) -> str:
        return f"Workflow({self.id!r}, stages=[{', '.join(self._stages)}])"
