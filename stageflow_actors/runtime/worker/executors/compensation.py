"""`CompensationExecutor`: runs the next compensation of an instance and publishes the rest, or the outcome.

A compensation that fails finally, hangs or kills its worker does not stop the others; the outcome names it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Raw, structs

from stageflow_actors.core.codec import ContextCodec
from stageflow_actors.core.envelope import NIL, CompensationRecord, Envelope, Failure, decode_envelope, decode_trail
from stageflow_actors.core.failures import UNDECIDED, exception_of, traceback_of, write_failure
from stageflow_actors.core.gather_results import ItemToUndo
from stageflow_actors.core.plan import WorkflowPlan, item_id
from stageflow_actors.core.resume_state import limit_steps
from stageflow_actors.core.routing import continue_compensation
from stageflow_actors.core.status import StageStatus
from stageflow_actors.core.tracebacks.table import compensation_place, with_traceback
from stageflow_actors.core.value_codec import (
    UndecodableData,
    ValueCodec,
    decode_context,
    find_undecodable,
    result_codec,
)
from stageflow_actors.definition.handler import BoundCall
from stageflow_actors.definition.stage import Compensation, Replace
from stageflow_actors.errors import PayloadTooLarge
from stageflow_actors.runtime.ipc.pool_spec import CompensationCode
from stageflow_actors.runtime.messaging.settlements import (
    Settlement,
    completed_steps,
    decline,
    park_undecodable,
    park_unknown_version,
    park_unreadable,
)
from stageflow_actors.runtime.worker.awaitables import is_awaitable
from stageflow_actors.runtime.worker.current_attempt import enter_attempt
from stageflow_actors.runtime.worker.executors.base import (
    UNDECODED_MARK,
    ExecutorEnvironment,
    ask_policy,
    lost_attempt_failure,
    name_broken_policy,
    policy_error,
)
from stageflow_actors.runtime.worker.executors.item_compensation import NO_ITEM, ItemCompensationState
from stageflow_actors.runtime.worker.failure_log import FailedAttempt
from stageflow_actors.runtime.worker.interceptors import AROUND_COMPENSATION, around_methods, wrap_handler
from stageflow_actors.runtime.worker.stage_context import (
    RememberedSteps,
    StageContext,
    check_no_request,
    with_result,
)
from stageflow_actors.runtime.worker.traceback_text import failure_with_traceback
from stageflow_brokers.api import ACK, RETRY, TERMINAL, DeliveryItem, PublishItem, SettleItem, Target

__all__ = ["CompensationExecutor"]

UNDO_STATE = ":undone"
"""The step that stores the `ItemCompensationState`. No user step has this name: item steps begin with a number."""

UNDO_FLUSH_SECONDS = 0.05
"""The interval at which the state becomes durable: after a crash, compensations of this time may run again."""

ITEM_CHECKPOINT_SECONDS = 0.25
"""The time for which each item is stored before it begins, after an item ended a worker.

It is several times `UNDO_FLUSH_SECONDS`: the item that ended the worker is among those that run again."""


class CompensationExecutor:
    """Executes the compensations of one workflow version."""

    first_target = 0

    def __init__(self, program: CompensationCode, plan: WorkflowPlan, environment: ExecutorEnvironment) -> None:
        self.plan = plan
        self._paused = environment.paused
        self.naming = environment.naming
        self.codec: ContextCodec[Any] = ContextCodec(program.context, program.result_types)
        self._context_type = program.context
        self._compensations = program.compensations
        self._items = {stage_id: ValueCodec(kind) for stage_id, kind in program.items.items()}
        self._arounds = around_methods(program.interceptors, AROUND_COMPENSATION)
        self.environment = environment
        self._event_loop = environment.event_loop
        self._copy_context = environment.base_context.copy
        self._bound = {stage_id: self._bind(undo, environment) for stage_id, undo in program.compensations.items()}
        self._slot = environment.slot
        self._store = environment.step_store
        self._limit = environment.max_message_bytes
        self._wall = environment.wall
        self._on_error = environment.on_error
        self.targets: list[Target] = []

    def _bind(self, compensation: Compensation, environment: ExecutorEnvironment) -> BoundCall:
        """Return the compensation as a blocking function of (context, ctx).

        With interceptors, the function returns (result, context) instead of the result.
        """
        call = compensation.spec
        bound = call.bind(environment.services)
        if self._arounds:
            bound = wrap_handler(
                bound,
                self._arounds,
                kind="compensation",
                is_async=call.is_async,
                context_type=self._context_type,
                resolve=self._resolve,
                finish=self._event_loop.finish,
            )
        return lambda context, ctx: self._resolve(bound(context, ctx))

    def _resolve(self, value: Any) -> Any:
        """Return a result of user code; if it is an awaitable, run the event loop until it is finished."""
        if not is_awaitable(value):
            return value
        return self._event_loop.run(value, self._slot, f"a compensation of {self.plan.id!r}")

    def __call__(self, item: DeliveryItem, body: bytes) -> Settlement:
        """Run one compensation."""
        try:
            envelope = decode_envelope(body)
        except msgspec.MsgspecError as error:
            return park_unreadable(item, error)
        task = envelope.compensation
        stage_id = "" if task is None or not task.plan else task.plan[0]
        compensation = self._compensations.get(stage_id)
        if task is None or compensation is None or envelope.version != self.plan.version:
            return park_unknown_version(
                item, envelope.workflow_id, envelope.version, f"compensation of stage {stage_id!r}"
            )
        self._slot.begin(item.id, int((compensation.timeout or 0) * 1e9), time.monotonic_ns())
        try:
            return self._copy_context().run(self._run, item, envelope, stage_id)
        finally:
            self._slot.end()

    def _run(self, item: DeliveryItem, envelope: Envelope, stage_id: str) -> Settlement:
        extra = item.extra
        attempt = 1 if extra is None else extra.attempts + 1
        if self._paused[0]:
            return decline(item)
        if (undo := _completed_items(envelope, stage_id)) is not None:
            return self._compensate_items(item, envelope, stage_id, undo)
        if extra is not None and extra.fresh:
            failure = lost_attempt_failure(extra.failure)
            return self._handle_failure(item, envelope, stage_id, attempt, failure, exception_of(failure), 0.0)
        clock = time.perf_counter()
        enter_attempt((envelope.workflow_id, item.group, stage_id, attempt))
        try:
            context = decode_context(self.codec, envelope.context)
            ctx = self._stage_context(item, envelope, stage_id, attempt)
            if extra is not None and extra.steps is not None and UNDECODED_MARK in extra.steps:
                ctx.results[extra.steps[UNDECODED_MARK].decode()]
            value = self._bound[stage_id](context, ctx)
            if self._arounds:
                value, context = value
            check_no_request(value, f"the compensation of stage {stage_id!r}")
            if type(value) is Replace:
                context = value.value
            elif self._context_type is not dict and isinstance(value, self._context_type):
                context = value
            encoded = self.codec.encode(context, stage=f"compensation of {stage_id}")
            given = len(envelope.context)
            # A context that joined branches made larger than the limit is not the compensation's fault.
            if len(encoded) > self._limit + (given if given > self._limit else 0):
                raise PayloadTooLarge(
                    f"the compensation of stage {stage_id!r} made the context {len(encoded)} bytes large, over "
                    f"max_message_bytes={self._limit}"
                )
        except BaseException as error:  # noqa: BLE001 - each exception of a compensation is its failure
            self._on_error(error)
            undecodable = find_undecodable(error)
            if undecodable is not None:
                return self._park_undecodable(item, stage_id, undecodable)
            failure = failure_with_traceback(error)
            asked = policy_error(error) or exception_of(failure)
            took = time.perf_counter() - clock
            return self._handle_failure(item, envelope, stage_id, attempt, failure, asked, took).mark_user_code_ran()
        envelope.context = Raw(encoded)
        record = CompensationRecord(stage_id, StageStatus.completed.value, None, time.perf_counter() - clock)
        return self._continue(item, envelope, record, _last_traceback(item)).mark_user_code_ran()

    def _park_undecodable(self, item: DeliveryItem, stage_id: str, error: UndecodableData) -> Settlement:
        """Park a compensation with data of another definition: code that cannot decode it compensates nothing."""
        if error.result_of is not None:
            self._store(item).keep(UNDECODED_MARK, error.result_of.encode())
        return park_undecodable(item, f"the compensation of stage {stage_id!r}", self.plan.id, self.plan.version, error)

    def _compensate_items(
        self, item: DeliveryItem, envelope: Envelope, stage_id: str, undo: list[ItemToUndo]
    ) -> Settlement:
        """Compensate the items of a map stage in descending order, each under its own timeout.

        A failed item stops no other. Each attempt tries the items that are not compensated yet.
        """
        clock = time.perf_counter()
        made = 0 if item.extra is None else item.extra.attempts
        ctx = self._stage_context(item, envelope, stage_id, made + 1)
        state = ItemCompensationState.restore(undo[-1].number + 1 if undo else 0, ctx.get_step_result(UNDO_STATE))
        if item.extra is None or UNDO_STATE not in (item.extra.steps or ()):
            state.begin_again()
        ctx.attempt = state.begin(made)
        enter_attempt((envelope.workflow_id, item.group, stage_id, ctx.attempt))
        if item.extra is not None and item.extra.fresh:
            failure = lost_attempt_failure(item.extra.failure)
            encoded = write_failure(failure)
            if failure.kind == UNDECIDED:
                if state.first_failure is not None:
                    state.first_failure = state.first_failure[0], encoded
                known = state.describe_failures(stage_id, len(undo)) or ""
                return self._handle_failure(
                    item, envelope, stage_id, ctx.attempt, failure, exception_of(failure), 0.0, known
                )
            if not state.record_death(made, encoded):
                return self._handle_failure(item, envelope, stage_id, ctx.attempt, failure, exception_of(failure), 0.0)
            ctx.store_step_result(UNDO_STATE, state.dump())
            return Settlement(SettleItem([(item.id, item.lease)], RETRY, [], 0.0, encoded), [], [])
        first: BaseException | None = None
        for number, failed in self._compensate_each(item, ctx, stage_id, undo, state):
            undecodable = find_undecodable(failed)
            if undecodable is not None:
                ctx._exit_item()
                ctx.store_step_result(UNDO_STATE, state.dump())
                return self._park_undecodable(item, stage_id, undecodable)
            first = first or failed
            state.record(number, None if failed is None else write_failure(failure_with_traceback(failed)))
        duration = time.perf_counter() - clock
        text = state.describe_failures(stage_id, len(undo))
        if text is None or state.first_failure is None:
            done = CompensationRecord(stage_id, StageStatus.completed.value, None, duration)
            return self._continue(item, envelope, done, _last_traceback(item)).mark_user_code_ran()
        ctx.store_step_result(UNDO_STATE, state.dump())
        failure = lost_attempt_failure(state.first_failure[1])
        asked = (
            first
            if isinstance(first, Exception) and failure_with_traceback(first) == failure
            else exception_of(failure)
        )
        return self._handle_failure(
            item, envelope, stage_id, ctx.attempt, failure, asked, duration, text
        ).mark_user_code_ran()

    def _compensate_each(
        self,
        item: DeliveryItem,
        ctx: StageContext,
        stage_id: str,
        undo: list[ItemToUndo],
        state: ItemCompensationState,
    ) -> Iterator[tuple[int, BaseException | None]]:
        """Compensate each pending item; yield its number and exception. Store the state at intervals."""
        codec, call = self._items[stage_id], self._bound[stage_id]
        timeout = int((self._compensations[stage_id].timeout or 0) * 1e9)
        results: Any = ctx.results
        of_item = result_codec(self.codec, stage_id).element
        began = kept = time.monotonic()
        for one in reversed(undo):
            number = one.number
            if not state.is_pending(number):
                continue
            now = time.monotonic()
            if state.one_by_one and now - began > ITEM_CHECKPOINT_SECONDS:
                state.one_by_one, kept = False, 0.0
            if state.one_by_one or now - kept > UNDO_FLUSH_SECONDS:
                state.current = number if state.one_by_one else NO_ITEM
                self._slot.begin(item.id, 0, time.monotonic_ns())
                ctx._exit_item()
                ctx.store_step_result(UNDO_STATE, state.dump())
                kept = time.monotonic()
            deadline = now + timeout / 1e9 if timeout else None
            failed: BaseException | None = None
            self._slot.begin(item.id, timeout, time.monotonic_ns())
            try:
                what = f"item {number} of {stage_id!r}"
                result = None if one.uncertain else of_item.decode_stored(one.result, what=f"the result of {what}")
                undone = {} if one.uncertain else {stage_id: result}
                ctx._enter_item(number, deadline, with_result(results, stage_id, undone))
                value = self._copy_context().run(call, codec.decode_stored(one.item, what=what), ctx)
                check_no_request(value[0] if self._arounds else value, f"the compensation of an item of {stage_id!r}")
            except BaseException as error:  # noqa: BLE001 - each exception of a compensation is its failure
                self._on_error(error)
                failed = error
            yield number, failed
        ctx._exit_item()

    def _stage_context(self, item: DeliveryItem, envelope: Envelope, stage_id: str, attempt: int) -> StageContext:
        extra = item.extra
        return StageContext._create(
            envelope=envelope,
            instance_id=item.group,
            epoch=item.epoch,
            stage_id=stage_id,
            attempt=attempt,
            timeout=self._compensations[stage_id].timeout,
            failure=None if extra is None else extra.failure,
            steps=completed_steps(envelope, item),
            store=RememberedSteps(self._store(item), item),
            error=envelope.error,
            codec=self.codec,
            limit=self._limit,
            slot=self._slot,
            place=f"the compensation of stage {stage_id!r}",
        )

    def _handle_failure(
        self,
        item: DeliveryItem,
        envelope: Envelope,
        stage_id: str,
        attempt: int,
        failure: Failure,
        error: Exception,
        duration: float,
        text: str = "",
    ) -> Settlement:
        """Retry by the policy, or record the compensation as failed with `text`."""
        text = text or failure.message
        trace = failure.traceback
        compensation = self._compensations[stage_id]
        timeout = int((compensation.timeout or 0) * 1e9)
        try:
            delay = ask_policy(self._slot, timeout, compensation.retry, attempt, failure, error)
        except BaseException as broken:  # noqa: BLE001 - a policy is user code
            self._on_error(broken)
            delay = None
            text = f"{text} (and its retry policy failed: {failure_with_traceback(broken).message})"
            trace = name_broken_policy(failure, broken, error).traceback
        shown = structs.replace(failure, message=text, traceback=trace)
        place = f"the compensation of stage {stage_id!r}"
        self.environment.on_failed_attempt(
            FailedAttempt(envelope.workflow_id, item.group, stage_id, place, attempt, shown, delay)
        )
        if delay is not None:
            return Settlement(SettleItem([(item.id, item.lease)], RETRY, [], delay, write_failure(failure)), [], [])
        record = CompensationRecord(stage_id, StageStatus.failed.value, text, duration)
        return self._continue(item, envelope, record, trace)

    def _continue(
        self, item: DeliveryItem, envelope: Envelope, record: CompensationRecord, trace: bytes | None
    ) -> Settlement:
        """Publish what follows; `trace` is the traceback of the last failed attempt of this compensation."""
        place = compensation_place(record.stage_id)
        envelope.tracebacks = with_traceback(envelope.tracebacks, place, trace)
        envelope.steps = limit_steps(completed_steps(envelope, item), self._limit)
        following = continue_compensation(self.plan, envelope, record, self.naming, self._wall())
        target = Target(following.queue, following.label, TERMINAL if following.terminal else 0)
        done = SettleItem([(item.id, item.lease)], ACK)
        return Settlement(done, [(target, PublishItem(0, len(following.body)))], [following.body])


def _last_traceback(item: DeliveryItem) -> bytes | None:
    """Return the traceback of the last failed attempt, if there was one."""
    return None if item.extra is None else traceback_of(item.extra.failure)


def _completed_items(envelope: Envelope, stage_id: str) -> list[ItemToUndo] | None:
    """Return the items of a map stage that are to be undone, in order; None for other stages."""
    for record in reversed(decode_trail(envelope.trail)):
        if (
            record.stage_id in (stage_id, item_id(stage_id))
            and record.status == StageStatus.completed
            and bytes(record.undo) != bytes(NIL)
        ):
            return _decode_undo(record.undo)
    return None


_decode_undo = msgspec.msgpack.Decoder(list[ItemToUndo]).decode
