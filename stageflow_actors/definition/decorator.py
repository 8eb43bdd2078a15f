"""The result of `Workflow.stage` and its `compensation`: decorators that register a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, overload

from stageflow_actors.definition.duration import Duration
from stageflow_actors.definition.retry import RetryPolicy
from stageflow_actors.definition.stage import Compensation

__all__ = ["CompensationDecorator", "StageFunction"]

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
F = TypeVar("F", bound=Callable[..., Any])


class StageFunction(Protocol[P, R_co]):
    """The function that `Workflow.stage` decorated, with a decorator for its compensation."""

    compensation: CompensationDecorator

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class CompensationRegistry(Protocol):
    """The part of `Workflow` that the decorator needs: a workflow imports this module, never the reverse."""

    def set_compensation(self, stage_id: str, compensation: Compensation) -> None:
        """Register the function that undoes the stage `stage_id`."""


class CompensationDecorator:
    """`@handler.compensation`, or with options: `@handler.compensation(timeout=60, retry=None, when_uncertain=True)`.

    `places` are the (workflow, stage id) pairs that the handler is a stage of.
    """

    __slots__ = ("places",)

    is_decorator = True

    def __init__(self, places: tuple[tuple[CompensationRegistry, str], ...] = ()) -> None:
        self.places = places

    @overload
    def __call__(self, function: F, /) -> F: ...

    @overload
    def __call__(
        self,
        /,
        *,
        timeout: Duration | None = 60,
        retry: RetryPolicy | None = None,
        actors: int = 1,
        when_uncertain: bool = False,
    ) -> Callable[[F], F]: ...

    def __call__(self, function: Any = None, /, **options: Any) -> Any:
        def register(undo: Any) -> Any:
            made = undo if isinstance(undo, Compensation) else Compensation(undo, **options)
            for workflow, stage_id in self.places:
                workflow.set_compensation(stage_id, made)
            return undo

        return register if function is None else register(function)

    def __reduce__(self) -> tuple[Any, ...]:
        # A function of `__main__` is pickled with its attributes. The definition is complete by then, and the
        # pickle of each function would contain every workflow that uses it.
        return CompensationDecorator, ()
