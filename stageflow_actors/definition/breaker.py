"""`Breaker`: the circuit breaker of a stage, an immutable value."""

from __future__ import annotations

from typing import Any

from stageflow_actors.definition.duration import Duration, seconds
from stageflow_actors.definition.guesses import adapts
from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["Breaker", "check_breaker"]


class Breaker:
    """A circuit breaker: the messages of a stage that keeps failing wait.

    After `failures` failed attempts in a row, over all actors of the stage, its messages wait for `reset` seconds.
    Then one message is tried: if that attempt succeeds, the others follow; if it fails, they wait again. Errors,
    timeouts and deaths of workers count as failures, whatever the retry policy decides. Waiting takes no attempt.

    Args:
        failures: Number of failed attempts in a row that open the breaker, from 1. Default: 5.
        reset: Seconds (or a `timedelta`) until one message is tried, more than 0. Default: 30.

    Raises:
        WorkflowDefinitionError: If `failures` is no integer from 1, or `reset` no positive duration.

    Example:
        >>> from stageflow_actors import Breaker, Workflow
        >>> Breaker(failures=3, reset=10)
        Breaker(failures=3, reset=10)
        >>> Workflow("orders").add_stage(print, id="ship", breaker=Breaker()).stages[0].breaker.failures
        5
    """

    __slots__ = ("failures", "reset")

    @adapts("Breaker(failures=5, reset=30)")
    def __init__(self, failures: int = 5, reset: Duration = 30) -> None:
        if isinstance(failures, bool) or not isinstance(failures, int) or failures < 1:
            raise WorkflowDefinitionError(f"failures of Breaker must be an integer from 1, not {failures!r}")
        self.failures: int = failures
        self.reset: float = seconds(reset, "reset of Breaker", zero=False)

    def __repr__(self) -> str:
        return f"Breaker(failures={self.failures}, reset={self.reset:g})"


def check_breaker(breaker: Any, what: str) -> Breaker | None:
    """Return `breaker` if it is a `Breaker` or None; `what` names its place in the error."""
    if breaker is None or isinstance(breaker, Breaker):
        return breaker
    raise WorkflowDefinitionError(f"{what} must be a Breaker such as Breaker(failures=5, reset=30), not {breaker!r}")
