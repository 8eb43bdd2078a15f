"""`Pool`: the workers of one queue — started, watched, replaced, scaled.

What a death means is decided here from facts: the exit status, what the worker's slot says it was running, and
whether this pool killed it. Only the message that was running is charged. No user code runs here.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pykka
from msgspec import Struct

from brokers.api import Broker
from brokers.client import new_peer
from stageflow_actors.core.envelope import Failure
from stageflow_actors.core.failures import write_failure
from stageflow_actors.core.plan import Naming
from stageflow_actors.runtime.processes import describe_exit, kill_group, wait_dead
from stageflow_actors.runtime.programs import PoolSpec, WorkerPayload
from stageflow_actors.runtime.slots import SlotTable
from stageflow_actors.runtime.worker import EXIT_UNLOADABLE
from stageflow_actors.runtime.zygote import Exited, Spawned, SpawnFailed, Zygote

__all__ = ["Pool", "PoolServices", "Retire", "ScaleTo", "Tick", "ZygoteLost"]

logger = logging.getLogger("stageflow.pool")

LONG = 50_000_000
"""Nanoseconds after which a message in work is long: what its worker holds beyond it is recalled."""

DEATHS_IN_A_ROW = 30
"""Worker deaths without a message handled in between before the pool is paused; each death of a message that kills
its worker counts, and such a message is a dead letter long before."""

FAILED_STARTS = 10
"""Workers that end before they handle anything, in a row, before the pool is paused."""

BACK_OFF = 0.1
LONGEST_BACK_OFF = 5.0


class Tick:
    """Time has passed."""


class ScaleTo(Struct, frozen=True):
    """So many actors from now on."""

    actors: int


class Retire(Struct, frozen=True):
    """Start nothing more. `kill`: end the workers now."""

    kill: bool


class ZygoteLost:
    """The zygote is gone, and with it every worker; there is another one by now."""


class _Worker:
    __slots__ = ("id", "killed", "peer", "pid", "pidfd", "recalled", "slot")

    def __init__(self, id: str, peer: int, slot: int) -> None:
        self.id = id
        self.peer = peer
        self.slot = slot
        self.pid = 0
        self.pidfd = -1
        self.killed: tuple[int, Failure] | None = None
        self.recalled = 0


class PoolServices:
    """What all pools of a node share. `live` is the roster: peers of workers not known to be dead, by queue."""

    def __init__(
        self,
        *,
        slots: SlotTable,
        zygote: Callable[[], Zygote],
        broker: Broker,
        address: str,
        naming: Naming,
        max_message_bytes: int,
        log_level: str,
        notify: Callable[[str], None],
    ) -> None:
        self.slots = slots
        self.zygote = zygote
        self.broker = broker
        self.address = address
        self.naming = naming
        self.max_message_bytes = max_message_bytes
        self.log_level = log_level
        self.notify = notify
        self.live: dict[int, str] = {}
        self._free = list(range(len(slots)))
        self._lock = threading.Lock()

    def take_slot(self) -> int | None:
        """A slot for a new worker; None when all are taken."""
        with self._lock:
            return self._free.pop() if self._free else None

    def give_slot(self, slot: int) -> None:
        """The worker of this slot is dead."""
        with self._lock:
            self._free.append(slot)


class Pool(pykka.ThreadingActor):
    """The supervised workers of one queue."""

    use_daemon_thread = True

    def __init__(self, spec: PoolSpec, services: PoolServices) -> None:
        super().__init__()
        self._spec = spec
        self._services = services
        self._wanted = spec.actors
        self._workers: dict[str, _Worker] = {}
        self._serial = 0
        self._deaths = 0
        self._failed_starts = 0
        self._not_before = 0.0
        self._retiring = False
        self._paused_at = 0.0

    def on_start(self) -> None:
        """The first workers."""
        self._fill()

    def on_failure(self, *args: Any) -> None:
        """A pool that is broken must not look like one that is idle: end the node, which is started again."""
        sys.stderr.flush()
        os._exit(71)

    def on_receive(self, message: Any) -> None:
        """One event."""
        if isinstance(message, Tick):
            self._tick()
        elif isinstance(message, Spawned):
            self._spawned(message)
        elif isinstance(message, Exited):
            self._exited(message)
        elif isinstance(message, SpawnFailed):
            self._spawn_failed(message)
        elif isinstance(message, ScaleTo):
            self._scale(message.actors)
        elif isinstance(message, Retire):
            self._retire(message.kill)
        elif isinstance(message, ZygoteLost):
            self._zygote_lost()

    # births

    def _fill(self) -> None:
        if self._retiring or self._paused_at or time.monotonic() < self._not_before:
            return
        while len(self._workers) < self._wanted:
            slot = self._services.take_slot()
            if slot is None:
                logger.error("pool %s: more workers wanted than there are slots (%d)", self._spec.queue, self._serial)
                return
            self._start(slot)

    def _start(self, slot: int) -> None:
        services, spec = self._services, self._spec
        self._serial += 1
        worker = _Worker(f"{spec.queue}#{self._serial}", new_peer(), slot)
        self._workers[worker.id] = worker
        services.live[worker.peer] = spec.queue
        services.slots[slot].clear()
        payload = WorkerPayload(
            services.address,
            worker.peer,
            worker.id,
            spec.kind,
            spec.queue,
            spec.code,
            spec.plan,
            services.naming,
            services.max_message_bytes,
            spec.max_tasks,
            services.log_level,
        )
        services.zygote().spawn(worker.id, msgspec.msgpack.encode(payload), slot, spec.env)

    def _spawned(self, event: Spawned) -> None:
        worker = self._workers.get(event.worker_id)
        if worker is None:
            os.close(event.pidfd)
            return
        worker.pid, worker.pidfd = event.pid, event.pidfd
        if self._retiring or worker.killed is not None:
            kill_group(worker.pid, worker.pidfd)

    def _spawn_failed(self, event: SpawnFailed) -> None:
        worker = self._workers.get(event.worker_id)
        if worker is not None:
            logger.error("pool %s: %s", self._spec.queue, event.reason)
            self._bury(worker, 0, None)
            self._back_off(self._failed_starts + 1)

    # deaths

    def _exited(self, event: Exited) -> None:
        worker = self._workers.get(event.worker_id)
        if worker is None:
            return
        state = self._services.slots[worker.slot].read()
        if state.finished:
            self._deaths = self._failed_starts = 0
        running = state.message_id if state.busy else 0
        if worker.killed is not None:
            message_id, failure = worker.killed
            self._bury(worker, message_id if message_id == running else 0, failure, charge=False)
        elif self._retiring or (event.status == 0 and not running):
            self._bury(worker, 0, None)
        elif running:
            self._deaths += 1
            reason = f"WorkerDied: the worker died while running {self._what()}: {describe_exit(event.status)}"
            self._bury(worker, running, Failure("died", reason, "WorkerDied"), charge=True)
            self._died()
        else:
            self._failed_starts += 1
            self._bury(worker, 0, None)
            self._ended_idle(event.status)
        self._fill()

    def _what(self) -> str:
        spec = self._spec
        return f"stage {spec.stage_id!r}" if spec.stage_id else f"a compensation of {spec.workflow_id!r}"

    def _bury(self, worker: _Worker, guilty: int, failure: Failure | None, *, charge: bool = False) -> None:
        """Tell the broker, which gives back what the worker held; `guilty` alone carries the failure."""
        services = self._services
        if guilty == 0:
            failure = None
        data = b"" if failure is None else write_failure(failure)
        services.broker.query("dead", worker.peer, guilty, charge, False, data)
        services.live.pop(worker.peer, None)
        services.give_slot(worker.slot)
        if worker.pidfd >= 0:
            os.close(worker.pidfd)
        del self._workers[worker.id]

    def _died(self) -> None:
        if self._deaths >= DEATHS_IN_A_ROW:
            self._pause(f"{self._deaths} of its workers died in a row while running {self._what()}")
        elif self._deaths > 1:
            self._back_off(self._deaths - 1)

    def _ended_idle(self, status: int) -> None:
        if self._failed_starts >= FAILED_STARTS:
            hint = " (its code or its services cannot be loaded)" if status == EXIT_UNLOADABLE else ""
            self._pause(f"{self._failed_starts} of its workers ended in a row before they did anything{hint}")
        elif self._failed_starts > 1:
            self._back_off(self._failed_starts - 1)

    def _back_off(self, times: int) -> None:
        """The first restart is immediate, later ones wait: a machine in trouble is not helped by a fork bomb."""
        self._not_before = time.monotonic() + min(LONGEST_BACK_OFF, BACK_OFF * 2 ** min(times - 1, 8))

    def _pause(self, why: str) -> None:
        queue = self._spec.queue
        self._paused_at = time.monotonic()
        self._services.broker.query("pause", queue)
        self._services.notify(
            f"pool {queue} is paused: {why}; see the errors above, then resume it with "
            f"`stageflow queue resume {queue}` or runtime.resume({queue!r})"
        )

    # time

    def _tick(self) -> None:
        now = time.monotonic_ns()
        services = self._services
        for worker in self._workers.values():
            if worker.pidfd < 0 or worker.killed is not None:
                continue
            state = services.slots[worker.slot].read()
            if not state.busy:
                continue
            if state.overdue(now):
                self._time_out(worker, state.message_id, state.timeout_ns / 1e9)
            elif now - state.since_ns > LONG and worker.recalled != state.message_id:
                worker.recalled = state.message_id
                services.broker.query("recall", worker.peer)
        if self._paused_at and time.monotonic() - self._paused_at > 1.0:
            self._look_whether_resumed()
        if len(self._workers) > self._wanted:
            self._trim()
        self._fill()

    def _time_out(self, worker: _Worker, message_id: int, seconds: float) -> None:
        reason = f"StageTimeout: {self._what()} ran longer than its timeout of {seconds:g} s"
        worker.killed = (message_id, Failure("timeout", reason, "StageTimeout"))
        kill_group(worker.pid, worker.pidfd)

    def _look_whether_resumed(self) -> None:
        self._paused_at = time.monotonic()
        answer = self._services.broker.query("stats", self._spec.queue)
        ref = self.actor_ref

        def heard(future: Any) -> None:
            if future.exception() is None:
                for queue in future.result()["queues"]:
                    if queue["name"] == self._spec.queue and queue["state"] != "paused":
                        self._paused_at = 0.0
                        self._deaths = self._failed_starts = 0
                        ref.tell(Tick())

        answer.add_done_callback(heard)

    # wishes

    def _scale(self, actors: int) -> None:
        self._wanted = actors
        self._trim()
        self._fill()

    def _trim(self) -> None:
        """End idle workers beyond what is wanted; busy ones are let finish, and are looked at again at the next tick."""
        staying = [worker for worker in self._workers.values() if worker.killed is None]
        for worker in reversed(staying):
            if len(staying) <= self._wanted:
                return
            if worker.pidfd >= 0 and not self._services.slots[worker.slot].read().busy:
                worker.killed = (0, Failure("stopped", "the pool was scaled down"))
                kill_group(worker.pid, worker.pidfd)
                staying.remove(worker)

    def _retire(self, kill: bool) -> None:
        self._retiring = True
        if kill:
            for worker in self._workers.values():
                if worker.pidfd >= 0:
                    kill_group(worker.pid, worker.pidfd)

    def _zygote_lost(self) -> None:
        """No report will come of these workers: end what is left of each, with what it was running uncharged."""
        for worker in list(self._workers.values()):
            if worker.pidfd >= 0:
                kill_group(worker.pid, worker.pidfd)
                wait_dead(worker.pidfd, 5.0)
            self._bury(worker, 0, None)
        self._fill()
