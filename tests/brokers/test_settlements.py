"""Settlements counted from the journal on disk."""

from pathlib import Path
from typing import Any

import pytest

from stageflow_actors.core.envelope import Failure
from stageflow_brokers.api import Target
from stageflow_brokers.errors import JournalCorrupt, JournalError
from stageflow_brokers.offline.settlements import count_settlements

FIRST, PAY = "stageflow.orders.stage0", "stageflow.orders.stage1"


def test_each_accepted_transition_counts_once_under_instance_epoch_and_label(filled: Any) -> None:
    filled.start("i1", {})
    filled.settle_next(FIRST, to=Target(PAY, "pay"), body=b"next")
    filled.settle_next(PAY, to=Target("stageflow.compensation.orders", "compensate:reserve"), body=b"undo")
    filled.settle_next("stageflow.compensation.orders")
    accounts = count_settlements(filled.close() / "journal")
    assert accounts.settled == {("i1", 1, "reserve"): 1, ("i1", 1, "pay"): 1, ("i1", 1, "compensate:reserve"): 1}
    assert accounts.live_messages == accounts.live_groups == accounts.unnamed == 0


def test_what_waits_is_parked_or_was_purged_has_not_been_settled(filled: Any) -> None:
    filled.start("parked", {})
    filled.settle_next(FIRST, parked=Failure("exception", "ValueError: no"))
    filled.start("waits", {})
    filled.start("purged", {}, queue="elsewhere")
    assert filled.ask.purge("elsewhere", [])["purged"] == 1
    accounts = count_settlements(filled.close() / "journal")
    assert accounts.settled == {}
    assert (accounts.live_messages, accounts.live_groups) == (2, 2)


def test_a_requeued_message_counts_when_it_is_done_at_last(filled: Any) -> None:
    filled.start("i1", {})
    filled.settle_next(FIRST, parked=Failure("exception", "ValueError: no"))
    filled.ask.requeue(FIRST, [])
    filled.settle_next(FIRST)
    assert count_settlements(filled.close() / "journal").settled == {("i1", 1, "reserve"): 1}


def test_of_a_frame_that_was_taken_in_part_only_that_part_counts(filled: Any) -> None:
    filled.start("i1", {})
    filled.start("i2", {})
    first, second = filled.take(FIRST), filled.take(FIRST)
    first.settle_all()
    # The second worker settles its own message and, with it, the one that the first had.
    second.settle_all(also=first.leases)
    assert second.stale == [first.leases[0][0]]
    accounts = count_settlements(filled.close() / "journal")
    assert accounts.settled == {("i1", 1, "reserve"): 1, ("i2", 1, "reserve"): 1}


def test_the_journal_may_be_read_while_it_is_written(filled: Any) -> None:
    filled.start("i1", {})
    filled.settle_next(FIRST)
    filled.start("i2", {})
    accounts = count_settlements(filled.data_dir.journal)
    assert (accounts.settled, accounts.live_messages) == ({("i1", 1, "reserve"): 1}, 1)
    assert sum(accounts.record_kinds.values()) == accounts.records


def test_damage_and_absence_are_reported_not_counted(filled: Any, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no journal"):
        count_settlements(tmp_path / "nowhere")
    for name in ("i1", "i2", "i3"):
        filled.start(name, {"name": name})
    segment = next((filled.close() / "journal").glob("*.journal"))
    content = bytearray(segment.read_bytes())
    content[1024 + 60] ^= 1
    segment.write_bytes(content)
    with pytest.raises(JournalCorrupt) as caught:
        count_settlements(segment.parent)
    assert (caught.value.file, caught.value.offset) == (segment.name, 1024)
