"""`Pool`: the workers of one queue — started, watched, replaced, scaled.

Its `ExitPolicy` decides on an exit by facts: the exit status, what the worker's lanes say it was running, and
whether this pool killed it. Only a running message is counted, and the broker counts it only if the dead worker still
held it. No user code runs here.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from concurrent.futures import Future
from typing import Any

import msgspec
import pykka
from msgspec import structs

from stageflow_actors.core.envelope import Failure
from stageflow_actors.core.failures import STDERR_HEADING, last_lines, write_failure
from stageflow_actors.runtime.ipc.exit_codes import EXIT_NODE_FAILED
from stageflow_actors.runtime.ipc.pool_spec import PoolSpec, WorkerPayload
from stageflow_actors.runtime.ipc.slots import SlotState
from stageflow_actors.runtime.node.exit_policy import (
    CANCELLED,
    NO_CONSEQUENCE,
    ExitDecision,
    ExitPolicy,
    memory_failure,
    overdue_states,
    timeout_failure,
)
from stageflow_actors.runtime.node.memory_limits import memory_above
from stageflow_actors.runtime.node.pool_context import PoolContext
from stageflow_actors.runtime.node.pool_events import Cancelled, ReplaceSpec, Retire, ScaleTo, Tick, ZygoteLost
from stageflow_actors.runtime.node.pool_pause import PoolPause
from stageflow_actors.runtime.node.worker_handle import Kill, WorkerHandle
from stageflow_actors.runtime.system.processes import kill_group, wait_dead
from stageflow_actors.runtime.zygote.handle import Exited, Spawned, SpawnFailed, ZygoteHandle
from stageflow_brokers.client.connection import new_peer
from stageflow_brokers.failpoints import failpoint

__all__ = ["Cancelled", "Pool", "ReplaceSpec", "Retire", "ScaleTo", "Tick", "ZygoteLost"]

logger = logging.getLogger("stageflow_actors.node.pool")

LONG_MESSAGE_NS = 50_000_000
"""Nanoseconds after which a message in work is long: what its worker holds beyond it is recalled."""

LANES_PER_TICK = 64
"""Lanes of one worker that are looked at in each tick, about."""

RETIRE_RETRY_NS = 50_000_000
"""Nanoseconds before a worker that is to end is asked again when the broker did not know it yet."""
RETIRE_REPEAT_NS = 2_000_000_000
"""Nanoseconds before a worker that has been asked to end, and is still there, is asked once more: words get lost."""

EXIT_CHECK_NS = 100_000_000
"""Nanoseconds between looks whether workers have ended of which the zygote has said nothing."""
UNREPORTED_NS = 2_000_000_000
"""Nanoseconds in which a zygote reports a death; one that has been stopped meanwhile is ended, for nobody else will."""
MAX_UNREPORTED_NS = 15_000_000_000
"""The same for a zygote that is not stopped: it may have much to kill of what its workers have left behind."""

MEMORY_CHECK_NS = 100_000_000
"""Nanoseconds between looks at the memory of workers that have a limit."""


class _Resumed:
    """The queue of a pool that had paused it is open again."""


class Pool(pykka.ThreadingActor):
    """The supervised workers of one queue."""

    use_daemon_thread = True

    def __init__(self, spec: PoolSpec, pool_context: PoolContext) -> None:
        super().__init__()
        self._spec = spec
        self._context = pool_context
        self._wanted = spec.actors
        self._workers: dict[str, WorkerHandle] = {}
        self._serial = 0
        self._exit_policy = ExitPolicy(pool_context.oom_kills.claim)
        self._pause = PoolPause(pool_context.broker, spec.queue, pool_context.notify)
        self._retiring = False
        self._ticks = 0
        self._next_memory_check = self._next_exit_check = 0

    def on_start(self) -> None:
        """The first workers."""
        self._pause.lift_earlier()
        self._fill()
        self._update_active()

    def on_failure(self, *args: Any) -> None:
        """A pool that is broken must not look like one that is idle: end the node, which is started again."""
        sys.stderr.flush()
        os._exit(EXIT_NODE_FAILED)

    def on_receive(self, message: Any) -> None:
        """One event."""
        if isinstance(message, Tick):
            self._tick()
        elif isinstance(message, Spawned):
            self._on_spawned(message)
        elif isinstance(message, Exited):
            self._on_exited(message)
        elif isinstance(message, SpawnFailed):
            self._on_spawn_failed(message)
        elif isinstance(message, ScaleTo):
            self._scale(message.actors)
        elif isinstance(message, ReplaceSpec):
            self._replace_spec(message.spec)
        elif isinstance(message, Retire):
            self._retire(message.kill)
        elif isinstance(message, Cancelled):
            self._cancel(message)
        elif isinstance(message, ZygoteLost):
            self._on_zygote_lost(message.zygote)
        elif isinstance(message, _Resumed):
            self._on_resumed()
        self._update_active()

    def _update_active(self) -> None:
        unsettled = len(self._workers) != self._wanted and not self._retiring
        # Who uses too much is also found out when it has just done its work.
        if (
            self._spec.max_memory
            or self._pause.is_active
            or unsettled
            or any(w.cancelled or w.retiring or w.report_due_since for w in self._workers.values())
        ):
            self._context.active.add(self._spec.queue)
        else:
            self._context.active.discard(self._spec.queue)

    def _publish_lanes(self) -> None:
        self._context.lanes[self._spec.queue] = [lane for w in self._workers.values() for lane in w.lanes]

    # births

    def _fill(self) -> None:
        while len(self._workers) < self._wanted:
            # Asked anew for each: one that cannot be started makes the next wait.
            if self._retiring or self._pause.is_active or time.monotonic() < self._exit_policy.not_before:
                return
            slot = self._context.allocate_slots(self._spec.concurrency)
            if slot is None:
                logger.error(
                    "pool %s: no room for more than %d of %d workers: all %d slots of the node are taken",
                    self._spec.queue,
                    len(self._workers),
                    self._wanted,
                    len(self._context.slots),
                )
                self._exit_policy.back_off(8, time.monotonic())
                return
            self._start(slot)

    def _start(self, slot: int) -> None:
        pool_context, spec = self._context, self._spec
        self._serial += 1
        zygote = pool_context.zygote()
        lanes = pool_context.slots.lanes(slot, spec.concurrency)
        worker = WorkerHandle(f"{spec.queue}#{self._serial}", new_peer(), slot, lanes, zygote)
        self._workers[worker.id] = worker
        pool_context.live[worker.peer] = spec.queue
        for lane in lanes:
            lane.clear()
        self._publish_lanes()
        payload = WorkerPayload(
            pool_context.address,
            worker.peer,
            worker.id,
            spec.kind,
            spec.queue,
            spec.programs,
            pool_context.naming,
            pool_context.max_message_bytes,
            spec.max_tasks,
            pool_context.log_level,
            spec.concurrency,
            spec.max_deaths,
        )
        theirs = -1
        try:
            if pool_context.stderr is not None:
                worker.stderr, theirs = pool_context.stderr.open()
            failpoint("pool.spawning")
            zygote.spawn(worker.id, msgspec.msgpack.encode(payload), slot, spec.env, stderr=theirs)
        except OSError as error:
            if error.errno == errno.EBADF:
                return  # the zygote has gone and is closed: `ZygoteLost` is on its way, and buries this one too
            self._on_spawn_failed(SpawnFailed(worker.id, f"a worker could not be asked for: {error}"))
        finally:
            if theirs >= 0:
                os.close(theirs)

    def _on_spawned(self, event: Spawned) -> None:
        worker = self._workers.get(event.worker_id)
        if worker is None:
            # Nobody would ever be told of its death.
            kill_group(event.pid, event.pidfd)
            os.close(event.pidfd)
            return
        worker.pid, worker.pidfd, worker.report_due_since = event.pid, event.pidfd, 0
        failpoint("pool.spawned")
        if self._retiring or worker.killed is not None:
            kill_group(worker.pid, worker.pidfd)

    def _on_spawn_failed(self, event: SpawnFailed) -> None:
        worker = self._workers.get(event.worker_id)
        if worker is not None:
            logger.error("pool %s: %s", self._spec.queue, event.reason)
            self._apply(worker, self._exit_policy.decide_failed_start(self._spec, time.monotonic()))

    # deaths

    def _on_exited(self, event: Exited) -> None:
        worker = self._workers.get(event.worker_id)
        if worker is None:
            return
        failpoint("pool.exit-seen")
        self._decide_exit(worker, event.status)
        self._fill()

    def _decide_exit(self, worker: WorkerHandle, status: int | None) -> None:
        states = [lane.read() for lane in worker.lanes]
        decision = self._exit_policy.decide(
            self._spec, states, status, killed=worker.killed, expected=self._retiring, now=time.monotonic()
        )
        self._apply(worker, decision)

    def _apply(self, worker: WorkerHandle, decision: ExitDecision) -> None:
        self._handle_exit(worker, decision)
        if decision.pause:
            self._pause.begin(decision.pause, time.monotonic())

    def _handle_exit(self, worker: WorkerHandle, decision: ExitDecision) -> None:
        """Report the exit to the broker, which releases the messages; only the responsible ones carry the failure."""
        pool_context = self._context
        responsible, failure = list(decision.responsible), decision.failure
        if worker.stderr is not None:
            said = last_lines(worker.stderr.finish())
            if said and failure is not None and failure.kind != "cancelled":
                failure = structs.replace(failure, message=f"{failure.message}{STDERR_HEADING}{said}")
        data = b"" if failure is None or not responsible else write_failure(failure)
        pool_context.broker.admin.report_death(
            worker.peer, responsible, decision.counted and bool(responsible), False, data
        )
        pool_context.live.pop(worker.peer, None)
        pool_context.free_slots(worker.slot, len(worker.lanes))
        if worker.pidfd >= 0:
            os.close(worker.pidfd)
        del self._workers[worker.id]
        self._publish_lanes()

    # time

    def _tick(self) -> None:
        now = time.monotonic_ns()
        self._ticks += 1
        # Hundreds of lanes are looked at less often: most are of async stages, which are ended by their own worker.
        if self._ticks % (1 + self._spec.concurrency // LANES_PER_TICK) == 0:
            for worker in self._workers.values():
                if worker.pidfd >= 0 and worker.killed is None:
                    running = worker.running()
                    if running:
                        self._check_running(worker, running, now)
        if now >= self._next_exit_check:
            self._next_exit_check = now + EXIT_CHECK_NS
            self._check_unreported_exits(now)
        if self._spec.max_memory and now >= self._next_memory_check:
            self._next_memory_check = now + MEMORY_CHECK_NS
            self._check_memory()
        self._pause.check_resumed(time.monotonic(), lambda: self.actor_ref.tell(_Resumed()))
        for worker in self._workers.values():
            if worker.retiring and now >= worker.request_at:
                self._request_retirement(worker)
        if len(self._workers) > self._wanted:
            self._trim()
        self._fill()

    def _check_running(self, worker: WorkerHandle, running: list[SlotState], now: int) -> None:
        """End a worker with a message past its time; recall what waits behind one that takes long."""
        if worker.cancelled:
            worker.mark_cancelled(now)
            late = [state for state in running if now > worker.cancelled.get(state.message_id, now)]
            if late:
                self._kill(worker, late, CANCELLED)
                return
        late = overdue_states(running, now)
        if late:
            self._kill(worker, late, timeout_failure(self._spec, *late))
            return
        oldest = min(running, key=lambda state: state.since_ns)
        if now - oldest.since_ns > LONG_MESSAGE_NS:
            self._recall_waiting(worker, oldest.message_id, now, now - oldest.since_ns)

    def _check_unreported_exits(self, now: int) -> None:
        """End a zygote that owes a death, or a birth, for too long: its successor does what it does not."""
        for worker in self._workers.values():
            dead = worker.pidfd >= 0 and self._context.has_exited(worker.pidfd)
            if not dead and worker.pidfd >= 0:
                continue
            worker.report_due_since = worker.report_due_since or now
            missed = now - worker.report_due_since
            if missed < UNREPORTED_NS or worker.died_before_zygote:
                continue
            if worker.zygote.is_stopped() or (dead and missed > MAX_UNREPORTED_NS):
                logger.error("pool %s: the zygote process does not report: it is ended", self._spec.queue)
                self._kill_zygote(worker.zygote)

    def _kill_zygote(self, zygote: ZygoteHandle) -> None:
        """`ZygoteLost` follows. Who is dead by now has died by itself."""
        dead = [w for w in self._workers.values() if w.zygote is zygote and w.pidfd >= 0]
        dead = [worker for worker in dead if self._context.has_exited(worker.pidfd)]
        if zygote.kill():
            for worker in dead:
                worker.died_before_zygote = True

    def _check_memory(self) -> None:
        """End workers that use too much. One that is idle has nobody to blame, and is replaced once that is certain."""
        limit = self._spec.max_memory
        for worker in self._workers.values():
            if worker.pidfd < 0 or worker.killed is not None:
                continue
            used = memory_above(worker.pid, limit)
            if not used:
                continue
            states = [lane.read() for lane in worker.lanes]
            running = [state for state in states if state.is_busy]
            if running or not any(state.started for state in states):
                self._kill(worker, running, memory_failure(self._spec, used), counted=True)
            elif not worker.retiring:
                self._request_retirement(worker)

    def _recall_waiting(self, worker: WorkerHandle, message_id: int, now: int, age: int) -> None:
        """Have others work on what waits behind a long message; again now and then, as more may have arrived since."""
        if worker.long_message_id != message_id:
            worker.long_message_id, worker.recall_at = message_id, now
        if now >= worker.recall_at:
            worker.recall_at = now + age
            self._context.broker.admin.recall(worker.peer)

    def _cancel(self, event: Cancelled) -> None:
        """Let the handler know, and end it if it has not ended after a grace. Compensations are never cancelled."""
        for worker in self._workers.values():
            if worker.peer == event.peer and self._spec.kind != "compensation":
                worker.cancel(event.message_id, time.monotonic_ns())

    def _kill(
        self, worker: WorkerHandle, responsible: list[SlotState], failure: Failure, *, counted: bool = False
    ) -> None:
        if self._context.has_exited(worker.pidfd):
            return  # its lanes say what it was at when it died; how it did is on its way
        worker.killed = Kill([state.message_id for state in responsible], failure, counted)
        kill_group(worker.pid, worker.pidfd)

    def _on_resumed(self) -> None:
        if self._pause.end():
            self._exit_policy.reset()
            self._fill()

    # wishes

    def _scale(self, actors: int) -> None:
        most = self._spec.most // self._spec.concurrency if self._spec.most else actors
        if actors > most:
            logger.warning("pool %s: %d actors, because max_stage_concurrency allows no more", self._spec.queue, most)
        self._wanted = min(actors, most)
        self._trim()
        self._fill()

    def _trim(self) -> None:
        """End idle workers beyond what is wanted; busy ones are looked at again at the next tick."""
        staying = [worker for worker in self._workers.values() if worker.killed is None and not worker.retiring]
        for worker in reversed(staying):
            if len(staying) <= self._wanted:
                return
            if worker.pidfd >= 0 and not any(lane.is_busy for lane in worker.lanes):
                self._request_retirement(worker)
                staying.remove(worker)

    def _replace_spec(self, spec: PoolSpec) -> None:
        """Workers are replaced: each ends when it is done with what it runs, or meets a message it does not know."""
        if self._wanted == self._spec.actors:
            self._wanted = spec.actors
        self._spec = spec
        for worker in self._workers.values():
            worker.lanes[0].mark_stale()
            self._request_retirement(worker)
        self._fill()

    def _request_retirement(self, worker: WorkerHandle) -> None:
        """Through the broker, never by a signal: it may have begun something, or be about to settle what it has done,
        and would be killed between the doing and the settling, so that all of that were done once more."""
        worker.retiring = True
        worker.request_at = time.monotonic_ns() + RETIRE_REPEAT_NS

        def answered(asked: Future[Any]) -> None:
            if asked.exception() is not None or not asked.result():
                worker.request_at = time.monotonic_ns() + RETIRE_RETRY_NS

        self._context.broker.admin.retire(worker.peer).add_done_callback(answered)

    def _retire(self, kill: bool) -> None:
        self._retiring = True
        if kill:
            for worker in self._workers.values():
                if worker.pidfd >= 0:
                    kill_group(worker.pid, worker.pidfd)

    def _on_zygote_lost(self, zygote: ZygoteHandle) -> None:
        """End what is left of each of its workers, of which no report will come.

        The death of a zygote counts for no message; an earlier death of a worker, not reported yet, does.
        """
        for worker in [worker for worker in self._workers.values() if worker.zygote is zygote]:
            if worker.pidfd >= 0:
                kill_group(worker.pid, worker.pidfd)
                if not wait_dead(worker.pidfd, 5.0):
                    logger.error("pool %s: worker %d cannot be killed", self._spec.queue, worker.pid)
            if worker.died_before_zygote:
                self._decide_exit(worker, None)
            else:
                self._handle_exit(worker, NO_CONSEQUENCE)
        self._fill()
