"""`Pool`: the workers of one queue — started, watched, replaced, scaled.

What a death means is decided here from facts: the exit status, what the worker's lanes say it was running, and
whether this pool killed it. Only what was running is charged, and the broker charges it only if the dead worker still
held it. No user code runs here.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import msgspec
import pykka
from msgspec import structs

from brokers.client import new_peer
from brokers.points import reach
from stageflow_actors.core.envelope import Failure
from stageflow_actors.core.failures import last_lines, write_failure
from stageflow_actors.runtime.memory import memory_over
from stageflow_actors.runtime.pausing import PAUSED_FACT
from stageflow_actors.runtime.pool_events import Cancelled, Respec, Retire, ScaleTo, Tick, ZygoteLost
from stageflow_actors.runtime.pool_services import PoolServices
from stageflow_actors.runtime.pool_worker import Kill, PooledWorker
from stageflow_actors.runtime.processes import describe_exit, kill_group, wait_dead
from stageflow_actors.runtime.programs import PoolSpec, WorkerPayload
from stageflow_actors.runtime.slots import SlotState
from stageflow_actors.runtime.worker import EXIT_RECYCLED, EXIT_UNLOADABLE
from stageflow_actors.runtime.zygote import Exited, Spawned, SpawnFailed, Zygote

__all__ = ["Cancelled", "Pool", "Respec", "Retire", "ScaleTo", "Tick", "ZygoteLost"]

logger = logging.getLogger("stageflow.pool")

LONG = 50_000_000
"""Nanoseconds after which a message in work is long: what its worker holds beyond it is recalled."""

DEATHS_IN_A_ROW = 16
"""Worker deaths without a message settled well in between before the pool is paused. Five messages in a row that
each kill as many workers as they may are dead letters by then; a stage that kills them all is not for ever tried."""

LANES_A_TICK = 64
"""Lanes of one worker that are looked at in each tick, about."""

REMEMBERED = 60_000_000_000
"""Nanoseconds for which it is remembered that a message was cancelled which its worker does not run."""

CANCEL_GRACE = 1_000_000_000
"""Nanoseconds that a stage in work gets to end by itself (`ctx.cancelled`) once its instance has been cancelled."""

ASK_AGAIN = 50_000_000
"""Nanoseconds before a worker that is to end is asked again when the broker did not know it yet."""
REMIND = 2_000_000_000
"""Nanoseconds before a worker that has been asked to end, and is still there, is asked once more: words get lost."""

DEATH_LOOK = 100_000_000
"""Nanoseconds between looks whether workers have ended of which the zygote has said nothing."""
UNREPORTED = 2_000_000_000
"""Nanoseconds in which a zygote reports a death; one that has been stopped meanwhile is ended, for nobody else will."""
LONGEST_UNREPORTED = 15_000_000_000
"""The same for a zygote that is not stopped: it may have much to kill of what its workers have left behind."""

MEMORY_LOOK = 100_000_000
"""Nanoseconds between looks at the memory of workers that have a limit."""

FAILED_STARTS = 10
"""Workers that end before they begin anything, in a row, before the pool is paused."""

BACK_OFF = 0.05
LONGEST_BACK_OFF = 0.5
"""Seconds before the second restart in a row, doubled for each one more; the first is immediate."""


class _Resumed:
    """The queue of a pool that had paused it is open again."""


class Pool(pykka.ThreadingActor):
    """The supervised workers of one queue."""

    use_daemon_thread = True

    def __init__(self, spec: PoolSpec, services: PoolServices) -> None:
        super().__init__()
        self._spec = spec
        self._services = services
        self._wanted = spec.actors
        self._workers: dict[str, PooledWorker] = {}
        self._serial = 0
        self._deaths = 0
        self._failed_starts = 0
        self._not_before = 0.0
        self._retiring = False
        self._paused_at = 0.0
        self._ticks = 0
        self._memory_look = self._death_look = 0
        self._last_death = ""

    def on_start(self) -> None:
        """The first workers. A pause of a pool's own ends with the node it was made in: what ailed may be mended."""
        self._lift_pause()
        self._fill()
        self._say_whether_restless()

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
        elif isinstance(message, Respec):
            self._respec(message.spec)
        elif isinstance(message, Retire):
            self._retire(message.kill)
        elif isinstance(message, Cancelled):
            self._cancel(message)
        elif isinstance(message, ZygoteLost):
            self._zygote_lost(message.zygote)
        elif isinstance(message, _Resumed):
            self._resumed()
        self._say_whether_restless()

    def _say_whether_restless(self) -> None:
        unsettled = len(self._workers) != self._wanted and not self._retiring
        # Who uses too much is also found out when it has just done its work.
        if (
            self._spec.max_memory
            or self._paused_at
            or unsettled
            or any(w.cancelled or w.retiring or w.missed_at for w in self._workers.values())
        ):
            self._services.restless.add(self._spec.queue)
        else:
            self._services.restless.discard(self._spec.queue)

    def _say_lanes(self) -> None:
        self._services.lanes[self._spec.queue] = [lane for w in self._workers.values() for lane in w.lanes]

    # births

    def _fill(self) -> None:
        while len(self._workers) < self._wanted:
            # Asked anew for each: one that cannot be started makes the next wait.
            if self._retiring or self._paused_at or time.monotonic() < self._not_before:
                return
            slot = self._services.take_slots(self._spec.concurrency)
            if slot is None:
                logger.error(
                    "pool %s: no room for more than %d of %d workers: all %d slots of the node are taken",
                    self._spec.queue,
                    len(self._workers),
                    self._wanted,
                    len(self._services.slots),
                )
                self._back_off(8)
                return
            self._start(slot)

    def _start(self, slot: int) -> None:
        services, spec = self._services, self._spec
        self._serial += 1
        zygote = services.zygote()
        lanes = services.slots.lanes(slot, spec.concurrency)
        worker = PooledWorker(f"{spec.queue}#{self._serial}", new_peer(), slot, lanes, zygote)
        self._workers[worker.id] = worker
        services.live[worker.peer] = spec.queue
        for lane in lanes:
            lane.clear()
        self._say_lanes()
        payload = WorkerPayload(
            services.address,
            worker.peer,
            worker.id,
            spec.kind,
            spec.queue,
            spec.programs,
            services.naming,
            services.max_message_bytes,
            spec.max_tasks,
            services.log_level,
            spec.concurrency,
            spec.max_deaths,
        )
        theirs = -1
        try:
            if services.stderr is not None:
                worker.stderr, theirs = services.stderr.open()
            reach("pool.spawning")
            zygote.spawn(worker.id, msgspec.msgpack.encode(payload), slot, spec.env, stderr=theirs)
        except OSError as error:
            if error.errno == errno.EBADF:
                return  # the zygote has gone and is closed: `ZygoteLost` is on its way, and buries this one too
            self._spawn_failed(SpawnFailed(worker.id, f"a worker could not be asked for: {error}"))
        finally:
            if theirs >= 0:
                os.close(theirs)

    def _spawned(self, event: Spawned) -> None:
        worker = self._workers.get(event.worker_id)
        if worker is None:
            # Nobody would ever be told of its death.
            kill_group(event.pid, event.pidfd)
            os.close(event.pidfd)
            return
        worker.pid, worker.pidfd, worker.missed_at = event.pid, event.pidfd, 0
        reach("pool.spawned")
        if self._retiring or worker.killed is not None:
            kill_group(worker.pid, worker.pidfd)

    def _spawn_failed(self, event: SpawnFailed) -> None:
        worker = self._workers.get(event.worker_id)
        if worker is not None:
            logger.error("pool %s: %s", self._spec.queue, event.reason)
            self._bury(worker)
            self._failed_starts += 1
            self._back_off(self._failed_starts)  # no room for processes: at once is too soon
            self._ended_idle(0)

    # deaths

    def _exited(self, event: Exited) -> None:
        worker = self._workers.get(event.worker_id)
        if worker is None:
            return
        reach("pool.exit-seen")
        self._judge(worker, event.status)
        self._fill()

    def _judge(self, worker: PooledWorker, status: int | None) -> None:
        """What the end of a worker means. `status` is None where the zygote was not there to find it out."""
        states = [lane.read() for lane in worker.lanes]
        settled = states[0].settled
        started = any(state.started for state in states)
        if settled:
            self._deaths = 0
        if started:
            self._failed_starts = 0
        # One that had ended by itself when the signal came is judged by how it did.
        kill = worker.killed if status in (None, -signal.SIGKILL) else None
        if kill is not None:
            # Not what it had been done with before the signal came.
            current = {state.message_id for state in states if state.started}
            guilty = [id for id in kill.guilty if id in current]
            self._bury(worker, guilty, kill.failure, charge=kill.charged)
            if kill.charged and guilty:
                self._last_death = "more memory than max_memory allows"
                self._deaths += 1
                self._died()
            elif kill.charged and not started:
                self._failed_starts += 1
                self._ended_idle(status)
        elif self._retiring or (status in (None, EXIT_RECYCLED) and not any(state.busy for state in states)):
            self._bury(worker)
        elif started:
            # Also when its handler had returned: what it had settled is no longer its own, and is not charged.
            suspects = [s for s in states if s.busy] or [s for s in states if s.started]
            how = self._describe(status)
            self._last_death = how
            reason = f"WorkerDied: the worker died while running {self._what()}: {how}"
            died = Failure("died", reason, "WorkerDied")
            self._bury(worker, [state.message_id for state in suspects], died, charge=True)
            self._deaths += 1
            self._died()
        else:
            self._bury(worker)
            self._failed_starts += 1
            self._ended_idle(status)

    def _describe(self, status: int | None) -> str:
        if status is None:
            return "how is not known, for the zygote process did not report it"
        return describe_exit(status, out_of_memory=self._out_of_memory(status))

    def _out_of_memory(self, status: int) -> bool | None:
        return self._services.oom_kills.claim() if status == -signal.SIGKILL else None

    def _what(self) -> str:
        spec = self._spec
        return f"stage {spec.stage_id!r}" if spec.stage_id else f"a compensation of {spec.workflow_id!r}"

    def _bury(
        self, worker: PooledWorker, guilty: Sequence[int] = (), failure: Failure | None = None, *, charge: bool = False
    ) -> None:
        """Tell the broker, which gives back what the worker held; those `guilty` among it alone carry the failure."""
        services = self._services
        if worker.stderr is not None:
            said = last_lines(worker.stderr.finish())
            if said and failure is not None and failure.kind != "cancelled":
                failure = structs.replace(failure, message=f"{failure.message}; the last on its stderr:\n{said}")
        data = b"" if failure is None or not guilty else write_failure(failure)
        services.broker.query("dead", worker.peer, list(guilty), charge and bool(guilty), False, data)
        services.live.pop(worker.peer, None)
        services.give_slots(worker.slot, len(worker.lanes))
        if worker.pidfd >= 0:
            os.close(worker.pidfd)
        del self._workers[worker.id]
        self._say_lanes()

    def _died(self) -> None:
        if self._deaths >= DEATHS_IN_A_ROW:
            last = f" (the last: {self._last_death})"
            self._pause(f"{self._deaths} of its workers died in a row while running {self._what()}{last}")
        elif self._deaths > 1:
            self._back_off(self._deaths - 1)

    def _ended_idle(self, status: int | None) -> None:
        if self._failed_starts >= FAILED_STARTS:
            hint = " (its code or its services cannot be loaded)" if status == EXIT_UNLOADABLE else ""
            if status == -signal.SIGKILL and self._spec.max_memory:
                hint = f" (they need more than max_memory={self._spec.max_memory} to begin with)"
            self._pause(f"{self._failed_starts} of its workers ended in a row before they did anything{hint}")
        elif self._failed_starts > 1:
            self._back_off(self._failed_starts - 1)

    def _back_off(self, times: int) -> None:
        """The first restart is immediate, later ones wait: a machine in trouble is not helped by a fork bomb."""
        self._not_before = time.monotonic() + min(LONGEST_BACK_OFF, BACK_OFF * 2 ** min(times - 1, 8))

    def _pause(self, why: str) -> None:
        """Once: who dies of what it had begun before, or of a moment that a person has given it, changes nothing."""
        if self._paused_at:
            return
        broker, queue = self._services.broker, self._spec.queue
        self._paused_at = time.monotonic()

        def seen(stats: Future[Any]) -> None:
            if stats.exception() is None and _state_in(stats.result(), queue) == "paused":
                broker.query("fact", PAUSED_FACT + queue, "no")  # by a person, who shall end it too

        before = broker.query("stats", queue)
        broker.query("pause", queue)
        broker.query("fact", PAUSED_FACT + queue, "yes")
        before.add_done_callback(seen)
        self._services.notify(
            f"pool {queue} is paused: {why}; see the errors above, then resume it with "
            f"`stageflow queue resume {queue}` or runtime.resume({queue!r})"
        )

    def _lift_pause(self) -> None:
        broker, queue = self._services.broker, self._spec.queue

        def heard(known: Future[Any]) -> None:
            if known.exception() is None and known.result() == "yes":
                broker.query("resume", queue)
                broker.query("fact", PAUSED_FACT + queue, "no")

        broker.query("fact", PAUSED_FACT + queue, None).add_done_callback(heard)

    # time

    def _tick(self) -> None:
        now = time.monotonic_ns()
        self._ticks += 1
        # Hundreds of lanes are looked at less often: most are of async stages, which are ended by their own worker.
        if self._ticks % (1 + self._spec.concurrency // LANES_A_TICK) == 0:
            for worker in self._workers.values():
                if worker.pidfd >= 0 and worker.killed is None:
                    states = [lane.read() for lane in worker.lanes if lane.busy]
                    running = [state for state in states if state.busy]
                    if running:
                        self._look_at(worker, running, now)
        if now >= self._death_look:
            self._death_look = now + DEATH_LOOK
            self._look_for_deaths(now)
        if self._spec.max_memory and now >= self._memory_look:
            self._memory_look = now + MEMORY_LOOK
            self._look_at_memory()
        if self._paused_at and time.monotonic() - self._paused_at > 1.0:
            self._look_whether_resumed()
        for worker in self._workers.values():
            if worker.retiring and now >= worker.ask_at:
                self._ask_to_retire(worker)
        if len(self._workers) > self._wanted:
            self._trim()
        self._fill()

    def _look_at(self, worker: PooledWorker, running: list[SlotState], now: int) -> None:
        """End a worker with a message past its time; recall what waits behind one that takes long."""
        if worker.cancelled:
            self._remind(worker, now)
            late = [state for state in running if now > worker.cancelled.get(state.message_id, now)]
            if late:
                failure = Failure("cancelled", "StageError: the instance was cancelled", "StageError")
                self._kill(worker, late, failure)
                return
        late = [state for state in running if state.overdue(now)]
        if late:
            self._time_out(worker, late)
            return
        oldest = min(running, key=lambda state: state.since_ns)
        if now - oldest.since_ns > LONG:
            self._recall(worker, oldest.message_id, now, now - oldest.since_ns)

    def _look_for_deaths(self, now: int) -> None:
        """End a zygote that owes a death, or a birth, for too long: its successor does what it does not."""
        for worker in self._workers.values():
            dead = worker.pidfd >= 0 and self._services.has_exited(worker.pidfd)
            if not dead and worker.pidfd >= 0:
                continue
            worker.missed_at = worker.missed_at or now
            missed = now - worker.missed_at
            if missed < UNREPORTED or worker.forsaken:
                continue
            if worker.zygote.is_stopped() or (dead and missed > LONGEST_UNREPORTED):
                logger.error("pool %s: the zygote process does not report: it is ended", self._spec.queue)
                self._forsake(worker.zygote)

    def _forsake(self, zygote: Zygote) -> None:
        """`ZygoteLost` follows. Who is dead by now has died by itself."""
        dead = [w for w in self._workers.values() if w.zygote is zygote and w.pidfd >= 0]
        dead = [worker for worker in dead if self._services.has_exited(worker.pidfd)]
        if zygote.kill():
            for worker in dead:
                worker.forsaken = True

    def _look_at_memory(self) -> None:
        """End workers that use too much. One that is idle has nobody to blame, and is replaced once that is certain."""
        limit = self._spec.max_memory
        for worker in self._workers.values():
            if worker.pidfd < 0 or worker.killed is not None:
                continue
            used = memory_over(worker.pid, limit)
            if not used:
                continue
            states = [lane.read() for lane in worker.lanes]
            running = [state for state in states if state.busy]
            if running or not any(state.started for state in states):
                reason = (
                    f"WorkerDied: the worker was killed while running {self._what()}: "
                    f"it used {used / 1e6:.0f} MB of memory, more than max_memory={limit}"
                )
                self._kill(worker, running, Failure("died", reason, "WorkerDied"), charged=True)
            elif not worker.retiring:
                self._ask_to_retire(worker)

    def _recall(self, worker: PooledWorker, message_id: int, now: int, age: int) -> None:
        """Have others work on what waits behind a long message; again now and then, as more may have arrived since."""
        if worker.long != message_id:
            worker.long, worker.recall_at = message_id, now
        if now >= worker.recall_at:
            worker.recall_at = now + age
            self._services.broker.query("recall", worker.peer)

    def _cancel(self, event: Cancelled) -> None:
        """Let the handler know, and end it if it has not ended after a grace. Compensations are never cancelled."""
        for worker in self._workers.values():
            if worker.peer == event.peer and self._spec.kind != "compensation":
                now = time.monotonic_ns()
                worker.cancelled[event.message_id] = now + CANCEL_GRACE
                self._remind(worker, now)

    def _remind(self, worker: PooledWorker, now: int) -> None:
        """Mark the lanes of what has been cancelled: it may have begun since that was heard of, or never begin."""
        for message_id, until in list(worker.cancelled.items()):
            if now - until > REMEMBERED:
                del worker.cancelled[message_id]
        for lane in worker.lanes:
            state = lane.read()
            if state.message_id in worker.cancelled and not state.cancelled:
                lane.cancel(state.message_id)

    def _time_out(self, worker: PooledWorker, late: list[SlotState]) -> None:
        reason = f"StageTimeout: {self._what()} ran longer than its timeout of {late[0].timeout_ns / 1e9:g} s"
        if late[0].grace_ns:
            reason += " and did not end when it was cancelled"
        self._kill(worker, late, Failure("timeout", reason, "StageTimeout"))

    def _kill(self, worker: PooledWorker, guilty: list[SlotState], failure: Failure, *, charged: bool = False) -> None:
        if self._services.has_exited(worker.pidfd):
            return  # its lanes say what it was at when it died; how it did is on its way
        worker.killed = Kill([state.message_id for state in guilty], failure, charged)
        kill_group(worker.pid, worker.pidfd)

    def _look_whether_resumed(self) -> None:
        self._paused_at = time.monotonic()
        name, ref = self._spec.queue, self.actor_ref

        def heard(future: Any) -> None:
            if future.exception() is None and _state_in(future.result(), name) not in (None, "paused"):
                ref.tell(_Resumed())

        self._services.broker.query("stats", name).add_done_callback(heard)

    def _resumed(self) -> None:
        if self._paused_at:
            self._paused_at = self._not_before = 0.0
            self._services.broker.query("fact", PAUSED_FACT + self._spec.queue, "no")
            self._deaths = self._failed_starts = 0
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
            if worker.pidfd >= 0 and not any(lane.busy for lane in worker.lanes):
                self._ask_to_retire(worker)
                staying.remove(worker)

    def _respec(self, spec: PoolSpec) -> None:
        """Workers are replaced: each ends when it is done with what it runs, or meets a message it does not know."""
        if self._wanted == self._spec.actors:
            self._wanted = spec.actors
        self._spec = spec
        for worker in self._workers.values():
            worker.lanes[0].mark_stale()
            self._ask_to_retire(worker)
        self._fill()

    def _ask_to_retire(self, worker: PooledWorker) -> None:
        """Through the broker, never by a signal: it may have begun something, or be about to settle what it has done,
        and would be killed between the doing and the settling, so that all of that were done once more."""
        worker.retiring = True
        worker.ask_at = time.monotonic_ns() + REMIND

        def answered(asked: Future[Any]) -> None:
            if asked.exception() is not None or not asked.result():
                worker.ask_at = time.monotonic_ns() + ASK_AGAIN

        self._services.broker.query("retire", worker.peer).add_done_callback(answered)

    def _retire(self, kill: bool) -> None:
        self._retiring = True
        if kill:
            for worker in self._workers.values():
                if worker.pidfd >= 0:
                    kill_group(worker.pid, worker.pidfd)

    def _zygote_lost(self, zygote: Zygote) -> None:
        """No report will come of its workers: end what is left of each; nobody is charged for a zygote's death, only
        for one that came before and was never told."""
        for worker in [worker for worker in self._workers.values() if worker.zygote is zygote]:
            if worker.pidfd >= 0:
                kill_group(worker.pid, worker.pidfd)
                if not wait_dead(worker.pidfd, 5.0):
                    logger.error("pool %s: worker %d cannot be killed", self._spec.queue, worker.pid)
            if worker.forsaken:
                self._judge(worker, None)
            else:
                self._bury(worker)
        self._fill()


def _state_in(stats: dict[str, Any], queue: str) -> str | None:
    """The state of one queue in a broker's statistics."""
    return next((found["state"] for found in stats["queues"] if found["name"] == queue), None)
