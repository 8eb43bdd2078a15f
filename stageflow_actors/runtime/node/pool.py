"""`Pool`: starts, watches, replaces and scales the workers of one queue.

Its `ExitPolicy` decides what follows from the exit of a worker. Only a message that the worker was running can be
responsible for its death, and the broker counts the death only if the dead worker still held the message. User code
must never run here.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from concurrent.futures import Future
from typing import Any

import msgspec
import pykka
from msgspec import structs

from stageflow_actors.core.envelope import Failure
from stageflow_actors.core.failures import STDERR_HEADING, fatal_traceback, last_lines, write_failure
from stageflow_actors.core.tracebacks.table import pack_traceback
from stageflow_actors.runtime.ipc.exit_codes import EXIT_NODE_FAILED
from stageflow_actors.runtime.ipc.output_frames import STDERR, STDOUT
from stageflow_actors.runtime.ipc.pool_spec import PoolSpec, WorkerPayload
from stageflow_actors.runtime.ipc.slots import LOADING, SlotState
from stageflow_actors.runtime.ipc.start_report import create_report_file
from stageflow_actors.runtime.node.exit_policy import (
    CANCELLED_FAILURE,
    NO_CONSEQUENCE,
    ExitDecision,
    ExitPolicy,
    memory_failure,
    overdue_states,
    timeout_failure,
)
from stageflow_actors.runtime.node.memory_limits import memory_above
from stageflow_actors.runtime.node.pool_context import PoolContext
from stageflow_actors.runtime.node.pool_events import Cancelled, ReplaceSpec, ScaleTo, ShutDown, Tick, ZygoteLost
from stageflow_actors.runtime.node.pool_starts import PoolStarts
from stageflow_actors.runtime.node.start_causes import StartCause
from stageflow_actors.runtime.node.worker_handle import Kill, WorkerHandle
from stageflow_actors.runtime.system.processes import is_stopped, kill_group, wait_dead
from stageflow_actors.runtime.zygote.handle import Exited, Spawned, SpawnFailed, ZygoteHandle
from stageflow_brokers.client.connection import new_peer
from stageflow_brokers.failpoints import failpoint

__all__ = ["Cancelled", "Pool", "ReplaceSpec", "ScaleTo", "ShutDown", "Tick", "ZygoteLost"]

logger = logging.getLogger("stageflow_actors.node.pool")

LONG_MESSAGE_NS = 50_000_000
"""Nanoseconds after which a running message is long: the messages that wait behind it in its worker are recalled."""

LANES_PER_TICK = 64
"""Approximate number of lanes of one worker that are checked per tick."""

RETIRE_RETRY_NS = 50_000_000
"""Nanoseconds before a worker is asked again to retire because the broker did not know the worker yet."""
RETIRE_REPEAT_NS = 2_000_000_000
"""Nanoseconds before a worker that has not exited is asked again to retire: a request can be lost with the broker."""

EXIT_CHECK_NS = 100_000_000
"""Nanoseconds between checks for exits that the zygote has not reported."""
UNREPORTED_NS = 2_000_000_000
"""Nanoseconds after which a zygote that owes a report and is stopped (SIGSTOP) is killed."""
MAX_UNREPORTED_NS = 15_000_000_000
"""The same for a zygote that is not stopped: it may still be killing processes that its workers have left behind."""

MEMORY_CHECK_NS = 100_000_000
"""Nanoseconds between checks of the memory of workers that have a limit."""


class Pool(pykka.ThreadingActor):
    """The supervised workers of one queue."""

    use_daemon_thread = True

    def __init__(self, spec: PoolSpec, pool_context: PoolContext) -> None:
        super().__init__()
        self._spec = spec
        self._context = pool_context
        self._target_workers = spec.actors
        self._workers: dict[str, WorkerHandle] = {}
        self._serial = 0
        self._exit_policy = ExitPolicy(pool_context.oom_kills.claim)
        self._starts = PoolStarts(spec, pool_context)
        self._pause_flag = 0 if pool_context.pauses is None else pool_context.pauses.register(spec.queue)
        self._shutting_down = False
        self._ticks = 0
        self._next_memory_check = self._next_exit_check = 0

    def on_start(self) -> None:
        """Start the first workers."""
        self._fill()
        if not self._workers:
            self._context.load_watch.on_exit(self._spec.queue, LOADING, b"")  # no worker is on its way
        self._update_active()

    def on_failure(self, *args: Any) -> None:
        """End the node, which the program starts again: a broken pool must not look like an idle one."""
        os._exit(EXIT_NODE_FAILED)

    def on_receive(self, message: Any) -> None:
        """Handle one message: a report of the zygote, a tick, or a command of the supervisor."""
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
        elif isinstance(message, ShutDown):
            self._shut_down(message.kill)
        elif isinstance(message, Cancelled):
            self._cancel(message)
        elif isinstance(message, ZygoteLost):
            self._on_zygote_lost(message.zygote)
        self._update_active()

    def _update_active(self) -> None:
        missing = self._target_workers - len(self._workers)
        is_incomplete = missing and (missing < 0 or self._starts.is_due(time.monotonic())) and not self._shutting_down
        # With a memory limit the pool is always active: an idle worker can be above the limit too.
        if (
            self._spec.max_memory
            or is_incomplete
            or any(w.cancelled or w.retiring or w.report_due_since or w.report_fd >= 0 for w in self._workers.values())
        ):
            self._context.active.add(self._spec.queue)
        else:
            self._context.active.discard(self._spec.queue)

    def _publish_lanes(self) -> None:
        self._context.lanes[self._spec.queue] = [lane for w in self._workers.values() for lane in w.lanes]

    # starts

    def _fill(self) -> None:
        while len(self._workers) < self._target_workers:
            # Checked before each start: a worker that cannot be started delays the next one.
            if self._shutting_down or not self._starts.may_start(self._workers.values(), time.monotonic()):
                return
            slot = self._context.allocate_slots(self._spec.concurrency)
            if slot is None:
                self._record_failed_start(f"all {len(self._context.slots)} slots of the node are in use")
                return
            self._start(slot)

    def _start(self, slot: int) -> None:
        pool_context, spec = self._context, self._spec
        self._serial += 1
        pool_context.source_watch.check(worker_starts=True)
        zygote = pool_context.zygote()
        lanes = pool_context.slots.lanes(slot, spec.concurrency)
        worker = WorkerHandle(f"{spec.queue}#{self._serial}", new_peer(), slot, lanes, zygote, time.monotonic())
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
            pool_context.initializer,
            log_fd=-1 if pool_context.output is None else pool_context.output.log_fd,
            levels_fd=pool_context.levels_fd,
            pause_fd=-1 if pool_context.pauses is None else pool_context.pauses.fd,
            pause_flag=self._pause_flag,
        )
        streams: list[int] = []
        try:
            if pool_context.output is None:
                streams += [os.dup(1), os.dup(2)]
            else:
                worker.stdout, theirs = pool_context.output.open(STDOUT)
                streams.append(theirs)
                worker.stderr, theirs = pool_context.output.open(STDERR)
                streams.append(theirs)
            worker.report_fd = create_report_file()
            streams.append(os.dup(worker.report_fd))
            failpoint("pool.spawning")
            zygote.spawn(worker.id, msgspec.msgpack.encode(payload), slot, spec.env, streams=streams)
        except OSError as error:
            if error.errno == errno.EBADF:
                return  # the zygote is dead and closed: `ZygoteLost` follows, and handles this worker too
            self._on_spawn_failed(SpawnFailed(worker.id, f"a worker could not be requested from the zygote: {error}"))
        finally:
            for fd in streams:
                os.close(fd)

    def _on_spawned(self, event: Spawned) -> None:
        worker = self._workers.get(event.worker_id)
        if worker is None:
            # The pool does not know this worker any more and would ignore its exit.
            kill_group(event.pid, event.pidfd)
            os.close(event.pidfd)
            return
        worker.pid, worker.pidfd, worker.report_due_since = event.pid, event.pidfd, 0
        failpoint("pool.spawned")
        if self._shutting_down or worker.killed is not None:
            kill_group(worker.pid, worker.pidfd)

    def _on_spawn_failed(self, event: SpawnFailed) -> None:
        worker = self._workers.get(event.worker_id)
        if worker is not None:
            self._handle_exit(worker, NO_CONSEQUENCE)
            self._record_failed_start(f"its process could not be started: {event.reason}", worker)

    # exits

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
            self._spec,
            states,
            status,
            killed=worker.killed,
            expected=self._shutting_down,
            ready=worker.lanes[0].is_ready,
            ending=worker.ending_since != 0,
        )
        now = time.monotonic()
        self._starts.record_life(worker, now)
        cause = self._starts.cause_of(worker, decision.failed_start) if decision.failed_start else None
        self._handle_exit(worker, decision)
        if cause is not None:
            self._starts.record_failure(cause, worker, self._target_workers, self._workers.values(), now)
        elif decision.responsible:
            self._starts.allow_now()

    def _record_failed_start(self, how: str, worker: WorkerHandle | None = None) -> None:
        """Record that a worker could not even be forked."""
        cause = StartCause(how, how)
        self._starts.record_failure(cause, worker, self._target_workers, self._workers.values(), time.monotonic())

    def _handle_exit(self, worker: WorkerHandle, decision: ExitDecision) -> None:
        """Report the exit to the broker, which releases the worker's messages; responsible ones carry the failure."""
        pool_context = self._context
        if not worker.lanes[0].is_outdated:
            pool_context.load_watch.on_exit(self._spec.queue, *worker.lanes[0].load_state())
        responsible, failure = list(decision.responsible), decision.failure
        if worker.stdout is not None:
            worker.stdout.finish()
        if worker.stderr is not None:
            written = worker.stderr.finish()
            lines = last_lines(written)
            if lines and failure is not None and failure.kind != "cancelled":
                text, trace = f"{failure.message}{STDERR_HEADING}{lines}", pack_traceback(fatal_traceback(written))
                failure = structs.replace(failure, message=text, traceback=trace)
        data = b"" if failure is None or not responsible else write_failure(failure)
        pool_context.broker.admin.report_death(
            worker.peer, responsible, decision.counted and bool(responsible), False, data
        )
        pool_context.live.pop(worker.peer, None)
        pool_context.free_slots(worker.slot, len(worker.lanes))
        if worker.pidfd >= 0:
            os.close(worker.pidfd)
        worker.close_report()
        del self._workers[worker.id]
        self._publish_lanes()

    # checks over time

    def _tick(self) -> None:
        now = time.monotonic_ns()
        self._ticks += 1
        # Hundreds of lanes are checked less often: most belong to async stages, whose worker ends late handlers.
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
        self._starts.check(self._workers.values(), self._target_workers, now / 1e9)
        for worker in self._workers.values():
            if worker.retiring and now >= worker.request_at and not worker.ending_since:
                self._request_retirement(worker)
            self._check_end(worker, now)
        if len(self._workers) > self._target_workers:
            self._trim()
        self._fill()

    def _check_running(self, worker: WorkerHandle, running: list[SlotState], now: int) -> None:
        """Kill a worker with an overdue message; recall the messages that wait behind a long one."""
        if worker.cancelled:
            worker.mark_cancelled(now)
            late = [state for state in running if now > worker.cancelled.get(state.message_id, now)]
            if late:
                self._kill(worker, late, CANCELLED_FAILURE)
                return
        late = overdue_states(running, now)
        if late:
            # Lanes are read one after the other, and an event loop that was blocked may have become free in between.
            late = overdue_states(worker.running(), now)
        if late:
            self._kill(worker, late, timeout_failure(self._spec, *late))
            return
        oldest = min(running, key=lambda state: state.since_ns)
        if now - oldest.since_ns > LONG_MESSAGE_NS:
            self._recall_waiting(worker, oldest.message_id, now, now - oldest.since_ns)

    def _check_end(self, worker: WorkerHandle, now: int) -> None:
        """Kill a worker whose end takes too long, with all processes that it started."""
        since = worker.ending_since or worker.stop_requested_at
        if not since or worker.overdue or worker.pidfd < 0 or now - since < self._context.stop_timeout_ns:
            return
        worker.overdue = True
        if worker.ending_since and self._context.stop_timeout_ns:
            step = worker.lanes[0].step
            if self._context.has_exited(worker.pidfd):
                step = "the end of processes that its handlers started"
            logger.warning(
                "%s: a worker is killed, because it did not end within worker_stop_timeout=%g s; unfinished: %s: make "
                "it faster, or raise Config(worker_stop_timeout=...)",
                self._spec.title,
                self._context.stop_timeout_ns / 1e9,
                step,
            )
        kill_group(worker.pid, worker.pidfd)

    def _check_unreported_exits(self, now: int) -> None:
        """Kill a zygote that owes the report of an exit or a start for too long; another zygote takes its place."""
        for worker in self._workers.values():
            dead = worker.pidfd >= 0 and self._context.has_exited(worker.pidfd)
            if not dead and worker.pidfd >= 0:
                continue
            if worker.ending_since and not worker.overdue:
                continue  # the zygote waits for the end of the processes that the worker started
            worker.report_due_since = worker.report_due_since or now
            missed = now - worker.report_due_since
            if missed < UNREPORTED_NS or worker.died_before_zygote:
                continue
            if worker.zygote.is_stopped() or (dead and missed > MAX_UNREPORTED_NS):
                logger.error(
                    "pool %s: the zygote process did not report the start or the exit of a worker for %.1f s and is "
                    "killed; another one is started",
                    self._spec.queue,
                    missed / 1e9,
                )
                self._kill_zygote(worker.zygote)

    def _kill_zygote(self, zygote: ZygoteHandle) -> None:
        """Kill a zygote; `ZygoteLost` follows. A worker that is dead already did not die with its zygote."""
        dead = [w for w in self._workers.values() if w.zygote is zygote and w.pidfd >= 0]
        dead = [worker for worker in dead if self._context.has_exited(worker.pidfd)]
        if zygote.kill():
            for worker in dead:
                worker.died_before_zygote = True

    def _check_memory(self) -> None:
        """Kill workers above their memory limit. An idle worker retires instead: no message is responsible."""
        limit = self._spec.max_memory
        for worker in self._workers.values():
            if worker.pidfd < 0 or worker.killed is not None or worker.ending_since:
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
        """Recall the messages that wait behind a long one, for other workers; repeat it, because more may arrive."""
        if worker.long_message_id != message_id:
            worker.long_message_id, worker.recall_at = message_id, now
        if now >= worker.recall_at:
            worker.recall_at = now + age
            self._context.broker.admin.recall(worker.peer)

    def _cancel(self, event: Cancelled) -> None:
        """Notify the handler, which is killed if it does not end in time. Compensations are never cancelled."""
        for worker in self._workers.values():
            if worker.peer == event.peer and self._spec.kind != "compensation":
                worker.cancel(event.message_id, time.monotonic_ns())

    def _kill(
        self, worker: WorkerHandle, responsible: list[SlotState], failure: Failure, *, counted: bool = False
    ) -> None:
        if self._context.has_exited(worker.pidfd):
            return  # its exit is decided by its own status, which the zygote has yet to report
        worker.killed = Kill([state.message_id for state in responsible], failure, counted)
        kill_group(worker.pid, worker.pidfd)

    # commands

    def _scale(self, actors: int) -> None:
        most = self._spec.most // self._spec.concurrency if self._spec.most else actors
        if actors > most:
            logger.warning(
                "%s: scaled to %d actors and not to %d, because max_stage_concurrency allows no more",
                self._spec.title,
                most,
                actors,
            )
        self._target_workers = min(actors, most)
        self._trim()
        self._fill()

    def _trim(self) -> None:
        """Retire surplus workers that are idle. Busy ones are checked again at the next tick."""
        staying = [worker for worker in self._workers.values() if worker.killed is None and not worker.retiring]
        for worker in reversed(staying):
            if len(staying) <= self._target_workers:
                return
            if worker.pidfd >= 0 and not any(lane.is_busy for lane in worker.lanes):
                self._request_retirement(worker)
                staying.remove(worker)

    def _replace_spec(self, spec: PoolSpec) -> None:
        """Replace all workers: each retires after its current messages, or at a message of a version unknown to it."""
        if self._target_workers == self._spec.actors:
            self._target_workers = spec.actors
        self._spec = spec
        self._starts.replace_spec(spec)
        for worker in self._workers.values():
            worker.lanes[0].mark_outdated()
            self._request_retirement(worker)
        self._fill()

    def _request_retirement(self, worker: WorkerHandle) -> None:
        """Ask a worker, through the broker, to exit after its current messages.

        Never by a signal: it would kill a worker between the end of a handler and the settlement of its message, and
        the handler would run again.
        """
        worker.retiring = True
        worker.request_at = time.monotonic_ns() + RETIRE_REPEAT_NS

        def on_answer(asked: Future[Any]) -> None:
            if asked.exception() is not None or not asked.result():
                worker.request_at = time.monotonic_ns() + RETIRE_RETRY_NS

        self._context.broker.admin.retire(worker.peer).add_done_callback(on_answer)

    def _shut_down(self, kill: bool) -> None:
        self._shutting_down = True
        for worker in self._workers.values():
            if worker.pidfd < 0:
                continue  # `_on_spawned` kills it
            slot = worker.lanes[0]
            may_have_services = self._spec.has_set_up or self._context.initializer
            can_end = slot.is_ready or slot.ending_since_ns or may_have_services
            if kill or not can_end or any(lane.is_busy for lane in worker.lanes) or is_stopped(worker.pid):
                kill_group(worker.pid, worker.pidfd)
            else:
                worker.stop_requested_at = time.monotonic_ns()
                self._request_retirement(worker)

    def _on_zygote_lost(self, zygote: ZygoteHandle) -> None:
        """Kill the remaining workers of a dead zygote: no report about them will come.

        No message is responsible for the death of a zygote; a worker that died before it is judged as usual.
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
