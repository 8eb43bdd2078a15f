"""Reading a journal beside its writer ends, however busy the writer is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from stageflow_brokers.journal import Journal, Record, scan, verify
from stageflow_brokers.journal.segment_reader import SegmentReader


def test_a_journal_that_grows_as_fast_as_it_is_read_is_read_to_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.open(tmp_path, replay=lambda batch: None, durability="write")
    batch = [Record(1, 0, 0, b"h", b"x" * 1_000)]
    for _ in range(20):
        journal.commit(batch, time.time())
    look_through = SegmentReader.find_next_batch
    looked: list[int] = []

    def while_the_writer_goes_on(self: SegmentReader, *where: Any) -> Any:
        """Looking through what is left of a segment takes longer than the writer takes for a batch."""
        assert len(looked) < 50, "it reads for ever"
        looked.append(1)
        found = look_through(self, *where)
        journal.commit(batch, time.time())
        return found

    again = SegmentReader.refresh

    def refresh(self: SegmentReader) -> None:
        journal.commit(batch, time.time())
        again(self)

    monkeypatch.setattr(SegmentReader, "find_next_batch", while_the_writer_goes_on)
    monkeypatch.setattr(SegmentReader, "refresh", refresh)
    try:
        assert verify(tmp_path) == []
        numbers = [one.number for one in scan(tmp_path)]
    finally:
        journal.close()
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 20, "all that was there when it began is read"


def test_a_segment_that_is_sealed_while_it_is_read_is_no_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(tmp_path, replay=lambda batch: None, durability="write")
    small, large = ([Record(1, 0, 0, b"h", b"x" * size)] for size in (1_000, 1 << 20))
    journal.commit(small, time.time())
    again = SegmentReader.refresh
    rounds = iter([small, small, large, large, large, large, large, small, large])

    def refresh(self: SegmentReader) -> None:
        more = next(rounds, None)
        if more is not None:
            journal.commit(more, time.time())
        again(self)

    monkeypatch.setattr(SegmentReader, "refresh", refresh)
    try:
        for _ in range(8):
            assert verify(tmp_path) == []
    finally:
        journal.close()
    assert len(list(tmp_path.glob("*.journal"))) > 1
