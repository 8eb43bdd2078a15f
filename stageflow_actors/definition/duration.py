"""Durations as users write them: seconds as int or float, or a `timedelta`."""

from __future__ import annotations

import math
from datetime import timedelta

from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["Duration", "optional_seconds", "seconds", "timeout_seconds"]

Duration = int | float | timedelta

NO_LIMIT = "leave it out, or use None, for no limit"


def seconds(value: Duration, what: str, *, zero: bool = True, endless: str = "") -> float:
    """Return `value` in seconds.

    Args:
        value: A number of seconds, or a `timedelta`.
        what: Name of the value in errors, as "the timeout of stage 'pay'".
        zero: False to reject 0.
        endless: Advice for errors: how to write a duration without an end.

    Returns:
        The seconds.

    Raises:
        WorkflowDefinitionError: If `value` is not a finite duration.
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
        bound = "0 or more" if zero else "more than 0"
        raise WorkflowDefinitionError(f"{what} must be {bound}, not {number:g} s")
    return number


def optional_seconds(value: Duration | None, what: str, *, zero: bool = False) -> float | None:
    """Return `value` in seconds, or None for no limit; see `seconds`."""
    return None if value is None else seconds(value, what, zero=zero, endless=NO_LIMIT)


def timeout_seconds(value: Duration | None, what: str = "timeout") -> float | None:
    """Return the seconds that a call may wait, or None for no limit; raise `ValueError` for other values."""
    try:
        return optional_seconds(value, what, zero=True)
    except WorkflowDefinitionError as error:
        raise ValueError(str(error)) from None
