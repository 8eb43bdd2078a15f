"""Ends a run that waits for a queue without workers, which would otherwise wait forever.

It reads the queues and changes nothing. A queue that a user has paused has its workers, and the run waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from stageflow_actors.cli.options import DEFAULT_DATA
from stageflow_actors.core.plural import pluralize
from stageflow_actors.errors import StageFlowError

if TYPE_CHECKING:
    from stageflow_actors.runtime.messaging.queue_info import QueueInfo
    from stageflow_actors.runtime.runtime import Runtime

__all__ = ["StallGuard"]

STALL_SECONDS = 2.0
"""Seconds without a result after which the guard reads the queues."""

CHECK_SECONDS = 0.5


class StallGuard:
    """Context manager around a wait for results of a started runtime; `seen` returns the number of results so far.

    If no further result can come, the waiting call raises a `StageFlowError` with the fix.
    """

    def __init__(self, runtime: Runtime, seen: Callable[[], int]) -> None:
        self._runtime = runtime
        self._seen = seen
        self._over = threading.Event()

    def __enter__(self) -> StallGuard:
        threading.Thread(target=self._watch, name="stall-guard", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _watch(self) -> None:
        seen, since = self._seen(), time.monotonic()
        while not self._over.wait(CHECK_SECONDS):
            if self._seen() != seen:
                seen, since = self._seen(), time.monotonic()
            elif time.monotonic() - since >= STALL_SECONDS:
                try:
                    blocked = _blocked(self._runtime.queues())
                except StageFlowError:
                    continue  # the waiting call raises it
                if blocked is not None and not self._over.is_set():
                    from stageflow_actors.runtime.client.client import session_of

                    session_of(self._runtime).waiters.notify_failure(self._error(blocked), forget=True)
                    return

    def _error(self, queue: QueueInfo) -> StageFlowError:
        data = str(self._runtime.data_dir)
        option = "" if data == DEFAULT_DATA else f" --data {data}"
        return StageFlowError(
            f"queue {queue.name} is paused, has no actors and holds {pluralize(queue.ready, 'message')}: this run "
            f"would wait forever. Fix the errors above, call `stageflow queue resume {queue.name}{option}` and run the "
            "same command again"
        )


def _blocked(queues: list[QueueInfo]) -> QueueInfo | None:
    """Return a queue with messages and without workers, if no message is in work."""
    if any(queue.leased for queue in queues):
        return None
    return next((queue for queue in queues if queue.ready and not queue.actors and queue.state == "paused"), None)
