"""Actors that work on several messages at once: async handlers on one running event loop, or threads for blocking ones.

Each message in work has a lane, which is a slot: the node sees each of them, with its own start and timeout. What is
done is settled by the actor alone, in batches as everywhere.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import traceback
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import pykka

from brokers.api import DeliveryItem
from stageflow_actors.errors import StageError, StageTimeout
from stageflow_actors.runtime.actor import MAX_BATCH_SETTLEMENTS, MAX_PREFETCH, PREFETCH_WORK_SECONDS, WorkActor
from stageflow_actors.runtime.handler_work import HandlerExecutor, PendingCall
from stageflow_actors.runtime.ipc.exit_codes import EXIT_UNHANDLED
from stageflow_actors.runtime.mailbox import RETIRE, WORK, Mailbox
from stageflow_actors.runtime.processes import end_now
from stageflow_actors.runtime.programs import WorkerPayload
from stageflow_actors.runtime.settled import Result
from stageflow_actors.runtime.slots import Slot
from stageflow_actors.runtime.versions import VersionedExecutor
from stageflow_actors.runtime.work import CANCEL_GRACE_NS

__all__ = ["TaskActor", "ThreadActor"]

CANCEL_POLL_SECONDS = 0.05
"""Seconds between looks whether what is in work has been cancelled."""


class _ConcurrentActor(WorkActor):
    """What both have in common: taking as many messages as there are lanes, and settling what is done."""

    def __init__(
        self, work: HandlerExecutor | VersionedExecutor, mailbox: Mailbox, given: WorkerPayload, slot: Slot
    ) -> None:
        super().__init__(work, mailbox, given, slot)
        self._handler = work
        self._lanes = slot.lanes(given.lanes)
        self.min_prefetch = self._prefetch = len(self._lanes)
        self._running: set[tuple[int, int]] = set()
        self._last_chance = given.max_deaths - 1
        self._alone = False

    def held_leases(self) -> list[tuple[int, int]]:
        """What the actor holds: in work, or done and not handed on. The mailbox's lock is taken."""
        return [*self._running, *super().held_leases()]

    def _start_waiting(self) -> None:
        """Give each lane that is free a message that waits; to one that may not cause another death, all of them."""
        mailbox = self._mailbox
        mailbox.signalled = False
        self._alone = self._alone and bool(self._running)
        while (
            len(self._running) < self.min_prefetch and not self._alone and not (self._limited and self._remaining <= 0)
        ):
            with mailbox.lock:
                if not mailbox.inbox:
                    return
                item, body = mailbox.inbox[0]
                # Its neighbours would be charged with the death that it may cause, and it with one of theirs.
                alone = item.extra is not None and 0 < self._last_chance <= item.extra.deaths
                if alone and self._running:
                    return
                mailbox.inbox.popleft()
                if mailbox.lost and (item.id, item.lease) in mailbox.lost:
                    continue
                self._running.add((item.id, item.lease))
                self._alone = alone
                self._remaining -= 1
            self._begin(item, body)

    @abstractmethod
    def _begin(self, item: DeliveryItem, body: bytes) -> None:
        """Have a lane work on it; `_on_done` is to follow."""

    def _on_done(self, item: DeliveryItem, result: Result, seconds: float) -> None:
        """A message is done with. It is settled at the next flush."""
        with self._mailbox.lock:
            self._running.discard((item.id, item.lease))
            if type(result) is tuple:
                target, done = result
                self._moves.append((item.id, item.lease, target, len(done), item.group))
                self._bodies.append(done)
            else:
                assert not isinstance(result, tuple)
                if result.unknown and self._slot.stale:
                    self._release(item)
                else:
                    self._add(result)
            # As much more as all lanes together do in a moment.
            fitting = int(self.min_prefetch * PREFETCH_WORK_SECONDS / max(seconds, 1e-6))
            self._prefetch = self.min_prefetch + min(fitting, self._prefetch * 4, MAX_PREFETCH)

    def _settle_finished(self) -> None:
        """Settle what is done; when that was the last message this worker was made for, end it."""
        with self._mailbox.lock:
            if self._limited and self._remaining <= 0 and not self._running:
                self._retire()
            else:
                self._flush()


class _Attempt:
    """One handler being awaited. `reason` is why it was cancelled by us."""

    __slots__ = ("reason", "task")

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.task = task
        self.reason: Exception | None = None

    def cancel(self, reason: Exception) -> None:
        """End it for this reason, unless it is being ended already."""
        if self.reason is None:
            self.reason = reason
            self.task.cancel()


class _LoopInbox:
    """A pykka inbox that is an event loop: what is put in is handled there, between the steps of tasks."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.handle: Callable[[Any], None] = lambda envelope: None

    def put(self, envelope: Any) -> None:
        """From any thread."""
        self.loop.call_soon_threadsafe(lambda: self.handle(envelope))

    def get(self) -> Any:
        """Nobody waits for messages here: they are handed over."""
        raise NotImplementedError

    def empty(self) -> bool:
        """Nothing is ever kept."""
        return True


class TaskActor(_ConcurrentActor):
    """Runs the messages of a stage whose handler is async: a task each, on one loop that never stops in between."""

    def __init__(
        self, work: HandlerExecutor | VersionedExecutor, mailbox: Mailbox, given: WorkerPayload, slot: Slot
    ) -> None:
        super().__init__(work, mailbox, given, slot)
        inbox: Any = self.actor_inbox
        inbox.handle = self._handle
        self._loop: asyncio.AbstractEventLoop = inbox.loop
        self._free = list(reversed(self._lanes))
        self._attempts: dict[Slot, _Attempt] = {}
        self._flushing = self._polling = False
        for lane in self._lanes:
            lane.allow(CANCEL_GRACE_NS)

    @staticmethod
    def _create_actor_inbox() -> Any:
        return _LoopInbox()

    def _actor_loop_running(self) -> None:
        asyncio.set_event_loop(self._loop)
        while not self.actor_stopped.is_set():
            try:
                self._loop.run_forever()
            except (SystemExit, KeyboardInterrupt):
                traceback.print_exc()  # of a task that a handler had started and left behind: nobody's failure

    def _handle(self, envelope: Any) -> None:
        try:
            self._handle_receive(envelope.message)
        except BaseException:  # noqa: BLE001 - the loop would log it and go on as if nothing had happened
            self._exit_on_bug()
        if self.actor_stopped.is_set():
            self._loop.stop()

    def on_receive(self, message: Any) -> None:
        """A word that there is work, or that no more is to be begun."""
        if message == WORK:
            self._start_waiting()
        elif message == RETIRE:
            self._settle_finished()

    def _exit_on_bug(self) -> None:
        end_now(EXIT_UNHANDLED, traceback.format_exc())

    def _begin(self, item: DeliveryItem, body: bytes) -> None:
        lane = self._free.pop()
        began = time.monotonic_ns()
        handler = self._handler.of(body)
        lane.begin(item.id, handler.timeout_ns, began)
        result = handler.start(item, body, lane)
        if isinstance(result, PendingCall):
            task = self._loop.create_task(self._await_handler(handler, item, lane, result, began))
            self._attempts[lane] = _Attempt(task)
            if not self._polling:
                self._polling = True
                self._loop.call_later(CANCEL_POLL_SECONDS, self._poll_cancels)
        else:
            self._finish(item, lane, result, began)

    async def _await_handler(
        self, handler: HandlerExecutor, item: DeliveryItem, lane: Slot, paused: PendingCall, began: int
    ) -> None:
        attempt = self._attempts[lane]
        timer: asyncio.TimerHandle | None = None
        if handler.timeout_ns:
            seconds = handler.timeout_ns / 1e9
            late = StageTimeout(f"{handler.what} ran longer than its timeout of {seconds:g} s")
            timer = self._loop.call_later(seconds, attempt.cancel, late)
        error: BaseException | None
        value: Any = None
        try:
            value = await paused.awaitable
            error = attempt.reason
        except BaseException as raised:  # noqa: BLE001 - SystemExit of a handler is its failure
            error = attempt.reason or raised
        if timer is not None:
            timer.cancel()
        try:
            result = paused.returned(value) if error is None else paused.broke(error)
            del self._attempts[lane]
            self._finish(item, lane, result, began)
            self._start_waiting()
        except BaseException:  # noqa: BLE001 - no handler of the user's: nothing here may fail
            self._exit_on_bug()

    def _finish(self, item: DeliveryItem, lane: Slot, result: Result, began: int) -> None:
        lane.end()
        self._free.append(lane)
        self._on_done(item, result, (time.monotonic_ns() - began) / 1e9)
        if not self._flushing:
            # Behind all that are done by now: they go in one frame.
            self._flushing = True
            self._loop.call_soon(self._flush_soon)

    def _flush_soon(self) -> None:
        self._flushing = False
        try:
            self._settle_finished()
        except BaseException:  # noqa: BLE001 - the loop would log it and go on as if nothing had happened
            self._exit_on_bug()

    def _poll_cancels(self) -> None:
        for lane, attempt in self._attempts.items():
            if lane.is_cancelled():
                attempt.cancel(StageError("the instance was cancelled"))
        self._polling = bool(self._attempts)
        if self._polling:
            self._loop.call_later(CANCEL_POLL_SECONDS, self._poll_cancels)


class _Finished:
    """A thread has done its message."""

    __slots__ = ("item", "result", "seconds")

    def __init__(self, item: DeliveryItem, result: Result, seconds: float) -> None:
        self.item = item
        self.result = result
        self.seconds = seconds


class ThreadActor(_ConcurrentActor):
    """Runs the messages of a stage whose handler blocks: a thread per lane, started when it is needed first."""

    def __init__(
        self, work: HandlerExecutor | VersionedExecutor, mailbox: Mailbox, given: WorkerPayload, slot: Slot
    ) -> None:
        super().__init__(work, mailbox, given, slot)
        self._jobs: queue.SimpleQueue[tuple[DeliveryItem, bytes]] = queue.SimpleQueue()
        self._threads = 0

    def on_receive(self, message: Any) -> None:
        """A word that there is work, or that no more is to be begun, or what has been done."""
        if isinstance(message, _Finished):
            self._on_done(message.item, message.result, message.seconds)
            self._start_waiting()
            if self.actor_inbox.empty() or len(self._moves) >= MAX_BATCH_SETTLEMENTS:
                self._settle_finished()
        elif message == WORK:
            self._start_waiting()
        elif message == RETIRE:
            self._settle_finished()

    def _begin(self, item: DeliveryItem, body: bytes) -> None:
        if self._threads < len(self._running):
            lane = self._lanes[self._threads]
            self._threads += 1
            name = f"{type(self).__name__}-{self._threads}"
            threading.Thread(target=self._serve_lane, args=(lane,), name=name, daemon=True).start()
        self._jobs.put((item, body))

    def _serve_lane(self, slot: Slot) -> None:
        try:
            work = self._handler.lane(slot)
            while True:
                item, body = self._jobs.get()
                began = time.perf_counter()
                result = work(item, body)
                self.actor_ref.tell(_Finished(item, result, time.perf_counter() - began))
        except pykka.ActorDeadError:
            return  # the worker is at its end
        except BaseException:  # noqa: BLE001 - handlers are caught further in: a lane that is gone must not go unnoticed
            end_now(EXIT_UNHANDLED, traceback.format_exc())
