"""The meaning of a worker's exit, from facts alone: no clock, no process, no broker."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from msgspec import structs

from stageflow_actors.core.envelope import Failure
from stageflow_actors.core.failures import UNDECIDED, shorten_failure
from stageflow_actors.core.plan import Naming, compile_plan
from stageflow_actors.definition.workflow import Workflow
from stageflow_actors.runtime.ipc.exit_codes import EXIT_RECYCLED, EXIT_UNLOADABLE
from stageflow_actors.runtime.ipc.pool_spec import PoolSpec, VersionCode
from stageflow_actors.runtime.ipc.slots import SlotState
from stageflow_actors.runtime.node.exit_policy import (
    NO_CONSEQUENCE,
    ExitDecision,
    ExitPolicy,
    memory_failure,
    overdue_states,
    timeout_failure,
)
from stageflow_actors.runtime.node.worker_handle import Kill

LATE = Failure("timeout", "StageTimeout: too long", "StageTimeout")
HUNGRY = Failure("died", "WorkerDied: too much", "WorkerDied")


def spec(*, stage: str = "s", max_memory: int = 0) -> PoolSpec:
    plan = compile_plan(Workflow("w").add_stage(lambda context: None, id="s"), Naming())
    return PoolSpec("q", "w", stage, "stage", 1, {}, [VersionCode(1, b"", plan)], max_memory=max_memory)


def lane(message_id: int = 7, *, busy: bool = False, started: int = 0, settled: int = 0) -> SlotState:
    return SlotState(message_id, 5 if busy else 0, 0, started or busy, 0, False, settled)


IDLE = lane()
BUSY = lane(busy=True)
DONE = lane(started=3)


class Court:
    """A policy, and the kernel's counter that it is given."""

    def __init__(self) -> None:
        self.claims = 0
        self.policy = ExitPolicy(self.claim)

    def claim(self) -> bool:
        self.claims += 1
        return True

    def __call__(
        self, status: int | None, *states: SlotState, of: PoolSpec | None = None, **facts: Any
    ) -> ExitDecision:
        return self.policy.decide(of or spec(), states, status, **facts)


@pytest.fixture
def court() -> Court:
    return Court()


GUILTY = [
    ("a segmentation fault", -signal.SIGSEGV, [BUSY], [7]),
    ("an exit of its own", 3, [BUSY], [7]),
    ("an end that nobody saw", None, [BUSY], [7]),
    ("after its handler had returned", -signal.SIGSEGV, [DONE], [7]),
    ("only what runs, of several lanes", 1, [lane(1, busy=True), lane(2, started=1), lane(3)], [1]),
    ("what began, where nothing runs", 1, [lane(1, started=1), lane(2, started=1), lane(3)], [1, 2]),
    ("recycled in the middle of something", EXIT_RECYCLED, [BUSY], [7]),
]


@pytest.mark.parametrize(
    ("status", "states", "responsible"), [case[1:] for case in GUILTY], ids=[case[0] for case in GUILTY]
)
def test_a_death_is_charged_to_what_was_running(
    court: Court, status: int | None, states: list[SlotState], responsible: list[int]
) -> None:
    decision = court(status, *states)
    assert (decision.responsible, decision.counted, decision.failed_start) == (responsible, True, "")
    assert decision.failure is not None
    assert decision.failure.kind == "died"
    assert "while running stage 's'" in decision.failure.message


NOT_GUILTY = [
    ("recycled", EXIT_RECYCLED, [DONE], False),
    ("idle when its zygote went", None, [DONE], False),
    ("all are to end", -signal.SIGKILL, [BUSY], True),
    ("all are to end, and it had begun nothing", 1, [IDLE], True),
]


@pytest.mark.parametrize(
    ("status", "states", "expected"), [case[1:] for case in NOT_GUILTY], ids=[case[0] for case in NOT_GUILTY]
)
def test_an_end_that_was_to_come_is_nobodys_fault_and_is_not_counted(
    court: Court, status: int | None, states: list[SlotState], expected: bool
) -> None:
    assert court(status, *states, expected=expected) == NO_CONSEQUENCE


def test_a_compensations_death_is_reported_as_such(court: Court) -> None:
    decision = court(1, BUSY, of=spec(stage=""))
    assert decision.failure is not None
    assert "while running a compensation of 'w': exit code 1" in decision.failure.message


def test_the_kernels_kills_are_claimed_only_for_deaths_that_they_may_explain(court: Court) -> None:
    court(-signal.SIGSEGV, BUSY)
    court(-signal.SIGKILL, BUSY, expected=True)
    court(-signal.SIGKILL, BUSY, killed=Kill([7], LATE, False))
    assert court.claims == 0
    assert "out of memory" in court(-signal.SIGKILL, IDLE).failed_start
    decision = court(-signal.SIGKILL, BUSY)
    assert court.claims == 2
    assert decision.failure is not None
    assert "by the kernel's OOM killer: out of memory" in decision.failure.message


@pytest.mark.parametrize("status", [-signal.SIGKILL, None])
def test_a_killed_worker_is_judged_by_why_it_was_killed(court: Court, status: int | None) -> None:
    assert court(status, BUSY, killed=Kill([7], LATE, False)) == ExitDecision([7], LATE)
    assert court(status, BUSY, killed=Kill([7], LATE, False), expected=True) == ExitDecision([7], LATE)


def test_a_killed_worker_that_had_already_exited_is_classified_by_its_own_exit(court: Court) -> None:
    decision = court(3, BUSY, killed=Kill([7], LATE, False))
    assert decision.counted
    assert decision.failure is not None
    assert "exit code 3" in decision.failure.message


def test_what_a_killed_worker_had_been_done_with_before_the_signal_came_is_not_blamed(court: Court) -> None:
    assert court(-signal.SIGKILL, lane(8, busy=True), killed=Kill([7], LATE, False)).responsible == []


def test_a_kill_for_memory_is_a_death_of_the_message_in_work_or_a_failed_start(court: Court) -> None:
    decision = court(-signal.SIGKILL, BUSY, killed=Kill([7], HUNGRY, True))
    assert decision == ExitDecision([7], HUNGRY, True)
    decision = court(-signal.SIGKILL, IDLE, of=spec(max_memory=5), killed=Kill([], HUNGRY, True))
    assert (decision.responsible, decision.failed_start) == ([], "it used more than max_memory=5")


FAILED_STARTS = [
    ("its service cannot be made", EXIT_UNLOADABLE, False, False, "exit code 78"),
    ("its service exits", 13, False, False, "exit code 13"),
    ("its service exits as a recycled worker does", EXIT_RECYCLED, False, False, "exit code 99"),
    ("its service crashes", -signal.SIGSEGV, False, False, "killed by SIGSEGV (segmentation fault)"),
    ("it was ready and had begun nothing", 3, True, False, "exit code 3"),
    ("it could not start and did not end in time", 3, False, True, "exit code 3"),
]


@pytest.mark.parametrize(
    ("status", "ready", "ending", "how"), [case[1:] for case in FAILED_STARTS], ids=[case[0] for case in FAILED_STARTS]
)
def test_an_exit_before_the_first_message_is_a_failed_start(
    court: Court, status: int, ready: bool, ending: bool, how: str
) -> None:
    assert court(status, IDLE, ready=ready, ending=ending) == ExitDecision(failed_start=how)


def test_a_worker_that_retires_before_its_first_message_has_not_failed(court: Court) -> None:
    assert court(EXIT_RECYCLED, IDLE, ready=True) == NO_CONSEQUENCE


def asking(message_id: int, about: str, *, since: int = 1, grace: int = 0, timeout: int = 10**9) -> SlotState:
    failure = b"no failure" if not about else shorten_failure(Failure("exception", about, "ValueError"), 1_000)
    return SlotState(message_id, since, timeout, 1, 0, False, 0, grace, failure)


def test_a_death_while_a_policy_decides_leaves_the_failure_as_final(court: Court) -> None:
    decision = court(3, asking(7, "ValueError: x"))
    assert (decision.responsible, decision.counted) == ([7], True)
    text = "ValueError: x (and its retry policy ended the worker: exit code 3)"
    assert decision.failure == Failure(UNDECIDED, text, "ValueError")
    several = court(3, asking(7, "ValueError: x"), lane(8, busy=True))
    assert several.failure is not None
    assert (several.responsible, several.failure.kind) == ([7, 8], "died"), "nobody knows whether it was the policy"
    looped = court(3, asking(7, "ValueError: x", grace=1), lane(8, busy=True))
    assert looped.responsible == [7], "of an event loop nothing else can have gone on"
    damaged = court(3, asking(7, ""))
    assert damaged.failure is not None
    assert damaged.failure.kind == "died"


def test_a_policy_over_its_time_is_killed_with_what_it_was_asked_about() -> None:
    late = asking(7, "ValueError: x")
    text = "ValueError: x (and its retry policy ran longer than the timeout of 1 s)"
    assert timeout_failure(spec(), late) == Failure(UNDECIDED, text, "ValueError")
    assert timeout_failure(spec(), late, asking(8, "ValueError: x")).message == text
    general = "StageTimeout: a retry policy of stage 's' ran longer than the timeout of 1 s"
    for other in ("ValueError: y", ""):
        assert timeout_failure(spec(), asking(7, other), late) == Failure(UNDECIDED, general, "StageTimeout")


def test_a_kill_is_for_policies_or_for_handlers_and_never_for_one_that_waits_for_the_same_event_loop() -> None:
    second = 10**9
    policy, handler = asking(1, "x"), SlotState(2, 1, second, 1, 0, False)
    assert overdue_states([policy, handler], second) == []
    assert overdue_states([policy, handler], 2 * second) == [policy]
    assert overdue_states([handler], 2 * second) == [handler]
    graced = SlotState(3, 1, second, 1, 0, False, 0, second)
    later = asking(4, "x", since=3 * second, grace=second)
    assert overdue_states([graced, later], 3 * second) == [], "it would have ended by itself, did the policy answer"
    assert overdue_states([graced, later], 5 * second) == [later]
    unlimited = asking(5, "x", grace=second, timeout=0)
    assert overdue_states([graced, unlimited], 3 * second) == [graced]


def in_turn(message_id: int, *, since: int, turn: int, timeout: int = 10**9) -> SlotState:
    """A lane of an event loop; `turn` is when its coroutine was resumed, 0 while it waits."""
    return SlotState(message_id, since, timeout, 1, 0, False, 0, 10**9, b"", turn)


def test_a_lane_that_blocks_the_event_loop_is_late_alone() -> None:
    second = 10**9
    waiting = [in_turn(number, since=1, turn=0) for number in (1, 2, 3)]
    blocking = in_turn(4, since=second, turn=second + 1)
    lanes = [*waiting, blocking]
    assert overdue_states(waiting, 2 * second + 2) == waiting, "the loop is free, and they did not end"
    assert overdue_states(lanes, 2 * second + 2) == [], "they cannot end, and its own time has not passed"
    assert overdue_states(lanes, 3 * second + 1) == [blocking]
    unlimited = in_turn(5, since=1, turn=second, timeout=0)
    assert overdue_states([*waiting, unlimited], 3 * second) == waiting
    resumed_late = in_turn(6, since=3, turn=2 * second + 2)
    assert overdue_states([*waiting, resumed_late], 2 * second + 4) == [*waiting, resumed_late]


def test_a_worker_that_dies_in_a_coroutine_charges_the_message_of_that_coroutine(court: Court) -> None:
    lanes = [in_turn(1, since=1, turn=0), in_turn(2, since=1, turn=7), in_turn(3, since=1, turn=0)]
    assert court(-signal.SIGSEGV, *lanes).responsible == [2]
    assert court(-signal.SIGSEGV, *(structs.replace(lane, turn_since_ns=0) for lane in lanes)).responsible == [1, 2, 3]


def test_reasons_to_kill_name_stage_and_limit() -> None:
    late = SlotState(7, 1, 2_500_000_000, 1, 0, False)
    assert timeout_failure(spec(), late).message == "StageTimeout: stage 's' ran longer than its timeout of 2.5 s"
    graced = SlotState(7, 1, 2_500_000_000, 1, 0, False, 0, 1)
    assert timeout_failure(spec(), graced).message.endswith("of 2.5 s and did not end when it was cancelled")
    blocked = in_turn(7, since=1, turn=2, timeout=2_500_000_000)
    assert timeout_failure(spec(), blocked).message == (
        "StageTimeout: stage 's' blocked its event loop (it needs await asyncio.sleep() or asyncio.to_thread() for "
        "blocking calls), ran longer than its timeout of 2.5 s and did not end when it was cancelled"
    )
    assert memory_failure(spec(max_memory=10**6), 3 * 10**6).message == (
        "WorkerDied: the worker was killed while running stage 's': "
        "it used 3 MB of memory, more than max_memory=1000000"
    )


ENDINGS = [
    ("as it should", EXIT_RECYCLED),
    ("killed because it took too long", -signal.SIGKILL),
    ("a crash of a C library", -signal.SIGSEGV),
    ("an exit of an atexit function", 3),
    ("stdout could not be flushed", 120),
    ("an end that nobody saw", None),
]


@pytest.mark.parametrize("states", [[DONE], [IDLE], [lane(1, started=1), lane(2, started=2)]])
@pytest.mark.parametrize("status", [case[1] for case in ENDINGS], ids=[case[0] for case in ENDINGS])
def test_however_a_worker_exits_that_was_ending_nothing_is_charged(
    court: Court, status: int | None, states: list[SlotState]
) -> None:
    assert court(status, *states, ready=True, ending=True) == ExitDecision()
