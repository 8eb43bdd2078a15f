"""The history read from beginning to end, one page at a time."""

from __future__ import annotations

from pathlib import Path

from stageflow_actors.history import HistoryReader, HistoryWriter
from stageflow_actors.history.rows import HistoryRow


def row(number: int) -> HistoryRow:
    status = "failed" if number % 3 == 0 else "completed"
    return HistoryRow(f"i{number}", 1, f"w{number % 2}", 1, status, 1.0, 2.0, None, None, None, b"outcome")


def test_all_rows_are_walked_over_in_the_order_in_which_they_finished(tmp_path: Path) -> None:
    with HistoryWriter.open(tmp_path / "history.db", create=True) as writer:
        writer.write([row(number) for number in range(1_001)])
        with HistoryReader.open(tmp_path / "history.db") as reader:
            assert [each.instance_id for each in reader.iterate()] == [f"i{number}" for number in range(1_001)]
            failed = [each.instance_id for each in reader.iterate("failed", "w1")]
            assert failed == [f"i{number}" for number in range(1_001) if number % 3 == 0 and number % 2]
            iterate = reader.iterate()
            next(iterate)
            writer.write([row(1_001)])
            assert [each.instance_id for each in iterate][-1] == "i1001", "what finishes meanwhile is walked over too"
