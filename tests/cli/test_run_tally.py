"""The counts of `stageflow run` after an interruption: what this run has finished, and what an earlier one had."""

from __future__ import annotations

import pytest

from stageflow_actors.cli.results_file import Tally
from stageflow_actors.core.codec import ContextCodec
from stageflow_actors.core.envelope import EMPTY_TRAIL, Outcome, encode, raw
from stageflow_actors.core.result import result_of_outcome


@pytest.mark.parametrize(
    ("started", "finished", "counts"),
    [(110.0, 120.0, (1, 0)), (50.0, 120.0, (1, 0)), (50.0, 60.0, (0, 1))],
    ids=["in_this_run", "resumed_by_this_run", "before_this_run"],
)
def test_an_instance_counts_as_done_by_the_run_in_which_it_has_ended(
    started: float, finished: float, counts: tuple[int, int]
) -> None:
    tally = Tally(since=100.0)
    outcome = encode(Outcome("orders", 1, "completed", raw({}), EMPTY_TRAIL, started, finished))
    tally.add(result_of_outcome("i1", outcome, ContextCodec(dict)))
    assert (tally.done, tally.skipped) == counts
