"""One stage at work: a delivery in, a settlement out. The happy path is a handful of calls.

No socket and no queue here: the actor around it hands in deliveries and sends off settlements, and the in-process test
runner does the same without either. Whatever a handler raises becomes the stage's failure.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from msgspec import Raw

from brokers.api import AGAIN, DEAD, DONE, DeliveryItem, PublishItem, SettleItem, Target
from stageflow_actors.core.codec import ContextCodec, encode_value
from stageflow_actors.core.envelope import (
    NIL,
    Envelope,
    Failure,
    Outcome,
    StageRecord,
    append_record,
    decode_envelope,
    encode,
)
from stageflow_actors.core.failures import exception_of, failure_of, read_failure, write_failure
from stageflow_actors.core.plan import FAILED, FINISHED, Naming, StagePlan, WorkflowPlan
from stageflow_actors.core.routing import Step, after_stage, give_up_stage, unmet
from stageflow_actors.core.status import StageStatus
from stageflow_actors.definition.handler import Call
from stageflow_actors.definition.retry import RetryPolicy
from stageflow_actors.definition.stage import Replace
from stageflow_actors.errors import PayloadTooLarge, StageError
from stageflow_actors.runtime.context import StageContext, StepStore
from stageflow_actors.runtime.programs import StageProgram

__all__ = ["Settled", "StageWork", "Stopwatch", "judge", "ready_to_call"]

TERMINAL = 1


class Stopwatch(Protocol):
    """The worker's slot: says which message is being run, and for how long it may be."""

    def begin(self, message_id: int, timeout_ns: int, now_ns: int) -> None:
        """The handler starts."""

    def end(self) -> None:
        """The handler is over."""


class Settled:
    """A settlement that is not the plain happy path: the item, and the bodies of what it publishes."""

    __slots__ = ("bodies", "outcome", "publishes")

    def __init__(self, outcome: SettleItem, publishes: list[tuple[Target, PublishItem]], bodies: list[bytes]) -> None:
        self.outcome = outcome
        self.publishes = publishes
        self.bodies = bodies


def judge(policy: RetryPolicy | None, attempt: int, failure: Failure, error: Exception | None = None) -> float | None:
    """Seconds until the next attempt after `attempt` failed, or None: it has failed for good.

    Without a policy a death is tried again at once, and everything else is final: also a `StageError` that may be
    retried, because nobody has said how often.
    """
    if policy is not None:
        delay = policy.next_delay(attempt, error or exception_of(failure))
        return None if delay is None else max(0.0, float(delay))
    return 0.0 if failure.kind == "died" else None


Result = tuple[int, bytes] | Settled
"""(target, body) of the happy path, or a settlement of another shape."""


def ignore(error: BaseException) -> None:
    """Nobody else wants to know."""


class StageWork:
    """Runs one stage. `targets[0]` is where the happy path leads.

    `loop` gives the event loop for an async handler. `raised` is told what user code raised before it becomes the
    stage's failure, and may raise it on.
    """

    def __init__(
        self,
        program: StageProgram,
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
    ) -> None:
        stage = program.stage
        planned = plan.stage(stage.id)
        assert planned is not None, f"stage {stage.id} is not in its own plan"
        self.plan = plan
        self.planned: StagePlan = planned
        self.naming = naming
        self.stage = stage
        self.codec: ContextCodec[Any] = ContextCodec(program.context)
        self._context_type = program.context
        self._is_dict = program.context is dict
        self._call = ready_to_call(stage.call, services, loop)
        self._wants_ctx = stage.call.wants_ctx
        self._slot = slot
        self._store = store
        self._wall = wall
        self._raised = raised
        self._limit = max_message_bytes
        self._timeout_ns = int((planned.timeout or 0) * 1e9)
        following = plan.stages[planned.index + 1] if planned.index + 1 < len(plan.stages) else None
        self._following = following
        if following is None:
            self.targets = [Target(naming.finished, FINISHED, TERMINAL)]
        else:
            self.targets = [Target(following.queue, following.id)]
        self._plain = following is None or not following.ttl

    def __call__(self, item: DeliveryItem, body: bytes) -> Result:
        """Run the stage for one delivery."""
        self._slot.begin(item.id, self._timeout_ns, time.monotonic_ns())
        try:
            return self._run(item, body)
        finally:
            self._slot.end()

    def _run(self, item: DeliveryItem, body: bytes) -> Result:
        envelope = decode_envelope(body)
        stage_id = self.planned.id
        if envelope.stage_id != stage_id or envelope.version != self.plan.version:
            return self._misplaced(item, envelope, body)
        extra = item.extra
        attempt = 1
        if extra is not None:
            attempt = extra.attempts + 1
            if extra.fresh:
                return self._judge_fresh(item, envelope, attempt)
        if self.planned.after:
            missing = unmet(self.planned.after, envelope.trail)
            if missing:
                return self._unmet(item, envelope, missing)
        started = self._wall()
        clock = time.perf_counter()
        try:
            context = self.codec.decode(envelope.context)
            ctx = self._stage_context(item, envelope, attempt) if self._wants_ctx else None
            if self.stage.when is not None and not self.stage.when(context):
                return self._skip(item, envelope)
            value = self._call(context, ctx)
            data = NIL
            if value is not None:
                if type(value) is Replace:
                    context = value.value
                elif not self._is_dict and isinstance(value, self._context_type):
                    context = value
                else:
                    data = Raw(encode_value(value, what=f"the result of stage {stage_id!r}"))
            encoded = self.codec.encode(context, stage=stage_id)
        except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt of a handler are its failures
            self._raised(error)
            return self._failed(item, envelope, attempt, started, time.perf_counter() - clock, error)
        record = StageRecord(stage_id, "completed", attempt, started, time.perf_counter() - clock, None, data)
        before, trail = envelope.context, envelope.trail
        envelope.context = Raw(encoded)
        envelope.trail = append_record(trail, record)
        following = self._following
        if following is None:
            done = encode(
                Outcome(
                    envelope.workflow_id,
                    envelope.version,
                    "completed",
                    envelope.context,
                    envelope.trail,
                    envelope.started_at,
                    self._wall(),
                    None,
                    None,
                    [],
                    envelope.digest,
                )
            )
        else:
            envelope.stage_id = following.id
            envelope.payload = NIL
            done = encode(envelope)
        if len(done) > self._limit:
            envelope.context, envelope.trail, envelope.stage_id = before, trail, stage_id
            too_large = PayloadTooLarge(
                f"stage {stage_id!r}: context and results are {len(done)} bytes, over max_message_bytes={self._limit}; "
                "keep large data in files and pass their names"
            )
            return self._failed(item, envelope, attempt, started, record.duration, too_large)
        if self._plain and (extra is None or not extra.priority):
            return 0, done
        terminal = following is None
        step = Step(self.targets[0].queue, self.targets[0].label, done, terminal, following.ttl if following else 0.0)
        return self._settle(item, [step])

    # the other paths

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
        delay, failure = self._ask(attempt, failure, asked)
        if delay is not None:
            return self._again(item, delay, failure)
        return self._give_up(item, envelope, failure, attempt, started, duration)

    def _ask(self, attempt: int, failure: Failure, error: Exception | None) -> tuple[float | None, Failure]:
        """What the policy says; one that raises has given up, and says why."""
        try:
            return judge(self.stage.retry, attempt, failure, error), failure
        except Exception as broken:  # noqa: BLE001 - a policy is user code
            text = f"{failure.message} (and its retry policy failed: {failure_of(broken).message})"
            return None, Failure(failure.kind, text, failure.error_type, failure.retryable)

    def _judge_fresh(self, item: DeliveryItem, envelope: Envelope, attempt: int) -> Settled:
        """The attempt before ended without a word (death, timeout, expiry): the policy is asked about it first."""
        assert item.extra is not None
        failure = read_failure(item.extra.failure) or Failure("died", "WorkerDied: the worker process died")
        delay, failure = self._ask(attempt, failure, None)
        if delay is not None:
            return self._again(item, delay, failure)
        now = self._wall()
        return self._give_up(item, envelope, failure, attempt, now, 0.0)

    def _again(self, item: DeliveryItem, delay: float, failure: Failure) -> Settled:
        again = SettleItem([(item.id, item.lease)], AGAIN, [], delay, write_failure(failure))
        return Settled(again, [], [])

    def _give_up(
        self, item: DeliveryItem, envelope: Envelope, failure: Failure, attempt: int, started: float, duration: float
    ) -> Settled:
        if self.planned.required and self.plan.on_failure == "park":
            return self._park(item, failure)
        record = StageRecord(self.planned.id, StageStatus.failed.value, attempt, started, duration, failure.message)
        return self._settle(item, [give_up_stage(self.plan, self.planned, envelope, record, self.naming, self._wall())])

    def _park(self, item: DeliveryItem, failure: Failure) -> Settled:
        return Settled(SettleItem([(item.id, item.lease)], DEAD, [], 0.0, write_failure(failure)), [], [])

    def _unmet(self, item: DeliveryItem, envelope: Envelope, missing: list[str]) -> Settled:
        text = f"stage {self.planned.id!r} needs {', '.join(map(repr, missing))} to have completed"
        if self.planned.required:
            failure = failure_of(StageError(text))
            return self._give_up(item, envelope, failure, 1, self._wall(), 0.0)
        record = StageRecord(self.planned.id, StageStatus.skipped.value, 0, self._wall(), 0.0, text)
        return self._pass(item, envelope, record)

    def _skip(self, item: DeliveryItem, envelope: Envelope) -> Settled:
        return self._pass(item, envelope, StageRecord(self.planned.id, StageStatus.skipped.value, 0, self._wall()))

    def _pass(self, item: DeliveryItem, envelope: Envelope, record: StageRecord) -> Settled:
        envelope.trail = append_record(envelope.trail, record)
        return self._settle(item, [after_stage(self.plan, self.planned, envelope, self.naming, self._wall())])

    def _misplaced(self, item: DeliveryItem, envelope: Envelope, body: bytes) -> Settled:
        """Routing goes by id and version: forward what another queue runs, park what nobody here knows."""
        known = self.plan.stage(envelope.stage_id)
        if envelope.version == self.plan.version and known is not None and known.queue != self.planned.queue:
            return self._settle(item, [Step(known.queue, known.id, body)])
        text = (
            f"workflow {envelope.workflow_id!r} version {envelope.version} has no stage {envelope.stage_id!r} here "
            f"(version {self.plan.version} is registered): register that version, then requeue"
        )
        return self._park(item, Failure("refused", f"WorkflowDefinitionError: {text}", "WorkflowDefinitionError"))

    def _settle(self, item: DeliveryItem, steps: list[Step]) -> Settled:
        priority = 0 if item.extra is None else item.extra.priority
        publishes = [
            (
                Target(step.queue, step.label, TERMINAL if step.terminal else 0),
                PublishItem(
                    0, len(step.body), "", 0, 0, 0 if step.terminal or step.label == FAILED else priority, 0.0, step.ttl
                ),
            )
            for step in steps
        ]
        return Settled(SettleItem([(item.id, item.lease)], DONE), publishes, [step.body for step in steps])

    def _stage_context(self, item: DeliveryItem, envelope: Envelope, attempt: int) -> StageContext:
        extra = item.extra
        return StageContext(
            envelope=envelope,
            instance_id=item.group,
            epoch=item.epoch,
            stage_id=self.planned.id,
            attempt=attempt,
            timeout=self.planned.timeout,
            failure=None if extra is None else extra.failure,
            steps=None if extra is None else extra.steps,
            store=self._store(item),
        )


def ready_to_call(
    call: Call, services: Mapping[str, Any], loop: Callable[[], asyncio.AbstractEventLoop]
) -> Callable[[Any, Any], Any]:
    """A handler as a plain function of (context, ctx); an async one runs on one event loop that its worker keeps."""
    bound = call.bind(services)
    if not call.is_async:
        return bound
    run = loop().run_until_complete

    async def finished(awaitable: Awaitable[Any]) -> Any:
        return await awaitable

    return lambda context, ctx: run(finished(bound(context, ctx)))
