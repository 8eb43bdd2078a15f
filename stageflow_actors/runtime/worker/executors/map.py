"""`MapExecutor` and `ItemExecutor`: split a map stage into one message per item, run each, join the results in order.

An item's envelope contains neither its siblings nor the context, which waits once in the gather. Many items are
published in chunks; each chunk includes a carrier message with the remaining items, so that after a crash the split
resumes at the current chunk.
"""

from __future__ import annotations

import time
from itertools import repeat
from typing import Any

from msgspec import Raw, structs

from stageflow_actors.core.envelope import (
    EMPTY_TRAIL,
    NIL,
    Envelope,
    Failure,
    ItemEnd,
    StageRecord,
    append_record,
    decode_envelope,
    encode,
)
from stageflow_actors.core.gather_results import (
    Arrivals,
    UnpublishedItems,
    completed_items_record,
    decode_item_ends,
    decode_unpublished,
    fail_unpublished_items,
    is_carrier,
)
from stageflow_actors.core.plan import WorkflowPlan, item_id
from stageflow_actors.core.routing import (
    GatherArrival,
    OpenGather,
    Publish,
    Transition,
    item_slot,
    missing_dependencies,
)
from stageflow_actors.core.status import StageStatus
from stageflow_actors.core.tracebacks.table import with_traceback
from stageflow_actors.core.value_codec import ValueCodec
from stageflow_actors.definition.callables import asks_for_ctx, with_ctx
from stageflow_actors.errors import StageError
from stageflow_actors.runtime.ipc.pool_spec import StageCode
from stageflow_actors.runtime.messaging.settlements import Result, Settlement, completed_steps, decline, split_parts
from stageflow_actors.runtime.worker.awaitables import PLAIN_TYPES, check_not_awaitable
from stageflow_actors.runtime.worker.executors.base import PARK_MARK, Executor, ExecutorEnvironment
from stageflow_actors.runtime.worker.executors.handler import HandlerExecutor
from stageflow_actors.runtime.worker.executors.set_field import with_field
from stageflow_actors.runtime.worker.stage_context import check_no_request
from stageflow_actors.runtime.worker.traceback_text import failure_with_traceback
from stageflow_brokers.api import DeliveryItem

__all__ = ["ItemExecutor", "MapExecutor"]

_NO_ITEMS = Raw(encode([]))

MIN_CHUNK_ITEMS = 2_000
"""The least items of a chunk. Larger maps use larger chunks, about eight: each chunk rewrites the remaining items."""

MAX_CHUNK_ITEMS = 100_000
"""The most items of a chunk: one settlement holds them all."""

MAX_ITEM_TRACEBACKS = 20
"""Most tracebacks of failed items that one worker sends for one instance: a million items may fail."""

MAX_TRACED_INSTANCES = 1_000
"""Most instances for which a worker counts these."""

BUILTIN_COLLECTIONS = (list, tuple, dict, set, frozenset, range)
"""Return types of `over` whose iteration is finite and runs no user code."""


class MapExecutor(Executor):
    """Executes the split and the join of a map stage. Encoding a million items must not count against the timeout."""

    limits_whole_run = False

    def __init__(self, program: StageCode, plan: WorkflowPlan, environment: ExecutorEnvironment) -> None:
        super().__init__(program, plan, environment)
        over, when = program.parts["over"], program.parts["when"]
        self._over = with_ctx(over, 1)
        self._when = None if when is None else with_ctx(when, 1)
        self._wants_ctx = asks_for_ctx(over, 1) or asks_for_ctx(when, 1)
        self._into: str | None = program.parts["into"]
        self._items = ValueCodec(program.parts["item_type"])
        self._results = ValueCodec(program.parts["result_type"])
        self._max_failures: int = program.parts["max_failures"]
        self._parks = self.planned.required and self.plan.on_failure == "park"
        place = self.plan.stage(item_id(self.planned.id))
        assert place is not None, f"map stage {self.planned.id} has no place for its items"
        self._place = place

    def _run(self, item: DeliveryItem, body: bytes) -> Result:
        base, arrivals = split_parts(item, body)
        extra = item.extra
        if extra is not None and extra.cancelled is not None:
            return self._cancel_items(item, decode_envelope(base), arrivals, extra.cancelled)
        if extra is not None and extra.parts is not None:
            envelope = decode_envelope(base)
            if not self._belongs_here(envelope):
                return self._forward_or_park(item, envelope, body)
            return self._join(item, envelope, arrivals)
        opened = self._open(item, body)
        if isinstance(opened, Settlement):
            return opened
        if is_carrier(opened):
            return self._settle(item, self._next_chunk(opened, decode_unpublished(opened.payload)))
        return self._split(item, opened)

    def _split(self, item: DeliveryItem, envelope: Envelope) -> Settlement:
        started = self._wall()
        attempt = 1 if item.extra is None else item.extra.attempts + 1
        missing = missing_dependencies(self.planned.after, envelope.trail)
        if missing:
            return self._settle_unmet(item, envelope, missing, attempt)
        try:
            self._set_time_limit(self._timeout_ns)
            context = self._decode_context(envelope)
            ctx = self._stage_context(item, envelope, attempt) if self._wants_ctx else None
            if self._when is not None and not self._holds(self._when, context, ctx):
                return self._skip(item, envelope)
            given = self._over(context, ctx)
            check_not_awaitable(given, f"over of map stage {self.planned.id!r}")
            if given is None or isinstance(given, (str, bytes, bytearray, memoryview)):
                shown = "None" if given is None else f"the {type(given).__name__} {given!r:.60}"
                raise StageError(
                    f"over of map stage {self.planned.id!r} returned {shown}: return the items as a list or another "
                    "iterable, and [] where there are none"
                )
            if type(given) in BUILTIN_COLLECTIONS:
                self._set_time_limit(0)
            items = [self._item(number, one) for number, one in enumerate(given)]
            self._set_time_limit(0)
        except BaseException as error:  # noqa: BLE001 - `over` is user code
            self._on_error(error)
            return self._handle_failure(item, envelope, attempt, started, self._wall() - started, error)
        if not items:
            return self._join(item, envelope, [])
        envelope.since, envelope.attempts = started, attempt - 1
        self._keep_traceback(item, envelope)
        transition = Transition(opens=[self._open_gather(envelope, len(items))])
        transition.publishes = self._next_chunk(envelope, UnpublishedItems(0, items)).publishes
        return self._settle(item, transition)

    def _item(self, number: int, value: Any) -> Raw:
        what = f"item {number} of {self.planned.id!r}"
        data = self._items.encode(value, what=what)
        if len(data) > self._limit:
            raise self._too_large(len(data), f"item {number} is")
        return Raw(data)

    def _set_time_limit(self, timeout_ns: int) -> None:
        """Set the time limit for the user code that follows; 0 after it."""
        self._slot.set_timeout(timeout_ns, time.monotonic_ns())

    def _open_gather(self, envelope: Envelope, need: int) -> OpenGather:
        return OpenGather(self.planned.id, need, self.planned.queue, self.planned.id, encode(envelope))

    def _cancel_items(self, item: DeliveryItem, envelope: Envelope, arrivals: Arrivals, reason: str) -> Settlement:
        """Settle a cancelled map: unpublished items count as ended, completed ones can be compensated."""
        assert item.extra is not None
        if item.extra.parts is None and is_carrier(envelope):
            return self._settle(item, fail_unpublished_items(self.planned, envelope, reason))
        self._record_done_items(envelope, decode_item_ends(arrivals))
        return self._skip_cancelled(item, envelope)

    def _record_done_items(self, envelope: Envelope, ended: list[tuple[int, ItemEnd]]) -> None:
        """Record the completed items like a completed stage, so that compensation undoes them."""
        undo = completed_items_record(self.planned, ended, self._wall())
        if undo is not None:
            envelope.trail = append_record(envelope.trail, undo)

    def _next_chunk(self, envelope: Envelope, rest: UnpublishedItems) -> Transition:
        """Return the messages for the next items, and a carrier for the rest."""
        place = self._place
        now, later = rest.split(max(MIN_CHUNK_ITEMS, min(len(rest.items) // 8, MAX_CHUNK_ITEMS)))
        head = (envelope.workflow_id, envelope.version)
        one = Envelope(*head, place.id, NIL, EMPTY_TRAIL, envelope.started_at, run=envelope.run)
        steps = []
        for number, value, kept in zip(now.all_numbers, now.items, now.steps or repeat(None), strict=False):
            one.context, one.payload, one.steps = value, Raw(encode(number)), kept
            steps.append(Publish(place.queue, self.planned.id, encode(one), ttl=place.ttl))
        if later.items:
            carrier = Envelope(*head, self.planned.id, NIL, EMPTY_TRAIL, envelope.started_at, Raw(encode(later)))
            carrier.run = envelope.run
            steps.append(Publish(self.planned.queue, self.planned.id, encode(carrier)))
        return Transition(steps)

    def _join(self, item: DeliveryItem, envelope: Envelope, arrivals: Arrivals) -> Settlement:
        extra = item.extra
        started = self._wall() if envelope.since is None else envelope.since
        attempt = 1 if extra is None else extra.attempts + 1
        ended = decode_item_ends(arrivals)
        failed = [(number, one.error) for number, one in ended if one.error is not None]
        trace = next((one.traceback for _, one in ended if one.traceback is not None), None)
        marked = extra is not None and extra.steps is not None and PARK_MARK in extra.steps
        if failed and marked and attempt == 1:
            return self._retry_failed_items(item, envelope, ended)
        before = envelope.trail
        if self.planned.required and not self._parks:
            self._record_done_items(envelope, ended)
        undone = envelope.trail
        if extra is not None and extra.fresh:
            return self._handle_lost_attempt(item, envelope, attempt)
        if len(failed) > self._max_failures:
            number, text = failed[0]
            why = StageError(
                f"{len(failed)} of {len(ended)} items of {self.planned.id!r} failed, more than "
                f"max_failures={self._max_failures}; the first was item {number}: {text}"
            )
            failure = structs.replace(failure_with_traceback(why), traceback=trace)
            if self._parks and attempt == 1:
                # Count an attempt first: a marked message without attempts is taken for a requeued one.
                return self._retry(item, 0.0, failure)
            if self._parks and not marked:
                self._store(item).keep(PARK_MARK, b"")
            # Final without the policy: it has already limited the attempts of each item.
            took = self._wall() - started
            return self._fail_stage(item, envelope, failure, attempt, started, took).mark_failed()
        try:
            encoded_results = [NIL if one.error is not None else one.result for _, one in ended]
            self._set_time_limit(self._timeout_ns)
            context, data = self._decode_context(envelope), NIL
            if self._into is not None:
                results = [
                    self._results.decode_stored(one, what=f"the result of item {number}")
                    for (number, _), one in zip(ended, encoded_results, strict=True)
                ]
                context = with_field(context, self._into, results)
            self._set_time_limit(0)
            if self._into is None:
                data = Raw(encode(encoded_results))
            encoded = self.codec.encode(context, stage=self.planned.id)
            done = completed_items_record(self.planned, ended, started)
            undo = done.undo if done is not None else _NO_ITEMS if self.planned.compensated else NIL
            record = StageRecord(
                self.planned.id,
                StageStatus.completed.value,
                envelope.attempts + attempt,
                started,
                self._wall() - started,
                None,
                data,
                undo,
            )
            envelope.trail = before
            if trace is not None:
                envelope.tracebacks = with_traceback(envelope.tracebacks, self.planned.id, trace)
            return self._complete_stage(item, envelope, record, encoded)
        except BaseException as error:  # noqa: BLE001 - a property of the context is user code
            self._on_error(error)
            envelope.trail = undone
            return self._handle_failure(item, envelope, attempt, started, self._wall() - started, error)

    def _retry_failed_items(
        self, item: DeliveryItem, envelope: Envelope, ended: list[tuple[int, ItemEnd]]
    ) -> Settlement:
        """Publish the failed items of a requeued map again; the completed ones wait in a new gather."""
        failed = [(number, one) for number, one in ended if one.error is not None]
        transition = Transition(opens=[self._open_gather(envelope, len(ended))])
        transition.arrivals = [
            GatherArrival(self.planned.id, str(number), encode(one)) for number, one in ended if one.error is None
        ]
        rest = UnpublishedItems(
            0, [one.item for _, one in failed], [n for n, _ in failed], [one.steps for _, one in failed]
        )
        transition.publishes = self._next_chunk(envelope, rest).publishes
        return self._settle(item, transition)

    def _fail_stage(
        self, item: DeliveryItem, envelope: Envelope, failure: Failure, attempt: int, started: float, duration: float
    ) -> Settlement:
        if is_carrier(envelope) and not self._parks:
            return self._settle(item, fail_unpublished_items(self.planned, envelope, failure.message))
        return super()._fail_stage(item, envelope, failure, attempt, started, duration)


class ItemExecutor(HandlerExecutor):
    """Executes one item of a map stage."""

    kind = "item"

    def __init__(self, program: StageCode, plan: WorkflowPlan, environment: ExecutorEnvironment) -> None:
        super().__init__(program, plan, environment)
        whole = self.plan.stage(self.planned.joins)
        self._keeps_items = whole is not None and whole.compensated
        self._parks = self.plan.on_failure == "park"
        self._none_may_fail: bool = program.parts["max_failures"] == 0
        self._items = ValueCodec(program.parts["item_type"])
        self._results = ValueCodec(program.parts["result_type"])
        self._sent_tracebacks: dict[str, int] = {}

    def _run(self, item: DeliveryItem, body: bytes) -> Result:
        opened = self._open(item, body)
        if isinstance(opened, Settlement):
            return opened
        attempt = 1 if item.extra is None else item.extra.attempts + 1
        started = self._wall()
        clock = time.perf_counter()
        try:
            ctx = self._stage_context(item, opened, attempt) if self._wants_ctx else None
            value = self._items.decode_stored(opened.context, what=f"item {item_slot(opened)}")
            if self._paused[0]:
                return decline(item)
            value = self._call(value, ctx)
            if type(value) not in PLAIN_TYPES:
                value = self._resolve_call(value)
        except BaseException as error:  # noqa: BLE001 - the handler is user code
            return self._handler_failed(item, opened, attempt, started, clock, error)
        return self._after_call(item, opened, attempt, started, clock, None, value)

    def _on_result(
        self, item: DeliveryItem, envelope: Any, attempt: int, started: float, clock: float, context: Any, value: Any
    ) -> Result:
        try:
            check_no_request(value, f"an item of {self.planned.joins!r}")
            what = f"a result of {self.planned.joins!r}"
            result = NIL if value is None else self._keep(self._results, value, what)
            if len(bytes(result)) > self._limit:
                raise self._too_large(len(bytes(result)), f"the result of item {item_slot(envelope)} is")
        except BaseException as error:  # noqa: BLE001 - the encoding of a user's object may raise anything
            return self._handler_failed(item, envelope, attempt, started, clock, error)
        return self._arrive(
            item, envelope, ItemEnd(result, None, envelope.context if self._keeps_items else NIL)
        ).mark_succeeded()

    def _fail_stage(
        self, item: DeliveryItem, envelope: Envelope, failure: Failure, attempt: int, started: float, duration: float
    ) -> Settlement:
        """Send the failure to the join, which counts failed items; park the item if none may fail."""
        if self._parks:
            self._mark_uncertain(item, envelope, failure)
        if self._none_may_fail and self._parks:
            return self._park(item, failure)
        uncertain = self._is_uncertain(item, envelope, failure)
        end = ItemEnd(NIL, failure.message, traceback=self._admit_traceback(item.group, failure.traceback))
        if self._parks:  # a requeue runs the item again
            end.item, end.steps = envelope.context, completed_steps(envelope, item)
        if uncertain:
            end.item, end.uncertain = envelope.context, True
        return self._arrive(item, envelope, end)

    def _admit_traceback(self, group: str, trace: bytes | None) -> bytes | None:
        """Return the traceback, or None if this worker has sent enough of this instance: the join shows only one."""
        if trace is None:
            return None
        sent = self._sent_tracebacks
        sent[group] = sent.get(group, 0) + 1
        while len(sent) > MAX_TRACED_INSTANCES:
            del sent[next(iter(sent))]
        return trace if sent[group] <= MAX_ITEM_TRACEBACKS else None

    def _arrive(self, item: DeliveryItem, envelope: Envelope, end: ItemEnd) -> Settlement:
        return self._settle(
            item, Transition(arrivals=[GatherArrival(self.planned.joins, item_slot(envelope), encode(end))])
        )
