"""Steps of a workflow that are not a single handler: `Parallel`, `Branch`, `MapStage`, `Delay`, `Signal`.

Immutable values, validated by their constructors, as `Stage` is. The methods `Workflow.add_*` make them and describe
their options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from stageflow_actors.definition.callables import check_function, name_of
from stageflow_actors.definition.duration import Duration, optional_seconds, seconds
from stageflow_actors.definition.handler import HandlerSpec, inspect_handler
from stageflow_actors.definition.ids import check_id
from stageflow_actors.definition.stage import Stage
from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["Branch", "Delay", "MapStage", "Parallel", "Signal", "Step", "shape_of", "stages_of"]


class Parallel:
    """Stages that run at the same time, each in a pool of its own; see `Workflow.add_parallel`.

    Args:
        id: The id of the step.
        branches: The stages: handlers or `Stage`s, at least one.
        merge: Called as `merge(base, branches)`; returns the context to go on with. Default: merge by field.
    """

    __slots__ = ("branches", "id", "merge")

    def __init__(
        self,
        id: str,
        branches: Iterable[Any],
        *,
        merge: Callable[[Any, Mapping[str, Any]], Any] | None = None,
    ) -> None:
        self.id: str = check_id(id, "the parallel stage")
        self.branches: tuple[Stage, ...] = _check_stages(branches, f"parallel stage {id!r}")
        if not self.branches:
            raise WorkflowDefinitionError(f"parallel stage {id!r} has no branches: pass a list of stages")
        self.merge: Callable[[Any, Mapping[str, Any]], Any] | None = None
        if merge is not None:
            self.merge = check_function(merge, f"merge of {id!r}", ("base", "branches"))

    def __repr__(self) -> str:
        return f"Parallel({self.id!r})"


class Branch:
    """A choice between lists of stages; see `Workflow.add_branch`.

    Args:
        id: The id of the step.
        selector: Function of the context that returns the key of an arm.
        arms: By key, the stages to run one after the other.
        default: Key of the arm for other keys. Default: another key fails the instance.
    """

    __slots__ = ("arms", "default", "id", "selector")

    def __init__(
        self,
        id: str,
        selector: Callable[[Any], Any],
        arms: Mapping[str, Iterable[Any]],
        *,
        default: str | None = None,
    ) -> None:
        self.id: str = check_id(id, "the branch")
        what = f"branch {id!r}"
        swapped: Any = selector
        if isinstance(swapped, Mapping) and callable(arms):
            raise WorkflowDefinitionError(
                f"{what} has its arms before its selector: write add_branch({id!r}, {name_of(arms)}, {{...}})"
            )
        self.selector: Callable[[Any], Any] = check_function(selector, f"the selector of {what}")
        if not isinstance(arms, Mapping) or not arms:
            raise WorkflowDefinitionError(f"{what} takes a dict of arms, as {{'key': [stage, ...]}}, not {arms!r}")
        for key in arms:
            if not isinstance(key, str):
                raise WorkflowDefinitionError(f"the arms of {what} have strings as keys, not {key!r}")
        self.arms: dict[str, tuple[Stage, ...]] = {
            key: _check_stages(stages, f"arm {key!r} of {what}") for key, stages in arms.items()
        }
        if default is not None and default not in self.arms:
            raise WorkflowDefinitionError(
                f"default of {what} is {default!r}, which is not one of its arms: {', '.join(self.arms)}"
            )
        self.default = default

    def __repr__(self) -> str:
        return f"Branch({self.id!r})"


class MapStage:
    """A stage that handles each item of a list; see `Workflow.add_map`.

    Args:
        id: The id of the step.
        handler: Called as `handler(item)` or `handler(item, ctx)`.
        over: Function of the context that returns the items.
        into: Field of the context for the list of results. Default: none.
        max_failures: Number of items that may fail before the stage fails, from 0. Default: 0.
        **options: Options of `Stage`.

    Attributes:
        item: The stage that handles one item.
    """

    __slots__ = ("id", "into", "item", "max_failures", "over")

    def __init__(
        self,
        id: str,
        handler: Any,
        *,
        over: Callable[[Any], Iterable[Any]],
        into: str | None = None,
        max_failures: int = 0,
        **options: Any,
    ) -> None:
        self.id: str = check_id(id, "the map stage")
        what = f"map stage {id!r}"
        self.over: Callable[[Any], Iterable[Any]] = check_function(over, f"over of {what}", yields=True)
        if into is not None and (not isinstance(into, str) or not into):
            raise WorkflowDefinitionError(f"into of {what} must be the name of a field, not {into!r}")
        if isinstance(max_failures, bool) or not isinstance(max_failures, int) or max_failures < 0:
            raise WorkflowDefinitionError(f"max_failures of {what} must be a whole number from 0, not {max_failures!r}")
        self.item = Stage(handler, id=id, **options)
        self.into = into
        self.max_failures = max_failures

    def __repr__(self) -> str:
        return f"MapStage({self.id!r})"


class Delay:
    """A wait of the instance; see `Workflow.add_delay`.

    Args:
        id: The id of the step.
        duration: Seconds (or a `timedelta`) to wait, from 0.
    """

    __slots__ = ("id", "seconds")

    def __init__(self, id: str, duration: Duration) -> None:
        self.id: str = check_id(id, "the delay")
        self.seconds: float = seconds(
            duration, f"the delay {id!r}", endless="for a wait that a signal ends use add_signal(id)"
        )

    def __repr__(self) -> str:
        return f"Delay({self.id!r}, {self.seconds:g})"


class Signal:
    """A wait of the instance for a signal; see `Workflow.add_signal`.

    `on_signal` and `on_timeout` may take the workflow's `stage_timeout`.

    Args:
        id: The id of the step.
        name: The name of the signal. Default: the id.
        timeout: Seconds to wait. Default: no limit.
        on_signal: Called as `on_signal(context, payload)`. Default: the payload is the result of the step.
        on_timeout: Called with the context if no signal arrived in time. Default: the step fails with `StageTimeout`.
    """

    __slots__ = ("id", "name", "on_signal", "on_timeout", "on_timeout_spec", "timeout")

    def __init__(
        self,
        id: str,
        *,
        name: str | None = None,
        timeout: Duration | None = None,
        on_signal: Callable[[Any, Any], Any] | None = None,
        on_timeout: Callable[[Any], Any] | None = None,
    ) -> None:
        self.id: str = check_id(id, "the signal stage")
        what = f"signal stage {id!r}"
        self.name: str = check_id(id if name is None else name, f"the signal of {what}")
        self.timeout: float | None = optional_seconds(timeout, f"the timeout of {what}")
        self.on_signal: Callable[[Any, Any], Any] | None = None
        if on_signal is not None:
            self.on_signal = check_function(on_signal, f"on_signal of {what}", ("context", "payload"))
        self.on_timeout = on_timeout
        self.on_timeout_spec: HandlerSpec | None = None
        if on_timeout is not None:
            self.on_timeout_spec = _on_timeout_spec(on_timeout, f"on_timeout of {what}")

    def __repr__(self) -> str:
        return f"Signal({self.id!r})"


Step = Stage | Parallel | Branch | MapStage | Delay | Signal


def stages_of(step: Step) -> tuple[Stage, ...]:
    """Return the stages with handlers of a step, in order of definition."""
    if isinstance(step, Stage):
        return (step,)
    if isinstance(step, Parallel):
        return step.branches
    if isinstance(step, Branch):
        return tuple(stage for arm in step.arms.values() for stage in arm)
    if isinstance(step, MapStage):
        return (step.item,)
    return ()


def shape_of(step: Step) -> list[Any]:
    """Return the parts of a step that instances in flight depend on, for the fingerprint."""
    if isinstance(step, Parallel):
        return [stage.id for stage in step.branches]
    if isinstance(step, Branch):
        return [[key, [stage.id for stage in arm]] for key, arm in step.arms.items()] + [step.default]
    if isinstance(step, MapStage):
        return [step.into]
    if isinstance(step, Signal):
        return [step.name]
    return []


def _on_timeout_spec(given: Any, what: str) -> HandlerSpec:
    """Return how to call `on_timeout`: like a handler, async or not, but without services."""
    spec = inspect_handler(given, what)
    if spec.all_services:
        raise WorkflowDefinitionError(
            f"{what} asks for the service {min(spec.all_services)!r}, and receives only the context: note the timeout "
            "in the context, and use the service in a later stage"
        )
    return spec


def _check_stages(given: Iterable[Any], what: str) -> tuple[Stage, ...]:
    if isinstance(given, Stage) or callable(given):
        given = [given]
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise WorkflowDefinitionError(f"{what} takes a list of stages, not {given!r}")
    stages = tuple(one if isinstance(one, Stage) else Stage(one) for one in given)
    for stage in stages:
        if not stage.id:
            raise WorkflowDefinitionError(f"{what} has a lambda, which has no name: write Stage(lambda ..., id=...)")
    return stages
