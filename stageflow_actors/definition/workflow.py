"""`Workflow`: named stages in an order, over one type of context.

Building a workflow runs nothing and touches nothing; a mistake that one call can see is raised by that call, what
only the whole can show by `validate`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeVar, Unpack, cast, overload

import msgspec

from stageflow_actors.definition.duration import Duration, optional_seconds
from stageflow_actors.definition.retry import RetryPolicy, check_policy
from stageflow_actors.definition.stage import Compensation, Stage, StageOptions, check_count, check_id
from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["CompensationDecorator", "OnFailure", "StageFunction", "Workflow"]

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C")

OnFailure = Literal["compensate", "park"]


class StageFunction(Protocol[P, R_co]):
    """What `Workflow.stage` gives back: the function itself, with a decorator for its compensation."""

    compensation: CompensationDecorator

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class Workflow(Generic[C]):
    """A workflow over contexts of one type.

    `id` and `version` name it (letters, digits, '-', '_', '.'; an integer from 1); `context` is dict, a dataclass
    or a msgspec Struct; `timeout` (seconds) bounds a whole instance; `on_failure` says whether a failed instance
    is compensated or parked; `retry` and `stage_timeout` are for stages that set none of their own.
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
        self.context: type[Any] = _context_type(context, what)
        self.version: int = check_count(version, f"the version of {what}")
        self.timeout: float | None = optional_seconds(timeout, f"the timeout of {what}")
        self.on_failure: OnFailure = on_failure
        self.retry: RetryPolicy | None = check_policy(retry, f"the retry of {what}")
        self.stage_timeout: float | None = optional_seconds(stage_timeout, f"the stage_timeout of {what}")
        self._stages: dict[str, Stage] = {}

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in order, with the defaults of the workflow filled in."""
        return tuple(self._stages.values())

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

    def validate(self, services: Collection[str] = ()) -> None:
        """Raise `WorkflowDefinitionError` for what makes the workflow as a whole impossible to run.

        `services` are the names that the runtime provides.
        """
        if not self._stages:
            raise WorkflowDefinitionError(
                f"workflow {self.id!r} has no stages: add one with @workflow.stage or add_stage(handler)"
            )
        before: set[str] = set()
        for stage in self._stages.values():
            for wanted in stage.after:
                self._check_after(stage, wanted, before)
            self._check_services(stage, services)
            before.add(stage.id)

    def fingerprint(self) -> str:
        """A hash (32 hex digits) of what instances in flight depend on; the same in every process.

        Ids, order, `required`, `after`, which stages are compensated, `on_failure` and the fields of the context
        count; how fast stages run (actors, timeouts, retries) and the code of the handlers do not.
        """
        parts = [
            self.id,
            self.on_failure,
            _fields_of(self.context),
            [
                [s.id, s.required, sorted(s.after), s.compensation is not None, s.when is not None]
                for s in self._stages.values()
            ],
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
            stage = stage.replace(id=f"stage-{len(self._stages) + 1}")
        if stage.id in self._stages:
            raise WorkflowDefinitionError(
                f"workflow {self.id!r} has a stage {stage.id!r} already: give this one another id with id=..."
            )
        if stage.retry is None and self.retry is not None:
            stage = stage.replace(retry=self.retry)
        if stage.timeout is None and self.stage_timeout is not None:
            stage = stage.replace(timeout=self.stage_timeout)
        self._stages[stage.id] = stage
        return stage

    def _as_stage(self, handler: Any, options: dict[str, Any]) -> Stage:
        if isinstance(handler, Stage):
            if options:
                raise WorkflowDefinitionError(
                    f"stage {handler.id!r} of workflow {self.id!r} was given as a Stage and with options "
                    f"({', '.join(options)}): give them to Stage(...)"
                )
            return handler
        unknown = options.keys() - StageOptions.__annotations__.keys()
        if unknown:
            raise WorkflowDefinitionError(
                f"a stage of workflow {self.id!r} was given the unknown option {min(unknown)!r}: "
                f"there are {', '.join(sorted(StageOptions.__annotations__))}"
            )
        return Stage(handler, **options)

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


class CompensationDecorator:
    """`@handler.compensation` or `@handler.compensation(timeout=60, retry=None, actors=1)`.

    `places` are the (workflow, stage id) that the handler is a stage of.
    """

    __slots__ = ("places",)

    def __init__(self, places: tuple[tuple[Workflow[Any], str], ...] = ()) -> None:
        self.places = places

    @overload
    def __call__(self, function: F, /) -> F: ...

    @overload
    def __call__(
        self, /, *, timeout: Duration | None = 60, retry: RetryPolicy | None = None, actors: int = 1
    ) -> Callable[[F], F]: ...

    def __call__(self, function: Any = None, /, **options: Any) -> Any:
        def register(undo: F) -> F:
            made = Compensation(undo, **options)
            for workflow, stage_id in self.places:
                workflow.set_compensation(stage_id, made)
            return undo

        return register if function is None else register(function)

    def __reduce__(self) -> tuple[Any, ...]:
        # A function of `__main__` travels with its attributes. The definition is finished by then, and dragging
        # every workflow along with each of its functions would make that journey long.
        return CompensationDecorator, ()


def _context_type(context: Any, what: str) -> type[Any]:
    if isinstance(context, type) and (
        context is dict or dataclasses.is_dataclass(context) or issubclass(context, msgspec.Struct)
    ):
        return context
    if isinstance(context, type):
        named = f"the class {context.__name__}"
    else:
        named = f"{context!r} (give the type, not an instance)" if not callable(context) else repr(context)
    raise WorkflowDefinitionError(f"the context of {what} must be dict, a dataclass or a msgspec Struct, not {named}")


def _fields_of(context: type[Any]) -> list[str]:
    if context is dict:
        return ["dict"]
    if dataclasses.is_dataclass(context):
        return [context.__name__, *(f.name for f in dataclasses.fields(context))]
    return [context.__name__, *cast(type[msgspec.Struct], context).__struct_fields__]
