"""`Breaker`: when a stage that keeps failing is left alone for a while. A value, checked when it is made."""

from __future__ import annotations

from typing import Any

from stageflow_actors.definition.duration import Duration, seconds
from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["Breaker", "check_breaker"]


class Breaker:
    """After `failures` failed attempts in a row, over all actors of the stage, its messages wait for `reset` seconds.

    Then one of them is tried: if that attempt succeeds all go on, if it fails they wait as long again. Errors, timeouts
    and deaths of workers count, whatever the retry policy says of them. Waiting is no failure and takes no attempt.
    """

    __slots__ = ("failures", "reset")

    def __init__(self, failures: int = 5, reset: Duration = 30) -> None:
        if isinstance(failures, bool) or not isinstance(failures, int) or failures < 1:
            raise WorkflowDefinitionError(f"failures of Breaker must be an integer from 1, not {failures!r}")
        self.failures: int = failures
        self.reset: float = seconds(reset, "reset of Breaker", zero=False)

    def __repr__(self) -> str:
        return f"Breaker(failures={self.failures}, reset={self.reset:g})"


def check_breaker(breaker: Any, what: str) -> Breaker | None:
    """`breaker` if it is one or None; `what` names its place in the error."""
    if breaker is None or isinstance(breaker, Breaker):
        return breaker
    raise WorkflowDefinitionError(f"{what} must be a Breaker such as Breaker(failures=5, reset=30), not {breaker!r}")
