"""Bugs that the simulator has found, each with a seed that finds it.

A change of the simulator, or of the code it drives, changes the run of a seed. So each bug is also a mutant of
`scripts/mutants.py`, which plants it again and shows that the seed named here still finds it; otherwise another seed
must be found. Bugs that no seed finds any more are reproduced step by step in
`tests/brokers/test_connection_accidents.py`, `tests/brokers/test_replay_accidents.py`,
`tests/runtime/test_retiring_workers.py` and `tests/runtime/test_api_failures.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
from simulation import simulate


class Seed(NamedTuple):
    """`found`: what went wrong then."""

    number: int
    wild: bool
    found: str


SEEDS = {
    "greeting-twice": Seed(27, False, "a greeting that came twice took back what was delivered since"),
    "recycled": Seed(246, True, "a recycled worker whose messages had failed was charged with a death"),
    "parked-while-asked": Seed(98, False, "who waited for a parked instance was not told while its request lay unread"),
}


@pytest.mark.parametrize("name", SEEDS)
def test_a_bug_found_once_is_not_found_again(name: str) -> None:
    seed = SEEDS[name]
    simulate(seed.number, wild=seed.wild)


def test_workers_that_cannot_start_are_tried_again_later_each_time() -> None:
    failed = 0
    for number in (4, 9, 14, 19):
        failed += simulate(number, wild=False).starts.failures
    assert failed > 20
