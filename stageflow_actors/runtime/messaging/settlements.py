"""Settlements that an executor, the coordinator or the node builds for one delivery.

This module must not run user code and must not send anything: the caller sends what it returns.
"""

from __future__ import annotations

from stageflow_actors.core.envelope import (
    Envelope,
    Failure,
    decode_envelope,
    encode,
)
from stageflow_actors.core.failures import describe_error, write_failure
from stageflow_actors.core.plan import FAILED, StagePlan
from stageflow_actors.core.routing import GatherArrival, OpenGather, Publish, Transition
from stageflow_brokers.api import (
    ACK,
    ATTEMPT_FAILED,
    ATTEMPT_SUCCEEDED,
    DEAD_LETTER,
    RETRY,
    TERMINAL,
    Arrival,
    DeliveryItem,
    GatherOpen,
    PublishItem,
    SettleItem,
    Target,
)

__all__ = [
    "UNDECODABLE",
    "Result",
    "Settlement",
    "assign_target_numbers",
    "completed_steps",
    "decline",
    "forward",
    "park_undecodable",
    "park_unknown_version",
    "park_unreadable",
    "settle_transition",
    "split_parts",
]


UNDECODABLE = ("refused", "UndecodableData")
"""Kind and error type of the failure with which a message is parked that holds data in an unknown form."""


class Settlement:
    """One settlement with all that it publishes, and the gathers that it opens or arrives at.

    Attributes:
        item: The item to send; its targets have no numbers before `assign_target_numbers`.
        publishes: The messages to publish, each with its target.
        bodies: The bodies, in the order publishes, opens, arrivals.
        opens: The gathers to open, each with its target.
        declined: True if the message has not begun: it is released, and nothing is settled.
        version_unknown: True if it parks a message because this worker does not know the version, or cannot decode it.
        user_code_ran: True if user code ran for it in this worker, and returned or raised. A worker that only records
            how another worker ended has not proved that it can run user code.
    """

    __slots__ = ("bodies", "declined", "item", "opens", "publishes", "user_code_ran", "version_unknown")

    def __init__(
        self,
        item: SettleItem,
        publishes: list[tuple[Target, PublishItem]],
        bodies: list[bytes],
        opens: list[tuple[Target, GatherOpen]] | None = None,
    ) -> None:
        self.item = item
        self.publishes = publishes
        self.bodies = bodies
        self.opens = opens or []
        self.version_unknown = self.user_code_ran = self.declined = False

    def mark_user_code_ran(self) -> Settlement:
        """Record that user code ran in this worker, and returned or raised."""
        self.user_code_ran = True
        return self

    def mark_succeeded(self) -> Settlement:
        """Count the attempt as a success for the breaker."""
        self.item.attempt_result = ATTEMPT_SUCCEEDED
        return self.mark_user_code_ran()

    def mark_failed(self) -> Settlement:
        """Count the attempt as a failure for the breaker.

        Failures of earlier attempts have been counted already.
        """
        self.item.attempt_result = ATTEMPT_FAILED
        return self.mark_user_code_ran()


Result = tuple[int, bytes] | Settlement
"""(target number, body) of a plain acknowledgement with one message, or any other settlement."""


def decline(item: DeliveryItem) -> Settlement:
    """Return the result of a message that must not begin, because its queue was paused after its delivery."""
    declined = Settlement(SettleItem([(item.id, item.lease)], RETRY), [], [])
    declined.declined = True
    return declined


def forward(item: DeliveryItem, body: bytes, place: StagePlan) -> Settlement:
    """Forward a message to the current queue of its place.

    Its completed steps, attempts and gathered parts go with it.
    """
    extra = item.extra
    if extra is not None and extra.parts is not None:
        base, arrivals = split_parts(item, body)
        key = f"moved:{item.id}"
        reopened = OpenGather(key, len(arrivals), place.queue, place.id, base)
        return settle_transition(
            item, Transition([], [reopened], [GatherArrival(key, slot, arrived) for slot, arrived in arrivals])
        )
    if extra is not None:
        envelope = decode_envelope(body)
        envelope.steps = completed_steps(envelope, item)
        if envelope.attempts >= 0:
            envelope.attempts += extra.attempts
            envelope.failure = extra.failure or envelope.failure
        body = encode(envelope)
    return settle_transition(item, Transition([Publish(place.queue, place.id, body)]))


def park_unknown_version(item: DeliveryItem, workflow_id: str, version: int, place: str) -> Settlement:
    """Park a message of a version or place that is not registered.

    `OrphanedMessages.resume` requeues it after the version has been registered.
    """
    text = (
        f"version {version} of workflow {workflow_id!r} is not registered with a {place}: the instance continues there "
        "after a runtime has started with this version, or has registered it"
    )
    reason = Failure("refused", f"WorkflowDefinitionError: {text}", "WorkflowDefinitionError")
    parked = Settlement(SettleItem([(item.id, item.lease)], DEAD_LETTER, [], 0.0, write_failure(reason)), [], [])
    parked.version_unknown = True
    return parked


def park_undecodable(item: DeliveryItem, place: str, workflow_id: str, version: int, error: Exception) -> Settlement:
    """Park a message with data that the code of this worker cannot decode. No attempt is counted.

    `place` is the subject of the reason, as "stage 'ship'". `OrphanedMessages.resume` requeues the message at the next
    start.
    """
    text = (
        f"{error}; {place} of workflow {workflow_id!r} version {version} cannot decode its data with the code that "
        "runs now: nothing is compensated, and the instance continues here after a runtime has started with code that "
        "can decode it"
    )
    kind, error_type = UNDECODABLE
    reason = Failure(kind, f"InvalidContext: {text}", error_type)
    parked = Settlement(SettleItem([(item.id, item.lease)], DEAD_LETTER, [], 0.0, write_failure(reason)), [], [])
    parked.version_unknown = True
    return parked


def park_unreadable(item: DeliveryItem, error: Exception) -> Settlement:
    """Park a message whose body cannot be decoded.

    A person can inspect it, and no worker fails on it again.
    """
    reason = Failure("refused", f"the body of the message cannot be decoded: {describe_error(error)}")
    parts = None if item.extra is None else item.extra.parts
    if parts is not None and any(not size for slot, size in parts if slot):
        # The broker empties the parts that would make a gathered message larger than the limit.
        reason = Failure(
            "refused",
            "PayloadTooLarge: the results of its branches or items are too large for one message; keep large data in "
            "files and pass their names",
        )
    return Settlement(SettleItem([(item.id, item.lease)], DEAD_LETTER, [], 0.0, write_failure(reason)), [], [])


def completed_steps(envelope: Envelope, item: DeliveryItem) -> dict[str, bytes] | None:
    """Return the steps that were completed under this message and under those before it."""
    own = None if item.extra is None else item.extra.steps
    if envelope.steps is None:
        return own
    return envelope.steps if own is None else {**envelope.steps, **own}


def settle_transition(item: DeliveryItem, transition: Transition, epoch: int = 0) -> Settlement:
    """Return the settlement that acknowledges a message and performs a transition.

    The published messages and opened gathers belong to the epoch of the message, or to `epoch` if given.
    """
    group = item.group if epoch else ""
    priority = 0 if item.extra is None else item.extra.priority
    publishes = [
        (
            Target(publish.queue, publish.label, TERMINAL if publish.terminal else 0),
            PublishItem(
                0,
                len(publish.body),
                group,
                epoch,
                0,
                0 if publish.terminal or publish.label == FAILED else priority,
                publish.delay,
                publish.ttl,
            ),
        )
        for publish in transition.publishes
    ]
    opens = [
        (Target(one.queue, one.label), GatherOpen(one.key, one.need, 0, len(one.base), group, epoch, one.deadline))
        for one in transition.opens
    ]
    arrivals = [Arrival(one.key, one.slot, len(one.body)) for one in transition.arrivals]
    bodies = [publish.body for publish in transition.publishes]
    bodies += [one.base for one in transition.opens]
    bodies += [one.body for one in transition.arrivals]
    done = SettleItem([(item.id, item.lease)], ACK, arrivals=arrivals)
    return Settlement(done, publishes, bodies, opens)


def assign_target_numbers(settled: Settlement, targets: list[Target]) -> SettleItem:
    """Return the item of a settlement, with its targets as numbers.

    A number is an index in `targets`, to which missing targets are added.
    """
    item = settled.item
    item.publishes = []
    for target, publish in settled.publishes:
        publish.target = _number(target, targets)
        item.publishes.append(publish)
    item.opens = []
    for target, opening in settled.opens:
        opening.target = _number(target, targets)
        item.opens.append(opening)
    return item


def _number(target: Target, targets: list[Target]) -> int:
    for number, existing in enumerate(targets):
        if existing == target:
            return number
    targets.append(target)
    return len(targets) - 1


def split_parts(item: DeliveryItem, body: bytes) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Return the base and the arrivals of a gathered message.

    Arrivals are (slot, body), in the order of arrival.
    """
    parts = None if item.extra is None else item.extra.parts
    if parts is None:
        return body, []
    at = parts[0][1]
    base = body[:at]
    arrivals = []
    for slot, size in parts[1:]:
        arrivals.append((slot, body[at : at + size]))
        at += size
    return base, arrivals
