"""How many messages a worker holds, by the time that they take."""

from __future__ import annotations

from stageflow_actors.runtime.worker.prefetch import LONG_SECONDS, MAX_PREFETCH, Prefetch


def measured(prefetch: Prefetch, seconds: float, times: int = 1, count: int = 1) -> int:
    for _ in range(times):
        prefetch.measure(seconds * count, count)
    return prefetch.limit


def test_microsecond_stages_hold_deep_credit_which_grows_step_by_step() -> None:
    prefetch = Prefetch()
    assert prefetch.limit == 1
    limits = [measured(prefetch, 5e-6, count=100) for _ in range(6)]
    assert limits == [4, 16, 64, 256, 1024, MAX_PREFETCH]


def test_what_waits_takes_twenty_milliseconds() -> None:
    assert measured(Prefetch(), 0.001, times=10) == 20


def test_a_stage_under_the_recall_limit_holds_two_and_a_long_one_exactly_one() -> None:
    assert measured(Prefetch(), 0.02, times=9) == 2
    assert measured(Prefetch(), 0.049, times=9) == 2
    assert measured(Prefetch(), LONG_SECONDS, times=9) == 1
    assert measured(Prefetch(), 3.0) == 1


def test_a_worker_of_several_lanes_holds_as_many_more_as_all_lanes_finish_in_that_time() -> None:
    assert measured(Prefetch(10), 0.005, times=9) == 40
    assert measured(Prefetch(10), 0.03, times=9) == 11
    assert measured(Prefetch(10), 1.0, times=9) == 10


def test_a_stage_that_becomes_slow_holds_few_after_two_messages() -> None:
    prefetch = Prefetch()
    measured(prefetch, 5e-6, times=10, count=400)
    assert prefetch.surplus(300) == 0
    measured(prefetch, 0.04)
    measured(prefetch, 0.04)
    assert prefetch.limit == 2
    assert prefetch.surplus(300) == 298


def test_one_pause_of_the_process_does_not_make_a_stage_slow() -> None:
    prefetch = Prefetch()
    measured(prefetch, 5e-6, times=10, count=400)
    measured(prefetch, 0.01)
    assert prefetch.surplus(300) == 0
    assert measured(prefetch, 5e-6, times=2, count=400) > 500


def test_a_long_message_among_many_short_ones_is_remembered() -> None:
    prefetch = Prefetch()
    for _ in range(3):
        measured(prefetch, 20e-6, count=9)
        measured(prefetch, 1.0)
    assert measured(prefetch, 20e-6, count=9) == 1


def test_after_a_recall_a_worker_holds_what_it_works_on_until_the_next_measurement() -> None:
    prefetch = Prefetch(4)
    measured(prefetch, 0.001, times=9)
    prefetch.reset()
    assert prefetch.limit == 4
