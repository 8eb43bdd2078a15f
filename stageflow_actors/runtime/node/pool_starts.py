"""`PoolStarts`: the starts of one pool's workers: when the next one is due, and why a worker is not ready.

It reports the pool to `StartCauses`: as failing while a cause is known and no worker is ready, or as starting if its
workers take long. It must not start or end a worker, nor decide what an exit means.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from stageflow_actors.core.failures import last_lines
from stageflow_actors.runtime.ipc.pool_spec import PoolSpec
from stageflow_actors.runtime.ipc.slots import UNLOADABLE
from stageflow_actors.runtime.ipc.start_report import StartReport, read_dump, read_report
from stageflow_actors.runtime.node.pool_context import PoolContext
from stageflow_actors.runtime.node.start_back_off import MAX_DELAY_SECONDS, StartBackOff
from stageflow_actors.runtime.node.start_causes import StartCause
from stageflow_actors.runtime.node.worker_handle import WorkerHandle

__all__ = ["PoolStarts"]

IDLE_TICK_SECONDS = 1.0
"""Time between two ticks of an idle pool."""
SLOW_SECONDS = 2.0
"""Time after which a pool without a ready worker is reported as starting, with the step that is not finished."""


class PoolStarts:
    """The starts of one pool. All times are monotonic, in seconds."""

    def __init__(self, spec: PoolSpec, context: PoolContext) -> None:
        self._spec = spec
        self._context = context
        self._back_off = StartBackOff()
        self._cause: StartCause | None = None
        self._next_start_at = 0.0
        self._reported = False

    def is_due(self, now: float) -> bool:
        """Return True if a worker may be started before the next tick that idle pools get too."""
        return self._back_off.not_before - now < IDLE_TICK_SECONDS

    def may_start(self, workers: Collection[WorkerHandle], now: float) -> bool:
        """Return True if a worker may be started now.

        After a failure one worker tries for all, because others would fail in the same way, until one is ready. A try
        that takes very long does not hold the others up.
        """
        if now < self._back_off.not_before:
            return False
        if not self._back_off.failures or any(map(self._is_success, workers)):
            return True
        return all(worker.lanes[0].is_ready or now - worker.started_at > MAX_DELAY_SECONDS for worker in workers)

    def cause_of(self, worker: WorkerHandle, how: str) -> StartCause:
        """Return why a worker could not start; `how` is the description of its exit, for one that has left no word."""
        report = read_report(worker.report_fd)
        if report is not None:
            return _cause_in(report)
        step = worker.lanes[0].step
        text = f"{how}, during {step}" if step else f"{how}, before its first message"
        return StartCause(text, text, last_lines(read_dump(worker.report_fd)))

    def record_failure(
        self, cause: StartCause, failed: WorkerHandle | None, target: int, workers: Collection[WorkerHandle], now: float
    ) -> None:
        """Record a worker that could not start, or None if it could not even be requested; without effect if it is
        recorded already. `workers` are those that are left of `target`.
        """
        if failed is not None:
            if failed.has_failed:
                return
            failed.has_failed = True
        self._back_off.record_failure(now if failed is None else failed.started_at, now)
        self._cause = cause
        self._next_start_at = time.time() + max(0.0, self._back_off.not_before - now)
        missing = max(1, target - sum(worker.lanes[0].is_ready for worker in workers))
        is_raised = failed is not None and failed.lanes[0].load_state()[0] == UNLOADABLE
        is_raised = is_raised and self._context.load_watch.raises_for(self._spec.queue)
        self._context.causes.record(self._spec, cause, missing, self._back_off.not_before, warn=not is_raised)
        self._report(workers, now)

    def allow_now(self) -> None:
        """Allow a start at once: a message has ended a worker, which is no failed start."""
        self._back_off.start_now()

    def replace_spec(self, spec: PoolSpec) -> None:
        """Start from the beginning: other code may not have the fault."""
        self._spec = spec
        self._back_off.reset()

    def record_life(self, worker: WorkerHandle, now: float) -> None:
        """Take note of a worker that has been ready: it may prove that the cause has ended."""
        lane = worker.lanes[0]
        if lane.is_ready:
            worker.close_report()
            if self._back_off.failures:
                self._back_off.record_life(worker.started_at, lane.read().settled > 0, now)

    def check(self, workers: Collection[WorkerHandle], target: int, now: float) -> None:
        """Look at the workers that are there, and report what has changed."""
        for worker in workers:
            if worker.report_fd >= 0 or self._back_off.failures:
                self.record_life(worker, now)
        for worker in workers:
            if worker.ending_since and not worker.has_failed and not worker.lanes[0].is_ready:
                # It has failed already, but its end may take seconds: services are closed.
                self.record_failure(self.cause_of(worker, "it ends"), worker, target, workers, now)
        if self._cause is not None and (not target or any(map(self._is_success, workers))):
            self._cause = None
            self._context.causes.recover(self._spec.queue)
        self._report(workers, now)

    def _is_success(self, worker: WorkerHandle) -> bool:
        """Return True if the worker is ready and was started after the last failure."""
        return worker.lanes[0].is_ready and worker.started_at >= self._back_off.failed_at

    def _report(self, workers: Collection[WorkerHandle], now: float) -> None:
        failing, text = False, ""
        if not any(worker.lanes[0].is_ready for worker in workers):
            starting = [worker for worker in workers if not worker.ending_since]
            slow = min(starting, key=lambda worker: worker.started_at, default=None)
            age = 0.0 if slow is None else now - slow.started_at
            step = "" if slow is None or age < SLOW_SECONDS else self._describe_step(slow)
            limit = self._context.start_timeout
            if self._cause is not None:
                failing, text = True, self._cause.reason + (f" (the present try has not ended: {step})" if step else "")
            elif step and age >= limit:
                failing, text = True, f"no worker has started within {limit:g} s (start_timeout): {step}"
            elif step:
                text = step
        if text or self._reported:
            self._reported = bool(text)
            next_start_at = self._next_start_at if self._cause is not None else 0.0
            self._context.causes.report(self._spec.queue, failing, text, next_start_at if failing else 0.0)

    def _describe_step(self, worker: WorkerHandle) -> str:
        """Return the step of the start that is not finished, and since when."""
        step = worker.lanes[0].step or "the start of its process"
        if worker.step != step:
            worker.step, worker.step_since = step, time.time()
        return f"{step} has not ended since {time.strftime('%H:%M:%S', time.localtime(worker.step_since))}"


def _cause_in(report: StartReport) -> StartCause:
    return StartCause(f"{report.step}: {report.error}", report.error, report.traceback)
