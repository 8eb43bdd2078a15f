"""A watch on a run: one that waits for a queue which nobody serves is ended, instead of waiting for ever.

It only looks. A queue that somebody has paused on purpose has its actors and is waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from stageflow_actors.cli.options import DEFAULT_DATA
from stageflow_actors.core.plural import counted
from stageflow_actors.errors import StageFlowError

if TYPE_CHECKING:
    from stageflow_actors.runtime.messaging.queue_info import QueueInfo
    from stageflow_actors.runtime.runtime import Runtime

__all__ = ["Watch"]

STILL = 2.0
"""Seconds without a result after which the queues are looked at."""

EVERY = 0.5


class Watch:
    """A context manager around waiting for results of a started runtime; `seen` counts those that have come.

    Whoever waits when nothing can come any more gets a `StageFlowError` that says what to do.
    """

    def __init__(self, runtime: Runtime, seen: Callable[[], int]) -> None:
        self._runtime = runtime
        self._seen = seen
        self._over = threading.Event()

    def __enter__(self) -> Watch:
        threading.Thread(target=self._look, name="watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _look(self) -> None:
        seen, since = self._seen(), time.monotonic()
        while not self._over.wait(EVERY):
            if self._seen() != seen:
                seen, since = self._seen(), time.monotonic()
            elif time.monotonic() - since >= STILL:
                try:
                    blocked = _blocked(self._runtime.queues())
                except StageFlowError:
                    continue  # whoever waits is told of that
                if blocked is not None and not self._over.is_set():
                    self._runtime._waiters.break_off(self._error(blocked), forget=True)
                    return

    def _error(self, queue: QueueInfo) -> StageFlowError:
        data = str(self._runtime.data_dir)
        option = "" if data == DEFAULT_DATA else f" --data {data}"
        return StageFlowError(
            f"queue {queue.name} is paused, has no actors and holds {counted(queue.ready, 'message')}, for which this "
            f"run would wait for ever: see the errors above, mend what they name, call `stageflow queue resume "
            f"{queue.name}{option}` and run the same command again"
        )


def _blocked(queues: list[QueueInfo]) -> QueueInfo | None:
    """A queue that nobody serves, when nothing else is in work."""
    if any(queue.leased for queue in queues):
        return None
    return next((queue for queue in queues if queue.ready and not queue.actors and queue.state == "paused"), None)
