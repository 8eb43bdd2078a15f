"""What all work has in common: the slot, the context, failures and what a policy says of them, settlements.

No socket and no queue here: the actor around it hands in deliveries and sends off settlements, and the in-process test
runner does the same without either. Whatever user code raises becomes the stage's failure.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from msgspec import Raw

from brokers.api import (
    AGAIN,
    DEAD,
    DeliveryItem,
    SettleItem,
    Target,
)
from stageflow_actors.core.codec import ContextCodec, encode_value
from stageflow_actors.core.envelope import (
    NIL,
    Envelope,
    Failure,
    StageRecord,
    append_record,
    decode_envelope,
)
from stageflow_actors.core.failures import UNDECIDED, brief, exception_of, failure_of, read_failure, write_failure
from stageflow_actors.core.plan import ITEM, Naming, StagePlan, WorkflowPlan
from stageflow_actors.core.retrying import bounded
from stageflow_actors.core.routing import Moves, enter, give_up, item_slot, leave, pass_through
from stageflow_actors.core.status import StageStatus
from stageflow_actors.definition.retry import RetryPolicy
from stageflow_actors.definition.stage import Replace
from stageflow_actors.errors import PayloadTooLarge, StageError
from stageflow_actors.runtime.context import RememberedSteps, StageContext, StepStore
from stageflow_actors.runtime.programs import StageProgram
from stageflow_actors.runtime.settled import (
    Result,
    Settled,
    forward,
    park_unknown,
    park_unreadable,
    settle_moves,
    steps_of,
)
from stageflow_actors.runtime.slots import WORDS_BYTES

__all__ = [
    "CANCEL_GRACE_NS",
    "PARK_MARK",
    "Executor",
    "ExecutorEnvironment",
    "Stopwatch",
    "ask_policy",
    "ignore_error",
    "lost_attempt_failure",
    "retry_delay",
]


PARK_MARK = ":park"
"""The step that marks a message which was published, or is, to be parked: delivered once more, it has been requeued."""

SLOT_FAILURE_BYTES = WORDS_BYTES - 2
"""Bytes of a failure that a slot can hold."""

CANCEL_GRACE_NS = 1_000_000_000
"""What an async handler gets to end by itself once it has been cancelled, before its worker is killed."""


class Stopwatch(Protocol):
    """The worker's slot: says which message is being run, and for how long it may be."""

    def begin(self, message_id: int, timeout_ns: int, now_ns: int) -> None:
        """The handler starts."""

    def end(self) -> None:
        """The handler is over."""

    def limit(self, timeout_ns: int, now_ns: int) -> None:
        """From now on what is in work may take so long; nought for any time."""

    def ask(self, failure: bytes, timeout_ns: int, now_ns: int) -> None:
        """The handler has failed, and its policy is asked about that from now on."""

    def answered(self) -> None:
        """The policy has answered."""

    def allow(self, grace_ns: int) -> None:
        """Handlers that are over their time are ended by the worker itself, and get so much longer for it."""

    def is_cancelled(self) -> bool:
        """Whether the message being run is to be ended."""


def retry_delay(
    policy: RetryPolicy | None, attempt: int, failure: Failure, error: Exception | None = None
) -> float | None:
    """Seconds until the next attempt after `attempt` failed, or None: it has failed for good.

    Without a policy a death is tried again at once, and everything else is final: also a `StageError` that may be
    retried, because nobody has said how often. Raises whatever the policy raises, and `ValueError` for a time that
    nobody can wait.
    """
    if failure.kind == UNDECIDED:
        return None  # the last worker that asked about it did not outlive that
    if policy is not None:
        delay = policy.next_delay(attempt, error or exception_of(failure))
        if delay is None:
            return None
        seconds = float(delay)
        if not 0 <= seconds < math.inf:
            raise ValueError(f"next_delay gave {delay!r}, and only 0 seconds or more can be waited (None: give up)")
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
    """`retry_delay`, while the slot says that it is the policy which takes the time: so much as an attempt, from now.

    A worker that is killed for it, or dies of it, has its successor give up. It would ask the same once more.
    """
    if policy is None:
        return retry_delay(None, attempt, failure)
    slot.ask(brief(failure, SLOT_FAILURE_BYTES), timeout_ns, time.monotonic_ns())
    try:
        return retry_delay(policy, attempt, failure, error)
    finally:
        slot.answered()


def lost_attempt_failure(failure: bytes | None) -> Failure:
    """Return the failure of an attempt that ended without a result; without a record, its worker died."""
    return read_failure(failure) or Failure("died", "WorkerDied: the worker process died")


def ignore_error(error: BaseException) -> None:
    """Nobody else wants to know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorEnvironment:
    """The part of a worker that all its executors share.

    `step_store` returns the store for the steps of one delivery. `loop` returns the event loop on which an executor
    runs async user code. `on_error` receives each exception of user code before it becomes the stage's failure, and
    may raise it again. `awaits_handlers`: the actor awaits async handlers itself (see `PendingCall`).
    `limits_compensations`: async compensations are cancelled at their timeout.
    """

    naming: Naming
    services: Mapping[str, Any]
    slot: Stopwatch
    step_store: Callable[[DeliveryItem], StepStore]
    max_message_bytes: int = 16 << 20
    wall: Callable[[], float] = time.time
    loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    on_error: Callable[[BaseException], None] = ignore_error
    awaits_handlers: bool = False
    limits_compensations: bool = False


class Executor:
    """Executes the deliveries to one place of a workflow. Subclasses implement `_run`.

    `targets` are the targets of the happy path; a result names one by its number.
    """

    targets: list[Target]
    first_target = 0
    """The number of `targets[0]` among the targets of all executors of a worker."""
    limits_whole_run = True
    """Whether the stage's timeout covers the whole run. If not, the executor sets the limit around user code."""

    def __init__(self, program: StageProgram, plan: WorkflowPlan, environment: ExecutorEnvironment) -> None:
        planned = plan.stage(program.place)
        assert planned is not None, f"stage {program.place} is not in its own plan"
        self.plan = plan
        self.planned: StagePlan = planned
        self.naming = environment.naming
        self.services = environment.services
        self.codec: ContextCodec[Any] = ContextCodec(program.context)
        self.targets = []
        self.retry: RetryPolicy | None = program.retry if program.stage is None else program.stage.retry
        self._context_type = program.context
        self._is_dict = program.context is dict
        self._slot = environment.slot
        self._store = environment.step_store
        self._wall = environment.wall
        self._loop = environment.loop
        self._on_error = environment.on_error
        self._limit = environment.max_message_bytes
        self._timeout_ns = int((planned.timeout or 0) * 1e9)

    def __call__(self, item: DeliveryItem, body: bytes) -> Result:
        """Do the work of one delivery."""
        self._slot.begin(item.id, self._timeout_ns if self.limits_whole_run else 0, time.monotonic_ns())
        try:
            return self._run(item, body)
        except msgspec.MsgspecError as error:
            return park_unreadable(item, error)
        finally:
            self._slot.end()

    def _run(self, item: DeliveryItem, body: bytes) -> Result:
        raise NotImplementedError

    def _open(self, item: DeliveryItem, body: bytes, whole: bytes | None = None) -> Envelope | Settled:
        """The envelope of a delivery that is in its place and to be run; or how it is settled without that.

        Of one that was gathered `body` is the base, and `whole` all of it.
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
        return envelope

    def _belongs_here(self, envelope: Envelope) -> bool:
        return envelope.stage_id == self.planned.id and envelope.version == self.plan.version

    def _skip_cancelled(self, item: DeliveryItem, envelope: Envelope) -> Settled:
        """The instance has been cancelled: nothing is begun here any more."""
        assert item.extra is not None
        reason = item.extra.cancelled or ""
        return self._settle(item, pass_through(self.planned, envelope, reason, self.naming, self._wall()))

    def _complete_stage(
        self,
        item: DeliveryItem,
        envelope: Envelope,
        record: StageRecord,
        context: bytes | Raw | None = None,
        *,
        payload: Raw = NIL,
        to: str | None = None,
    ) -> Settled:
        """The stage is over, with `context` where it made another one: on to the place behind it, or to `to`.

        Raises `PayloadTooLarge`. The envelope is then as it was: a stage that fails by the size of what it made has not
        completed, and changed nothing.
        """
        before = envelope.stage_id, envelope.context, envelope.trail, envelope.payload, envelope.steps
        if context is not None:
            envelope.context = Raw(context)
        envelope.trail = append_record(envelope.trail, record)
        envelope.payload = payload
        now = self._wall()
        if to is None:
            moves = leave(self.plan, self.planned, envelope, self.naming, now)
        else:
            moves = enter(self.plan, to, envelope, self.naming, now)
        largest = moves.largest()
        if largest > self._limit:
            envelope.stage_id, envelope.context, envelope.trail, envelope.payload, envelope.steps = before
            raise self._too_large(largest)
        return self._settle(item, moves).worked()

    def _too_large(self, size: int, what: str = "context and results are") -> PayloadTooLarge:
        return PayloadTooLarge(
            f"stage {self.planned.id!r}: {what} {size} bytes, over max_message_bytes={self._limit}; "
            "keep large data in files and pass their names",
            size=size,
            limit=self._limit,
        )

    def _split_result(self, context: Any, value: Any) -> tuple[Any, Raw]:
        """What a function of the user's beside the handler gave: the context it leaves, and the result to be kept."""
        if type(value) is Replace:
            return value.value, NIL
        if not self._is_dict and isinstance(value, self._context_type):
            return value, NIL
        if value is None:
            return context, NIL
        return context, Raw(encode_value(value, what=f"the result of stage {self.planned.id!r}"))

    # failures

    def _failed(
        self,
        item: DeliveryItem,
        envelope: Envelope,
        attempt: int,
        started: float,
        duration: float,
        error: BaseException,
    ) -> Settled:
        failure = failure_of(error)
        asked = error if isinstance(error, Exception) else exception_of(failure)
        delay, failure = self._ask_policy(attempt, failure, asked)
        if delay is not None:
            return self._retry(item, delay, failure).failed()
        return self._fail_stage(item, envelope, failure, attempt, started, duration).failed()

    def _ask_policy(self, attempt: int, failure: Failure, error: Exception | None) -> tuple[float | None, Failure]:
        """What the policy says; one that raises has given up, and says why."""
        try:
            return ask_policy(self._slot, self._timeout_ns, self.retry, attempt, failure, error), failure
        except BaseException as broken:  # noqa: BLE001 - a policy is user code
            self._on_error(broken)
            text = f"{failure.message} (and its retry policy failed: {failure_of(broken).message})"
            return None, Failure(failure.kind, text, failure.error_type, failure.retryable)

    def _handle_lost_attempt(self, item: DeliveryItem, envelope: Envelope, attempt: int) -> Settled:
        """The attempt before ended without a word (death, timeout, expiry): the policy is asked about it first."""
        assert item.extra is not None
        failure = lost_attempt_failure(item.extra.failure)
        delay, failure = self._ask_policy(attempt, failure, None)
        if delay is not None:
            return self._retry(item, delay, failure)
        now = self._wall()
        return self._fail_stage(item, envelope, failure, attempt, now, 0.0)

    def _retry(self, item: DeliveryItem, delay: float, failure: Failure) -> Settled:
        again = SettleItem([(item.id, item.lease)], AGAIN, [], delay, write_failure(failure))
        return Settled(again, [], [])

    def _fail_stage(
        self, item: DeliveryItem, envelope: Envelope, failure: Failure, attempt: int, started: float, duration: float
    ) -> Settled:
        if self.planned.required and self.plan.on_failure == "park":
            return self._park(item, failure)
        envelope.steps = bounded(steps_of(envelope, item), self._limit)
        record = StageRecord(self.planned.id, StageStatus.failed.value, attempt, started, duration, failure.message)
        return self._settle(item, give_up(self.plan, self.planned, envelope, record, self.naming, self._wall()))

    def _park(self, item: DeliveryItem, failure: Failure) -> Settled:
        return Settled(SettleItem([(item.id, item.lease)], DEAD, [], 0.0, write_failure(failure)), [], [])

    def _settle_unmet(self, item: DeliveryItem, envelope: Envelope, missing: list[str], attempt: int) -> Settled:
        text = f"stage {self.planned.id!r} needs {', '.join(map(repr, missing))} to have completed"
        if self.planned.required:
            failure = failure_of(StageError(text))
            return self._fail_stage(item, envelope, failure, attempt, self._wall(), 0.0)
        record = StageRecord(self.planned.id, StageStatus.skipped.value, 0, self._wall(), 0.0, text)
        return self._skip_with_record(item, envelope, record)

    def _skip(self, item: DeliveryItem, envelope: Envelope) -> Settled:
        record = StageRecord(self.planned.id, StageStatus.skipped.value, 0, self._wall())
        return self._skip_with_record(item, envelope, record).tried()

    def _skip_with_record(self, item: DeliveryItem, envelope: Envelope, record: StageRecord) -> Settled:
        envelope.trail = append_record(envelope.trail, record)
        return self._settle(item, leave(self.plan, self.planned, envelope, self.naming, self._wall()))

    def _forward_or_park(self, item: DeliveryItem, envelope: Envelope, body: bytes) -> Settled:
        """Routing goes by id and version: forward what another queue runs, park what nobody here knows."""
        known = self.plan.stage(envelope.stage_id)
        if envelope.version == self.plan.version and known is not None and known.queue != self.planned.queue:
            return forward(item, body, known)
        return park_unknown(item, envelope.workflow_id, envelope.version, f"stage {envelope.stage_id!r}")

    def _settle(self, item: DeliveryItem, moves: Moves) -> Settled:
        settled = settle_moves(item, moves)
        # What comes back to this very place has been asked for, or split, by its code.
        return settled.tried() if any(one.queue == self.planned.queue for one in moves.opens) else settled

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
            steps=steps_of(envelope, item),
            store=RememberedSteps(self._store(item), item),
            limit=self._limit,
            slot=self._slot,
        )
