"""A pool and the exits of its workers: which message is responsible, when it restarts one, when it gives up."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from stageflow_actors.runtime.messaging.pauses import PAUSED_BY_POOL_FACT
from stageflow_actors.runtime.node import exit_policy, pool_pause
from stageflow_actors.runtime.node import pool as pool_module
from stageflow_actors.runtime.node.pool import Cancelled, Tick, ZygoteLost

FACT = f"{PAUSED_BY_POOL_FACT}q"


@pytest.fixture
def alone(nursery: Any) -> Any:
    """A pool of one actor, which has been asked for."""
    made = nursery(actors=1)
    made.pool.on_start()
    return made


def test_the_first_restart_is_immediate_and_the_second_in_a_row_is_not(alone: Any) -> None:
    alone.death()
    assert len(alone.zygote.asked) == 2
    alone.death()
    assert len(alone.zygote.asked) == 2
    assert time.monotonic() < alone.pool._exit_policy.not_before <= time.monotonic() + exit_policy.BACK_OFF_SECONDS
    alone.pool._exit_policy.not_before = 0.0
    alone.pool.on_receive(Tick())
    assert len(alone.zygote.asked) == 3
    alone.death()
    assert alone.pool._exit_policy.not_before > time.monotonic() + exit_policy.BACK_OFF_SECONDS, "longer each time"


def test_a_message_settled_well_makes_the_next_death_the_first_one_again(alone: Any) -> None:
    for number in range(2 * exit_policy.MAX_DEATHS_IN_A_ROW):
        alone.death(settled=1)
        assert len(alone.zygote.asked) == number + 2
    assert not alone.broker.paused
    assert alone.said == []


def test_a_worker_that_begins_something_makes_the_next_failed_start_the_first_one_again(alone: Any) -> None:
    for _ in range(exit_policy.MAX_FAILED_STARTS):
        alone.idle_end()
        alone.death(settled=1)
    assert not alone.broker.paused
    before = len(alone.zygote.asked)
    alone.idle_end()
    assert len(alone.zygote.asked) == before + 1


def test_failed_starts_in_a_row_pause_the_pool(alone: Any) -> None:
    for _ in range(exit_policy.MAX_FAILED_STARTS):
        alone.pool._exit_policy.not_before = 0.0
        alone.pool._fill()
        alone.idle_end()
    assert alone.broker.paused
    assert "10 of its workers ended in a row before they began a message" in alone.said[0]


def test_a_pool_that_has_been_resumed_forgets_what_was_and_that_it_had_paused_itself(alone: Any) -> None:
    alone.pause()
    assert alone.broker.facts[FACT] == "yes"
    before = len(alone.zygote.asked)
    alone.broker.paused = False
    alone.pool._pause._checked_at -= 2 * pool_pause.CHECK_INTERVAL_SECONDS
    alone.pool.on_receive(Tick())
    alone.pool.on_receive(alone.pool.actor_inbox.get().message)
    assert alone.broker.facts[FACT] == "no", "or a pause of a person's would be lifted at the next start"
    assert len(alone.zygote.asked) == before + 1
    alone.death()
    assert not alone.broker.paused
    assert len(alone.zygote.asked) == before + 2


def test_a_pool_reports_its_pause_once_however_many_workers_die_of_what_they_had_begun(nursery: Any) -> None:
    many = nursery(actors=6)
    many.pool.on_start()
    ids = [many.birth(id) for id in list(many.zygote.asked)]
    many.pool._exit_policy._deaths = exit_policy.MAX_DEATHS_IN_A_ROW - 1
    for number, id in enumerate(ids):
        many.lane(id).begin(number, 0, time.monotonic_ns())
        many.end(id, -6)
    assert len(many.said) == 1
    assert many.broker.told.count(("pause", "q")) == 1


def test_a_death_just_after_a_manual_resume_does_not_pause_the_queue_again(nursery: Any) -> None:
    two = nursery(actors=2)
    two.pool.on_start()
    straggler = two.birth(two.zygote.asked[0])
    two.lane(straggler).begin(1, 0, time.monotonic_ns())
    two.pool._exit_policy._deaths = exit_policy.MAX_DEATHS_IN_A_ROW - 1
    two.death()
    assert two.broker.paused
    two.broker.admin.resume("q")
    two.end(straggler, -6)
    assert not two.broker.paused
    assert len(two.said) == 1


def test_a_manual_pause_is_distinguished_from_the_pools_own(alone: Any) -> None:
    alone.broker.paused = True
    alone.pause()
    assert alone.broker.facts[FACT] == "no"


def test_a_new_pool_lifts_the_pause_of_its_predecessor_and_no_other(nursery: Any) -> None:
    for fact, paused in (("yes", False), ("no", True)):
        made = nursery()
        made.broker.paused, made.broker.facts[FACT] = True, fact
        made.pool.on_start()
        assert made.broker.paused == paused
        assert made.broker.facts[FACT] == "no"


def test_a_stage_in_work_is_notified_of_its_cancellation_and_a_compensation_is_not(nursery: Any) -> None:
    for kind, told in (("stage", True), ("compensation", False)):
        made = nursery(actors=1, kind=kind)
        made.pool.on_start()
        id = made.birth()
        made.lane(id).begin(7, 0, time.monotonic_ns())
        made.pool.on_receive(Cancelled(made.worker(id).peer, 7))
        assert made.lane(id).is_cancelled() == told
        assert (7 in made.worker(id).cancelled) == told


def overdue(made: Any) -> str:
    """A worker whose message has run past its timeout."""
    id: str = made.birth()
    made.lane(id).begin(7, 1, time.monotonic_ns() - 1_000)
    return id


def test_a_stage_past_its_timeout_is_killed_and_judged_by_that(alone: Any) -> None:
    id = overdue(alone)
    alone.pool.on_receive(Tick())
    assert alone.killed == [alone.worker(id).pid]
    alone.end(id, -signal.SIGKILL)
    ((responsible, counted, failure),) = alone.buried()
    assert (responsible, counted, failure.kind) == ([7], False, "timeout")


def test_a_worker_that_has_died_is_not_killed_for_what_it_seems_to_run_still(alone: Any) -> None:
    id = overdue(alone)
    alone.exited.add(alone.worker(id).pidfd)
    alone.pool.on_receive(Tick())
    assert alone.killed == []
    alone.end(id, 3)
    ((responsible, counted, failure),) = alone.buried()
    assert (responsible, counted, failure.kind) == ([7], True, "died")
    assert "exit code 3" in failure.message


@pytest.mark.parametrize("why", ["timeout", "cancel", "memory"])
def test_a_worker_that_exited_before_the_kill_is_classified_by_its_own_exit(
    alone: Any, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    id = overdue(alone)
    worker = alone.worker(id)
    if why == "cancel":
        worker.cancelled[7] = 1
    elif why == "memory":
        monkeypatch.setattr(pool_module, "memory_above", lambda pid, limit: 2 * limit)
        alone.pool._spec.max_memory = 1_000_000
        alone.pool._check_memory()
    alone.pool.on_receive(Tick())
    assert alone.killed == [worker.pid]
    alone.end(id, 3)
    ((responsible, counted, failure),) = alone.buried()
    assert (responsible, counted, failure.kind) == ([7], True, "died")
    assert "exit code 3" in failure.message


def test_a_stopped_zygote_that_owes_a_death_is_ended_and_the_dead_are_judged_all_the_same(nursery: Any) -> None:
    two = nursery(actors=2)
    two.pool.on_start()
    dead, busy = (two.birth(id) for id in two.zygote.asked)
    for number, id in enumerate((dead, busy)):
        two.lane(id).begin(number, 0, time.monotonic_ns())
    two.exited.add(two.worker(dead).pidfd)
    zygote = two.zygote
    now = time.monotonic_ns()
    two.pool._check_unreported_exits(now)
    two.pool._check_unreported_exits(now + pool_module.UNREPORTED_NS)
    assert not zygote.killed, "one that is at work is given more time"
    zygote.stopped = True
    two.pool._check_unreported_exits(now + pool_module.UNREPORTED_NS - 1)
    assert not zygote.killed
    two.pool._check_unreported_exits(now + pool_module.UNREPORTED_NS)
    assert zygote.killed
    two.new_zygote()
    two.pool.on_receive(ZygoteLost(zygote))
    (first, first_charged, failure), second = two.buried()
    assert (first, first_charged, failure.kind) == ([0], True, "died")
    assert "exit status unknown" in failure.message
    assert second == ([], False, None)
    assert len(two.zygote.asked) == 2


def test_a_stage_killed_at_its_timeout_under_a_stopped_zygote_has_failed_by_that(alone: Any) -> None:
    id = overdue(alone)
    alone.pool.on_receive(Tick())
    alone.exited.add(alone.worker(id).pidfd)
    zygote = alone.zygote
    zygote.stopped = True
    now = time.monotonic_ns()
    alone.pool._check_unreported_exits(now)
    alone.pool._check_unreported_exits(now + pool_module.UNREPORTED_NS)
    alone.pool.on_receive(ZygoteLost(zygote))
    ((responsible, _, failure),) = alone.buried()
    assert (responsible, failure.kind) == ([7], "timeout")


def test_a_zygote_that_is_not_stopped_and_reports_nothing_for_very_long_is_ended_too(alone: Any) -> None:
    id = alone.birth()
    alone.exited.add(alone.worker(id).pidfd)
    now = time.monotonic_ns()
    alone.pool._check_unreported_exits(now)
    alone.pool._check_unreported_exits(now + pool_module.MAX_UNREPORTED_NS + 1)
    assert alone.zygote.killed


def test_a_stopped_zygote_that_owes_a_birth_is_ended(alone: Any) -> None:
    now = time.monotonic_ns()
    alone.pool._check_unreported_exits(now)
    alone.zygote.stopped = True
    alone.pool._check_unreported_exits(now + pool_module.UNREPORTED_NS)
    assert alone.zygote.killed


def test_a_worker_that_is_born_in_time_is_owed_nothing(alone: Any) -> None:
    now = time.monotonic_ns()
    alone.pool._check_unreported_exits(now)
    alone.zygote.stopped = True
    alone.birth()
    alone.pool._check_unreported_exits(now + pool_module.UNREPORTED_NS)
    assert not alone.zygote.killed
