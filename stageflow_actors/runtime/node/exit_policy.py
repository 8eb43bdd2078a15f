"""`ExitPolicy`: decides what follows from the exit of a pool's worker.

The input is facts: the exit status, the state of the worker's lanes, and the reason if the pool has killed the worker.
The output is a decision, which the pool carries out: the messages that are responsible, and whether the worker is one
that cannot start. This module must never read a clock and never touch a process or the broker.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence

from msgspec import Struct

from stageflow_actors.core.envelope import Failure
from stageflow_actors.core.failures import UNDECIDED, undecided_failure
from stageflow_actors.runtime.ipc.exit_codes import EXIT_RECYCLED
from stageflow_actors.runtime.ipc.pool_spec import PoolSpec
from stageflow_actors.runtime.ipc.slots import SlotState
from stageflow_actors.runtime.node.worker_handle import Kill
from stageflow_actors.runtime.system.processes import describe_exit

__all__ = [
    "CANCELLED_FAILURE",
    "NO_CONSEQUENCE",
    "ExitDecision",
    "ExitPolicy",
    "memory_failure",
    "overdue_states",
    "timeout_failure",
]

CANCELLED_FAILURE = Failure("cancelled", "StageError: the instance was cancelled", "StageError")
"""The failure of a stage that was killed because it did not end after its instance had been cancelled."""


class ExitDecision(Struct, frozen=True):
    """The consequences of one exit.

    - `responsible`: ids of the messages that carry `failure` from now on
    - `counted`: the exit counts as a death that these messages caused
    - `failed_start`: how the worker ended, if it ended before its first message; empty otherwise
    """

    responsible: Sequence[int] = ()
    failure: Failure | None = None
    counted: bool = False
    failed_start: str = ""


NO_CONSEQUENCE = ExitDecision()
"""No message is responsible, and another worker may start at once."""


class ExitPolicy:
    """Decides on each exit of one pool's workers.

    `out_of_memory` claims one kill by the kernel's OOM killer (see `OomKills.claim`). It is called only for an exit by
    SIGKILL, because one OOM kill explains exactly one exit.
    """

    def __init__(self, out_of_memory: Callable[[], bool | None]) -> None:
        self._out_of_memory = out_of_memory

    def decide(
        self,
        spec: PoolSpec,
        states: Sequence[SlotState],
        status: int | None,
        *,
        killed: Kill | None = None,
        expected: bool = False,
        ready: bool = False,
        ending: bool = False,
    ) -> ExitDecision:
        """Return the decision on the exit of a worker.

        Args:
            spec: The pool's specification.
            states: The worker's lanes as the worker left them.
            status: The exit status; None if the zygote was lost and could not report it.
            killed: The pool's reason for killing the worker; None if the pool has not killed it.
            expected: True if all workers of the pool are stopping.
            ready: True if the worker had started and took messages.
            ending: True if it was ending: it held no message. If it had been ready too, none is responsible, however it
                exited.
        """
        # A worker that had exited before the pool's signal arrived has another status, and is judged by that.
        if killed is not None and status in (None, -signal.SIGKILL):
            return self._decide_killed(spec, states, killed)
        if expected or (ending and ready):
            return NO_CONSEQUENCE
        started = any(state.started for state in states)
        is_end = status is None or (status == EXIT_RECYCLED and (started or ready))
        if is_end and not any(state.is_busy for state in states):
            return NO_CONSEQUENCE
        if not started:
            return ExitDecision(failed_start=self._describe_status(status))
        # If none runs, the last message of each slot is reported: the broker ignores those that are settled already.
        busy = [state for state in states if state.is_busy]
        suspects = _blocking_event_loop(busy) or busy or [state for state in states if state.started]
        how = self._describe_status(status)
        died = Failure("died", f"WorkerDied: the worker died while running {_describe_work(spec)}: {how}", "WorkerDied")
        if len(suspects) == 1 and suspects[0].policy_failure:
            died = undecided_failure(suspects[0].policy_failure, f"ended the worker: {how}") or died
        return ExitDecision([state.message_id for state in suspects], died, True)

    def _decide_killed(self, spec: PoolSpec, states: Sequence[SlotState], killed: Kill) -> ExitDecision:
        # A message that the worker had finished before the signal arrived is not responsible.
        current = {state.message_id for state in states if state.started}
        responsible = [id for id in killed.responsible if id in current]
        hungry = killed.counted and not current
        how = f"it used more than max_memory={spec.max_memory}" if hungry else ""
        return ExitDecision(responsible, killed.failure, killed.counted, how)

    def _describe_status(self, status: int | None) -> str:
        if status is None:
            return "exit status unknown, because the zygote process did not report it"
        return describe_exit(status, out_of_memory=self._out_of_memory() if status == -signal.SIGKILL else None)


def overdue_states(running: Sequence[SlotState], now_ns: int) -> list[SlotState]:
    """Return the lanes whose message has run too long, so that the worker must be killed.

    A lane that blocks the worker's event loop is judged before the others: no handler there can end in time, nor be
    cancelled, until the loop is free again. So only lanes that were late before it began count beside it. If one of the
    late lanes waits for a retry policy, only those that do are returned: a kill is attributed to policies or to
    handlers, never to both.
    """
    late = [state for state in running if state.is_overdue(now_ns)]
    blocking = [state for state in _blocking_event_loop(running) if state.timeout_ns]
    if blocking:
        began = min(state.turn_since_ns for state in blocking)
        late = [state for state in late if state in blocking or state.is_overdue(began)]
    return [state for state in late if state.policy_failure] or late


def _blocking_event_loop(running: Sequence[SlotState]) -> list[SlotState]:
    """Return the lanes whose coroutine or retry policy runs on an event loop, where it blocks all other lanes."""
    policies = [state for state in running if state.policy_failure and state.grace_ns]
    return policies or [state for state in running if state.turn_since_ns]


def timeout_failure(spec: PoolSpec, late: SlotState, *others: SlotState) -> Failure:
    """Return the failure of a worker's messages, `late` and `others`, that ran past their timeout."""
    if late.policy_failure:
        how = f"ran longer than the timeout of {late.timeout_ns / 1e9:g} s"
        failure = undecided_failure(late.policy_failure, how)
        if failure is not None and all(state.policy_failure == late.policy_failure for state in others):
            return failure
        return Failure(UNDECIDED, f"StageTimeout: a retry policy of {_describe_work(spec)} {how}", "StageTimeout")
    reason = f"StageTimeout: {_describe_work(spec)} "
    if late.turn_since_ns:
        reason += "blocked its event loop (it needs await asyncio.sleep() or asyncio.to_thread() for blocking calls), "
    reason += f"ran longer than its timeout of {late.timeout_ns / 1e9:g} s"
    if late.grace_ns:
        reason += " and did not end when it was cancelled"
    return Failure("timeout", reason, "StageTimeout")


def memory_failure(spec: PoolSpec, used: int) -> Failure:
    """Return the failure of the messages of a worker that uses `used` bytes of memory."""
    return Failure(
        "died",
        f"WorkerDied: the worker was killed while running {_describe_work(spec)}: "
        f"it used {used / 1e6:.0f} MB of memory, more than max_memory={spec.max_memory}",
        "WorkerDied",
    )


def _describe_work(spec: PoolSpec) -> str:
    return f"stage {spec.stage_id!r}" if spec.stage_id else f"a compensation of {spec.workflow_id!r}"
