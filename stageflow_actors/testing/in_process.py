"""One instance from start to end in the calling thread, with the code of the runtime.

Executors, decisions and messages are those of the runtime; only the broker is replaced by a deque in which no message
is delayed. So a workflow behaves in a unit test as in a cluster. This module must never decide which message follows
a stage.
"""

from __future__ import annotations

import asyncio
import bdb
import contextlib
import inspect
import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from stageflow_actors.core.coordination import decide, decide_gathered
from stageflow_actors.core.description import live_records
from stageflow_actors.core.envelope import NIL, decode_envelope
from stageflow_actors.core.failures import EXPIRED, read_failure
from stageflow_actors.core.plan import ITEM_SUFFIX, SIGNAL, TIMEOUT, Naming
from stageflow_actors.core.result import WorkflowResult, parked_result, result_of_outcome
from stageflow_actors.core.routing import signal_key
from stageflow_actors.core.value_codec import encode_message
from stageflow_actors.definition.result_types import result_types
from stageflow_actors.definition.services import check_services, inspect_services, select_services
from stageflow_actors.definition.stage import Stage
from stageflow_actors.definition.steps import Signal
from stageflow_actors.definition.workflow import Workflow, workflow_of
from stageflow_actors.errors import StageFlowError, WorkflowDefinitionError
from stageflow_actors.runtime.client.session import Session
from stageflow_actors.runtime.client.workflow_ref import WorkflowRef
from stageflow_actors.runtime.ipc.pool_spec import CompensationCode, compensated_item_types, endpoint_code, stage_codes
from stageflow_actors.runtime.messaging.settlements import Settlement, settle_transition, split_parts
from stageflow_actors.runtime.worker.base_context import BaseContext
from stageflow_actors.runtime.worker.event_loop import EventLoop
from stageflow_actors.runtime.worker.executors.base import Executor, ExecutorEnvironment
from stageflow_actors.runtime.worker.executors.compensation import CompensationExecutor
from stageflow_actors.runtime.worker.executors.registry import EXECUTORS
from stageflow_actors.runtime.worker.interceptors import (
    AROUND_COMPENSATION,
    AROUND_STAGE,
    around_methods,
    check_interceptors,
)
from stageflow_actors.runtime.worker.services import ServiceScope, services_on_loop
from stageflow_brokers.api import DEAD_LETTER, RETRY, DeliveryExtra, DeliveryItem, SettleItem, Target

__all__ = ["run"]

C = TypeVar("C")

logger = logging.getLogger("stageflow_actors.testing")

AnyExecutor = Executor | CompensationExecutor


def run(
    workflow: Workflow[C] | type[Workflow[C]],
    context: C | Mapping[str, Any],
    *,
    services: Mapping[str, Any] | None = None,
    signals: Mapping[str, Any] | Iterable[tuple[str, Any]] | None = None,
    endpoints: Mapping[str, Any] | None = None,
    interceptors: Sequence[Any] = (),
) -> WorkflowResult[C]:
    """Run one instance of a workflow in the calling thread, and return its result.

    Contexts are serialised after each stage, and failures are retried, compensated or parked, as in production. Delays
    are skipped. A parked instance is a result with the status `parked`. Handlers run in the calling thread and are
    not pickled, so breakpoints work and handlers may use mocks of the test. A KeyboardInterrupt, and quitting a
    debugger, end the run. Exceptions of handlers are logged with their traceback at level INFO, by the logger
    `stageflow_actors.testing`.

    Timeouts (`ctx.deadline` is set, but not enforced), `ttl`, `env` and the death of a worker have no effect here.

    Args:
        workflow: The workflow.
        context: The input: a context, or a dict of its fields.
        services: Factories or values by name, as for `Runtime`. A factory is called at most once per run, and its
            service closed at the end of the run.
        signals: Payloads by the name of the signal, or a list of (name, payload). A step whose signal is missing runs
            into its timeout at once.
        endpoints: Handlers or `Stage`s by the name of the endpoint. A request to another endpoint runs into its
            timeout at once.
        interceptors: Interceptors, as for `Runtime`.

    Returns:
        The result.

    Raises:
        WorkflowDefinitionError: If the workflow or an argument is invalid.
        InvalidContext: If the context does not fit the workflow.
        PayloadTooLarge: If the context exceeds the size limit.
        StageFlowError: If the workflow waits without a timeout for a signal that is missing, or has async handlers
            and an event loop already runs in this thread.

    Example:
        >>> from stageflow_actors import Workflow
        >>> from stageflow_actors.testing import run
        >>> def charge(order, *, bank):
        ...     return bank.charge(order["total"])
        >>> class FakeBank:
        ...     def charge(self, cents):
        ...         return f"receipt for {cents}"
        >>> result = run(Workflow("orders").add_stage(charge), {"total": 450}, services={"bank": FakeBank})
        >>> result.stages[0].data
        'receipt for 450'
    """
    workflow = workflow_of(workflow)
    if not isinstance(workflow, Workflow):
        raise WorkflowDefinitionError(
            f"testing.run takes a workflow, not {workflow!r:.120}: write run(workflow, context)"
        )
    sources = inspect_services({} if services is None else services)
    check_services(sources)
    workflow.validate(sources)
    given = list(signals.items() if isinstance(signals, Mapping) else signals or ())
    _check_signals(workflow, [name for name, _ in given])
    around = check_interceptors(interceptors)
    served = [stage if isinstance(stage, Stage) else Stage(stage, id=name) for name, stage in (endpoints or {}).items()]
    _check_thread(workflow, served, around)
    session = Session()
    ref = session.adopt(workflow)
    request = ref.prepare(context)
    body = ref.body(request, time.time(), session.max_message_bytes)
    undoing = [stage.compensation.spec for stage in workflow.stages if stage.compensation is not None]
    specs = [*(stage.spec for stage in (*workflow.stages, *served)), *undoing]
    needed = frozenset[str]().union(*(spec.services_among(sources) for spec in specs))
    base = BaseContext()

    def run_instance() -> WorkflowResult[C]:
        with (
            contextlib.closing(asyncio.Runner(loop_factory=asyncio.new_event_loop)) as loop,
            contextlib.ExitStack() as ends,
        ):
            scope = ServiceScope(loop.get_loop)
            ends.callback(scope.close)
            taken = select_services([name for name in sources if name in needed], sources)
            made = scope.make(taken, services_on_loop(specs, sources))
            instance: _Instance[C] = _Instance(
                session.naming, workflow, ref, request.id, made, loop, base, given, served, around
            )
            return instance.finish(_Message(ref.target.queue, ref.target.label, body))

    # What factories and constructors set is seen neither by handlers, as in a worker, nor by the caller.
    return base.copy().run(run_instance)


def _check_signals(workflow: Workflow[Any], signals: Iterable[str]) -> None:
    awaited = [step.name for step in workflow.steps if isinstance(step, Signal)]
    for name in signals:
        if name not in awaited:
            raise WorkflowDefinitionError(
                f"workflow {workflow.id!r} does not wait for the signal {name!r}"
                + (f": it waits for {', '.join(map(repr, awaited))}" if awaited else "")
            )


def _check_thread(workflow: Workflow[Any], endpoints: Sequence[Stage], interceptors: Sequence[Any]) -> None:
    """Raise if async handlers would need an event loop inside a running one of this thread."""
    stages = [*workflow.stages, *endpoints]
    undoing = [stage.compensation.spec for stage in stages if stage.compensation is not None]
    arounds = [
        around for method in (AROUND_STAGE, AROUND_COMPENSATION) for around in around_methods(interceptors, method)
    ]
    if not any(call.is_async for call in (*(stage.spec for stage in stages), *undoing)) and not any(
        map(inspect.iscoroutinefunction, arounds)
    ):
        return
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise StageFlowError(
        f"workflow {workflow.id!r} has async handlers and testing.run was called inside a running event loop: "
        "call it in a thread, as in `await asyncio.to_thread(run, workflow, context)`"
    )


class _Message:
    """One message in the deque, with the state that a broker keeps of it."""

    __slots__ = ("attempts", "body", "failure", "label", "parts", "queue", "steps")

    def __init__(self, queue: str, label: str, body: bytes, parts: list[tuple[str, int]] | None = None) -> None:
        self.queue = queue
        self.label = label
        self.body = body
        self.parts = parts
        self.attempts = 0
        self.failure: bytes | None = None
        self.steps: dict[str, bytes] = {}

    def keep(self, name: str, value: bytes) -> None:
        """See `StepStore.keep`."""
        self.steps[name] = value

    def report(self, progress: bytes) -> None:
        """Ignore the progress: there is no observer."""

    def extra(self) -> DeliveryExtra | None:
        """Return the state of a message that is not new and plain."""
        if not self.attempts and self.parts is None and not self.label.startswith(":"):
            return None
        return DeliveryExtra(self.attempts, 0, self.failure, False, dict(self.steps) or None, self.parts, self.label, 0)


class _Gather:
    """The state of one gather, as a broker keeps it."""

    def __init__(self) -> None:
        self.target: Target | None = None
        self.need = 0
        self.base = b""
        self.arrivals: dict[str, bytes] = {}

    @property
    def complete(self) -> bool:
        """True if it is open and all arrivals are there."""
        return self.target is not None and len(self.arrivals) >= self.need

    def take(self) -> _Message:
        """Return the message of the gather, with the arrivals so far."""
        assert self.target is not None
        slots = list(self.arrivals)[: self.need]
        bodies = [self.base, *(self.arrivals.pop(slot) for slot in slots)]
        parts = [(slot, len(body)) for slot, body in zip(["", *slots], bodies, strict=True)]
        target, self.target = self.target, None
        return _Message(target.queue, target.label, b"".join(bodies), parts)


class _NullSlot:
    """A slot without a clock: attempts have no time limit here."""

    def begin(self, message_id: int, timeout_ns: int, now_ns: int) -> None:
        """See `Slot.begin`."""

    def end(self) -> None:
        """See `Slot.end`."""

    def set_timeout(self, timeout_ns: int, now_ns: int) -> None:
        """See `Stopwatch.set_timeout`."""

    def begin_policy(self, failure: bytes, timeout_ns: int, now_ns: int) -> None:
        """See `Stopwatch.begin_policy`."""

    def end_policy(self) -> None:
        """See `Stopwatch.end_policy`."""

    def set_grace(self, grace_ns: int) -> None:
        """See `LoopSlot.set_grace`."""

    def begin_turn(self, now_ns: int) -> None:
        """See `LoopSlot.begin_turn`."""

    def end_turn(self) -> None:
        """See `LoopSlot.end_turn`."""

    def excuse(self, blocked_ns: int) -> None:
        """See `LoopSlot.excuse`."""

    def time_limit(self, now_ns: int) -> tuple[int, int] | None:
        """Return None: attempts have no time limit here."""
        return None

    def is_cancelled(self) -> bool:
        """Return False: an instance cannot be cancelled here."""
        return False


class _Instance(Generic[C]):
    """One instance, its workers and its messages."""

    def __init__(
        self,
        naming: Naming,
        workflow: Workflow[C],
        ref: WorkflowRef,
        instance_id: str,
        services: Mapping[str, Any],
        loop: asyncio.Runner,
        base: BaseContext,
        signals: list[tuple[str, Any]],
        endpoints: Sequence[Stage],
        interceptors: Sequence[Any],
    ) -> None:
        plan = ref.plan
        self._id = instance_id
        self._ref = ref
        self._naming = naming
        self._plans = {(plan.id, plan.version): plan}
        self._current = _Message("", "", b"")
        self._gathers: dict[str, _Gather] = {}
        self._waiting: deque[_Message] = deque()
        for number, (name, payload) in enumerate(signals):
            data = encode_message(payload, what=f"the payload of signal {name!r}")
            self._gathers.setdefault(signal_key(name), _Gather()).arrivals[str(number)] = data
        environment = ExecutorEnvironment(
            naming=naming,
            services=services,
            slot=_NullSlot(),
            step_store=self._steps,
            event_loop=EventLoop(loop.get_loop),
            base_context=base,
            on_error=self._on_error,
        )
        context = workflow.context
        self._executors: dict[str, AnyExecutor] = {}
        for program, planned in stage_codes(workflow, plan, endpoints):
            program.interceptors = tuple(interceptors)
            self._executors[planned.queue] = EXECUTORS[planned.kind](program, plan, environment)
        for stage in endpoints:
            served, place = endpoint_code(stage, naming, {})
            served.interceptors = tuple(interceptors)
            self._executors[naming.endpoint(stage.id)] = EXECUTORS[place.stages[0].kind](served, place, environment)
        undo = {stage.id: stage.compensation for stage in workflow.stages if stage.compensation is not None}
        if undo:
            undoing = CompensationCode(
                workflow.id,
                workflow.version,
                context,
                undo,
                interceptors=tuple(interceptors),
                items=compensated_item_types(workflow),
                result_types=result_types(workflow),
            )
            self._executors[plan.compensation.queue] = CompensationExecutor(undoing, plan, environment)

    def finish(self, first: _Message) -> WorkflowResult[C]:
        """Deliver messages until the instance ends, and return its result."""
        waiting = self._waiting
        waiting.append(first)
        while True:
            if not waiting:
                waiting.append(self._expire_gather())
            message = waiting.popleft()
            if message.queue == self._naming.finished:
                return result_of_outcome(self._id, message.body, self._ref.codec, self._ref.layout)
            if message.queue == self._naming.coordinator:
                result: tuple[int, bytes] | Settlement = self._coordinate(message)
            elif message.queue in self._executors:
                result = self._deliver(self._executors[message.queue], message)
            else:
                continue  # a request to an endpoint that is not served
            if not isinstance(result, Settlement):
                place, body = result
                target = self._executors[message.queue].targets[place]
                waiting.append(_Message(target.queue, target.label, body))
                continue
            item = result.item
            if item.outcome == DEAD_LETTER:
                return self._parked(message, item)
            if item.outcome == RETRY:
                message.attempts += 1
                message.failure = item.failure
                waiting.appendleft(message)
            waiting.extend(self._following(result))

    def _following(self, settled: Settlement) -> list[_Message]:
        """Return the messages that a settlement publishes, and those of the gathers that it completes."""
        bodies = iter(settled.bodies)
        follow = [_Message(target.queue, target.label, next(bodies)) for target, _ in settled.publishes]
        touched = []
        for target, opening in settled.opens:
            gather = self._gathers.setdefault(opening.key, _Gather())
            gather.target, gather.need, gather.base = target, opening.need, next(bodies)
            touched.append(gather)
        for arrival in settled.item.arrivals:
            gather = self._gathers.setdefault(arrival.key, _Gather())
            gather.arrivals[arrival.slot] = next(bodies)
            touched.append(gather)
        return follow + [gather.take() for gather in touched if gather.complete]

    def _expire_gather(self) -> _Message:
        """Return the message of an open gather as expired: no other message is left."""
        for key, gather in self._gathers.items():
            if gather.target is None or key == TIMEOUT:
                continue
            stage = self._ref.plan.stage(decode_envelope(gather.base).stage_id)
            if stage is not None and stage.kind == SIGNAL and not stage.seconds:
                raise StageFlowError(
                    f"stage {stage.id!r} of workflow {self._ref.plan.id!r} waits for the signal {stage.signal!r} "
                    f"without a timeout: pass it, as in signals={{{stage.signal!r}: payload}}"
                )
            late = gather.take()
            late.failure = EXPIRED
            return late
        raise StageFlowError(f"instance {self._id!r} has no message left and has not ended: please report this")

    def _deliver(self, executor: AnyExecutor, message: _Message) -> tuple[int, bytes] | Settlement:
        self._current = message
        return executor(DeliveryItem(1, 1, len(message.body), self._id, 1, message.extra()), message.body)

    def _coordinate(self, message: _Message) -> Settlement:
        item = DeliveryItem(1, 1, len(message.body), self._id, 1, message.extra())
        if message.parts is not None:
            base, arrivals = split_parts(item, message.body)
            transition = decide_gathered(base, arrivals, self._plans, self._naming, time.time())
        else:
            transition = decide(message.label, message.body, None, 1, self._plans, self._naming, time.time())
        return settle_transition(item, transition)

    def _parked(self, message: _Message, item: SettleItem) -> WorkflowResult[C]:
        body = message.body if message.parts is None else message.body[: message.parts[0][1]]
        envelope = decode_envelope(body)
        one = envelope.stage_id.endswith(ITEM_SUFFIX)  # of a map stage: the context is in the gather
        failure = read_failure(item.failure)
        records, tracebacks = live_records(self._described(message, item))
        return parked_result(
            self._id,
            envelope.workflow_id,
            self._ref.codec,
            error=None if failure is None else failure.message,
            failed_stage=envelope.stage_id.removesuffix(ITEM_SUFFIX),
            context=NIL if one else envelope.context,
            records=records,
            tracebacks=tracebacks,
            version=envelope.version,
            started_at=envelope.started_at,
            parked_at=time.time(),
            layout=self._ref.layout,
        )

    def _described(self, message: _Message, item: SettleItem) -> dict[str, Any]:
        """Return what a broker's `inspect` would return of the instance, as far as its stages are concerned."""
        gathers = [
            {"key": key, "need": gather.need, "base": gather.base, "parts": list(gather.arrivals.values())}
            for key, gather in self._gathers.items()
            if gather.target is not None
        ]
        base = len(message.body)
        if message.parts is not None:
            base = message.parts[0][1]
            _, arrivals = split_parts(DeliveryItem(1, 1, len(message.body), self._id, 1, message.extra()), message.body)
            gathers.append({"key": message.label, "need": 1, "base": b"", "parts": [body for _, body in arrivals]})
        letter = {"id": 1, "state": "dead", "body": message.body, "base": base, "reason": item.failure}
        letter |= {"attempts": message.attempts + 1, "deaths": 0}
        plain = {"id": 2, "state": "ready", "attempts": 0, "deaths": 0, "reason": None, "failure": None}
        others = [{**plain, "body": other.body, "base": len(other.body)} for other in self._waiting]
        return {"messages": [letter, *others], "gathers": gathers}

    def _steps(self, item: DeliveryItem) -> _Message:
        return self._current

    def _on_error(self, error: BaseException) -> None:
        """Re-raise Ctrl-C and the end of a debugger; log other errors, which are failures of the stage."""
        if isinstance(error, (KeyboardInterrupt, bdb.BdbQuit)):
            raise error
        message = self._current
        logger.info("%s failed in attempt %d", message.label, message.attempts + 1, exc_info=error)
