"""`ExitPolicy`: decides on exits of one pool's workers: messages responsible, next start, pause of the pool.

Facts go in (exit status, what the lanes said, whether the pool had killed the worker), decisions come out, and the pool
carries them out. No clock, no process and no broker here: `now` is handed in.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence

from msgspec import Struct

from stageflow_actors.core.envelope import Failure
from stageflow_actors.core.failures import UNDECIDED, undecided_failure
from stageflow_actors.runtime.ipc.exit_codes import EXIT_RECYCLED, EXIT_UNLOADABLE
from stageflow_actors.runtime.ipc.pool_spec import PoolSpec
from stageflow_actors.runtime.ipc.slots import SlotState
from stageflow_actors.runtime.node.worker_handle import Kill
from stageflow_actors.runtime.system.processes import describe_exit

__all__ = [
    "CANCELLED",
    "NO_CONSEQUENCE",
    "ExitDecision",
    "ExitPolicy",
    "memory_failure",
    "overdue_states",
    "timeout_failure",
]

MAX_DEATHS_IN_A_ROW = 16
"""Worker deaths without a message settled well in between before the pool is paused. Five messages in a row that
each kill as many workers as they may are dead letters by then; a stage that kills them all is not for ever tried."""

MAX_FAILED_STARTS = 10
"""Workers that end before they begin anything, in a row, before the pool is paused."""

NO_PROCESS = "there was no room for its process"

BACK_OFF_SECONDS = 0.05
MAX_BACK_OFF_SECONDS = 0.5
"""Seconds before the second restart in a row, doubled for each one more; the first is immediate."""

CANCELLED = Failure("cancelled", "StageError: the instance was cancelled", "StageError")
"""Why a stage was killed that did not end when its instance had been cancelled."""


class ExitDecision(Struct, frozen=True):
    """`responsible`: the messages that carry `failure` from now on; `counted`: it counts as a death that they caused.
    `pause`: why the pool is to stop trying; empty while it is not."""

    responsible: Sequence[int] = ()
    failure: Failure | None = None
    counted: bool = False
    pause: str = ""


NO_CONSEQUENCE = ExitDecision()
"""No message is responsible, and nothing follows."""


class ExitPolicy:
    """Counts what happens in a row. `out_of_memory` claims one process that the kernel has killed for want of memory:
    it is asked only about a death that it may explain, because each one explains no other.

    `not_before`: when the next worker may be started (monotonic, seconds).
    """

    def __init__(self, out_of_memory: Callable[[], bool | None]) -> None:
        self._out_of_memory = out_of_memory
        self._deaths = 0
        self._failed_starts = 0
        self.not_before = 0.0

    def decide(
        self,
        spec: PoolSpec,
        states: Sequence[SlotState],
        status: int | None,
        *,
        killed: Kill | None = None,
        expected: bool = False,
        now: float,
    ) -> ExitDecision:
        """A worker has ended. `status` is None where the zygote was not there to find it out; `states` are its lanes as
        it left them, `killed` why its pool had killed it; `expected`: all workers of the pool are to end."""
        started = any(state.started for state in states)
        if states[0].settled:
            self._deaths = 0
        if started:
            self._failed_starts = 0
        # One that had ended by itself when the signal came is judged by how it did.
        if killed is not None and status in (None, -signal.SIGKILL):
            return self._decide_killed(spec, states, status, killed, now)
        if expected or (status in (None, EXIT_RECYCLED) and not any(state.is_busy for state in states)):
            return NO_CONSEQUENCE
        if not started:
            return ExitDecision(pause=self._record_failed_start(spec, status, now))
        # Also when its handler had returned: what it had settled is no longer its own, and is not counted.
        busy = [state for state in states if state.is_busy]
        suspects = _blocking_event_loop(busy) or busy or [state for state in states if state.started]
        how = self._describe_status(status)
        died = Failure("died", f"WorkerDied: the worker died while running {_describe_work(spec)}: {how}", "WorkerDied")
        if len(suspects) == 1 and suspects[0].policy_failure:
            died = undecided_failure(suspects[0].policy_failure, f"ended the worker: {how}") or died
        return ExitDecision([state.message_id for state in suspects], died, True, self._record_death(spec, how, now))

    def decide_failed_start(self, spec: PoolSpec, now: float) -> ExitDecision:
        """There was no room for a worker's process: at once is too soon even for the first one more."""
        self.back_off(1, now)
        return ExitDecision(pause=self._record_failed_start(spec, NO_PROCESS, now))

    def back_off(self, times: int, now: float) -> None:
        """The first restart is immediate, later ones wait: a machine in trouble is not helped by a fork bomb."""
        self.not_before = now + min(MAX_BACK_OFF_SECONDS, BACK_OFF_SECONDS * 2 ** min(times - 1, 8))

    def reset(self) -> None:
        """The pool begins anew: whatever ailed it may have been mended."""
        self._deaths = self._failed_starts = 0
        self.not_before = 0.0

    def _decide_killed(
        self, spec: PoolSpec, states: Sequence[SlotState], status: int | None, killed: Kill, now: float
    ) -> ExitDecision:
        # Not what it had been done with before the signal came.
        current = {state.message_id for state in states if state.started}
        responsible = [id for id in killed.responsible if id in current]
        pause = ""
        if killed.counted and responsible:
            pause = self._record_death(spec, "more memory than max_memory allows", now)
        elif killed.counted and not current:
            pause = self._record_failed_start(spec, status, now)
        return ExitDecision(responsible, killed.failure, killed.counted, pause)

    def _record_death(self, spec: PoolSpec, how: str, now: float) -> str:
        """One more death in a row; why the pool is to be paused, if it is."""
        self._deaths += 1
        if self._deaths >= MAX_DEATHS_IN_A_ROW:
            return f"{self._deaths} of its workers died in a row while running {_describe_work(spec)} (the last: {how})"
        if self._deaths > 1:
            self.back_off(self._deaths - 1, now)
        return ""

    def _record_failed_start(self, spec: PoolSpec, status: int | str | None, now: float) -> str:
        """One more that has begun nothing; why the pool is to be paused, if it is."""
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS:
            if status == EXIT_UNLOADABLE:
                hint = "its code or its services cannot be loaded"
            elif status == -signal.SIGKILL and spec.max_memory:
                hint = f"they need more than max_memory={spec.max_memory} to begin with"
            else:
                hint = f"the last: {status if isinstance(status, str) else self._describe_status(status)}"
            return f"{self._failed_starts} of its workers ended in a row before they did anything ({hint})"
        if self._failed_starts > 1:
            self.back_off(self._failed_starts - 1, now)
        return ""

    def _describe_status(self, status: int | None) -> str:
        if status is None:
            return "how is not known, for the zygote process did not report it"
        return describe_exit(status, out_of_memory=self._out_of_memory() if status == -signal.SIGKILL else None)


def overdue_states(running: Sequence[SlotState], now_ns: int) -> list[SlotState]:
    """The messages for which their worker is to be killed now; of those, a kill is for handlers or for policies.

    While an event loop waits for what a policy says, nobody else there can end in time: it alone is late.
    """
    limited = [state for state in _blocking_event_loop(running) if state.timeout_ns]
    late = [state for state in limited or running if state.is_overdue(now_ns)]
    return [state for state in late if state.policy_failure] or late


def _blocking_event_loop(running: Sequence[SlotState]) -> list[SlotState]:
    """The message about whose failure a policy is asked on an event loop: nothing else that runs there goes on."""
    return [state for state in running if state.policy_failure and state.grace_ns]


def timeout_failure(spec: PoolSpec, late: SlotState, *others: SlotState) -> Failure:
    """Why a worker is killed whose message, and `others`, have run past their timeout."""
    if late.policy_failure:
        how = f"ran longer than the timeout of {late.timeout_ns / 1e9:g} s"
        known = undecided_failure(late.policy_failure, how)
        if known is not None and all(state.policy_failure == late.policy_failure for state in others):
            return known
        return Failure(UNDECIDED, f"StageTimeout: a retry policy of {_describe_work(spec)} {how}", "StageTimeout")
    reason = f"StageTimeout: {_describe_work(spec)} ran longer than its timeout of {late.timeout_ns / 1e9:g} s"
    if late.grace_ns:
        reason += " and did not end when it was cancelled"
    return Failure("timeout", reason, "StageTimeout")


def memory_failure(spec: PoolSpec, used: int) -> Failure:
    """Why a worker is killed that uses so many bytes of memory."""
    return Failure(
        "died",
        f"WorkerDied: the worker was killed while running {_describe_work(spec)}: "
        f"it used {used / 1e6:.0f} MB of memory, more than max_memory={spec.max_memory}",
        "WorkerDied",
    )


def _describe_work(spec: PoolSpec) -> str:
    return f"stage {spec.stage_id!r}" if spec.stage_id else f"a compensation of {spec.workflow_id!r}"
