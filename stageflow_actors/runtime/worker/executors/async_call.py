"""Blocking calls of async user code, on an event loop that each thread keeps."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from stageflow_actors.definition.handler import BoundCall, HandlerSpec
from stageflow_actors.errors import StageTimeout

__all__ = ["as_blocking", "bind_blocking"]


def bind_blocking(
    call: HandlerSpec,
    services: Mapping[str, Any],
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> BoundCall:
    """Return a handler as a blocking function of (context, ctx)."""
    bound = call.bind(services)
    return as_blocking(bound, loop) if call.is_async else bound


def as_blocking(
    bound: BoundCall, loop: Callable[[], asyncio.AbstractEventLoop], timeout: float | None = None, what: str = ""
) -> BoundCall:
    """Return an async handler as a blocking function that runs it on the event loop of the calling thread.

    After `timeout` seconds the handler is cancelled, and the function raises a `StageTimeout` that names `what`.
    """
    kept = threading.local()

    async def finished(awaitable: Awaitable[Any]) -> Any:
        if timeout is None:
            return await awaitable
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                return await awaitable
        except TimeoutError:
            if not limit.expired():
                raise
            raise StageTimeout(f"{what} ran longer than its timeout of {timeout:g} s") from None

    def run(context: Any, ctx: Any) -> Any:
        own = getattr(kept, "loop", None)
        if own is None:
            own = kept.loop = loop()
        return own.run_until_complete(finished(bound(context, ctx)))

    return run
