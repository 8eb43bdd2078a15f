"""`EventLoop`: the one event loop of a worker's async user code, and the messages whose coroutines run on it.

All coroutines of a worker share a loop, so that they can share a service, such as an HTTP client, which belongs to the
loop that made it. The loop runs in the main thread: always in a worker of async handlers, otherwise while a result is
awaited. Where handlers run in several threads, it has a thread of its own.

A coroutine that does not return to the loop blocks all others. For that reason the slot of a message shows each turn of
its coroutines (`LoopCall.take_turn`): if the node kills the worker during a turn, only that message is responsible, and
a turn that blocked the loop does not count against the time limits of the others.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Protocol

from stageflow_actors.core.failures import AttemptCancelled
from stageflow_actors.errors import StageFlowError, StageTimeout
from stageflow_actors.runtime.ipc.slots import CANCEL_GRACE_NS
from stageflow_actors.runtime.worker.awaitables import finish

__all__ = ["EventLoop", "LoopCall", "LoopSlot"]

LONG_TURN_NS = 50_000_000
"""The least length of a turn that counts as a blocked loop."""


CANCEL_POLL_SECONDS = 0.05
"""The interval at which the slots of messages on the loop are checked for cancellations."""


class LoopSlot(Protocol):
    """The part of a slot that the loop uses."""

    def begin_turn(self, now_ns: int) -> None:
        """Record that a coroutine of the message in work is resumed."""

    def end_turn(self) -> None:
        """Record that this coroutine has returned to the loop."""

    def excuse(self, blocked_ns: int) -> None:
        """Extend the time limit of the message in work by the time in which another one blocked the loop."""

    def is_cancelled(self) -> bool:
        """Return True if the message in work is to end."""

    def set_grace(self, grace_ns: int) -> None:
        """Extend each time limit by `grace_ns`, in which the worker itself cancels the handler."""

    def time_limit(self, now_ns: int) -> tuple[int, int] | None:
        """Return the time limit of the message in work and the time that is left; None without a limit."""


class LoopCall:
    """One message whose coroutines run on the loop: its turns, its time limit and its cancellation.

    `reason` is set if the runtime cancelled `task`, which awaits the handler.
    """

    __slots__ = ("_excused_ns", "_loop", "_slot", "_timer", "reason", "task")

    def __init__(self, loop: EventLoop, slot: LoopSlot) -> None:
        self.task: asyncio.Task[Any] | None = None
        self.reason: Exception | None = None
        self._loop = loop
        self._slot: LoopSlot | None = slot
        self._timer: asyncio.TimerHandle | None = None
        self._excused_ns = 0
        loop.calls.add(self)

    def enter(self) -> None:
        """Make the tasks that are created in the current context, and in copies of it, part of this message."""
        _call.set(self)

    def limit(self, seconds: float, late: Exception) -> None:
        """Cancel the handler after this time."""
        self._timer = self._loop.loop.call_later(seconds, self._on_late, late)

    def watch_cancel(self) -> None:
        """Cancel the handler when the node cancels its message."""
        if not self._loop.polls_cancels:
            self._loop.polls_cancels = True
            self._loop.loop.call_later(CANCEL_POLL_SECONDS, self._loop.poll_cancels)

    def check_cancelled(self) -> None:
        """Cancel the handler if the node has cancelled its message."""
        if self._slot is not None and self._slot.is_cancelled():
            self.cancel(AttemptCancelled())

    def cancel(self, reason: Exception) -> None:
        """Cancel the handler for this reason; only the first reason counts."""
        if self.reason is None and self.task is not None:
            self.reason = reason
            self.task.cancel()

    def reason_for(self, error: BaseException) -> BaseException:
        """Return why the handler raised `error`: the reason of its cancellation, with the frames where it waited."""
        return error if self.reason is None else self.reason.with_traceback(error.__traceback__)

    def close(self) -> None:
        """Record that the message has ended. A coroutine that outlives it takes no turn: its slot has another use."""
        self._slot = None
        self._loop.calls.discard(self)
        if self._timer is not None:
            self._timer.cancel()

    def take_turn(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call the function as one turn of this message."""
        slot = self._slot
        if slot is None:
            return function(*args)
        began = time.monotonic_ns()
        slot.begin_turn(began)
        try:
            return function(*args)
        finally:
            blocked_ns = time.monotonic_ns() - began
            if blocked_ns > LONG_TURN_NS:
                for other in list(self._loop.calls):  # threads may add to it
                    if other is not self:
                        other._excuse(blocked_ns)
            slot.end_turn()  # last: the node must not see the end of the turn before the others are excused

    def _excuse(self, blocked_ns: int) -> None:
        self._excused_ns += blocked_ns
        if self._slot is not None:
            self._slot.excuse(blocked_ns)

    def _on_late(self, late: Exception) -> None:
        if self._excused_ns:
            seconds, self._excused_ns = self._excused_ns / 1e9, 0
            self.limit(seconds, late)
        else:
            self.cancel(late)


_call: contextvars.ContextVar[LoopCall | None] = contextvars.ContextVar("stageflow_loop_call", default=None)
"""The message that a task belongs to. The tasks that a handler starts inherit it."""


class _Turns(Coroutine[Any, Any, Any]):
    """A coroutine of which each resumption is a turn of its message."""

    __slots__ = ("_call", "_coroutine")

    def __init__(self, coroutine: Any, call: LoopCall) -> None:
        self._coroutine = coroutine
        self._call = call

    def send(self, value: Any) -> Any:
        """Resume the coroutine."""
        return self._call.take_turn(self._coroutine.send, value)

    def throw(self, *error: Any) -> Any:
        """Resume the coroutine with an exception."""
        return self._call.take_turn(self._coroutine.throw, *error)

    def close(self) -> None:
        """Close the coroutine."""
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coroutine, name)  # the names and the frame that the repr of a task shows


def _create_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    context = options.get("context")
    call = _call.get() if context is None else context.get(_call)
    return asyncio.Task(coroutine if call is None else _Turns(coroutine, call), loop=loop, **options)


class EventLoop:
    """The event loop of a worker, created on its first use.

    The thread that creates this object is its owner. `calls` are the messages in work on the loop. `polls_cancels`:
    their slots are checked at intervals.
    """

    def __init__(self, create: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop) -> None:
        self.calls: set[LoopCall] = set()
        self.polls_cancels = False
        self._create = create
        self._created: asyncio.AbstractEventLoop | None = None
        self._owner = threading.get_ident()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._of_thread = threading.local()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop itself."""
        if self._created is None:
            self._created = self._create()
            self._created.set_task_factory(_create_task)
        return self._created

    def run(self, value: Any, slot: LoopSlot, what: str) -> Any:
        """Return the result of an awaitable, and wait for it in the calling thread.

        At the time limit in `slot` the awaitable is cancelled, and a `StageTimeout` that names `what` is raised.
        """
        _check_no_running_loop(value, what)
        limit = slot.time_limit(time.monotonic_ns())
        if limit is not None:
            slot.set_grace(CANCEL_GRACE_NS)
        try:
            call = LoopCall(self, slot)
            context = contextvars.copy_context()
            context.run(call.enter)
            result, error = self._wait_for(_await_call(call, value, limit, what), context)
        finally:
            if limit is not None:
                slot.set_grace(0)
        if error is not None:
            raise error
        return result

    def run_beside(self, value: Any, slot: LoopSlot, what: str) -> Any:
        """Return the same for a coroutine that calls a blocking handler, on a loop that the calling thread keeps."""
        if threading.get_ident() == self._owner:
            return self.run(value, slot, what)
        own: EventLoop | None = getattr(self._of_thread, "own", None)
        if own is None:
            own = self._of_thread.own = EventLoop()
        return own.run(value, slot, what)

    async def finish(self, value: Any) -> Any:
        """Return a result of user code; an awaitable is awaited on this loop, whichever loop calls it."""
        if threading.get_ident() == self._owner or asyncio.get_running_loop() is self._created:
            return await finish(value)
        return await asyncio.wrap_future(self._start(finish(value), contextvars.copy_context()))

    def poll_cancels(self) -> None:
        """Cancel the messages that the node has cancelled, now and at intervals while messages are in work."""
        for call in list(self.calls):
            call.check_cancelled()
        self.polls_cancels = bool(self.calls)
        if self.polls_cancels:
            self.loop.call_later(CANCEL_POLL_SECONDS, self.poll_cancels)

    def stop(self) -> None:
        """End the loop's own thread, if it has one: afterwards the owner may run and close the loop."""
        if self._thread is not None:
            self._stopping = True
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self._thread = None

    def _wait_for(
        self, coroutine: Coroutine[Any, Any, tuple[Any, BaseException | None]], context: contextvars.Context
    ) -> tuple[Any, BaseException | None]:
        if threading.get_ident() == self._owner and self._thread is None:
            return self.loop.run_until_complete(self.loop.create_task(coroutine, context=context))
        outcome: tuple[Any, BaseException | None] = self._start(coroutine, context).result()
        return outcome

    def _start(self, coroutine: Coroutine[Any, Any, Any], context: contextvars.Context) -> Any:
        """Start the coroutine on the loop, in the loop's own thread, and return a future of its result."""
        with self._starting:
            loop = self.loop
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="event-loop", daemon=True)
                self._thread.start()
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()

        async def run() -> None:
            try:
                done.set_result(await coroutine)
            except BaseException as error:  # noqa: BLE001 - the waiting thread raises it
                done.set_exception(error)

        loop.call_soon_threadsafe(lambda: loop.create_task(run()), context=context)
        return done

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        while not self._stopping:  # a handler may have stopped the loop, on which others wait
            try:
                self.loop.run_forever()
            except (SystemExit, KeyboardInterrupt):
                traceback.print_exc()  # from a task that a handler started and did not await: no attempt fails by it


async def _await_call(
    call: LoopCall, value: Any, limit: tuple[int, int] | None, what: str
) -> tuple[Any, BaseException | None]:
    """Return the result or the exception: a SystemExit that leaves a task would end the loop."""
    call.task = asyncio.current_task()
    if limit is not None:
        timeout_ns, left_ns = limit
        late = StageTimeout(f"{what} ran longer than its timeout of {timeout_ns / 1e9:g} s")
        call.limit(max(0, left_ns) / 1e9, late)
    call.watch_cancel()
    try:
        return await finish(value), call.reason
    except BaseException as error:  # noqa: BLE001 - the caller raises it
        return None, call.reason_for(error)
    finally:
        call.close()


def _check_no_running_loop(value: Any, what: str) -> None:
    """Raise if this thread cannot wait: only `testing.run` is called where a loop may be running."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    if asyncio.iscoroutine(value):
        value.close()
    raise StageFlowError(
        f"{what} returned an awaitable, and testing.run was called inside a running event loop: call it in a thread, "
        "as in `await asyncio.to_thread(run, workflow, context)`"
    )
