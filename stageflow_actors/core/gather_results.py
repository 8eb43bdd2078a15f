"""The bodies of gathers: the ends of branches, items or a request, and what is compensated if the stage fails.

Pure functions. Workers and the coordinator use the same ones, so that both compensate the same stages and items.
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
from stageflow_actors.core.tracebacks.table import merge_tracebacks

__all__ = [
    "Arrivals",
    "ItemToUndo",
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
"""Slot and body of each arrival, in order of arrival."""


class RequestState(Struct, array_like=True):
    """The state of a remote stage that waits for a reply; it is the payload of the waiting envelope.

    `before` is the context as delivered, `steps` are the completed steps, `timeout` is in seconds.
    """

    attempt: int
    started: float
    endpoint: str
    timeout: float
    before: Raw
    payload: Raw = NIL
    steps: dict[str, bytes] | None = None


class UnpublishedItems(Struct, array_like=True):
    """Items of a map stage that are not published yet: the payload of an envelope without a context.

    The items are numbered from `first`, or by `numbers` if they are not consecutive. `steps` are the completed steps of
    each item that ran before.
    """

    first: int
    items: list[Raw]
    numbers: list[int] | None = None
    steps: list[dict[str, bytes] | None] | None = None

    def split(self, count: int) -> tuple[UnpublishedItems, UnpublishedItems]:
        """Return the first `count` items, and the others."""
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


class ItemToUndo(Struct, array_like=True, gc=False):
    """One item of a map stage as its compensation reads it; an `uncertain` one has no result."""

    number: int
    item: Raw
    result: Raw = NIL
    uncertain: bool = False


class JoinResult(Struct):
    """The result of joining branches.

    `completed` are the envelopes of the completed branches, `conflict` is the first field that two of them changed
    differently, and `failure` the record of the first required branch that failed.
    """

    completed: dict[str, Envelope]
    conflict: MergeConflict | None = None
    failure: StageRecord | None = None


def join_branches(plan: WorkflowPlan, base: Envelope, arrivals: Arrivals) -> JoinResult:
    """Add the trails and the merged changes of the branches to `base`, so that their stages can be compensated."""
    joined = JoinResult({})
    before = len(decode_trail(base.trail))
    for slot, body in arrivals:
        branch = decode_envelope(body)
        stage = plan.stage(slot)
        base.tracebacks = merge_tracebacks(base.tracebacks, branch.tracebacks)
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
    """Return number and end of each item, by number."""
    return sorted(((int(slot), decode_item_end(body)) for slot, body in arrivals), key=lambda pair: pair[0])


def completed_items_record(stage: StagePlan, ends: list[tuple[int, ItemEnd]], now: float) -> StageRecord | None:
    """Return the record from which the completed items of a map stage are compensated; None if there are none.

    Failed items whose effect is unknown are among them, if the compensation is for these too. The trail holds it in
    addition to the record of the stage.
    """
    if not stage.compensated:
        return None
    done = [
        [number, end.item, end.result, *([True] if end.uncertain else [])]  # `ItemToUndo`, as earlier releases read it
        for number, end in ends
        if end.error is None or end.uncertain
    ]
    if not done:
        return None
    undo = Raw(encode(done))
    return StageRecord(item_id(stage.id), StageStatus.completed.value, 1, now, 0.0, None, NIL, undo)


def is_carrier(envelope: Envelope) -> bool:
    """Return True if the envelope only carries unpublished items of a map stage, and no context."""
    return bytes(envelope.context) == bytes(NIL)


def fail_unpublished_items(stage: StagePlan, envelope: Envelope, error: str) -> Transition:
    """Return the arrivals that end each item of a carrier with `error`; no item has started."""
    end = encode(ItemEnd(NIL, error))
    return Transition(
        arrivals=[
            GatherArrival(stage.id, str(number), end) for number in decode_unpublished(envelope.payload).all_numbers
        ]
    )
