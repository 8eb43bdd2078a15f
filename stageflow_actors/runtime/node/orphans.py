"""`OrphanedMessages`: finds messages of versions that are not registered, and resumes them when their version is.

It also resumes messages that earlier code could not decode, when a runtime starts with other code.

A worker parks such a message when it finds one in its own queue. In a queue that has no pool any more (its workflow has
fewer stages now, or is not registered at all) no worker sees it: this module makes the coordinator consume the queue,
and the coordinator forwards or parks each message. It must never consume a queue that has a pool.
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
from stageflow_actors.runtime.messaging.settlements import (
    UNDECODABLE,
    Settlement,
    forward,
    park_unknown_version,
    settle_transition,
)
from stageflow_brokers.api import Broker, DeliveryItem

__all__ = ["OrphanedMessages", "forward_orphan"]

PAGE_SIZE = 1_000
"""Dead letters read with one query."""
ORPHAN_CREDIT = 200
"""Messages of one orphaned queue that the broker delivers before the first of them is settled."""
UNKNOWN_VERSION = ("refused", "WorkflowDefinitionError")
"""Kind and error type of the failure with which a message of an unregistered version is parked."""

_STAGE_QUEUE = re.compile(r"\.stage\d+(\.|$)")


class OrphanedMessages:
    """The search for orphaned messages of one node.

    `_with_consumer` are the queues that have a pool or are the coordinator's own, `_consuming` the orphaned queues that
    the coordinator consumes.
    """

    def __init__(self, broker: Broker, naming: Naming) -> None:
        self._broker = broker
        self._naming = naming
        self._with_consumer: set[str] = {naming.finished, naming.coordinator}
        self._consuming: set[str] = set()

    def exclude(self, queues: Iterable[str]) -> None:
        """Exclude queues that have pools from now on, and stop consuming them.

        When this returns, no delivery from these queues is on its way to the coordinator.
        """
        new = set(queues) - self._with_consumer
        self._with_consumer |= new
        for queue in new & self._consuming:
            self._consuming.discard(queue)
            self._broker.release([], queue, 0)
        # The first answer may share a frame with deliveries and be handled before them; the second comes after them.
        self._broker.admin.ping().result()
        self._broker.admin.ping().result()

    def check(self) -> None:
        """Make the coordinator consume each queue that holds messages and has no consumer. Does not wait."""
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
            return False  # a request to an endpoint waits for its worker until the request expires
        return bool(_STAGE_QUEUE.search(name)) or name.startswith(self._naming.compensation_prefix)

    def resume(self, plans: Plans, loaded: Plans) -> dict[str, int]:
        """Requeue messages that were parked because of the code that ran then.

        These are messages of versions that were not registered, and now are, and messages with data that could not be
        decoded, if their version is among those `loaded` just now. Only a worker finds out whether it can decode them
        now: each is tried once per start, and parked again if not. Return the instances of the second kind that have
        a requeued message, by workflow.
        """
        tried: dict[str, set[str]] = {}
        for queue in self._broker.admin.stats("").result()["queues"]:
            if queue["dead"]:
                name = f"{DLQ_PREFIX}{queue['name']}"
                found = self._resumable(name, plans, loaded, tried)
                for first in range(0, len(found), PAGE_SIZE):
                    self._broker.admin.requeue(name, found[first : first + PAGE_SIZE]).result()
        return {workflow_id: len(instances) for workflow_id, instances in tried.items()}

    def _resumable(self, name: str, plans: Plans, loaded: Plans, tried: dict[str, set[str]]) -> list[int]:
        found: list[int] = []
        offset = 0
        while True:
            page = self._broker.admin.peek(name, offset, PAGE_SIZE).result()
            for letter in page:
                if "body" not in letter:
                    break  # the answer was full; the next page begins here
                offset += 1
                failure = read_failure(letter["reason"])
                reason = None if failure is None else (failure.kind, failure.error_type)
                if reason not in (UNKNOWN_VERSION, UNDECODABLE) or letter["evidence"]:
                    continue
                head = head_of(letter["body"])
                known = loaded if reason == UNDECODABLE else plans
                plan = None if head is None else known.get((head[0], head[1]))
                if head is not None and plan is not None and plan.stage(head[2]) is not None:
                    found.append(letter["id"])
                    if reason == UNDECODABLE:
                        tried.setdefault(head[0], set()).add(letter["group"])
            if not page:
                return found


def forward_orphan(item: DeliveryItem, body: bytes, plans: Plans) -> Settlement:
    """Return the settlement of a message from an orphaned queue.

    It is forwarded to the present queue of its stage, or parked until its version is registered again.
    """
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
