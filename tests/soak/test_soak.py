"""A few seconds of `scripts/soak.py`, and its judge, which must notice growth."""

from __future__ import annotations

import re
from typing import Any

import pytest
from script_runner import run_script


def test_a_moment_under_mixed_load_leaves_nothing_behind_and_nothing_wrong() -> None:
    run = run_script("soak", "--seconds", "5", "--rate", "12", "--ignore-latency")
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    ended = re.search(r"instances: (\d+) cancelled, (\d+) compensated, ([\d,]+) completed", run.stdout)
    assert ended is not None, run.stdout
    assert all(int(number.replace(",", "")) > 0 for number in ended.groups())


@pytest.fixture
def soaking() -> Any:
    """The modules of the script."""
    from soaking import judge, measure

    return judge, measure


def samples(soaking: Any, **grown: float) -> list[Any]:
    """Return samples of 100 seconds in which only the named figures grow, from zero to the given value."""
    judge, measure = soaking
    made = []
    for second in range(101):
        figures = dict.fromkeys(judge.BOUNDS, 100.0)
        for name, most in grown.items():
            what, _, which = name.partition("_")
            figures[what, which] += most * second / 100
        made.append(measure.Sample(float(second), figures))
    return made


def test_the_judge_compares_thirds_once_it_is_warm(soaking: Any) -> None:
    judge, _ = soaking
    assert judge.thirds(10.0, 100.0, 30.0) == ((40.0, 60.0), (80.0, 100.0))


@pytest.mark.parametrize(
    ("grown", "found"),
    [
        ({}, []),
        ({"rss_broker": 10e6}, []),
        ({"rss_broker": 50e6}, [("rss", "broker")]),
        ({"rss_worker": 30e6}, [("rss", "worker")]),
        ({"descriptors_node": 30}, [("descriptors", "node")]),
        ({"threads_program": 20}, [("threads", "program")]),
        ({"disk_journal": 500e6}, [("disk", "journal")]),
        ({"entries_sockets": 20}, [("entries", "sockets")]),
    ],
)
def test_the_judge_notices_what_grows(soaking: Any, grown: dict[str, float], found: list[tuple[str, str]]) -> None:
    judge, _ = soaking
    first, last = judge.thirds(0.0, 100.0, 10.0)
    rows = judge.compare(samples(soaking, **grown), first, last)
    assert [(row.what, row.which) for row in rows if row.grown] == found


def test_the_judge_notices_latency_that_grows(soaking: Any) -> None:
    judge, _ = soaking
    first, last = judge.thirds(0.0, 100.0, 10.0)
    steady = [(at / 4, 0.01) for at in range(400)]
    slower = [(at, 0.01 + at * at / 20_000) for at, _ in steady]
    assert not any(row.grown for row in judge.latencies(steady, first, last))
    assert all(row.grown for row in judge.latencies(slower, first, last))


def test_the_judge_wants_samples_of_both_ends(soaking: Any) -> None:
    judge, _ = soaking
    with pytest.raises(ValueError, match="too few"):
        judge.compare(samples(soaking)[:3], (10.0, 20.0), (30.0, 40.0))
    with pytest.raises(ValueError, match="too few"):
        judge.latencies([], (10.0, 20.0), (30.0, 40.0))
