"""A sample of `scripts/mutants.py`: each mistake can be planted, each killer exists, and killers kill."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from script_runner import run_script

from mutants import ROOT, plant, survived
from mutating import MUTANTS
from mutating.mutant import Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_each_mistake_can_still_be_made(mutant: Mutant) -> None:
    plant(mutant, ROOT, dry=True)


def test_each_mistake_has_a_name_of_its_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_each_killer_is_a_test() -> None:
    killers = sorted({killer for mutant in MUTANTS for killer in mutant.killers})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *killers]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout
    assert sorted(line for line in run.stdout.splitlines() if "::" in line) == killers


def test_each_seed_that_has_found_a_bug_kills_a_mutant() -> None:
    """So that it goes on to mean something when the simulator changes."""
    source = (ROOT / "tests" / "simulator" / "test_named_seeds.py").read_text()
    named = set(re.findall(r'^    "([a-z-]+)": Seed\(', source, re.MULTILINE))
    killers = " ".join(killer for mutant in MUTANTS for killer in mutant.killers)
    assert named
    assert named == set(re.findall(r"test_named_seeds\.py::\w+\[([a-z-]+)\]", killers))


def test_mistakes_in_broker_and_saga_die() -> None:
    run = run_script("mutants", "dispatch-before-fsync", "compensation-by-index")
    assert (run.returncode, run.stdout.count("dies by")) == (0, 2), run.stdout + run.stderr


def test_a_change_that_is_no_mistake_lives() -> None:
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "compensation-by-index")
    ((file, there, _),) = mutant.edits
    assert survived(mutant._replace(edits=((file, there, f"{there}\n"),))) == list(mutant.killers)


def test_a_mistake_that_cannot_be_planted_is_an_error_and_no_death() -> None:
    stale = MUTANTS[0]._replace(edits=(("brokers/stageflow_brokers/engine/engine.py", "what is not there", ""),))
    with pytest.raises(SystemExit, match="has 0 times, not once"):
        survived(stale)
