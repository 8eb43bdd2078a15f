"""Every bug that the simulator has found, by the seed that finds it.

A change of the simulator makes another run of a seed. So each bug is also a mutant of `scripts/mutants.py`, which
plants it again and shows that the seed named here still finds it; where it does not, another one has to be looked for.
What happened is told step by step in `tests/brokers/test_talk_accidents.py`, `tests/runtime/test_retiring_workers.py`.
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
    "recycled": Seed(12, True, "a recycled worker whose messages had failed was charged with a death"),
    "watched-again": Seed(226, False, "a start that was sent again was answered, and its end never told"),
    "answer-with-welcome": Seed(341, False, "an answer that came with the welcome was thrown away"),
}


@pytest.mark.parametrize("name", SEEDS)
def test_what_was_found_once_is_not_found_again(name: str) -> None:
    seed = SEEDS[name]
    simulate(seed.number, wild=seed.wild)
