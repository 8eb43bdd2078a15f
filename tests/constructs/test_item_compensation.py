"""How far the items of a map are compensated over attempts, deaths and restarts, without any worker."""

from __future__ import annotations

from stageflow_actors.core.envelope import Failure
from stageflow_actors.core.failures import write_failure
from stageflow_actors.runtime.worker.executors.item_compensation import ItemCompensationState

LOST = write_failure(Failure("exception", "ValueError: no", "ValueError"))
DIED = write_failure(Failure("died", "WorkerDied: the worker process died"))


def left(state: ItemCompensationState, count: int = 6) -> list[int]:
    return [number for number in reversed(range(count)) if state.is_pending(number)]


def again(state: ItemCompensationState, count: int = 6) -> ItemCompensationState:
    """As the next delivery finds it."""
    return ItemCompensationState.restore(count, state.dump())


def test_an_attempt_is_about_those_that_failed_and_those_not_reached() -> None:
    state = ItemCompensationState.restore(6, None)
    assert state.begin(0) == 1
    for number in (5, 4, 3):
        state.record(number, LOST if number == 4 else None)
    assert left(state) == [2, 1, 0]
    state = again(state)
    assert (state.begin(0), left(state)) == (1, [2, 1, 0]), "delivered again, the attempt goes on"
    assert (state.begin(1), left(state)) == (2, [4, 2, 1, 0])
    state.record(4, None)
    assert (left(state), state.failed_count) == ([2, 1, 0], 0)


def test_the_first_failure_of_the_attempt_is_reported_with_the_number_of_failures() -> None:
    state = ItemCompensationState.restore(3, None)
    state.begin(0)
    for number in (2, 1, 0):
        state.record(number, LOST if number else None)
    told = "2 of 3 items of 'm' could not be undone; the first was item 2: ValueError: no"
    assert again(state, 3).describe_failures("m", 3) == told
    state.begin(1)
    state.record(2, None)
    state.record(1, LOST)
    told = "1 of 3 items of 'm' could not be undone; the first was item 1: ValueError: no"
    assert state.describe_failures("m", 3) == told
    state.begin(2)
    state.record(1, None)
    assert state.describe_failures("m", 3) is None


def test_the_message_that_ends_the_worker_is_found_the_second_time_and_the_attempt_goes_on() -> None:
    state = ItemCompensationState.restore(6, None)
    state.begin(0)
    assert state.record_death(0, DIED), "any of them may have"
    assert state.one_by_one
    state = again(state)
    assert (state.begin(1), left(state)) == (1, [5, 4, 3, 2, 1, 0])
    state.record(5, None)
    state.current = 4
    state = again(state)
    assert state.record_death(1, DIED), "it was the one that had been begun"
    assert (state.begin(2), left(state), state.failed_count) == (1, [3, 2, 1, 0], 1)
    assert (state.begin(3), left(state)) == (2, [4, 3, 2, 1, 0])


def test_a_cut_that_is_reported_twice_counts_once() -> None:
    state = ItemCompensationState.restore(6, None)
    state.begin(0)
    state.record_death(0, DIED)
    state = again(state)
    state.current = 5
    state.record_death(0, DIED)
    assert state.begin(1) == 1


def test_a_worker_that_ends_before_any_item_is_begun_has_failed_in_this_attempt() -> None:
    state = ItemCompensationState.restore(6, None)
    state.begin(0)
    assert state.record_death(0, DIED)
    assert not again(state).record_death(1, DIED)
