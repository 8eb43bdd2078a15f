"""The worker process: one stage actor in the main thread, the broker connection in another.

The zygote forks it and calls `main`. User code runs in the main thread, where signals, C libraries and event loops want
it; the connection's thread lays deliveries into a deque and tells the actor once per batch. It ends when its process
is killed, or with `EXIT_RECYCLED` when it has done the work it was made for.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import pykka

from brokers.api import DONE, Broker, DeliveryItem, Listener, Refused, SettleItem, Target
from stageflow_actors.core.failures import describe_error
from stageflow_actors.definition.shipping import loads
from stageflow_actors.errors import StageFlowError
from stageflow_actors.runtime.compensation_work import CompensationWork
from stageflow_actors.runtime.programs import WorkerPayload
from stageflow_actors.runtime.slots import Slot
from stageflow_actors.runtime.transport import connect
from stageflow_actors.runtime.work import Settled, numbered
from stageflow_actors.runtime.works import WORKS

__all__ = ["EXIT_RECYCLED", "EXIT_UNLOADABLE", "CompensationActor", "StageActor", "main"]

EXIT_RECYCLED = 0
EXIT_UNLOADABLE = 78
"""Exit code of a worker whose code could not be loaded or whose services could not be made (`EX_CONFIG`)."""

FLUSH_COUNT = 128
"""Settlements sent at once at most; fewer when the inbox runs dry or `FLUSH_SECONDS` have passed."""
FLUSH_SECONDS = 0.002
DEEPEST = 256
"""Most messages held at once, by stages that take microseconds."""
HELD_SECONDS = 0.02
"""How much work a worker may hold: stages that take longer hold exactly one message."""
LAST_WORDS_SECONDS = 60.0
"""How long a worker that has done its share waits for its settlements to be durable: a broker restarts in that time."""

WORK = "work"


def main(payload: bytes, slot: Slot | None) -> int:
    """Entry of the forked process."""
    given = msgspec.msgpack.decode(payload, type=WorkerPayload)
    logging.basicConfig(level=given.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    assert slot is not None
    mailbox = _Mailbox(given.queue)
    try:
        work = _load(given, slot, mailbox)
    except BaseException as error:  # noqa: BLE001 - user modules and factories may do anything
        traceback.print_exc()
        sys.stderr.write(f"stageflow: worker {given.worker_id} cannot start: {describe_error(error)}\n")
        return EXIT_UNLOADABLE
    kind = CompensationActor if given.kind == "compensation" else StageActor
    actor = kind(work, mailbox, given, slot)
    mailbox.actor = actor
    mailbox.broker = connect(given.address, mailbox, peer=given.peer, role="worker", name=given.worker_id)
    mailbox.broker.consume(given.queue, 1)
    actor.serve()
    mailbox.broker.close(timeout=LAST_WORDS_SECONDS)
    return EXIT_RECYCLED


def _load(given: WorkerPayload, slot: Slot, mailbox: _Mailbox) -> Any:
    program = loads(given.code)
    services = {name: factory() for name, factory in program.factories.items()}
    kind: Any = CompensationWork
    if given.kind != "compensation":
        place = given.plan.stage(program.place)
        assert place is not None, f"{program.place} is not in its own plan"
        kind = WORKS[place.kind]
    return kind(
        program,
        given.plan,
        given.naming,
        services,
        slot,
        mailbox.steps_of,
        max_message_bytes=given.max_message_bytes,
    )


class _Mailbox(Listener):
    """Between the connection's thread and the actor's: what has arrived and is not begun.

    `lock` guards the way of a message from here through the actor's hands into the connection: whoever has it sees
    each message that this worker holds in one place at least.
    """

    def __init__(self, queue: str) -> None:
        self.inbox: deque[tuple[DeliveryItem, bytes]] = deque()
        self.lock = threading.Lock()
        self.actor: _WorkActor | None = None
        self.broker: Broker | None = None
        self.signalled = False
        self.lost: set[tuple[int, int]] = set()
        self._queue = queue

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        """Lay them ready; one word to the actor is enough for the batch."""
        self.inbox.extend(zip(items, bodies, strict=True))
        if not self.signalled and self.actor is not None:
            self.signalled = True
            self.actor.actor_ref.tell(WORK)

    def on_notice(self, word: str, detail: Any) -> None:
        """Hand on what is done and return what has not begun, when asked to: the message in work takes long."""
        if word == "recall" and self.broker is not None and self.actor is not None:
            with self.lock:
                self.actor.hand_on()
                leases = [(item.id, item.lease) for item, _ in self.inbox]
                self.inbox.clear()
            self.broker.release(leases, self._queue, 1)
        elif word == "malformed":
            logging.getLogger("stageflow.worker").error("the broker refused a frame: %s", detail)

    def on_lost(self, ids: list[int]) -> None:
        """What is not ours any more is not begun. The same message may well come again, under another lease."""
        gone = set(ids)
        with self.lock:
            self.lost = {(item.id, item.lease) for item, _ in self.inbox if item.id in gone}

    def on_stale(self, ids: list[int]) -> None:
        """A settlement was refused: somebody else has these messages now."""
        logging.getLogger("stageflow.worker").warning("settlements of %s were refused: no longer held", ids)

    def holding(self) -> list[tuple[int, int]]:
        """Everything delivered and not yet settled."""
        with self.lock:
            held = [(item.id, item.lease) for item, _ in self.inbox]
            return held + self.actor.held() if self.actor is not None else held

    def steps_of(self, item: DeliveryItem) -> _Steps:
        """Where the steps of one delivery are kept."""
        return _Steps(self, item)


class _Steps:
    """Keeps steps with the message in the broker, durable on return."""

    __slots__ = ("_item", "_mailbox")

    def __init__(self, mailbox: _Mailbox, item: DeliveryItem) -> None:
        self._mailbox = mailbox
        self._item = item

    def keep(self, name: str, value: bytes) -> None:
        """See `StepStore.keep`. Raises `StageFlowError` when this worker no longer holds the message."""
        broker = self._mailbox.broker
        assert broker is not None
        try:
            broker.checkpoint(self._item.id, self._item.lease, name, value).result()
        except Refused as error:
            raise StageFlowError(f"step {name!r} cannot be kept: {error}") from None

    def report(self, progress: bytes) -> None:
        """See `StepStore.report`. Whether it arrives is nobody's concern."""
        broker = self._mailbox.broker
        assert broker is not None
        broker.query("progress", self._item.id, self._item.lease, progress)


class _WorkActor(pykka.ThreadingActor):
    """An actor whose loop runs in the thread that calls `serve`: the process's main thread."""

    def __init__(
        self, work: Callable[[DeliveryItem, bytes], Any], mailbox: _Mailbox, given: WorkerPayload, slot: Slot
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
        self._current: tuple[int, int] | None = None
        self._prefetch = 1
        self._left = given.max_tasks
        self._limited = given.max_tasks > 0

    def _start_actor_loop(self) -> None:
        """Started by `serve`, in the caller's thread."""

    def serve(self) -> None:
        """Handle messages until stopped."""
        pykka.ActorRegistry.register(self.actor_ref)
        self._actor_loop()

    def on_receive(self, message: Any) -> None:
        """A word that there is work."""
        if message == WORK:
            self._drain()

    def on_failure(self, *args: Any) -> None:
        """What the actor itself gets wrong must not leave a worker that looks alive and does nothing."""
        sys.stderr.flush()
        os._exit(70)

    def held(self) -> list[tuple[int, int]]:
        """What the actor holds: in work, or done and not handed on. The mailbox's lock is taken."""
        held = [] if self._current is None else [self._current]
        held += [(move[0], move[1]) for move in self._moves]
        for other in self._others:
            held += other.leases
        return held

    def hand_on(self) -> None:
        """Settle what is done while another message is in work, and hold no more than that one. The lock is taken."""
        self._prefetch = 1
        self._flush()

    def _drain(self) -> None:
        mailbox = self._mailbox
        inbox = mailbox.inbox
        lock = mailbox.lock
        work = self._work
        moves, bodies = self._moves, self._bodies
        mailbox.signalled = False
        clock = time.perf_counter
        began = flushed = clock()
        count = 0
        lock.acquire()  # and let go of only for the work itself: once per message, not once per step
        try:
            while inbox:
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
                else:
                    if moves:
                        self._flush()
                    self._add(result)
                self._current = None
                if self._limited:
                    self._left -= 1
                    if self._left <= 0:
                        self._retire()
                        return
                if not inbox or len(moves) >= FLUSH_COUNT or clock() - flushed > FLUSH_SECONDS:
                    if not inbox:
                        self._adapt(clock() - began, count)
                    self._flush()
                    flushed = clock()
        finally:
            lock.release()

    def _add(self, settled: Settled) -> None:
        self._others.append(numbered(settled, self._targets))
        self._other_bodies.extend(settled.bodies)

    def _adapt(self, seconds: float, count: int) -> None:
        """Hold as much work as fits into `HELD_SECONDS`, and never more than four times what was held before."""
        each = seconds / count if count else 1.0
        fitting = int(HELD_SECONDS / each) if each > 0 else DEEPEST
        self._prefetch = max(1, min(fitting, self._prefetch * 4, DEEPEST))

    def _flush(self) -> None:
        moves, others = self._moves, self._others
        if not moves and not others:
            return
        broker = self._mailbox.broker
        assert broker is not None
        bodies = self._bodies + self._other_bodies
        targets = self._targets if others else self._targets[: self._plain_targets]
        broker.settle(targets, list(moves), [], list(others), bodies, queue=self._queue, prefetch=self._prefetch)
        self._slot.settle(len(moves) + sum(other.outcome == DONE for other in others))
        moves.clear()
        self._bodies.clear()
        others.clear()
        self._other_bodies.clear()
        if len(self._targets) > 64:
            del self._targets[self._plain_targets :]

    def _retire(self) -> None:
        """This worker has handled all the messages it was made for; what it has not begun goes back."""
        self._flush()
        broker = self._mailbox.broker
        assert broker is not None
        leases = [(item.id, item.lease) for item, _ in list(self._mailbox.inbox)]
        self._mailbox.inbox.clear()
        broker.release(leases, self._queue, 0)
        self.stop()


class StageActor(_WorkActor):
    """Runs the messages of one stage queue."""


class CompensationActor(_WorkActor):
    """Runs the messages of one compensation queue."""
