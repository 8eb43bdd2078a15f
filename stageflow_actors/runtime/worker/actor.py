"""`WorkActor`: takes messages from the mailbox, executes them and sends the settlements.

An actor's loop runs in the main thread of the process, because signals, C libraries and event loops expect user code
there. This actor runs one message after the other; the actors in `concurrent_actors` run several concurrently.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pykka

from stageflow_actors.runtime.ipc.exit_codes import EXIT_UNHANDLED
from stageflow_actors.runtime.ipc.pool_spec import WorkerPayload
from stageflow_actors.runtime.ipc.slots import Slot
from stageflow_actors.runtime.messaging.settlements import Settlement, assign_target_numbers
from stageflow_actors.runtime.system.processes import exit_now
from stageflow_actors.runtime.worker.mailbox import RETIRE, WORK, Mailbox
from stageflow_actors.runtime.worker.prefetch import Prefetch
from stageflow_brokers.api import DeliveryItem, SettleItem, Target
from stageflow_brokers.failpoints import failpoint

__all__ = ["CompensationActor", "StageActor", "WorkActor"]

MAX_BATCH_SETTLEMENTS = 512
"""The most settlements of one frame; fewer if the inbox is empty or `FLUSH_INTERVAL_SECONDS` have passed."""

FLUSH_INTERVAL_SECONDS = 0.004
"""The longest time that a finished message waits for its settlement while others run."""


class WorkActor(pykka.ThreadingActor):
    """An actor whose loop runs in the thread that calls `serve`: the main thread of the process.

    `min_prefetch` is the least number of messages that it holds, in work or waiting.
    """

    min_prefetch = 1

    def __init__(
        self, execute: Callable[[DeliveryItem, bytes], Any], mailbox: Mailbox, payload: WorkerPayload, slot: Slot
    ) -> None:
        super().__init__()
        self._execute = execute
        self._mailbox = mailbox
        self._slot = slot
        self._queue = payload.queue
        self._targets: list[Target] = list(execute.targets)  # type: ignore[attr-defined]
        self._plain_targets = len(self._targets)
        self._moves: list[tuple[int, int, int, int, str]] = []
        self._bodies: list[bytes] = []
        self._others: list[SettleItem] = []
        self._other_bodies: list[bytes] = []
        self._ran = 0
        self._current: tuple[int, int] | None = None
        self._prefetch = Prefetch()
        self._remaining = payload.max_tasks
        self._limited = payload.max_tasks > 0

    def _start_actor_loop(self) -> None:
        """Do nothing: `serve` runs the loop in the thread of its caller."""

    def serve(self) -> None:
        """Handle messages until the actor is stopped."""
        pykka.ActorRegistry.register(self.actor_ref)
        self._actor_loop()

    def on_receive(self, message: Any) -> None:
        """Execute the deliveries in the inbox, or retire."""
        if message == WORK:
            self._drain()
        elif message == RETIRE:
            with self._mailbox.lock:
                self._retire()

    def on_failure(self, *args: Any) -> None:
        """End the process: an error in the actor itself must not leave a worker that looks alive and does nothing."""
        exit_now(EXIT_UNHANDLED)

    def held_leases(self) -> list[tuple[int, int]]:
        """Return the leases in work, or finished and not settled. The mailbox's lock is held."""
        held = [] if self._current is None else [self._current]
        held += [(move[0], move[1]) for move in self._moves]
        for other in self._others:
            held += other.leases
        return held

    def settle_finished(self) -> None:
        """Settle the finished messages while another one is in work, and hold only that one. The lock is held."""
        self._prefetch.reset()
        self._flush()

    def stop_taking(self) -> None:
        """Start no further message. The mailbox's lock is held."""
        self._limited, self._remaining = True, 0

    def _drain(self) -> None:
        mailbox = self._mailbox
        inbox = mailbox.inbox
        lock = mailbox.lock
        execute = self._execute
        moves, bodies = self._moves, self._bodies
        mailbox.signalled = False
        failpoint("worker.delivered")
        clock = time.perf_counter
        flushed = clock()
        count = 0
        paused = mailbox.paused
        lock.acquire()  # released only while a message runs: once per message
        try:
            while inbox:
                if self._limited and self._remaining <= 0:
                    self._retire()
                    return
                if paused[0]:
                    break  # the broker recalls the messages
                item, body = inbox.popleft()
                if mailbox.lost and (item.id, item.lease) in mailbox.lost:
                    continue
                self._current = (item.id, item.lease)
                lock.release()
                try:
                    result = execute(item, body)
                finally:
                    lock.acquire()
                count += 1
                if type(result) is tuple:
                    if self._others:
                        self._flush()
                    target, done = result
                    moves.append((item.id, item.lease, target, len(done), item.group))
                    bodies.append(done)
                elif result.declined:
                    self._release(item, self.min_prefetch)
                    self._current = None
                    break
                elif result.version_unknown and self._slot.is_outdated:
                    self._release(item, 0)
                    self.stop_taking()
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
                    now = clock()
                    self._prefetch.measure(now - flushed, count)
                    flushed, count = now, 0
                    self._flush()
                    self._release_surplus()
            self._flush()  # the last deliveries may have been lost: finished messages must not wait for more
        finally:
            lock.release()

    def _add(self, settled: Settlement) -> None:
        self._others.append(assign_target_numbers(settled, self._targets))
        self._other_bodies.extend(settled.bodies)
        self._ran += settled.user_code_ran

    def _release_surplus(self) -> None:
        """Release the last of the waiting messages if they would wait too long here. The mailbox's lock is held."""
        inbox = self._mailbox.inbox
        surplus = self._prefetch.surplus(len(inbox))
        if surplus:
            last = [inbox.pop()[0] for _ in range(surplus)]
            leases = [(item.id, item.lease) for item in reversed(last)]
            self._mailbox.release(leases, self._prefetch.limit)

    def _flush(self) -> None:
        moves, others = self._moves, self._others
        if not moves and not others:
            return
        broker = self._mailbox.broker
        assert broker is not None
        failpoint("worker.before-settle")
        bodies = self._bodies + self._other_bodies
        targets = self._targets if others else self._targets[: self._plain_targets]
        broker.settle(targets, list(moves), [], list(others), bodies, queue=self._queue, prefetch=self._limit())
        failpoint("worker.settled")
        self._slot.count_settled(len(moves) + self._ran)
        self._ran = 0
        moves.clear()
        self._bodies.clear()
        others.clear()
        self._other_bodies.clear()
        if len(self._targets) > 64:
            del self._targets[self._plain_targets :]

    def _limit(self) -> int:
        """Return the number of messages to hold: no more than the worker may still take before it is replaced."""
        limit = self._prefetch.limit
        return max(self.min_prefetch, min(limit, self._remaining)) if self._limited else limit

    def _release(self, item: DeliveryItem, prefetch: int) -> None:
        """Release a message that has not begun: for another worker, or because the queue is paused."""
        self._mailbox.release([(item.id, item.lease)], prefetch)

    def _retire(self) -> None:
        """Settle the finished messages, release the waiting ones, and stop."""
        self._flush()
        leases = [(item.id, item.lease) for item, _ in list(self._mailbox.inbox)]
        self._mailbox.inbox.clear()
        self._mailbox.release(leases, 0)
        self.stop()


class StageActor(WorkActor):
    """The actor of one stage queue."""


class CompensationActor(WorkActor):
    """The actor of one compensation queue."""
