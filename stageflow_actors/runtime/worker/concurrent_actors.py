"""Actors that run several messages concurrently: async handlers on one event loop, or blocking ones in threads.

Each running message has a slot of its own (a lane), in which the node sees its start and timeout. Only the actor
settles finished messages, in batches.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import traceback
from abc import abstractmethod
from collections.abc import Callable
from inspect import iscoroutine
from typing import Any

import pykka

from stageflow_actors.errors import StageTimeout
from stageflow_actors.runtime.ipc.exit_codes import EXIT_UNHANDLED
from stageflow_actors.runtime.ipc.pool_spec import WorkerPayload
from stageflow_actors.runtime.ipc.slots import CANCEL_GRACE_NS, Slot
from stageflow_actors.runtime.messaging.settlements import Result, decline
from stageflow_actors.runtime.system.processes import exit_now
from stageflow_actors.runtime.worker.actor import MAX_BATCH_SETTLEMENTS, WorkActor
from stageflow_actors.runtime.worker.awaitables import finish
from stageflow_actors.runtime.worker.event_loop import LoopCall
from stageflow_actors.runtime.worker.executors.handler import HandlerExecutor, PendingCall
from stageflow_actors.runtime.worker.executors.versions import VersionedExecutor
from stageflow_actors.runtime.worker.mailbox import RETIRE, WORK, Mailbox
from stageflow_actors.runtime.worker.prefetch import Prefetch
from stageflow_brokers.api import DeliveryItem

__all__ = ["TaskActor", "ThreadActor"]

THREAD_END_SECONDS = 1.0
"""The longest wait for an idle thread to end."""


class _ConcurrentActor(WorkActor):
    """The base of both: takes as many messages as there are lanes, and settles finished ones."""

    def __init__(
        self, executor: HandlerExecutor | VersionedExecutor, mailbox: Mailbox, payload: WorkerPayload, slot: Slot
    ) -> None:
        super().__init__(executor, mailbox, payload, slot)
        self._executor = executor
        self._lanes = slot.lanes(payload.lanes)
        self.min_prefetch = len(self._lanes)
        self._prefetch = Prefetch(self.min_prefetch)
        self._running: set[tuple[int, int]] = set()
        self._deaths_before_last = payload.max_deaths - 1
        self._exclusive = False

    def held_leases(self) -> list[tuple[int, int]]:
        """Return the leases in work, or finished and not settled. The mailbox's lock is held."""
        return [*self._running, *super().held_leases()]

    def _start_waiting(self) -> None:
        """Start waiting messages on free lanes; a message before its last allowed death runs without others."""
        mailbox = self._mailbox
        mailbox.signalled = False
        self._exclusive = self._exclusive and bool(self._running)
        while (
            len(self._running) < self.min_prefetch
            and not self._exclusive
            and not (self._limited and self._remaining <= 0)
        ):
            with mailbox.lock:
                if not mailbox.inbox or mailbox.paused[0]:
                    return
                item, body = mailbox.inbox[0]
                # A death would count against all messages in work, so that each could be dead-lettered for another.
                exclusive = item.extra is not None and 0 < self._deaths_before_last <= item.extra.deaths
                if exclusive and self._running:
                    return
                mailbox.inbox.popleft()
                if mailbox.lost and (item.id, item.lease) in mailbox.lost:
                    continue
                self._running.add((item.id, item.lease))
                self._exclusive = exclusive
                self._remaining -= 1
            self._begin(item, body)

    @abstractmethod
    def _begin(self, item: DeliveryItem, body: bytes) -> None:
        """Start the message on a lane, which calls `_on_done` at its end."""

    def _on_done(self, item: DeliveryItem, result: Result, seconds: float) -> None:
        """Record a finished message for the next flush."""
        with self._mailbox.lock:
            self._running.discard((item.id, item.lease))
            if type(result) is tuple:
                target, done = result
                self._moves.append((item.id, item.lease, target, len(done), item.group))
                self._bodies.append(done)
            else:
                assert not isinstance(result, tuple)
                if result.declined:
                    self._release(item, self.min_prefetch)
                    self._remaining += 1
                    return
                if result.version_unknown and self._slot.is_outdated:
                    self._release(item, 0)
                    self.stop_taking()
                else:
                    self._add(result)
            self._prefetch.measure(seconds, 1)
            self._release_surplus()

    def _flush_or_retire(self) -> None:
        """Settle the finished messages; retire after the last message that this worker may take."""
        with self._mailbox.lock:
            if self._limited and self._remaining <= 0 and not self._running:
                self._retire()
            else:
                self._flush()


class _LoopInbox:
    """A pykka inbox over an event loop: the loop handles each message between the turns of its tasks."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.handle: Callable[[Any], None] = lambda envelope: None

    def put(self, envelope: Any) -> None:
        """Schedule the message on the loop; callable from any thread."""
        assert self.loop is not None
        self.loop.call_soon_threadsafe(lambda: self.handle(envelope))

    def get(self) -> Any:
        """Not used: the loop passes messages to the handler."""
        raise NotImplementedError

    def empty(self) -> bool:
        """Return True: the loop holds all messages."""
        return True


class TaskActor(_ConcurrentActor):
    """Runs the messages of a stage with an async handler: one task each, on one event loop."""

    def __init__(
        self, executor: HandlerExecutor | VersionedExecutor, mailbox: Mailbox, payload: WorkerPayload, slot: Slot
    ) -> None:
        super().__init__(executor, mailbox, payload, slot)
        inbox: Any = self.actor_inbox
        inbox.handle = self._handle
        self._event_loop = executor.environment.event_loop
        self._base_context = executor.environment.base_context
        self._loop = inbox.loop = self._event_loop.loop
        self._free = list(reversed(self._lanes))
        self._flushing = False
        for lane in self._lanes:
            lane.set_grace(CANCEL_GRACE_NS)

    @staticmethod
    def _create_actor_inbox() -> Any:
        return _LoopInbox()

    def _actor_loop_running(self) -> None:
        asyncio.set_event_loop(self._loop)
        while not self.actor_stopped.is_set():
            try:
                self._loop.run_forever()
            except (SystemExit, KeyboardInterrupt):
                traceback.print_exc()  # from a task that a handler started and did not await: no attempt fails by it

    def _handle(self, envelope: Any) -> None:
        try:
            self._handle_receive(envelope.message)
        except BaseException:  # noqa: BLE001 - the loop would only log it and go on
            self._exit_on_bug()
        if self.actor_stopped.is_set():
            self._loop.stop()

    def on_receive(self, message: Any) -> None:
        """Start waiting messages, or settle and start no more."""
        if message == WORK:
            self._start_waiting()
        elif message == RETIRE:
            self._flush_or_retire()

    def _exit_on_bug(self) -> None:
        exit_now(EXIT_UNHANDLED, traceback.format_exc())

    def _begin(self, item: DeliveryItem, body: bytes) -> None:
        lane = self._free.pop()
        began = time.monotonic_ns()
        executor = self._executor.executor_for(body)
        lane.begin(item.id, executor.timeout_ns, began)
        call = LoopCall(self._event_loop, lane)
        context = self._base_context.copy()
        context.run(call.enter)
        result = context.run(call.take_turn, executor.start, item, body, lane)
        if not isinstance(result, PendingCall):
            call.close()
            self._finish(item, lane, result, began)
            return
        call.task = self._loop.create_task(self._await_handler(item, lane, call, result, began), context=context)
        if executor.timeout_ns:
            seconds = executor.timeout_ns / 1e9
            call.limit(seconds, StageTimeout(f"{executor.display_name} ran longer than its timeout of {seconds:g} s"))
        call.watch_cancel()

    async def _await_handler(
        self, item: DeliveryItem, lane: Slot, call: LoopCall, pending: PendingCall, began: int
    ) -> None:
        error: BaseException | None
        value: Any = None
        if self._mailbox.paused[0] and iscoroutine(pending.awaitable):
            # The loop was blocked since this task was made, and its coroutine has not begun.
            pending.awaitable.close()
            call.close()
            self._finish(item, lane, decline(item), began)
            return
        try:
            value = await finish(pending.awaitable)
            error = call.reason
        except BaseException as raised:  # noqa: BLE001 - SystemExit of a handler is its failure
            error = call.reason_for(raised)
        call.close()
        try:
            result = pending.complete(value) if error is None else pending.fail(error)
            self._finish(item, lane, result, began)
            self._start_waiting()
        except BaseException:  # noqa: BLE001 - not user code: an error here is ours
            self._exit_on_bug()

    def _finish(self, item: DeliveryItem, lane: Slot, result: Result, began: int) -> None:
        lane.end()
        self._free.append(lane)
        self._on_done(item, result, (time.monotonic_ns() - began) / 1e9)
        if not self._flushing:
            # After the tasks that are finished by now: one frame settles them all.
            self._flushing = True
            self._loop.call_soon(self._flush_soon)

    def _flush_soon(self) -> None:
        self._flushing = False
        try:
            self._flush_or_retire()
        except BaseException:  # noqa: BLE001 - the loop would only log it and go on
            self._exit_on_bug()


class _Finished:
    """The message of a thread to the actor: a delivery is finished."""

    __slots__ = ("item", "result", "seconds")

    def __init__(self, item: DeliveryItem, result: Result, seconds: float) -> None:
        self.item = item
        self.result = result
        self.seconds = seconds


class ThreadActor(_ConcurrentActor):
    """Runs the messages of a stage with a blocking handler: one thread per lane, started on its first use."""

    def __init__(
        self, executor: HandlerExecutor | VersionedExecutor, mailbox: Mailbox, payload: WorkerPayload, slot: Slot
    ) -> None:
        super().__init__(executor, mailbox, payload, slot)
        self._jobs: queue.SimpleQueue[tuple[DeliveryItem, bytes] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def on_receive(self, message: Any) -> None:
        """Start waiting messages, record a finished one, or settle and start no more."""
        if isinstance(message, _Finished):
            self._on_done(message.item, message.result, message.seconds)
            self._start_waiting()
            if self.actor_inbox.empty() or len(self._moves) >= MAX_BATCH_SETTLEMENTS:
                self._flush_or_retire()
        elif message == WORK:
            self._start_waiting()
        elif message == RETIRE:
            self._flush_or_retire()

    def _begin(self, item: DeliveryItem, body: bytes) -> None:
        if len(self._threads) < len(self._running):
            lane = self._lanes[len(self._threads)]
            name = f"{type(self).__name__}-{len(self._threads) + 1}"
            self._threads.append(threading.Thread(target=self._serve_lane, args=(lane,), name=name, daemon=True))
            self._threads[-1].start()
        self._jobs.put((item, body))

    def on_stop(self) -> None:
        """End the threads, which are idle: what they refer to would outlive the end of the interpreter."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(THREAD_END_SECONDS)

    def _serve_lane(self, slot: Slot) -> None:
        try:
            execute = self._executor.copy_for(slot)
            while (job := self._jobs.get()) is not None:
                item, body = job
                began = time.perf_counter()
                result = execute(item, body)
                self.actor_ref.tell(_Finished(item, result, time.perf_counter() - began))
        except pykka.ActorDeadError:
            return  # the worker is ending
        except BaseException:  # noqa: BLE001 - the executor catches user errors: this one is ours, and would lose a lane
            exit_now(EXIT_UNHANDLED, traceback.format_exc())
