"""The work of one queue where several versions of a workflow are registered: each message is done by its own version.

Only the head of a message is looked at here; what no version knows is parked by the work that is asked.
"""

from __future__ import annotations

import copy
from typing import Any, Self

from brokers.api import DeliveryItem, Target
from stageflow_actors.core.envelope import head_of
from stageflow_actors.runtime.handler_work import HandlerExecutor
from stageflow_actors.runtime.settled import Result
from stageflow_actors.runtime.work import Stopwatch

__all__ = ["VersionedExecutor"]


class VersionedExecutor:
    """Several works as one, in order of their versions, no two of the same one.

    `awaits`: each is the call of an async handler, so that they can be awaited together; `threads`: each is that of a
    blocking one, so that several can run at once. Otherwise it is one after the other.
    """

    def __init__(self, works: list[Any]) -> None:
        self.targets: list[Target] = []
        self._by_version = {work.plan.version: work for work in works}
        self._latest = works[-1]
        for work in works:
            work.first_target = len(self.targets)
            self.targets.extend(work.targets)
        handlers = all(isinstance(work, HandlerExecutor) for work in works)
        self.awaits = handlers and all(work.awaits for work in works)
        self.threads = handlers and all(work.threads for work in works)

    def __call__(self, item: DeliveryItem, body: bytes) -> Result:
        """Have the work of the message's version do it."""
        result: Result = self.of(body)(item, body)
        return result

    def of(self, body: bytes) -> Any:
        """The work of a message; for one of an unknown version the latest, which says so."""
        head = head_of(body)
        return self._latest if head is None else self._by_version.get(head[1], self._latest)

    def lane(self, slot: Stopwatch) -> Self:
        """The same works for a thread of its own, which show in `slot` what they run."""
        lane = copy.copy(self)
        lane._by_version = {version: work.lane(slot) for version, work in self._by_version.items()}
        lane._latest = lane._by_version[self._latest.plan.version]
        return lane
