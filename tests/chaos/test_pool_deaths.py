"""A pool and the exits of its workers: which message is responsible, and when it starts another one."""

from __future__ import annotations

import re
import signal
import time
from typing import Any

import pytest

from stageflow_actors.runtime.node import pool as pool_module
from stageflow_actors.runtime.node.pool import Cancelled, ReplaceSpec, ScaleTo, Tick, ZygoteLost
from stageflow_actors.runtime.node.start_back_off import LIVED_SECONDS


@pytest.fixture
def alone(nursery: Any) -> Any:
    """A pool of one actor, which has been asked for."""
    made = nursery(actors=1)
    made.pool.on_start()
    return made


def test_after_a_death_at_a_message_the_restart_is_immediate_however_often(alone: Any) -> None:
    for number in range(30):
        alone.death()
        assert len(alone.zygote.asked) == number + 2
    assert not alone.broker.paused
    assert alone.broker.facts == {}, "no pool pauses its queue"
    assert alone.said == []


def test_a_worker_that_cannot_start_is_tried_again_after_a_tenth_of_a_second_doubling_to_thirty(alone: Any) -> None:
    delays = [alone.delay_after_failed_start() for _ in range(12)]
    assert delays == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30, 30], abs=0.05)
    assert not alone.broker.paused


def test_a_settled_message_makes_the_next_failed_start_the_first_one_again(alone: Any) -> None:
    for _ in range(5):
        alone.delay_after_failed_start()
    alone.try_again()
    alone.death(settled=1)
    assert alone.delay_after_failed_start() == pytest.approx(0.1, abs=0.05)


def test_a_message_that_kills_its_worker_does_not(alone: Any) -> None:
    for _ in range(4):
        alone.delay_after_failed_start()
    alone.try_again()
    before = len(alone.zygote.asked)
    alone.death()
    assert len(alone.zygote.asked) == before + 1, "the restart is immediate"
    assert alone.delay_after_failed_start() == pytest.approx(1.6, abs=0.05)


def test_a_worker_that_has_lived_for_a_minute_does(alone: Any) -> None:
    for _ in range(5):
        alone.delay_after_failed_start()
    alone.try_again()
    id = alone.ready()
    alone.pool.on_receive(Tick())
    assert alone.pool._starts._back_off.failures == 5
    alone.worker(id).started_at -= LIVED_SECONDS
    alone.pool._starts._back_off.failed_at -= LIVED_SECONDS
    alone.pool.on_receive(Tick())
    assert alone.pool._starts._back_off.failures == 0


def test_all_workers_of_a_pool_share_one_back_off_and_one_of_them_tries_for_all(nursery: Any) -> None:
    six = nursery(actors=6)
    six.pool.on_start()
    for id in list(six.zygote.asked):
        six.end(six.birth(id), 78)
    assert six.pool._starts._back_off.failures == 1, "they were started together"
    six.try_again()
    assert len(six.zygote.asked) == 7
    six.ready()
    six.pool.on_receive(Tick())
    assert len(six.zygote.asked) == 12, "it is ready, so the others are started"


def test_old_workers_that_settle_messages_do_not_hide_that_new_ones_cannot_start(nursery: Any) -> None:
    one = nursery(actors=1)
    one.pool.on_start()
    old = one.ready()
    one.pool.on_receive(ScaleTo("q", 2))
    delays = []
    for _ in range(3):
        one.lane(old).count_settled(1)
        one.pool.on_receive(Tick())
        delays.append(one.delay_after_failed_start())
    assert delays == pytest.approx([0.1, 0.2, 0.4], abs=0.05)
    assert one.starts() == [], "a worker is ready, so that the pool is not failing"


def test_a_pool_is_failing_while_no_worker_is_ready_and_also_during_a_try(alone: Any) -> None:
    assert alone.starts() == []
    alone.delay_after_failed_start()
    (state,) = alone.starts()
    assert state[:3] == ("q", True, "exit code 78, before its first message")
    assert 0 < state[3] - time.time() <= 0.1
    alone.try_again()
    alone.birth()
    alone.pool.on_receive(Tick())
    assert alone.starts() == [state], "nothing has changed"
    alone.ready(alone.zygote.asked[-1])
    alone.pool.on_receive(Tick())
    assert alone.starts()[1:] == [("q", False, "", 0.0)]
    alone.death()
    alone.pool.on_receive(Tick())
    assert len(alone.starts()) == 2, "a death at a message is no failed start"


def test_a_broker_that_has_restarted_receives_the_states_again(alone: Any) -> None:
    alone.delay_after_failed_start()
    alone.pool_context.causes.report_again()
    first, second = alone.starts()
    assert first == second


def test_another_version_is_tried_at_once(alone: Any) -> None:
    for _ in range(6):
        alone.delay_after_failed_start()
    before = len(alone.zygote.asked)
    alone.pool.on_receive(ReplaceSpec(alone.pool._spec))
    assert len(alone.zygote.asked) == before + 1


def test_a_service_that_is_not_made_in_time_is_named_with_its_beginning(alone: Any) -> None:
    id = alone.birth()
    alone.lane(id).set_step("the making of service 'bank'")
    alone.worker(id).started_at -= 6
    alone.pool.on_receive(Tick())
    ((_, failing, text, _),) = alone.starts()
    assert not failing
    assert re.fullmatch(r"the making of service 'bank' has not ended since \d\d:\d\d:\d\d", text)
    alone.worker(id).started_at -= 120
    alone.pool.on_receive(Tick())
    (_, failing, text, _) = alone.starts()[-1]
    assert failing
    assert text.startswith("no worker has started within 120 s (start_timeout): the making of service 'bank' has not")


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
