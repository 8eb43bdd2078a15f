"""The actors of a worker process: they take messages from the mailbox, do their work and send off the settlements.

An actor's loop runs in the process's main thread, where signals, C libraries and event loops want user code to be. This
one does one message after the other; `lanes` has those that do several at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pykka

from brokers.api import DeliveryItem, SettleItem, Target
from brokers.points import reach
from stageflow_actors.runtime.ipc.exit_codes import EXIT_UNHANDLED
from stageflow_actors.runtime.mailbox import RETIRE, WORK, Mailbox
from stageflow_actors.runtime.processes import end_now
from stageflow_actors.runtime.programs import WorkerPayload
from stageflow_actors.runtime.settled import Settled, numbered
from stageflow_actors.runtime.slots import Slot

__all__ = ["CompensationActor", "StageActor", "WorkActor"]

MAX_BATCH_SETTLEMENTS = 128
"""Settlements sent at once at most; fewer when the inbox runs dry or `FLUSH_INTERVAL_SECONDS` have passed."""
FLUSH_INTERVAL_SECONDS = 0.002
MAX_PREFETCH = 256
"""Most messages held at once, by stages that take microseconds."""
PREFETCH_WORK_SECONDS = 0.02
"""How much work a worker may hold: stages that take longer hold exactly one message."""


class WorkActor(pykka.ThreadingActor):
    """An actor whose loop runs in the thread that calls `serve`: the process's main thread.

    `min_prefetch` is how many messages it holds at least, in work or ready to be.
    """

    min_prefetch = 1

    def __init__(
        self, work: Callable[[DeliveryItem, bytes], Any], mailbox: Mailbox, given: WorkerPayload, slot: Slot
    ) -> None:
        super().__init__()
        self._work = work
        self._mailbox = mailbox
        self._slot = slot
        self._queue = given.queue
        self._targets: list[Target] = list(work.targets)  # type: ignore[attr-defined]
        self._plain_targets = len(self._targets)
        self._moves: list[tuple[int, int, int, int, str]] = []
        self._bodies: list[bytes] = []
        self._others: list[SettleItem] = []
        self._other_bodies: list[bytes] = []
        self._ran = 0
        self._current: tuple[int, int] | None = None
        self._prefetch = 1
        self._remaining = given.max_tasks
        self._limited = given.max_tasks > 0

    def _start_actor_loop(self) -> None:
        """Started by `serve`, in the caller's thread."""

    def serve(self) -> None:
        """Handle messages until stopped."""
        pykka.ActorRegistry.register(self.actor_ref)
        self._actor_loop()

    def on_receive(self, message: Any) -> None:
        """A word that there is work, or that no more is to be done."""
        if message == WORK:
            self._drain()
        elif message == RETIRE:
            with self._mailbox.lock:
                self._retire()

    def on_failure(self, *args: Any) -> None:
        """What the actor itself gets wrong must not leave a worker that looks alive and does nothing."""
        end_now(EXIT_UNHANDLED)

    def held_leases(self) -> list[tuple[int, int]]:
        """What the actor holds: in work, or done and not handed on. The mailbox's lock is taken."""
        held = [] if self._current is None else [self._current]
        held += [(move[0], move[1]) for move in self._moves]
        for other in self._others:
            held += other.leases
        return held

    def settle_finished(self) -> None:
        """Settle what is done while another message is in work, and hold no more than that one. The lock is taken."""
        self._prefetch = self.min_prefetch
        self._flush()

    def stop_taking(self) -> None:
        """Begin no other message than those in work. The lock is taken."""
        self._limited, self._remaining = True, 0

    def _drain(self) -> None:
        mailbox = self._mailbox
        inbox = mailbox.inbox
        lock = mailbox.lock
        work = self._work
        moves, bodies = self._moves, self._bodies
        mailbox.signalled = False
        reach("worker.delivered")
        clock = time.perf_counter
        began = flushed = clock()
        count = 0
        lock.acquire()  # and let go of only for the work itself: once per message, not once per step
        try:
            while inbox:
                if self._limited and self._remaining <= 0:
                    self._retire()
                    return
                item, body = inbox.popleft()
                if mailbox.lost and (item.id, item.lease) in mailbox.lost:
                    continue
                self._current = (item.id, item.lease)
                lock.release()
                try:
                    result = work(item, body)
                finally:
                    lock.acquire()
                count += 1
                if type(result) is tuple:
                    if self._others:
                        self._flush()
                    target, done = result
                    moves.append((item.id, item.lease, target, len(done), item.group))
                    bodies.append(done)
                elif result.unknown and self._slot.stale:
                    self._release(item)
                    self._current = None
                    self._retire()
                    return
                else:
                    if moves:
                        self._flush()
                    self._add(result)
                self._current = None
                if self._limited:
                    self._remaining -= 1
                    if self._remaining <= 0:
                        self._retire()
                        return
                if not inbox or len(moves) >= MAX_BATCH_SETTLEMENTS or clock() - flushed > FLUSH_INTERVAL_SECONDS:
                    if not inbox:
                        self._adapt(clock() - began, count)
                    self._flush()
                    flushed = clock()
            self._flush()  # what is done must not wait when what came last was not ours any more
        finally:
            lock.release()

    def _add(self, settled: Settled) -> None:
        self._others.append(numbered(settled, self._targets))
        self._other_bodies.extend(settled.bodies)
        self._ran += settled.ran

    def _adapt(self, seconds: float, count: int) -> None:
        """Set the prefetch to the messages that fit into `PREFETCH_WORK_SECONDS`, at most four times the last value."""
        each = seconds / count if count else 1.0
        fitting = int(PREFETCH_WORK_SECONDS / each) if each > 0 else MAX_PREFETCH
        self._prefetch = max(1, min(fitting, self._prefetch * 4, MAX_PREFETCH))

    def _flush(self) -> None:
        moves, others = self._moves, self._others
        if not moves and not others:
            return
        broker = self._mailbox.broker
        assert broker is not None
        reach("worker.worked")
        bodies = self._bodies + self._other_bodies
        targets = self._targets if others else self._targets[: self._plain_targets]
        broker.settle(targets, list(moves), [], list(others), bodies, queue=self._queue, prefetch=self._prefetch)
        reach("worker.settled")
        self._slot.settle(len(moves) + self._ran)
        self._ran = 0
        moves.clear()
        self._bodies.clear()
        others.clear()
        self._other_bodies.clear()
        if len(self._targets) > 64:
            del self._targets[self._plain_targets :]

    def _release(self, item: DeliveryItem) -> None:
        """This worker's successor knows what to do with it: more is not taken here."""
        broker = self._mailbox.broker
        assert broker is not None
        broker.release([(item.id, item.lease)], self._queue, 0)
        self.stop_taking()

    def _retire(self) -> None:
        """This worker has handled all the messages it was made for, or knows; what it has not begun goes back."""
        self._flush()
        broker = self._mailbox.broker
        assert broker is not None
        leases = [(item.id, item.lease) for item, _ in list(self._mailbox.inbox)]
        self._mailbox.inbox.clear()
        broker.release(leases, self._queue, 0)
        self.stop()


class StageActor(WorkActor):
    """Runs the messages of one stage queue."""


class CompensationActor(WorkActor):
    """Runs the messages of one compensation queue."""
