"""One instance from its start to its end in the calling thread, over the very code that works in production.

The stages, the decisions and the bytes between them are those of the runtime; only the broker is a deque here, in
which every delay is over at once. So a workflow means the same in a unit test and in a cluster, and this module must
never decide by itself what follows a stage.
"""

from __future__ import annotations

import asyncio
import bdb
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from brokers.api import AGAIN, DEAD, DeliveryExtra, DeliveryItem, SettleItem
from stageflow_actors.core.coordination import decide
from stageflow_actors.core.envelope import decode_envelope
from stageflow_actors.core.failures import read_failure
from stageflow_actors.core.plan import Naming
from stageflow_actors.core.result import WorkflowResult
from stageflow_actors.definition.workflow import Workflow
from stageflow_actors.errors import StageFlowError, WorkflowDefinitionError
from stageflow_actors.runtime.client import Client, Known
from stageflow_actors.runtime.compensation_work import CompensationWork
from stageflow_actors.runtime.mapping import Prepared
from stageflow_actors.runtime.programs import CompensationProgram, StageProgram
from stageflow_actors.runtime.stage_work import Settled, StageWork

__all__ = ["run"]

C = TypeVar("C")

logger = logging.getLogger("stageflow.testing")

Work = StageWork | CompensationWork


def run(
    workflow: Workflow[C],
    context: C | Mapping[str, Any],
    *,
    services: Mapping[str, Callable[[], Any]] | None = None,
    signals: Mapping[str, Any] | None = None,
) -> WorkflowResult[C]:
    """Run one instance of `workflow` to its end, here and now, and give its result.

    Contexts are serialised at each hop and failures retried, compensated or parked as in production; delays are
    skipped, and a parked instance is a result with status `parked`. Handlers run in the calling thread and are not
    sent anywhere, so breakpoints work and they may close over mocks. Each factory in `services` that is needed is
    called once, and what it makes is shared by all stages. `signals` are payloads by name.

    Not there in one process: timeouts (`ctx.deadline` is set and nobody enforces it), `ttl`, `env`, and surviving
    the death of a worker. A KeyboardInterrupt, and quitting a debugger, end the run instead of failing the stage.
    What handlers raise is logged with its traceback by the logger `stageflow.testing` at level INFO.

    Raises what starting a runtime and submitting raise: `WorkflowDefinitionError`, `InvalidContext`,
    `PayloadTooLarge`; and whatever a factory or the constructor of a class handler raises.
    """
    if not isinstance(workflow, Workflow):
        raise WorkflowDefinitionError(f"testing.run takes a workflow, not {workflow!r}")
    factories = _checked(services or {})
    workflow.validate(factories)
    if signals:
        raise WorkflowDefinitionError(
            f"workflow {workflow.id!r} was given the signal {next(iter(signals))!r} and waits for none of that name"
        )
    _check_thread(workflow)
    door = _Door()
    known, prepared, body = door.admit(workflow, context)
    needed = frozenset[str]().union(*(stage.services | stage.compensation_services for stage in workflow.stages))
    made = {name: factory() for name, factory in factories.items() if name in needed}
    with contextlib.closing(asyncio.Runner(loop_factory=asyncio.new_event_loop)) as loop:
        instance: _Instance[C] = _Instance(door, known, prepared.id, made, loop)
        return instance.finish(_Message(known.target.queue, known.target.label, body))


def _checked(services: Mapping[str, Callable[[], Any]]) -> Mapping[str, Callable[[], Any]]:
    for name, factory in services.items():
        if not callable(factory):
            raise WorkflowDefinitionError(
                f"service {name!r} must be a factory, as for a Runtime, not {factory!r}: "
                f"write services={{{name!r}: lambda: …}}"
            )
    return services


def _check_thread(workflow: Workflow[Any]) -> None:
    """An event loop cannot run inside another one of its thread."""
    stages = workflow.stages
    undoing = [stage.compensation.call for stage in stages if stage.compensation is not None]
    if not any(call.is_async for call in (*(stage.call for stage in stages), *undoing)):
        return
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise StageFlowError(
        f"workflow {workflow.id!r} has async handlers and testing.run was called inside a running event loop: "
        "call it in a thread, as in `await asyncio.to_thread(run, workflow, context)`"
    )


class _Door(Client):
    """The door of a client: what is refused there is refused here."""

    def admit(self, workflow: Workflow[Any], context: Any) -> tuple[Known, Prepared, bytes]:
        """The workflow as clients know it, the accepted context, and the first message."""
        known = self._workflow(workflow)
        prepared = self._prepare(known, context, None)
        return known, prepared, self._body(known, prepared, time.time())

    @property
    def naming(self) -> Naming:
        """How queues are called."""
        return self._naming


class _Message:
    """One message in the deque, and what the broker would remember of it."""

    __slots__ = ("attempts", "body", "failure", "label", "queue", "steps")

    def __init__(self, queue: str, label: str, body: bytes) -> None:
        self.queue = queue
        self.label = label
        self.body = body
        self.attempts = 0
        self.failure: bytes | None = None
        self.steps: dict[str, bytes] = {}

    def keep(self, name: str, value: bytes) -> None:
        """See `StepStore.keep`."""
        self.steps[name] = value

    def extra(self) -> DeliveryExtra | None:
        """What comes along with a delivery that is not the first."""
        if not self.attempts:
            return None
        return DeliveryExtra(self.attempts, 0, self.failure, False, dict(self.steps) or None, None, self.label, 0)


class _NoSlot:
    """Nobody watches the clock of an attempt."""

    def begin(self, message_id: int, timeout_ns: int, now_ns: int) -> None:
        """The handler starts."""

    def end(self) -> None:
        """The handler is over."""


class _Instance(Generic[C]):
    """One instance, its workers and its messages."""

    def __init__(
        self, door: _Door, known: Known, instance_id: str, services: Mapping[str, Any], loop: asyncio.Runner
    ) -> None:
        workflow, plan, naming = known.workflow, known.plan, door.naming
        self._id = instance_id
        self._known = known
        self._naming = naming
        self._plans = {(plan.id, plan.version): plan}
        self._current = _Message("", "", b"")
        context = workflow.context
        self._works: dict[str, Work] = {}
        for stage, planned in zip(workflow.stages, plan.stages, strict=True):
            program = StageProgram(workflow.id, workflow.version, context, stage)
            self._works[planned.queue] = StageWork(
                program, plan, naming, services, _NoSlot(), self._steps, loop=loop.get_loop, raised=self._told
            )
        undo = {stage.id: stage.compensation for stage in workflow.stages if stage.compensation is not None}
        if undo:
            undoing = CompensationProgram(workflow.id, workflow.version, context, undo)
            self._works[plan.compensation.queue] = CompensationWork(
                undoing, plan, naming, services, _NoSlot(), self._steps, loop=loop.get_loop, raised=self._told
            )

    def finish(self, first: _Message) -> WorkflowResult[C]:
        """Deliver messages until one of them is the end."""
        waiting = deque([first])
        while True:
            message = waiting.popleft()
            if message.queue == self._naming.finished:
                return WorkflowResult(self._id, message.body, self._known.codec, self._known.order)
            if message.queue == self._naming.coordinator:
                waiting.append(self._coordinate(message))
                continue
            work = self._works[message.queue]
            result = self._deliver(work, message)
            if not isinstance(result, Settled):
                place, body = result
                target = work.targets[place]
                waiting.append(_Message(target.queue, target.label, body))
                continue
            outcome = result.outcome
            if outcome.outcome == DEAD:
                return self._parked(message, outcome)
            if outcome.outcome == AGAIN:
                message.attempts += 1
                message.failure = outcome.failure
                waiting.appendleft(message)
            for (target, _), body in zip(result.publishes, result.bodies, strict=True):
                waiting.append(_Message(target.queue, target.label, body))

    def _deliver(self, work: Work, message: _Message) -> tuple[int, bytes] | Settled:
        self._current = message
        return work(DeliveryItem(1, 1, len(message.body), self._id, 1, message.extra()), message.body)

    def _coordinate(self, message: _Message) -> _Message:
        step = decide(message.label, message.body, None, 1, self._plans, self._naming, time.time())
        return _Message(step.queue, step.label, step.body)

    def _parked(self, message: _Message, outcome: SettleItem) -> WorkflowResult[C]:
        envelope = decode_envelope(message.body)
        failure = read_failure(outcome.failure)
        return WorkflowResult.parked(
            self._id,
            envelope.workflow_id,
            self._known.codec,
            error=None if failure is None else failure.message,
            failed_stage=envelope.stage_id,
            context=envelope.context,
            trail=envelope.trail,
            version=envelope.version,
            started_at=envelope.started_at,
            parked_at=time.time(),
            order=self._known.order,
        )

    def _steps(self, item: DeliveryItem) -> _Message:
        return self._current

    def _told(self, error: BaseException) -> None:
        """Somebody at the keyboard wants out; everything else is the stage's failure, as in production."""
        if isinstance(error, (KeyboardInterrupt, bdb.BdbQuit)):
            raise error
        message = self._current
        logger.info("%s failed in attempt %d", message.label, message.attempts + 1, exc_info=error)
