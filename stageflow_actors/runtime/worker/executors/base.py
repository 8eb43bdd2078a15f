"""`Executor`: the base of all executors, with their environment, failures, retry policies and settlements.

An executor turns one delivery into one settlement. It has no socket and no queue: an actor passes deliveries to it and
sends the settlements, and the in-process test runner does the same without a broker. Each exception of user code
becomes the stage's failure.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import msgspec
from msgspec import Raw, structs

from stageflow_actors.core.codec import ContextCodec
from stageflow_actors.core.envelope import (
    NIL,
    UNCERTAIN,
    Envelope,
    Failure,
    StageRecord,
    append_record,
    decode_envelope,
)
from stageflow_actors.core.failures import (
    UNCERTAIN_MARK,
    UNDECIDED,
    exception_of,
    is_uncertain,
    read_failure,
    shorten_failure,
    traceback_of,
    write_failure,
)
from stageflow_actors.core.plan import ENDPOINT, ITEM, STAGE, Naming, StagePlan, WorkflowPlan
from stageflow_actors.core.resume_state import limit_steps
from stageflow_actors.core.routing import Transition, enter_stage, fail_stage, item_slot, leave_stage, skip_cancelled
from stageflow_actors.core.status import StageStatus
from stageflow_actors.core.tracebacks.table import with_traceback
from stageflow_actors.core.value_codec import (
    UndecodableData,
    ValueCodec,
    decode_context,
    find_undecodable,
    result_codec,
)
from stageflow_actors.definition.handler import BoundCall
from stageflow_actors.definition.retry import RetryPolicy
from stageflow_actors.definition.stage import Replace
from stageflow_actors.errors import PayloadTooLarge, StageError
from stageflow_actors.runtime.ipc.pool_spec import StageCode
from stageflow_actors.runtime.ipc.slots import POLICY_TEXT_BYTES
from stageflow_actors.runtime.messaging.settlements import (
    Result,
    Settlement,
    completed_steps,
    forward,
    park_undecodable,
    park_unknown_version,
    park_unreadable,
    settle_transition,
)
from stageflow_actors.runtime.worker.awaitables import check_not_awaitable, is_awaitable
from stageflow_actors.runtime.worker.base_context import BaseContext
from stageflow_actors.runtime.worker.current_attempt import enter_attempt
from stageflow_actors.runtime.worker.event_loop import EventLoop, LoopSlot
from stageflow_actors.runtime.worker.failure_log import FailedAttempt, log_nothing
from stageflow_actors.runtime.worker.stage_context import RememberedSteps, StageContext, StepStore
from stageflow_actors.runtime.worker.traceback_text import failure_with_traceback
from stageflow_brokers.api import DEAD_LETTER, RETRY, DeliveryItem, SettleItem, Target
from stageflow_brokers.pause_flags import NOT_PAUSED

__all__ = [
    "PARK_MARK",
    "UNDECODED_MARK",
    "Executor",
    "ExecutorEnvironment",
    "Stopwatch",
    "ask_policy",
    "ignore_error",
    "lost_attempt_failure",
    "name_broken_policy",
    "policy_error",
    "retry_delay",
]


logger = logging.getLogger("stageflow_actors.worker")

PARK_MARK = ":park"
"""The step that marks a message as parked, or about to be parked. A marked message without attempts was requeued."""

UNDECODED_MARK = ":undecoded"
"""The step that names the stage whose result could not be decoded; it is decoded before the handler runs again."""

SLOT_FAILURE_BYTES = POLICY_TEXT_BYTES - 2
"""The bytes of a failure that a slot can hold."""


class Stopwatch(LoopSlot, Protocol):
    """The part of a slot that executors write: the message in work and its time limit, for the node to watch."""

    def begin(self, message_id: int, timeout_ns: int, now_ns: int) -> None:
        """Record that user code begins on a message; `timeout_ns` of 0 is no limit."""

    def end(self) -> None:
        """Record that no user code runs."""

    def set_timeout(self, timeout_ns: int, now_ns: int) -> None:
        """Replace the time limit of the message in work, counted from now; 0 is no limit."""

    def begin_policy(self, failure: bytes, timeout_ns: int, now_ns: int) -> None:
        """Record that the handler failed and its retry policy begins, with a time limit of its own."""

    def end_policy(self) -> None:
        """Record that the retry policy returned."""


def retry_delay(
    policy: RetryPolicy | None, attempt: int, failure: Failure, error: Exception | None = None
) -> float | None:
    """Return the seconds until the attempt after `attempt`, or None if the failure is final.

    Without a policy, the death of a worker is retried immediately and every other failure is final; a `StageError` with
    `retryable=True` too, because only a policy limits the number of attempts. Raises each exception of the policy, and
    `ValueError` if its delay is negative or not finite.
    """
    if failure.kind == UNDECIDED:
        return None  # the policy itself ended the worker that asked it last
    if policy is not None:
        delay: Any = policy.next_delay(attempt, error or exception_of(failure))
        if delay is None:
            return None
        try:
            seconds = float(delay) if not isinstance(delay, str) else math.nan
        except TypeError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            raise ValueError(
                f"{type(policy).__name__}.next_delay returned {delay!r}: return a number of seconds from 0, or None to "
                "give up"
            )
        return seconds
    return 0.0 if failure.kind == "died" else None


def ask_policy(
    slot: Stopwatch,
    timeout_ns: int,
    policy: RetryPolicy | None,
    attempt: int,
    failure: Failure,
    error: Exception | None,
) -> float | None:
    """Return `retry_delay`, with the slot showing that the policy runs, under the time limit of an attempt.

    If the policy ends the worker, the next worker takes the failure as final: the same question would end it too.
    """
    if policy is None:
        return retry_delay(None, attempt, failure)
    slot.begin_policy(shorten_failure(failure, SLOT_FAILURE_BYTES), timeout_ns, time.monotonic_ns())
    try:
        return retry_delay(policy, attempt, failure, error)
    finally:
        slot.end_policy()


def lost_attempt_failure(failure: bytes | None) -> Failure:
    """Return the failure of an attempt that ended without a result; without a record, its worker died."""
    return read_failure(failure) or Failure("died", "WorkerDied: the worker process died", "WorkerDied")


def policy_error(error: BaseException | None) -> Exception | None:
    """Return the exception as a retry policy receives it: an exception, or a group; None for others."""
    return cast("Exception", error) if isinstance(error, (Exception, BaseExceptionGroup)) else None


def name_broken_policy(failure: Failure, broken: BaseException, error: Exception | None) -> Failure:
    """Return the failure with the exception that its retry policy raised when it was asked about `error`."""
    if broken.__context__ is None and broken is not error:
        broken.__context__ = error
    its_own = failure_with_traceback(broken)
    text = f"{failure.message} (and its retry policy failed: {its_own.message})"
    return structs.replace(failure, message=text, traceback=its_own.traceback or failure.traceback)


def ignore_error(error: BaseException) -> None:
    """Do nothing with an exception of user code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorEnvironment:
    """The part of a worker that all its executors share.

    `step_store` returns the store for the steps of one delivery. `event_loop` awaits async user code. Each message is
    handled in a copy of `base_context`. `on_error` receives each exception of user code before it becomes the stage's
    failure, and may raise it again. `on_failed_attempt` receives each failed attempt. `paused[0]` is not 0 while the
    queue is paused. `awaits_handlers`: the actor awaits async handlers itself (see `PendingCall`).
    """

    naming: Naming
    services: Mapping[str, Any]
    slot: Stopwatch
    step_store: Callable[[DeliveryItem], StepStore]
    max_message_bytes: int = 16 << 20
    wall: Callable[[], float] = time.time
    event_loop: EventLoop = field(default_factory=EventLoop)
    base_context: BaseContext = field(default_factory=BaseContext)
    on_error: Callable[[BaseException], None] = ignore_error
    on_failed_attempt: Callable[[FailedAttempt], None] = log_nothing
    awaits_handlers: bool = False
    paused: Sequence[int] = NOT_PAUSED


class Executor:
    """Executes the deliveries to one place of a workflow. Subclasses implement `_run`.

    `targets` are the targets of the happy path; a result names one by its number.
    """

    targets: list[Target]
    first_target = 0
    """The number of `targets[0]` among the targets of all executors of a worker."""
    limits_whole_run = True
    """Whether the stage's timeout covers the whole run. If not, the executor sets the limit around user code."""

    def __init__(self, program: StageCode, plan: WorkflowPlan, environment: ExecutorEnvironment) -> None:
        planned = plan.stage(program.place)
        assert planned is not None, f"stage {program.place} is not in its own plan"
        self.plan = plan
        self.planned: StagePlan = planned
        self.naming = environment.naming
        self.services = environment.services
        self.codec: ContextCodec[Any] = ContextCodec(program.context, program.result_types)
        self._result = result_codec(self.codec, planned.id)
        self._warned: set[str] = set()
        self.targets = []
        self.retry: RetryPolicy | None = program.retry if program.stage is None else program.stage.retry
        self._context_type = program.context
        self._is_dict = program.context is dict
        self._slot = environment.slot
        self._store = environment.step_store
        self._wall = environment.wall
        self.environment = environment
        self._event_loop = environment.event_loop
        self._copy_context = environment.base_context.copy
        self._on_error = environment.on_error
        self._paused = environment.paused
        self._limit = environment.max_message_bytes
        self._timeout_ns = int((planned.timeout or 0) * 1e9)
        self._requestless = self._place_without_requests()

    def __call__(self, item: DeliveryItem, body: bytes) -> Result:
        """Execute one delivery and return its settlement."""
        self._slot.begin(item.id, self._timeout_ns if self.limits_whole_run else 0, time.monotonic_ns())
        try:
            return self._copy_context().run(self._run, item, body)
        except msgspec.MsgspecError as error:
            return park_unreadable(item, error)
        finally:
            self._slot.end()

    def _run(self, item: DeliveryItem, body: bytes) -> Result:
        raise NotImplementedError

    def _holds(self, when: BoundCall, context: Any, ctx: StageContext | None) -> bool:
        """Return True if the predicate of this stage holds; an awaitable would always count as True."""
        held = when(context, ctx)
        if type(held) is not bool:
            check_not_awaitable(held, f"when of {self.display_name}")
        return bool(held)

    def _resolve(self, value: Any) -> Any:
        """Return a result of user code; if it is an awaitable, run the event loop until it is finished."""
        return self._event_loop.run(value, self._slot, self.display_name) if is_awaitable(value) else value

    @property
    def display_name(self) -> str:
        """The name of this place for error messages."""
        one, endpoint = self.planned.kind == ITEM, self.planned.kind == ENDPOINT
        return f"{'endpoint' if endpoint else 'stage'} {(self.planned.joins if one else self.planned.id)!r}"

    def _open(self, item: DeliveryItem, body: bytes, whole: bytes | None = None) -> Envelope | Settlement:
        """Return the envelope of a delivery if it is to run here, otherwise its settlement.

        For a gathered message, `body` is the base and `whole` the message with all arrivals.
        """
        envelope = decode_envelope(body)
        if not self._belongs_here(envelope):
            return self._forward_or_park(item, envelope, body if whole is None else whole)
        extra = item.extra
        if extra is not None:
            if extra.cancelled is not None:
                return self._skip_cancelled(item, envelope)
            if extra.fresh:
                return self._handle_lost_attempt(item, envelope, extra.attempts + 1)
        self._enter_attempt(item, envelope, 1 if extra is None else extra.attempts + 1)
        return envelope

    def _enter_attempt(self, item: DeliveryItem, envelope: Envelope, attempt: int) -> None:
        """Record the attempt whose user code follows, for log records."""
        stage_id = self.planned.joins if self.planned.kind == ITEM else self.planned.id
        enter_attempt((envelope.workflow_id, item.group, stage_id, attempt))

    def _belongs_here(self, envelope: Envelope) -> bool:
        return envelope.stage_id == self.planned.id and envelope.version == self.plan.version

    def _skip_cancelled(self, item: DeliveryItem, envelope: Envelope, *, sent: bool = False) -> Settlement:
        """Settle a delivery of a cancelled instance without running it. `sent`: it waited for a reply."""
        assert item.extra is not None
        reason, last = item.extra.cancelled or "", read_failure(item.extra.failure)
        uncertain = self._is_uncertain(item, envelope, last) or (sent and self.planned.when_uncertain)
        return self._settle(
            item, skip_cancelled(self.planned, envelope, reason, self.naming, self._wall(), uncertain=uncertain)
        )

    def _is_uncertain(self, item: DeliveryItem, envelope: Envelope, failure: Failure | None) -> bool:
        """Return True if this attempt or an earlier one left an unknown effect that the compensation is for."""
        if not self.planned.when_uncertain:
            return False
        return is_uncertain(failure) or UNCERTAIN_MARK in (completed_steps(envelope, item) or ())

    def _mark_uncertain(self, item: DeliveryItem, envelope: Envelope, failure: Failure) -> None:
        """Mark a message that goes on after an attempt with an unknown effect: later failures do not undo it."""
        if (
            self.planned.when_uncertain
            and is_uncertain(failure)
            and UNCERTAIN_MARK not in (completed_steps(envelope, item) or ())
        ):
            RememberedSteps(self._store(item), item).keep(UNCERTAIN_MARK, b"")

    def _complete_stage(
        self,
        item: DeliveryItem,
        envelope: Envelope,
        record: StageRecord,
        context: bytes | Raw | None = None,
        *,
        payload: Raw = NIL,
        to: str | None = None,
    ) -> Settlement:
        """Record the stage and publish the envelope to the next place, or to place `to`.

        `context` replaces the context if the stage changed it. Raises `PayloadTooLarge` and restores the envelope: a
        stage whose result is too large has not completed and must not change the context.
        """
        before = envelope.stage_id, envelope.context, envelope.trail, envelope.payload, envelope.steps
        self._keep_traceback(item, envelope)
        if context is not None:
            envelope.context = Raw(context)
        envelope.trail = append_record(envelope.trail, record)
        envelope.payload = payload
        now = self._wall()
        if to is None:
            transition = leave_stage(self.plan, self.planned, envelope, self.naming, now)
        else:
            transition = enter_stage(self.plan, to, envelope, self.naming, now)
        largest = transition.largest()
        if largest > self._limit:
            largest -= len(envelope.tracebacks or b"")
        if largest > self._limit:
            envelope.stage_id, envelope.context, envelope.trail, envelope.payload, envelope.steps = before
            raise self._too_large(largest)
        return self._settle(item, transition).mark_succeeded()

    def _too_large(self, size: int, what: str = "context and results are") -> PayloadTooLarge:
        return PayloadTooLarge(
            f"stage {self.planned.id!r}: {what} {size} bytes, over max_message_bytes={self._limit}; "
            "keep large data in files and pass their names",
            size=size,
            limit=self._limit,
        )

    def _split_result(self, context: Any, value: Any) -> tuple[Any, Raw]:
        """Return the context and the encoded result that a user function other than the handler returned."""
        if type(value) is Replace:
            return value.value, NIL
        if not self._is_dict and isinstance(value, self._context_type):
            return value, NIL
        if value is None:
            return context, NIL
        return context, self._encode_result(value)

    def _encode_result(self, value: Any) -> Raw:
        """Return the encoded result of this stage: plain data where it does not fit its annotation."""
        return self._keep(self._result, value, f"the result of stage {self.planned.id!r}")

    def _keep(self, codec: ValueCodec, value: Any, what: str) -> Raw:
        data, warning = codec.keep(value, what=what)
        if warning is not None and what not in self._warned:
            self._warned.add(what)
            logger.warning("%s", warning)
        return Raw(data)

    # failures

    def _decode_context(self, envelope: Envelope) -> Any:
        """Return the context of a message. Raises `UndecodableData`, which `_handle_failure` parks."""
        return decode_context(self.codec, envelope.context)

    def _park_undecodable(self, item: DeliveryItem, error: UndecodableData) -> Settlement:
        """Park a message with data of another definition: no attempt of this stage has failed."""
        if error.result_of is not None:
            self._store(item).keep(UNDECODED_MARK, error.result_of.encode())
        return park_undecodable(item, self.display_name, self.plan.id, self.plan.version, error)

    def _handle_failure(
        self,
        item: DeliveryItem,
        envelope: Envelope,
        attempt: int,
        started: float,
        duration: float,
        error: BaseException,
    ) -> Settlement:
        undecodable = find_undecodable(error)
        if undecodable is not None:
            return self._park_undecodable(item, undecodable)
        failure = failure_with_traceback(error)
        known = policy_error(error) or exception_of(failure)
        delay, failure = self._ask_policy(attempt, failure, known)
        self._log_failed(item, envelope.workflow_id, attempt, failure, delay)
        if delay is not None:
            self._mark_uncertain(item, envelope, failure)
            return self._retry(item, delay, failure).mark_failed()
        return self._fail_stage(item, envelope, failure, attempt, started, duration).mark_failed()

    def _ask_policy(self, attempt: int, failure: Failure, error: Exception | None) -> tuple[float | None, Failure]:
        """Return the delay and the failure; a policy that raises makes the failure final and is named in it."""
        try:
            return ask_policy(self._slot, self._timeout_ns, self.retry, attempt, failure, error), failure
        except BaseException as broken:  # noqa: BLE001 - a policy is user code
            self._on_error(broken)
            return None, name_broken_policy(failure, broken, error)

    def _handle_lost_attempt(self, item: DeliveryItem, envelope: Envelope, attempt: int) -> Settlement:
        """Ask the policy about the previous attempt, which ended without a result (death, timeout, expiry)."""
        assert item.extra is not None
        failure = lost_attempt_failure(item.extra.failure)
        delay, failure = self._ask_policy(attempt, failure, None)
        self._log_failed(item, envelope.workflow_id, attempt, failure, delay)
        if delay is not None:
            self._mark_uncertain(item, envelope, failure)
            return self._retry(item, delay, failure)
        now = self._wall()
        return self._fail_stage(item, envelope, failure, attempt, now, 0.0)

    def _log_failed(
        self, item: DeliveryItem, workflow_id: str, attempt: int, failure: Failure, delay: float | None
    ) -> None:
        one = self.planned.kind == ITEM
        stage_id = self.planned.joins if one else self.planned.id
        place = f"an item of {self.display_name}" if one else self.display_name
        self.environment.on_failed_attempt(
            FailedAttempt(workflow_id, item.group, stage_id, place, attempt, failure, delay)
        )

    def _retry(self, item: DeliveryItem, delay: float, failure: Failure) -> Settlement:
        return Settlement(SettleItem([(item.id, item.lease)], RETRY, [], delay, write_failure(failure)), [], [])

    def _fail_stage(
        self, item: DeliveryItem, envelope: Envelope, failure: Failure, attempt: int, started: float, duration: float
    ) -> Settlement:
        if self.planned.required and self.plan.on_failure == "park":
            self._mark_uncertain(item, envelope, failure)
            return self._park(item, failure)
        uncertain = self._is_uncertain(item, envelope, failure)
        envelope.tracebacks = with_traceback(envelope.tracebacks, self.planned.id, failure.traceback)
        envelope.steps = limit_steps(completed_steps(envelope, item), self._limit + len(envelope.tracebacks or b""))
        record = StageRecord(self.planned.id, StageStatus.failed.value, attempt, started, duration, failure.message)
        if uncertain:
            record.undo = UNCERTAIN
        return self._settle(item, fail_stage(self.plan, self.planned, envelope, record, self.naming, self._wall()))

    def _keep_traceback(self, item: DeliveryItem, envelope: Envelope) -> None:
        """Keep the traceback of the last failed attempt of a stage that has ended otherwise."""
        extra = item.extra
        last = envelope.failure if extra is None or not extra.attempts else extra.failure
        if last is not None:
            envelope.tracebacks = with_traceback(envelope.tracebacks, self.planned.id, traceback_of(last))

    def _park(self, item: DeliveryItem, failure: Failure) -> Settlement:
        return Settlement(SettleItem([(item.id, item.lease)], DEAD_LETTER, [], 0.0, write_failure(failure)), [], [])

    def _settle_unmet(self, item: DeliveryItem, envelope: Envelope, missing: list[str], attempt: int) -> Settlement:
        text = f"stage {self.planned.id!r} needs {', '.join(map(repr, missing))} to have completed"
        if self.planned.required:
            failure = failure_with_traceback(StageError(text))
            return self._fail_stage(item, envelope, failure, attempt, self._wall(), 0.0)
        record = StageRecord(self.planned.id, StageStatus.skipped.value, 0, self._wall(), 0.0, text)
        return self._skip_with_record(item, envelope, record)

    def _skip(self, item: DeliveryItem, envelope: Envelope) -> Settlement:
        record = StageRecord(self.planned.id, StageStatus.skipped.value, 0, self._wall())
        return self._skip_with_record(item, envelope, record).mark_user_code_ran()

    def _skip_with_record(self, item: DeliveryItem, envelope: Envelope, record: StageRecord) -> Settlement:
        envelope.trail = append_record(envelope.trail, record)
        self._keep_traceback(item, envelope)
        return self._settle(item, leave_stage(self.plan, self.planned, envelope, self.naming, self._wall()))

    def _forward_or_park(self, item: DeliveryItem, envelope: Envelope, body: bytes) -> Settlement:
        """Forward a message whose place has another queue now; park one of a place or version unknown here."""
        known = self.plan.stage(envelope.stage_id)
        if envelope.version == self.plan.version and known is not None and known.queue != self.planned.queue:
            return forward(item, body, known)
        return park_unknown_version(item, envelope.workflow_id, envelope.version, f"stage {envelope.stage_id!r}")

    def _settle(self, item: DeliveryItem, transition: Transition) -> Settlement:
        settled = settle_transition(item, transition)
        # A gather that returns to this place was opened by user code: by a request or by a split.
        return (
            settled.mark_user_code_ran()
            if any(one.queue == self.planned.queue for one in transition.opens)
            else settled
        )

    def _stage_context(self, item: DeliveryItem, envelope: Envelope, attempt: int) -> StageContext:
        extra = item.extra
        one = self.planned.kind == ITEM
        return StageContext._create(
            envelope=envelope,
            instance_id=item.group,
            epoch=item.epoch,
            stage_id=self.planned.joins if one else self.planned.id,
            item=item_slot(envelope) if one else None,
            attempt=attempt,
            timeout=self.planned.timeout,
            failure=envelope.failure if extra is None or not extra.attempts else extra.failure,
            steps=completed_steps(envelope, item),
            store=RememberedSteps(self._store(item), item),
            limit=self._limit,
            slot=self._slot,
            place=self._requestless,
            codec=self.codec,
        )

    def _place_without_requests(self) -> str:
        """Return the name of this place for errors if it cannot send a request to an endpoint, or ""."""
        if self.planned.kind == STAGE:
            return ""
        if self.planned.kind == ITEM:
            return f"an item of {self.planned.joins!r}"
        return f"{'endpoint' if self.planned.kind == ENDPOINT else 'stage'} {self.planned.id!r}"
