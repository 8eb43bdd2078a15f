"""`HandlerExecutor`: the base of executors that call one handler, blocking or async, with or without interceptors.

A subclass prepares the call in `_run` and settles its result in `_on_result`, so that an actor with an event loop can
await many handlers between the two. For a blocking handler the two follow each other directly.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Awaitable, Callable
from typing import Any, Self

import msgspec

from stageflow_actors.core.plan import WorkflowPlan
from stageflow_actors.runtime.ipc.pool_spec import StageCode
from stageflow_actors.runtime.messaging.settlements import Result, Settlement, park_unreadable
from stageflow_actors.runtime.worker.awaitables import is_awaitable
from stageflow_actors.runtime.worker.executors.base import Executor, ExecutorEnvironment, Stopwatch
from stageflow_actors.runtime.worker.interceptors import AROUND_STAGE, around_methods, wrap_handler
from stageflow_brokers.api import DeliveryItem

__all__ = ["HandlerExecutor", "PendingCall"]


class PendingCall:
    """A call of an async handler that has not returned: await `awaitable` and pass its result to `complete`."""

    __slots__ = ("_executor", "_slot", "_state", "awaitable")

    def __init__(self, executor: HandlerExecutor, awaitable: Awaitable[Any], state: Any) -> None:
        self.awaitable = awaitable
        self._executor = executor
        self._slot = executor._slot
        self._state: Any = state

    def complete(self, value: Any) -> Result:
        """Return the settlement for the handler's result."""
        executor, state = self._executor, self._state
        executor._slot = self._slot  # other calls of this executor have started since
        return executor._settle_result(*state, value)

    def fail(self, error: BaseException) -> Result:
        """Return the settlement for the handler's exception, or for the reason of its cancellation."""
        item, envelope, attempt, started, clock, _ = self._state
        self._executor._slot = self._slot
        return self._executor._handler_failed(item, envelope, attempt, started, clock, error)


class HandlerExecutor(Executor):
    """Executes a place with a handler.

    `awaits`: `start` returns a `PendingCall` for each call, because the handler is async and the environment awaits
    handlers. Otherwise an awaitable that the handler returns is awaited before `_after_call` receives the result.
    """

    kind = "stage"

    def __init__(self, program: StageCode, plan: WorkflowPlan, environment: ExecutorEnvironment) -> None:
        super().__init__(program, plan, environment)
        stage = program.stage
        assert stage is not None
        call = stage.spec
        self.stage = stage
        self.awaits = environment.awaits_handlers and call.is_async
        self._arounds = around_methods(program.interceptors, AROUND_STAGE)
        self._wants_ctx = call.wants_ctx or bool(self._arounds)
        self._handler = call.bind(self.services)
        self._bind()

    def _bind(self) -> None:
        self._call = self._handler
        self._settle_result: Callable[..., Result] = self._on_result
        if self._arounds:
            self._settle_result = self._on_intercepted_result
            self._call = wrap_handler(
                self._handler,
                self._arounds,
                kind=self.kind,
                is_async=self.stage.spec.is_async,
                context_type=self._context_type if self.kind == "stage" else None,
                resolve=self._resolve,
                finish=self._event_loop.finish,
            )
        self._after_call: Callable[..., Result] = self._suspend if self.awaits else self._settle_result

    @property
    def timeout_ns(self) -> int:
        """The time limit of one attempt; 0 is no limit."""
        return self._timeout_ns

    @property
    def threads(self) -> bool:
        """True if several threads may call the handler concurrently."""
        return not self.stage.spec.is_async

    def executor_for(self, body: bytes) -> HandlerExecutor:
        """Return the executor of a message: with one version, this one."""
        return self

    def copy_for(self, slot: Stopwatch) -> Self:
        """Return a copy of this executor for a thread with its own slot."""
        executor = copy.copy(self)
        executor._slot = slot
        executor._bind()
        return executor

    def start(self, item: DeliveryItem, body: bytes, slot: Stopwatch) -> Result | PendingCall:
        """Execute one delivery until its handler awaits; the caller writes begin and end into `slot`."""
        self._slot = slot
        try:
            return self._run(item, body)
        except msgspec.MsgspecError as error:
            return park_unreadable(item, error)

    def _resolve_call(self, value: Any) -> Any:
        """Return the handler's result for `_after_call`: the actor awaits the result of an async handler itself."""
        if self.awaits or not is_awaitable(value):
            return value
        if self._arounds and not self.stage.spec.is_async:
            return self._event_loop.run_beside(value, self._slot, self.display_name)
        return self._event_loop.run(value, self._slot, self.display_name)

    def _on_result(
        self, item: DeliveryItem, envelope: Any, attempt: int, started: float, clock: float, context: Any, value: Any
    ) -> Result:
        """Return the settlement for the handler's result `value` and the context it left."""
        raise NotImplementedError

    def _handler_failed(
        self, item: DeliveryItem, envelope: Any, attempt: int, started: float, clock: float, error: BaseException
    ) -> Settlement:
        """Return the settlement for an exception of the handler, or of the encoding of its result."""
        self._on_error(error)
        return self._handle_failure(item, envelope, attempt, started, time.perf_counter() - clock, error)

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
        """Divide the (result, context) that a handler with interceptors returns."""
        value, context = given
        return self._on_result(item, envelope, attempt, started, clock, context, value)

    def _suspend(self, *state: Any) -> Any:
        """Return the pending call in place of a settlement; only `start` receives it."""
        return PendingCall(self, state[-1], state[:-1])
