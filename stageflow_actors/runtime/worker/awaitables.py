"""Awaitables that user code returns: found by their type, and awaited wherever a result of user code is expected.

Whether a call is async is decided by its result, not by the function: a decorator, a lambda or a partial may hide the
`async def` behind a plain function.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from types import GeneratorType
from typing import Any

from stageflow_actors.errors import StageError

__all__ = ["PLAIN_TYPES", "call_without_loop", "check_not_awaitable", "finish", "is_awaitable"]

PLAIN_TYPES = frozenset((bool, bytes, dict, float, int, list, str, tuple, type(None)))
"""The common types of results: the hot path looks them up here, which is cheaper than `is_awaitable`."""


def is_awaitable(value: Any) -> bool:
    """Return True if `value` can be awaited. Cheaper than `inspect.isawaitable` for plain values."""
    kind = type(value)
    return hasattr(kind, "__await__") or (kind is GeneratorType and inspect.isawaitable(value))


async def finish(value: Any) -> Any:
    """Return a result of user code, awaited if it is an awaitable."""
    while is_awaitable(value):
        value = await value
    return value


def check_not_awaitable(value: Any, what: str) -> None:
    """Raise `StageError` if a function that is not awaited returned an awaitable: `what` names it."""
    if is_awaitable(value):
        if inspect.iscoroutine(value):
            value.close()  # otherwise Python warns that it was never awaited
        raise StageError(
            f"{what} returned the awaitable {type(value).__name__}, and its result is not awaited: return the value "
            "itself, and do async work in a handler",
            retryable=False,
        )


def call_without_loop(function: Callable[..., Any], *args: Any) -> Any:
    """Call a plain function from a coroutine as if no event loop ran: it may run one, as `asyncio.run` does."""
    loop = asyncio.get_running_loop()
    asyncio._set_running_loop(None)
    try:
        return function(*args)
    finally:
        asyncio._set_running_loop(loop)
