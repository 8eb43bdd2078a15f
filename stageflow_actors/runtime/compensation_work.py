"""One compensation at work: runs the next of the plan, and passes the rest on, or the end.

A compensation that fails for good, hangs or kills its worker does not stop the others; the outcome names it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from msgspec import Raw

from brokers.api import AGAIN, DONE, DeliveryItem, PublishItem, SettleItem, Target
from stageflow_actors.core.codec import ContextCodec
from stageflow_actors.core.envelope import NIL, CompensationRecord, Envelope, Failure, decode_envelope, decode_trail
from stageflow_actors.core.failures import exception_of, failure_of, read_failure, write_failure
from stageflow_actors.core.plan import Naming, WorkflowPlan, item_id
from stageflow_actors.core.routing import after_compensation
from stageflow_actors.core.status import StageStatus
from stageflow_actors.core.values import ValueCodec
from stageflow_actors.definition.handler import BoundCall
from stageflow_actors.definition.stage import Compensation, Replace
from stageflow_actors.errors import PayloadTooLarge
from stageflow_actors.runtime.context import StageContext, StepStore
from stageflow_actors.runtime.interception import COMPENSATION, arounds_of, intercepted
from stageflow_actors.runtime.programs import CompensationProgram
from stageflow_actors.runtime.work import (
    GRACE_NS,
    TERMINAL,
    Settled,
    Stopwatch,
    ignore,
    judge,
    park_unknown,
    run_to_end,
)

__all__ = ["CompensationWork"]

UNDONE = ":undone"
"""The step that says which item of a map stage was undone last; no step of a user's can be taken for it, for those that
are kept while an item is undone begin with its number."""


class CompensationWork:
    """Runs the compensations of one workflow version. `limits`: async ones are cancelled at their timeouts."""

    first_target = 0

    def __init__(
        self,
        program: CompensationProgram,
        plan: WorkflowPlan,
        naming: Naming,
        services: Mapping[str, Any],
        slot: Stopwatch,
        store: Callable[[DeliveryItem], StepStore],
        *,
        max_message_bytes: int = 16 << 20,
        wall: Callable[[], float] = time.time,
        loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
        raised: Callable[[BaseException], None] = ignore,
        limits: bool = False,
    ) -> None:
        self.plan = plan
        self.naming = naming
        self.codec: ContextCodec[Any] = ContextCodec(program.context)
        self._context_type = program.context
        self._compensations = program.compensations
        self._items = {stage_id: ValueCodec(kind) for stage_id, kind in program.items.items()}
        self._arounds = arounds_of(program.interceptors, COMPENSATION)
        self._limits_itself = limits
        self._calls = {stage_id: self._ready(undo, services, loop) for stage_id, undo in program.compensations.items()}
        self._slot = slot
        self._store = store
        self._limit = max_message_bytes
        self._wall = wall
        self._raised = raised
        self.targets: list[Target] = []

    def _ready(
        self, compensation: Compensation, services: Mapping[str, Any], loop: Callable[[], asyncio.AbstractEventLoop]
    ) -> BoundCall:
        """The compensation as a function of (context, ctx) that gives (result, context)."""
        call = compensation.call
        bound, is_async = call.bind(services), call.is_async
        timeout = compensation.timeout if is_async and self._limits_itself else None
        if self._arounds:
            bound, is_async = intercepted(
                bound, self._arounds, kind="compensation", is_async=is_async, context_type=self._context_type
            )
        return run_to_end(bound, loop, timeout, f"a compensation of {self.plan.id!r}") if is_async else bound

    def __call__(self, item: DeliveryItem, body: bytes) -> Settled:
        """Run one compensation."""
        envelope = decode_envelope(body)
        task = envelope.compensation
        stage_id = "" if task is None or not task.plan else task.plan[0]
        compensation = self._compensations.get(stage_id)
        if task is None or compensation is None or envelope.version != self.plan.version:
            return park_unknown(item, envelope.workflow_id, envelope.version, f"compensation of stage {stage_id!r}")
        self._slot.allow(GRACE_NS if compensation.call.is_async and self._limits_itself else 0)
        self._slot.begin(item.id, int((compensation.timeout or 0) * 1e9), time.monotonic_ns())
        try:
            return self._run(item, envelope, stage_id)
        finally:
            self._slot.end()

    def _run(self, item: DeliveryItem, envelope: Envelope, stage_id: str) -> Settled:
        extra = item.extra
        attempt = 1 if extra is None else extra.attempts + 1
        if extra is not None and extra.fresh:
            failure = read_failure(extra.failure) or Failure("died", "WorkerDied: the worker process died")
            return self._failed(item, envelope, stage_id, attempt, failure, exception_of(failure), 0.0)
        clock = time.perf_counter()
        try:
            context = self.codec.decode(envelope.context)
            undo = undo_of(envelope, stage_id)
            value: Any = None
            if undo is None:
                value = self._calls[stage_id](context, self._context_of(item, envelope, stage_id, attempt))
                if self._arounds:
                    value, context = value
            else:
                self._undo_items(item, envelope, stage_id, attempt, undo)
            if type(value) is Replace:
                context = value.value
            elif self._context_type is not dict and isinstance(value, self._context_type):
                context = value
            encoded = self.codec.encode(context, stage=f"compensation of {stage_id}")
            if len(encoded) > self._limit:
                raise PayloadTooLarge(
                    f"the compensation of stage {stage_id!r} made the context {len(encoded)} bytes large, over "
                    f"max_message_bytes={self._limit}"
                )
        except BaseException as error:  # noqa: BLE001 - whatever a compensation raises is its failure
            self._raised(error)
            failure = failure_of(error)
            asked = error if isinstance(error, Exception) else exception_of(failure)
            return self._failed(item, envelope, stage_id, attempt, failure, asked, time.perf_counter() - clock)
        envelope.context = Raw(encoded)
        record = CompensationRecord(stage_id, StageStatus.completed.value, None, time.perf_counter() - clock)
        return self._on(item, envelope, record)

    def _undo_items(
        self, item: DeliveryItem, envelope: Envelope, stage_id: str, attempt: int, undo: list[tuple[Raw, Any]]
    ) -> None:
        """The items of a map stage, last one first, each once: what a crash interrupts goes on behind the last done."""
        ctx = self._context_of(item, envelope, stage_id, attempt)
        codec = self._items[stage_id]
        first_done = ctx.get_step_result(UNDONE)
        for number in reversed(range(len(undo) if first_done is None else first_done)):
            data, result = undo[number]
            ctx.enter_item(number)
            ctx.results = {**ctx.results, stage_id: result}
            self._calls[stage_id](codec.decode(data), ctx)
            ctx.enter_item(None)
            ctx.store_step_result(UNDONE, number)

    def _context_of(self, item: DeliveryItem, envelope: Envelope, stage_id: str, attempt: int) -> StageContext:
        extra = item.extra
        return StageContext(
            envelope=envelope,
            instance_id=item.group,
            epoch=item.epoch,
            stage_id=stage_id,
            attempt=attempt,
            timeout=self._compensations[stage_id].timeout,
            failure=None if extra is None else extra.failure,
            steps=None if extra is None else extra.steps,
            store=self._store(item),
            error=envelope.error,
            limit=self._limit,
            slot=self._slot,
        )

    def _failed(
        self,
        item: DeliveryItem,
        envelope: Envelope,
        stage_id: str,
        attempt: int,
        failure: Failure,
        error: Exception,
        duration: float,
    ) -> Settled:
        text = failure.message
        try:
            delay = judge(self._compensations[stage_id].retry, attempt, failure, error)
        except Exception as broken:  # noqa: BLE001 - a policy is user code
            delay = None
            text = f"{text} (and its retry policy failed: {failure_of(broken).message})"
        if delay is not None:
            again = SettleItem([(item.id, item.lease)], AGAIN, [], delay, write_failure(failure))
            return Settled(again, [], [])
        return self._on(item, envelope, CompensationRecord(stage_id, StageStatus.failed.value, text, duration))

    def _on(self, item: DeliveryItem, envelope: Envelope, record: CompensationRecord) -> Settled:
        step = after_compensation(self.plan, envelope, record, self.naming, self._wall())
        target = Target(step.queue, step.label, TERMINAL if step.terminal else 0)
        done = SettleItem([(item.id, item.lease)], DONE)
        return Settled(done, [(target, PublishItem(0, len(step.body)))], [step.body])


def undo_of(envelope: Envelope, stage_id: str) -> list[tuple[Raw, Any]] | None:
    """(item as encoded, result) of each item that a map stage handled well; None for a stage of any other kind."""
    for record in reversed(decode_trail(envelope.trail)):
        if record.stage_id in (stage_id, item_id(stage_id)) and bytes(record.undo) != bytes(NIL):
            return _decode_undo(record.undo)
    return None


_decode_undo = msgspec.msgpack.Decoder(list[tuple[Raw, Any]]).decode
