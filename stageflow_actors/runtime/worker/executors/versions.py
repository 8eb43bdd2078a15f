"""`VersionedExecutor`: the executor of a queue that serves several versions of a workflow.

It reads only the head of a message and passes the message to the executor of its version. The latest version receives
messages of unknown versions, and parks them.
"""

from __future__ import annotations

import copy
from typing import Any, Self

from stageflow_actors.core.envelope import head_of
from stageflow_actors.runtime.messaging.settlements import Result
from stageflow_actors.runtime.worker.executors.base import Stopwatch
from stageflow_actors.runtime.worker.executors.handler import HandlerExecutor
from stageflow_brokers.api import DeliveryItem, Target

__all__ = ["VersionedExecutor"]


class VersionedExecutor:
    """Several executors as one, in ascending order of their versions.

    `awaits`: all handlers are async, and one event loop awaits them together. `threads`: all handlers block, and
    several threads may run them. Otherwise messages run one after the other.
    """

    def __init__(self, executors: list[Any]) -> None:
        self.targets: list[Target] = []
        self._by_version = {executor.plan.version: executor for executor in executors}
        self._latest = executors[-1]
        self.environment = self._latest.environment
        for executor in executors:
            executor.first_target = len(self.targets)
            self.targets.extend(executor.targets)
        handlers = all(isinstance(executor, HandlerExecutor) for executor in executors)
        self.awaits = handlers and all(executor.awaits for executor in executors)
        self.threads = handlers and all(executor.threads for executor in executors)

    def __call__(self, item: DeliveryItem, body: bytes) -> Result:
        """Execute a delivery with the executor of its version."""
        result: Result = self.executor_for(body)(item, body)
        return result

    def executor_for(self, body: bytes) -> Any:
        """Return the executor of a message's version; for an unknown version the latest, which parks it."""
        head = head_of(body)
        return self._latest if head is None else self._by_version.get(head[1], self._latest)

    def copy_for(self, slot: Stopwatch) -> Self:
        """Return a copy of these executors for a thread with its own slot."""
        copied = copy.copy(self)
        copied._by_version = {version: executor.copy_for(slot) for version, executor in self._by_version.items()}
        copied._latest = copied._by_version[self._latest.plan.version]
        return copied
