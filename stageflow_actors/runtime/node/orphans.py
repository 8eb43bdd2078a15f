"""What belongs to versions that are not registered: found, parked with a reason, and resumed when they are again.

A message at the queue of a pool is parked by its worker. What lies where no pool serves any more (a workflow that has
grown shorter, or is not there at all) is taken by the coordinator, whom this module sends there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from stageflow_actors.core.coordination import Plans
from stageflow_actors.core.envelope import head_of
from stageflow_actors.core.failures import read_failure
from stageflow_actors.core.plan import COMPENSATE, DLQ_PREFIX, Naming
from stageflow_actors.core.routing import Publish, Transition
from stageflow_actors.runtime.messaging.settlements import Settlement, forward, park_unknown_version, settle_transition
from stageflow_brokers.api import Broker, DeliveryItem

__all__ = ["OrphanedMessages", "forward_orphan"]

PAGE_SIZE = 1_000
ORPHAN_CREDIT = 200
UNKNOWN_VERSION = ("refused", "WorkflowDefinitionError")
"""Kind and error type of the failure with which a message of an unregistered version is parked."""

_STAGE_QUEUE = re.compile(r"\.stage\d+(\.|$)")


class OrphanedMessages:
    """Keeps watch for one node."""

    def __init__(self, broker: Broker, naming: Naming) -> None:
        self._broker = broker
        self._naming = naming
        self._with_consumer: set[str] = {naming.finished, naming.coordinator}
        self._consuming: set[str] = set()

    def exclude(self, queues: Iterable[str]) -> None:
        """These have pools from now on. Nothing of them is on its way to the coordinator when this returns."""
        new = set(queues) - self._with_consumer
        self._with_consumer |= new
        for queue in new & self._consuming:
            self._consuming.discard(queue)
            self._broker.release([], queue, 0)
        # The answer to the first question may come in one frame with deliveries; that to the second comes behind them.
        self._broker.admin.ping().result()
        self._broker.admin.ping().result()

    def check(self) -> None:
        """Have the coordinator take what lies in queues that nobody serves. Returns at once."""
        self._broker.admin.stats("").add_done_callback(self._consume_orphaned)

    def _consume_orphaned(self, future: Any) -> None:
        if future.exception() is not None:
            return
        for queue in future.result()["queues"]:
            name = queue["name"]
            if (queue["ready"] or queue["delayed"]) and self._is_orphaned(name) and name not in self._consuming:
                self._consuming.add(name)
                self._broker.consume(name, ORPHAN_CREDIT)

    def _is_orphaned(self, name: str) -> bool:
        if name in self._with_consumer or name.startswith(self._naming.endpoint("")):
            return False  # a command to an endpoint waits for it, as long as whoever asked does
        return bool(_STAGE_QUEUE.search(name)) or name.startswith(self._naming.compensation_prefix)

    def resume(self, plans: Plans) -> int:
        """Requeue what was parked for want of a version that is registered now; how many messages that were."""
        count = 0
        for queue in self._broker.admin.stats("").result()["queues"]:
            if queue["dead"]:
                name = f"{DLQ_PREFIX}{queue['name']}"
                found = self._resumable(name, plans)
                if found:
                    count += self._broker.admin.requeue(name, found).result()["requeued"]
        return count

    def _resumable(self, name: str, plans: Plans) -> list[int]:
        found: list[int] = []
        offset = 0
        while True:
            page = self._broker.admin.peek(name, offset, PAGE_SIZE).result()
            for letter in page:
                if "body" not in letter:
                    break  # as many as there was room for; the next page begins here
                offset += 1
                failure = read_failure(letter["reason"])
                if failure is None or (failure.kind, failure.error_type) != UNKNOWN_VERSION or letter["evidence"]:
                    continue
                head = head_of(letter["body"])
                plan = None if head is None else plans.get((head[0], head[1]))
                if head is not None and plan is not None and plan.stage(head[2]) is not None:
                    found.append(letter["id"])
            if not page:
                return found


def forward_orphan(item: DeliveryItem, body: bytes, plans: Plans) -> Settlement:
    """What becomes of a message where nobody serves: to where its stage is now, or parked until its version is back."""
    head = head_of(body)
    if head is None:
        return park_unknown_version(item, "?", 0, "queue of this name")
    workflow_id, version, stage_id = head
    plan = plans.get((workflow_id, version))
    planned = None if plan is None else plan.stage(stage_id)
    label = "" if item.extra is None else item.extra.label
    if plan is None or planned is None:
        compensation = label.startswith(COMPENSATE)
        place = f"compensation of stage {stage_id!r}" if compensation else f"stage {stage_id!r}"
        return park_unknown_version(item, workflow_id, version, place)
    if label.startswith(COMPENSATE):
        return settle_transition(item, Transition([Publish(plan.compensation.queue, label, body)]))
    return forward(item, body, planned)
