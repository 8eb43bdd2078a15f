"""A sample of `scripts/torture.py`: the journal of a real broker cut, garbled, flipped, failed and crashed."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from script_runner import run_script

from torturing.crashes import crash_at_every_call
from torturing.faults import FAULTS, LASTING, READING, fail_every_call, fail_every_read
from torturing.journal_at_rest import cut_everywhere, flip_bits, lose_files, lose_sectors, spoil_sectors
from torturing.sample_journal import SampleJournal
from torturing.scenarios import SCENARIOS, RepairScenario, Scenario


@pytest.fixture(scope="module")
def sample() -> SampleJournal:
    """A journal of a broker that was worked, compacted, and sent bodies that are journals themselves."""
    grown = SampleJournal.grow(2, 160)
    assert len(grown.decoded) > 100
    assert grown.records > 200
    assert len(grown.files) > 20
    return grown


def test_every_beginning_of_a_journal_makes_the_state_that_was_in_memory_then(sample: SampleJournal) -> None:
    assert sample.check_states() > 100


def test_a_journal_cut_at_any_byte_is_recovered_to_its_last_whole_batch_or_refused(sample: SampleJournal) -> None:
    figures: Counter[str] = Counter()
    cut_everywhere(sample, figures, share=0.001, edges=0.06, chance=random.Random(1))
    assert figures["bytes cut"] > 100
    assert all(figures[kind] > 3 for kind in figures if kind.startswith("  "))


def test_a_segment_that_is_missing_in_the_middle_or_at_the_end_is_refused(sample: SampleJournal) -> None:
    figures: Counter[str] = Counter()
    lose_files(sample, figures)
    assert figures["segments deleted"] > 20


def test_any_sectors_of_the_last_batch_may_be_lost_garbled_or_stale_but_none_before_it(sample: SampleJournal) -> None:
    figures: Counter[str] = Counter()
    lose_sectors(sample, figures, rounds=6, chance=random.Random(2))
    assert figures["sectors lost"] > 50
    assert figures["acknowledged batches lost"] >= 6


def test_a_sector_that_cannot_be_read_is_refused_with_its_place_and_repair_goes_on(sample: SampleJournal) -> None:
    figures: Counter[str] = Counter()
    spoil_sectors(sample, figures, share=0.1, chance=random.Random(8))
    assert figures["sectors made unreadable"] > 20


def test_a_flipped_bit_is_refused_with_its_place_and_repair_keeps_what_comes_before_it(sample: SampleJournal) -> None:
    figures: Counter[str] = Counter()
    flip_bits(sample, figures, share=0.0015, bodies=0.00005, chance=random.Random(3))
    assert figures["bits flipped"] > 100
    assert figures["journals repaired"] > 5


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(("code", "name"), FAULTS, ids=[name for _, name in FAULTS])
def test_a_disk_that_fails_at_any_call_loses_nothing_acknowledged(scenario: str, code: int, name: str) -> None:
    figures: Counter[str] = Counter()
    for for_ever in (False, True) if name in LASTING else (False,):
        fail_every_call(scenario, code, figures, for_ever=for_ever, share=0.12, chance=random.Random(4), seed=5)
    assert figures["faults injected"] >= 1


@pytest.mark.parametrize("scenario", READING)
def test_a_read_that_fails_changes_nothing_and_loses_nothing(scenario: str) -> None:
    figures: Counter[str] = Counter()
    fail_every_read(scenario, figures, share=0.5, chance=random.Random(9), seed=5)
    assert figures["reads failed"] > 5


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_crash_may_lose_and_reorder_whatever_was_not_synced(scenario: str) -> None:
    figures: Counter[str] = Counter()
    crash_at_every_call(scenario, figures, most=16, chance=random.Random(6), seed=7)
    assert figures["crash states"] > figures["crash points"] > 15


# the judges can say no


def test_a_journal_that_acknowledges_before_the_sync_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from torturing.scenarios import Disk

    monkeypatch.setattr(Disk, "fdatasync", lambda self, fd: None)
    with pytest.raises(AssertionError, match="what was acknowledged is not what was recovered"):
        crash_at_every_call("append and rotation", Counter(), most=16, chance=random.Random(6), seed=7)


def test_names_that_were_not_synced_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from torturing.scenarios import Disk

    monkeypatch.setattr(Disk, "fsync_dir", lambda self, path: None)
    with pytest.raises(AssertionError, match="what was acknowledged is not what was recovered"):
        crash_at_every_call("compaction", Counter(), most=16, chance=random.Random(6), seed=7)


def test_a_repair_that_cuts_before_it_copies_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from stageflow_brokers.journal.repair import _Repair

    monkeypatch.setattr(_Repair, "_copy", lambda self, name: None)
    scenario = RepairScenario()
    disk = scenario.set(1)
    scenario.act()
    disk.kill()
    with pytest.raises(AssertionError, match="cut before it was copied"):
        scenario.judge(disk)


def test_damage_that_is_dropped_without_a_word_is_found_out(
    sample: SampleJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stageflow_brokers.journal.segment_reader import SegmentReader

    monkeypatch.setattr(SegmentReader, "find_next_batch", lambda self, offset, number, salt: (None, 0))
    with pytest.raises(AssertionError):
        flip_bits(sample, Counter(), share=0.0015, bodies=0.00005, chance=random.Random(3))


def test_a_broker_that_goes_on_after_a_failure_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from stageflow_brokers.engine.engine import Engine

    monkeypatch.setattr(Engine, "round", lambda self, frames, more=False: self._round(frames, more))
    with pytest.raises(AssertionError, match="acknowledged after a failed one"):
        fail_every_call(
            "append and rotation", FAULTS[0][0], Counter(), for_ever=False, share=1, chance=random.Random(1)
        )


def test_the_script_prints_what_it_did() -> None:
    run = run_script("torture", "--share", "0.01", "--only", "faults", "crashes")
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ +faults injected", run.stdout)
    assert "the law holds" in run.stdout


def test_a_scene_without_faults_ends_well() -> None:
    for make in SCENARIOS.values():
        scenario: Scenario = make()
        disk = scenario.set(3)
        scenario.act()
        disk.crash()
        scenario.judge(disk)
