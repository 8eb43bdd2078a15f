"""How far the items of a map are undone, over attempts, deaths and restarts: by hand, without any worker."""

from __future__ import annotations

from stageflow_actors.core.envelope import Failure
from stageflow_actors.core.failures import write_failure
from stageflow_actors.runtime.undoing import ItemCompensationState

LOST = write_failure(Failure("exception", "ValueError: no", "ValueError"))
DIED = write_failure(Failure("died", "WorkerDied: the worker process died"))


def left(undoing: ItemCompensationState, count: int = 6) -> list[int]:
    return [number for number in reversed(range(count)) if undoing.is_left(number)]


def again(undoing: ItemCompensationState, count: int = 6) -> ItemCompensationState:
    """As the next delivery finds it."""
    return ItemCompensationState.read(count, undoing.state())


def test_an_attempt_is_about_those_that_failed_and_those_not_reached() -> None:
    undoing = ItemCompensationState.read(6, None)
    assert undoing.begin(0) == 1
    for number in (5, 4, 3):
        undoing.tried(number, LOST if number == 4 else None)
    assert left(undoing) == [2, 1, 0]
    undoing = again(undoing)
    assert (undoing.begin(0), left(undoing)) == (1, [2, 1, 0]), "delivered again, the attempt goes on"
    assert (undoing.begin(1), left(undoing)) == (2, [4, 2, 1, 0])
    undoing.tried(4, None)
    assert (left(undoing), undoing.failed) == ([2, 1, 0], 0)


def test_the_first_failure_of_the_attempt_is_reported_with_the_number_of_failures() -> None:
    undoing = ItemCompensationState.read(3, None)
    undoing.begin(0)
    for number in (2, 1, 0):
        undoing.tried(number, LOST if number else None)
    told = "2 of 3 items of 'm' could not be undone; the first was item 2: ValueError: no"
    assert again(undoing, 3).described("m", 3) == told
    undoing.begin(1)
    undoing.tried(2, None)
    undoing.tried(1, LOST)
    told = "1 of 3 items of 'm' could not be undone; the first was item 1: ValueError: no"
    assert undoing.described("m", 3) == told
    undoing.begin(2)
    undoing.tried(1, None)
    assert undoing.described("m", 3) is None


def test_the_message_that_ends_the_worker_is_found_the_second_time_and_the_attempt_goes_on() -> None:
    undoing = ItemCompensationState.read(6, None)
    undoing.begin(0)
    assert undoing.cut(0, DIED), "any of them may have"
    assert undoing.careful
    undoing = again(undoing)
    assert (undoing.begin(1), left(undoing)) == (1, [5, 4, 3, 2, 1, 0])
    undoing.tried(5, None)
    undoing.at = 4
    undoing = again(undoing)
    assert undoing.cut(1, DIED), "it was the one that had been begun"
    assert (undoing.begin(2), left(undoing), undoing.failed) == (1, [3, 2, 1, 0], 1)
    assert (undoing.begin(3), left(undoing)) == (2, [4, 3, 2, 1, 0])


def test_a_cut_that_is_reported_twice_counts_once() -> None:
    undoing = ItemCompensationState.read(6, None)
    undoing.begin(0)
    undoing.cut(0, DIED)
    undoing = again(undoing)
    undoing.at = 5
    undoing.cut(0, DIED)
    assert undoing.begin(1) == 1


def test_a_worker_that_ends_before_any_item_is_begun_has_failed_in_this_attempt() -> None:
    undoing = ItemCompensationState.read(6, None)
    undoing.begin(0)
    assert undoing.cut(0, DIED)
    assert not again(undoing).cut(1, DIED)
