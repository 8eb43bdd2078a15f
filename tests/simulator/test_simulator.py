"""The whole cluster under a virtual clock: hundreds of seeds of accidents.

`scripts/simulate.py` runs more of them. A bug found by a seed is also reproduced step by step, because a change of the
simulator changes the run of the seed (see `tests/brokers/test_connection_accidents.py`,
`tests/runtime/test_retiring_workers.py`).
"""

from __future__ import annotations

from collections import Counter

import pytest
from simulation import Simulation, simulate

from stageflow_actors.core.envelope import decode_outcome
from stageflow_actors.core.routing import uncertain_stages

TAME, WILD = range(160), range(160)
PART = 40


@pytest.mark.parametrize("first", range(TAME.start, TAME.stop, PART))
def test_whatever_breaks_each_instance_ends_exactly_as_its_workflow_requires(first: int) -> None:
    for seed in range(first, first + PART):
        simulate(seed, wild=False)


@pytest.mark.parametrize("first", range(WILD.start, WILD.stop, PART))
def test_whatever_is_killed_cancelled_or_late_each_result_is_true(first: int) -> None:
    for seed in range(first, first + PART):
        simulate(seed, wild=True)


def test_a_seed_is_one_run_and_no_other() -> None:
    first, second, other = (simulate(seed, wild=True) for seed in (7, 7, 8))
    assert (first.world.log, first.world.happened) == (second.world.log, second.world.happened)
    assert first.effects == second.effects
    assert first.world.happened != other.world.happened


def test_the_seeds_bring_every_accident_request_expiry_and_end() -> None:
    accidents: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    undone: Counter[str] = Counter()
    for seed in range(200, 240):
        ran: Simulation = simulate(seed, wild=True)
        accidents.update(ran.tally())
        ends.update(row.status for row in ran.history.rows.values())
        ends.update("parked" for job in ran.jobs if job.parked)
        for row in ran.history.rows.values():
            outcome = decode_outcome(row.outcome)
            names = {record.stage_id for record in outcome.compensations}
            undone["of unknown effect"] += bool(names.intersection(uncertain_stages(outcome.trail)))
            undone["by a retry"] += any(record.rerun for record in outcome.compensations)
    assert set(accidents) == {
        "kill",
        "_kill_broker_in_a_call",
        "_fail_a_sync",
        "_kill_node",
        "_kill_program",
        "_lose_power",
        "_break_connections",
        "_freeze",
        "_fill_history",
        "_set_the_clock",
        "_kill_worker",
        "_curse",
        "_curse_an_endpoint",
        "_cancel",
        "_scale",
        "_pause",
        "_run_again",
        "an endpoint has worked",
        "a reply was handed on",
        "a reply was taken in",
        "a message has expired",
        "a worker could not start",
        "a higher priority waits",
        "waits beside an idle worker",
    }
    assert min(undone.values()) > 0, undone
    assert set(ends) == {"completed", "failed", "compensated", "compensation_failed", "cancelled", "parked"}
