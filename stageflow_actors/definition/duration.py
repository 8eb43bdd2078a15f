"""Durations as users write them: seconds as int or float, or a `timedelta`. Nothing here knows a clock."""

from __future__ import annotations

import math
from datetime import timedelta

from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["Duration", "optional_seconds", "seconds", "timeout_seconds"]

Duration = int | float | timedelta

NO_LIMIT = "leave it out, or give None, for no limit"


def seconds(value: Duration, what: str, *, zero: bool = True, endless: str = "") -> float:
    """`value` in seconds.

    `what` names the value in errors ("the timeout of stage 'pay'"); with `zero=False` nought is refused too; `endless`
    says what to write for no end, where there is a way. Raises `WorkflowDefinitionError` for anything that is not a
    finite duration.
    """
    if isinstance(value, timedelta):
        number = value.total_seconds()
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise WorkflowDefinitionError(
            f"{what} must be a number of seconds or a timedelta, not {value!r} ({type(value).__name__})"
        )
    else:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not math.isfinite(number):
        raise WorkflowDefinitionError(f"{what} must be finite, not {number!r}" + (f": {endless}" if endless else ""))
    if number < 0 or (number == 0 and not zero):
        bound = "nought or more" if zero else "more than nought"
        raise WorkflowDefinitionError(f"{what} must be {bound}, not {value!r}")
    return number


def optional_seconds(value: Duration | None, what: str, *, zero: bool = False) -> float | None:
    """As `seconds`, where None stands for no limit."""
    return None if value is None else seconds(value, what, zero=zero, endless=NO_LIMIT)


def timeout_seconds(value: Duration | None, what: str = "timeout") -> float | None:
    """How long a call may wait, in seconds; None for as long as it takes. Raises `ValueError`."""
    try:
        return optional_seconds(value, what, zero=True)
    except WorkflowDefinitionError as error:
        raise ValueError(str(error)) from None
