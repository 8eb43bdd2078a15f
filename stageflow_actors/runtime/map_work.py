"""A map stage: split into one message per item, handle each, join the results in order.

No envelope of an item carries its siblings, and the context waits once, in the gather. Many items are published in
chunks, each with the message that brings the rest: a crash in between resumes at the chunk it hit.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from msgspec import Raw, Struct

from brokers.api import DeliveryItem
from stageflow_actors.core.envelope import (
    EMPTY_TRAIL,
    NIL,
    Envelope,
    Failure,
    ItemEnd,
    StageRecord,
    append_record,
    decode_envelope,
    decode_item_end,
    encode,
)
from stageflow_actors.core.failures import describe_error
from stageflow_actors.core.plan import item_id
from stageflow_actors.core.routing import Arrive, Moves, Open, Step, fail_stage, item_slot, unmet
from stageflow_actors.core.status import StageStatus
from stageflow_actors.core.values import ValueCodec
from stageflow_actors.errors import StageError
from stageflow_actors.runtime.context import refuse_request
from stageflow_actors.runtime.handler_work import HandlerWork
from stageflow_actors.runtime.work import Result, Settled, Work, split_parts

__all__ = ["ItemWork", "MapWork"]

_NOTHING = bytes(NIL)
_NONE_DONE = (_NOTHING, encode([]))

CHUNK = 2_000
"""Fewest items of a chunk; of more than eight chunks each is larger, so that the rest is not rewritten too often."""

LARGEST_CHUNK = 100_000
"""Most items of a chunk: one settlement has to hold them all."""


class _Rest(Struct, array_like=True):
    """Items still to be published, and the number of the first: the payload of an envelope without a context."""

    first: int
    items: list[Raw]


_rest = msgspec.msgpack.Decoder(_Rest)


class MapWork(Work):
    """Splits and joins."""

    def __init__(self, program: Any, *args: Any, **options: Any) -> None:
        super().__init__(program, *args, **options)
        self._over = program.parts["over"]
        self._when = program.parts["when"]
        self._into: str | None = program.parts["into"]
        self._items = ValueCodec(program.parts["item_type"])
        self._results = ValueCodec(program.parts["result_type"])
        self._max_failures: int = program.parts["max_failures"]
        self._undo: bool = program.parts["undo"]
        place = self.plan.stage(item_id(self.planned.id))
        assert place is not None, f"map stage {self.planned.id} has no place for its items"
        self._place = place

    def _run(self, item: DeliveryItem, body: bytes) -> Result:
        base, arrivals = split_parts(item, body)
        extra = item.extra
        if extra is not None and extra.cancelled is not None:
            return self._give_back(item, decode_envelope(base), arrivals)
        opened = self._open(item, base, body)
        if isinstance(opened, Settled):
            return opened
        if extra is not None and extra.parts is not None:
            return self._join(item, opened, arrivals)
        if bytes(opened.context) == _NOTHING:
            return self._settle(item, self._chunk(opened, _rest.decode(opened.payload)))
        return self._split(item, opened)

    def _split(self, item: DeliveryItem, envelope: Envelope) -> Settled:
        started = self._wall()
        attempt = 1 if item.extra is None else item.extra.attempts + 1
        missing = unmet(self.planned.after, envelope.trail)
        if missing:
            return self._unmet(item, envelope, missing)
        try:
            context = self.codec.decode(envelope.context)
            if self._when is not None and not self._when(context):
                return self._skip(item, envelope)
            given = list(self._over(context))
            what = f"item {{}} of {self.planned.id!r}"
            items = [Raw(self._items.encode(one, what=what.format(number))) for number, one in enumerate(given)]
        except BaseException as error:  # noqa: BLE001 - `over` is user code
            self._raised(error)
            return self._failed(item, envelope, attempt, started, self._wall() - started, error)
        if not items:
            return self._join(item, envelope, [])
        moves = Moves(opens=[Open(self.planned.id, len(items), self.planned.queue, self.planned.id, encode(envelope))])
        chunk = self._chunk(envelope, _Rest(0, items))
        moves.steps = chunk.steps
        return self._settle(item, moves)

    def _give_back(self, item: DeliveryItem, envelope: Envelope, arrivals: list[tuple[str, bytes]]) -> Settled:
        """The instance has been cancelled: items not published yet count as ended, those done can be undone."""
        assert item.extra is not None
        if item.extra.parts is None and bytes(envelope.context) == _NOTHING:
            rest = _rest.decode(envelope.payload)
            end = encode(ItemEnd(NIL, item.extra.cancelled))
            numbers = range(rest.first, rest.first + len(rest.items))
            return self._settle(item, Moves(arrivals=[Arrive(self.planned.id, str(n), end) for n in numbers]))
        done = [(number, one) for number, one in _ended(arrivals) if one.error is None]
        if self._undo and done:
            undo = Raw(encode([[number, one.item, one.result] for number, one in done]))
            place = item_id(self.planned.id)
            record = StageRecord(place, StageStatus.completed.value, 1, self._wall(), 0.0, None, NIL, undo)
            envelope.trail = append_record(envelope.trail, record)
        return self._pass_through(item, envelope)

    def _chunk(self, envelope: Envelope, rest: _Rest) -> Moves:
        """Messages for the next items, and one for the rest of them."""
        place = self._place
        count = max(CHUNK, min(len(rest.items) // 8, LARGEST_CHUNK))
        now, later = rest.items[:count], rest.items[count:]
        one = Envelope(
            envelope.workflow_id,
            envelope.version,
            place.id,
            NIL,
            EMPTY_TRAIL,
            envelope.started_at,
        )
        steps = []
        for number, value in enumerate(now, rest.first):
            one.context = value
            one.payload = Raw(encode(number))
            steps.append(Step(place.queue, self.planned.id, encode(one), ttl=place.ttl))
        if later:
            carrier = Envelope(
                envelope.workflow_id, envelope.version, self.planned.id, NIL, EMPTY_TRAIL, envelope.started_at
            )
            carrier.payload = Raw(encode(_Rest(rest.first + count, later)))
            steps.append(Step(self.planned.queue, self.planned.id, encode(carrier)))
        return Moves(steps)

    def _join(self, item: DeliveryItem, envelope: Envelope, arrivals: list[tuple[str, bytes]]) -> Settled:
        started = self._wall()
        ended = _ended(arrivals)
        errors = [(number, one.error) for number, one in ended if one.error is not None]
        undo = NIL
        if self._undo:
            undo = Raw(encode([[number, one.item, one.result] for number, one in ended if one.error is None]))
        try:
            if len(errors) > self._max_failures:
                number, error = errors[0]
                raise StageError(
                    f"{len(errors)} of {len(ended)} items of {self.planned.id!r} failed, more than "
                    f"max_failures={self._max_failures}; the first was item {number}: {error}"
                )
            results = [None if one.error is not None else self._results.decode(one.result) for _, one in ended]
            context = self.codec.decode(envelope.context)
            data = NIL
            if self._into is None:
                data = Raw(encode(results))
            elif self._is_dict:
                context[self._into] = results
            else:
                setattr(context, self._into, results)
            encoded = self.codec.encode(context, stage=self.planned.id)
            envelope.context = Raw(encoded)
            record = StageRecord(
                self.planned.id, StageStatus.completed.value, 1, started, self._wall() - started, None, data, undo
            )
            return self._record_and_leave(item, envelope, record)
        except BaseException as error:  # noqa: BLE001 - a property of the user's may raise anything
            self._raised(error)
            return self._lost(item, envelope, started, error, undo)

    def _lost(self, item: DeliveryItem, envelope: Envelope, started: float, error: BaseException, undo: Raw) -> Settled:
        """The stage has failed with items done: those are undone like a stage that completed."""
        if bytes(undo) in _NONE_DONE or not self.planned.required or self.plan.on_failure == "park":
            return self._failed(item, envelope, 1, started, self._wall() - started, error)
        done = StageRecord(item_id(self.planned.id), StageStatus.completed.value, 1, started, 0.0, None, NIL, undo)
        envelope.trail = append_record(envelope.trail, done)
        lost = StageRecord(self.planned.id, StageStatus.failed.value, 1, started, 0.0, describe_error(error))
        return self._settle(item, Moves([fail_stage(envelope, self.planned.id, lost, self.naming)]))


def _ended(arrivals: list[tuple[str, bytes]]) -> list[tuple[int, ItemEnd]]:
    """How the items ended, by number, in the order of the items."""
    return sorted(((int(slot), decode_item_end(body)) for slot, body in arrivals), key=lambda pair: pair[0])


class ItemWork(HandlerWork):
    """Handles one item."""

    kind = "item"

    def __init__(self, program: Any, *args: Any, **options: Any) -> None:
        super().__init__(program, *args, **options)
        whole = self.plan.stage(self.planned.joins)
        self._keep = whole is not None and whole.compensated
        self._none_may_fail: bool = program.parts["max_failures"] == 0
        self._items = ValueCodec(program.parts["item_type"])
        self._results = ValueCodec(program.parts["result_type"])

    def _run(self, item: DeliveryItem, body: bytes) -> Result:
        opened = self._open(item, body)
        if isinstance(opened, Settled):
            return opened
        attempt = 1 if item.extra is None else item.extra.attempts + 1
        started = self._wall()
        clock = time.perf_counter()
        try:
            ctx = self._stage_context(item, opened, attempt) if self._wants_ctx else None
            value = self._call(self._items.decode(opened.context), ctx)
        except BaseException as error:  # noqa: BLE001 - the handler is user code
            return self._broke(item, opened, attempt, started, clock, error)
        return self._then(item, opened, attempt, started, clock, None, value)

    def _returned(
        self, item: DeliveryItem, envelope: Any, attempt: int, started: float, clock: float, context: Any, value: Any
    ) -> Result:
        try:
            refuse_request(value, f"an item of {self.planned.joins!r}")
            what = f"a result of {self.planned.joins!r}"
            result = NIL if value is None else Raw(self._results.encode(value, what=what))
        except BaseException as error:  # noqa: BLE001 - what cannot be encoded may raise whatever it likes
            return self._broke(item, envelope, attempt, started, clock, error)
        return self._arrive(item, envelope, ItemEnd(result, None, envelope.context if self._keep else NIL)).worked()

    def _give_up(
        self, item: DeliveryItem, envelope: Envelope, failure: Failure, attempt: int, started: float, duration: float
    ) -> Settled:
        """The join decides how many items may fail; where none may, and failures are parked, the item is parked."""
        if self._none_may_fail and self.plan.on_failure == "park":
            return self._park(item, failure)
        return self._arrive(item, envelope, ItemEnd(NIL, failure.message))

    def _arrive(self, item: DeliveryItem, envelope: Envelope, end: ItemEnd) -> Settled:
        return self._settle(item, Moves(arrivals=[Arrive(self.planned.joins, item_slot(envelope), encode(end))]))
