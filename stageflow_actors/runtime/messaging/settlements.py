"""Settlements of another shape than the plain happy path, as whoever does the work puts them together.

Nothing here runs user code, and nothing is sent: that is the actor's.
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
    Arrival,
    DeliveryItem,
    GatherOpen,
    PublishItem,
    SettleItem,
    Target,
)

__all__ = [
    "TERMINAL",
    "Result",
    "Settlement",
    "assign_target_numbers",
    "completed_steps",
    "forward",
    "park_unknown_version",
    "park_unreadable",
    "settle_transition",
    "split_parts",
]

TERMINAL = 1


class Settlement:
    """A settlement that is not the plain happy path: the item, and what it publishes, opens and lets arrive.

    Targets are found their number by whoever sends it; `bodies` are in the order publishes, opens, arrivals. `unknown`:
    it parks a message of a version that is not known here. `ran`: code of the user's has run for it in this worker, and
    has returned or raised; a worker that only finds out how another one ended has not shown that it can work.
    """

    __slots__ = ("bodies", "opens", "outcome", "publishes", "user_code_ran", "version_unknown")

    def __init__(
        self,
        outcome: SettleItem,
        publishes: list[tuple[Target, PublishItem]],
        bodies: list[bytes],
        opens: list[tuple[Target, GatherOpen]] | None = None,
    ) -> None:
        self.outcome = outcome
        self.publishes = publishes
        self.bodies = bodies
        self.opens = opens or []
        self.version_unknown = self.user_code_ran = False

    def mark_user_code_ran(self) -> Settlement:
        """By code of the user's, which has returned or raised."""
        self.user_code_ran = True
        return self

    def mark_succeeded(self) -> Settlement:
        """With the verdict that the attempt went well."""
        self.outcome.attempt_result = ATTEMPT_SUCCEEDED
        return self.mark_user_code_ran()

    def mark_failed(self) -> Settlement:
        """With the verdict that the attempt failed. What was found out about an earlier one has been counted."""
        self.outcome.attempt_result = ATTEMPT_FAILED
        return self.mark_user_code_ran()


Result = tuple[int, bytes] | Settlement
"""(target, body) of the happy path, or a settlement of another shape."""


def forward(item: DeliveryItem, body: bytes, place: StagePlan) -> Settlement:
    """Send a message on to where its place is now: with the steps and attempts it has had, and all that it gathered."""
    extra = item.extra
    if extra is not None and extra.parts is not None:
        base, arrivals = split_parts(item, body)
        key = f"moved:{item.id}"
        again = OpenGather(key, len(arrivals), place.queue, place.id, base)
        return settle_transition(
            item, Transition([], [again], [GatherArrival(key, slot, arrived) for slot, arrived in arrivals])
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
    """Park what belongs to a version, or a place of it, that is not registered; `resumable` finds it once it is."""
    text = (
        f"version {version} of workflow {workflow_id!r} is not registered with a {place}: the instance goes on there "
        "when a runtime with that version is started, or registers it"
    )
    reason = Failure("refused", f"WorkflowDefinitionError: {text}", "WorkflowDefinitionError")
    parked = Settlement(SettleItem([(item.id, item.lease)], DEAD_LETTER, [], 0.0, write_failure(reason)), [], [])
    parked.version_unknown = True
    return parked


def park_unreadable(item: DeliveryItem, error: Exception) -> Settlement:
    """Park what is no message of a workflow at all: it is there to be looked at, and no worker dies of it."""
    reason = Failure("refused", f"what was delivered is no message of a workflow: {describe_error(error)}")
    parts = None if item.extra is None else item.extra.parts
    if parts is not None and any(not size for slot, size in parts if slot):
        # What would have made it larger than any message can be has arrived as nothing.
        reason = Failure(
            "refused",
            "PayloadTooLarge: what its branches or items have handed on is too much for one message; keep large data "
            "in files and pass their names",
        )
    return Settlement(SettleItem([(item.id, item.lease)], DEAD_LETTER, [], 0.0, write_failure(reason)), [], [])


def completed_steps(envelope: Envelope, item: DeliveryItem) -> dict[str, bytes] | None:
    """The steps that were completed under this message, and under those before it."""
    own = None if item.extra is None else item.extra.steps
    if envelope.steps is None:
        return own
    return envelope.steps if own is None else {**envelope.steps, **own}


def settle_transition(item: DeliveryItem, transition: Transition, epoch: int = 0) -> Settlement:
    """The settlement that acknowledges a message and does what follows from it.

    What follows belongs to the epoch of the message, or to `epoch` where that is given.
    """
    group = item.group if epoch else ""
    priority = 0 if item.extra is None else item.extra.priority
    publishes = [
        (
            Target(step.queue, step.label, TERMINAL if step.terminal else 0),
            PublishItem(
                0,
                len(step.body),
                group,
                epoch,
                0,
                0 if step.terminal or step.label == FAILED else priority,
                step.delay,
                step.ttl,
            ),
        )
        for step in transition.publishes
    ]
    opens = [
        (Target(one.queue, one.label), GatherOpen(one.key, one.need, 0, len(one.base), group, epoch, one.deadline))
        for one in transition.opens
    ]
    arrivals = [Arrival(one.key, one.slot, len(one.body)) for one in transition.arrivals]
    bodies = [step.body for step in transition.publishes]
    bodies += [one.base for one in transition.opens]
    bodies += [one.body for one in transition.arrivals]
    done = SettleItem([(item.id, item.lease)], ACK, arrivals=arrivals)
    return Settlement(done, publishes, bodies, opens)


def assign_target_numbers(settled: Settlement, targets: list[Target]) -> SettleItem:
    """The item of a settlement with its targets by number; `targets` grows by those it has not got."""
    item = settled.outcome
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
    for number, known in enumerate(targets):
        if known == target:
            return number
    targets.append(target)
    return len(targets) - 1


def split_parts(item: DeliveryItem, body: bytes) -> tuple[bytes, list[tuple[str, bytes]]]:
    """A gathered message taken apart: its base, and the arrivals as (slot, body) in the order they came."""
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
