"""Executor that is one call of a handler of the user's: bound, wrap_handler, and awaited where it is async.

A subclass does in `_run` what comes before the call and in `_on_result` what follows it, so that whoever runs an event
loop can wait in between for many at once. Handlers that are not async go through without a stop.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Awaitable, Callable
from typing import Any, Self

import msgspec

from brokers.api import DeliveryItem
from stageflow_actors.core.plan import WorkflowPlan
from stageflow_actors.runtime.calling import as_blocking
from stageflow_actors.runtime.interception import AROUND_STAGE, around_methods, wrap_handler
from stageflow_actors.runtime.programs import StageProgram
from stageflow_actors.runtime.settled import Result, Settled, park_unreadable
from stageflow_actors.runtime.work import Executor, ExecutorEnvironment, Stopwatch

__all__ = ["HandlerExecutor", "PendingCall"]


class PendingCall:
    """A handler that has been called and has not returned: `awaitable` gives what `returned` takes."""

    __slots__ = ("_slot", "_state", "_work", "awaitable")

    def __init__(self, work: HandlerExecutor, awaitable: Awaitable[Any], state: Any) -> None:
        self.awaitable = awaitable
        self._work = work
        self._slot = work._slot
        self._state: Any = state

    def returned(self, value: Any) -> Result:
        """It has returned."""
        work, state = self._work, self._state
        work._slot = self._slot  # others have been started since
        return work._after(*state, value)

    def broke(self, error: BaseException) -> Result:
        """It has raised, or was cancelled for this reason."""
        item, envelope, attempt, started, clock, _ = self._state
        self._work._slot = self._slot
        return self._work._handler_failed(item, envelope, attempt, started, clock, error)


class HandlerExecutor(Executor):
    """The work of a place with a handler. `tasks`: whoever calls `start` awaits async handlers (see `PendingCall`).

    `awaits` says whether there is anything to be awaited then. What a handler gives is handed to `_then`.
    """

    kind = "stage"

    def __init__(self, program: StageProgram, plan: WorkflowPlan, environment: ExecutorEnvironment) -> None:
        super().__init__(program, plan, environment)
        stage = program.stage
        assert stage is not None
        call = stage.spec
        bound = call.bind(self.services)
        is_async = call.is_async
        arounds = around_methods(program.interceptors, AROUND_STAGE)
        if arounds:
            kind = program.context if self.kind == "stage" else None
            bound, is_async = wrap_handler(bound, arounds, kind=self.kind, is_async=is_async, context_type=kind)
        self.stage = stage
        self.awaits = environment.awaits_handlers and call.is_async
        self._intercepted = bool(arounds)
        self._wants_ctx = call.wants_ctx or self._intercepted
        self._call = as_blocking(bound, self._loop) if is_async and not self.awaits else bound
        self._bind()

    def _bind(self) -> None:
        self._after: Callable[..., Result] = self._on_intercepted_result if self._intercepted else self._on_result
        self._then: Callable[..., Result] = self._suspend if self.awaits else self._after

    @property
    def what(self) -> str:
        """What is run here, for errors."""
        name = self.planned.joins if self.kind == "item" else self.planned.id
        return f"{'endpoint' if self.kind == 'endpoint' else 'stage'} {name!r}"

    @property
    def timeout_ns(self) -> int:
        """What one attempt may take, nanoseconds; nought for any time."""
        return self._timeout_ns

    @property
    def threads(self) -> bool:
        """Whether several threads may run it at once."""
        return not self.stage.spec.is_async

    def of(self, body: bytes) -> HandlerExecutor:
        """The work of a message: where there is one version only, this."""
        return self

    def lane(self, slot: Stopwatch) -> Self:
        """The same work for a thread of its own, which shows in `slot` what it runs."""
        lane = copy.copy(self)
        lane._slot = slot
        lane._bind()
        return lane

    def start(self, item: DeliveryItem, body: bytes, slot: Stopwatch) -> Result | PendingCall:
        """Do the work of one delivery as far as it goes without waiting; whoever calls keeps `slot`."""
        self._slot = slot
        try:
            return self._run(item, body)
        except msgspec.MsgspecError as error:
            return park_unreadable(item, error)

    def _on_result(
        self, item: DeliveryItem, envelope: Any, attempt: int, started: float, clock: float, context: Any, value: Any
    ) -> Result:
        """The handler gave `value`, and left `context` behind."""
        raise NotImplementedError

    def _handler_failed(
        self, item: DeliveryItem, envelope: Any, attempt: int, started: float, clock: float, error: BaseException
    ) -> Settled:
        """The handler, or what is done with its result, has failed."""
        self._on_error(error)
        return self._failed(item, envelope, attempt, started, time.perf_counter() - clock, error)

    def _on_intercepted_result(
        self,
        item: DeliveryItem,
        envelope: Any,
        attempt: int,
        started: float,
        clock: float,
        context: Any,
        given: tuple[Any, Any],
    ) -> Result:
        """Interceptors give the context along with the result."""
        value, context = given
        return self._on_result(item, envelope, attempt, started, clock, context, value)

    def _suspend(self, *state: Any) -> Any:
        """In place of the result: only `start` has it from here, and knows."""
        return PendingCall(self, state[-1], state[:-1])
