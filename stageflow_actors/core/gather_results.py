"""What came together in a gather, taken apart: branches, items, a reply; and what of it counts once its stage fails.

Pure, for workers and the coordinator alike: whoever finds that a stage is over has the same to be undone.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from msgspec import Raw, Struct

from stageflow_actors.core.envelope import (
    NIL,
    Envelope,
    ItemEnd,
    StageRecord,
    append_record,
    decode_envelope,
    decode_item_end,
    decode_trail,
    encode,
)
from stageflow_actors.core.merge import MergeConflict, merge_fields
from stageflow_actors.core.plan import StagePlan, WorkflowPlan, item_id
from stageflow_actors.core.resume_state import save_branches
from stageflow_actors.core.routing import GatherArrival, Transition
from stageflow_actors.core.status import StageStatus

__all__ = [
    "Arrivals",
    "JoinResult",
    "RequestState",
    "UnpublishedItems",
    "completed_items_record",
    "decode_item_ends",
    "decode_request",
    "decode_unpublished",
    "fail_unpublished_items",
    "is_carrier",
    "join_branches",
]

Arrivals = list[tuple[str, bytes]]
"""Slot and body of each arrival, in the order they came."""


class RequestState(Struct, array_like=True):
    """What waits for a reply as the payload of its envelope: the attempt, and what the stage was given and has kept."""

    attempt: int
    started: float
    endpoint: str
    timeout: float
    before: Raw
    payload: Raw = NIL
    steps: dict[str, bytes] | None = None


class UnpublishedItems(Struct, array_like=True):
    """Items still to be published: the payload of an envelope without a context.

    Their numbers are those from `first` on, or `numbers` where they are not in a row; `steps` are those that each has
    completed before, where it was tried before.
    """

    first: int
    items: list[Raw]
    numbers: list[int] | None = None
    steps: list[dict[str, bytes] | None] | None = None

    def split(self, count: int) -> tuple[UnpublishedItems, UnpublishedItems]:
        """The next `count` of them, and those behind."""
        numbers, steps = self.numbers, self.steps
        return (
            UnpublishedItems(self.first, self.items[:count], numbers and numbers[:count], steps and steps[:count]),
            UnpublishedItems(
                self.first + count, self.items[count:], numbers and numbers[count:], steps and steps[count:]
            ),
        )

    @property
    def all_numbers(self) -> Iterable[int]:
        """The number of each item."""
        return range(self.first, self.first + len(self.items)) if self.numbers is None else self.numbers


decode_request = msgspec.msgpack.Decoder(RequestState).decode
decode_unpublished = msgspec.msgpack.Decoder(UnpublishedItems).decode


class JoinResult(Struct):
    """What came of branches: the envelopes of those that completed, the first contradiction between them, and how the
    first required one that failed did so."""

    completed: dict[str, Envelope]
    conflict: MergeConflict | None = None
    failure: StageRecord | None = None


def join_branches(plan: WorkflowPlan, base: Envelope, arrivals: Arrivals) -> JoinResult:
    """`base` is given the trail of each branch, and what they changed, for all that may have to be undone."""
    joined = JoinResult({})
    before = len(decode_trail(base.trail))
    for slot, body in arrivals:
        branch = decode_envelope(body)
        stage = plan.stage(slot)
        for record in decode_trail(branch.trail)[before:]:
            base.trail = append_record(base.trail, record)
            if record.status == StageStatus.completed:
                joined.completed[slot] = branch
            elif record.status == StageStatus.failed and joined.failure is None and (stage is None or stage.required):
                joined.failure = record
    base.steps = save_branches(base.context, arrivals)
    base.context, joined.conflict = merge_fields(
        base.context, {name: one.context for name, one in joined.completed.items()}
    )
    return joined


def decode_item_ends(arrivals: Arrivals) -> list[tuple[int, ItemEnd]]:
    """Number and end of each item, in order."""
    return sorted(((int(slot), decode_item_end(body)) for slot, body in arrivals), key=lambda pair: pair[0])


def completed_items_record(stage: StagePlan, ended: list[tuple[int, ItemEnd]], now: float) -> StageRecord | None:
    """The record, beside that of map stage `stage` itself, by which its items that are done are undone; None where
    there is nothing to be undone."""
    done = [[number, one.item, one.result] for number, one in ended if one.error is None] if stage.compensated else []
    if not done:
        return None
    undo = Raw(encode(done))
    return StageRecord(item_id(stage.id), StageStatus.completed.value, 1, now, 0.0, None, NIL, undo)


def is_carrier(envelope: Envelope) -> bool:
    """Whether it brings items that are still to be published, and nothing else."""
    return bytes(envelope.context) == bytes(NIL)


def fail_unpublished_items(stage: StagePlan, envelope: Envelope, error: str) -> Transition:
    """The items that a carrier brings are over before they began."""
    end = encode(ItemEnd(NIL, error))
    return Transition(
        arrivals=[
            GatherArrival(stage.id, str(number), end) for number in decode_unpublished(envelope.payload).all_numbers
        ]
    )
