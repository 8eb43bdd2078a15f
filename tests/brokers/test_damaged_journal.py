"""A journal that lacks its beginning, contradicts itself or was changed on disk is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engine_peer import EnginePeer

from stageflow_brokers.api import FLAG_START
from stageflow_brokers.core import records, wire
from stageflow_brokers.core import state as store_module
from stageflow_brokers.engine.engine import Engine
from stageflow_brokers.errors import JournalCorrupt
from stageflow_brokers.journal.format import Record
from stageflow_brokers.journal.journal import Journal
from stageflow_brokers.journal.verify import verify
from stageflow_brokers.offline.settlements import count_settlements, ended_groups, load_engine

SEGMENT = 16 << 10


class Publisher(EnginePeer):
    """A peer that publishes to a broker on a real directory."""

    def __init__(self, directory: Path) -> None:
        super().__init__(Engine(journal_dir=directory, segment_bytes=SEGMENT))
        self.hello()

    def publish(self, count: int, size: int = 1000) -> None:
        for _ in range(count):
            group = f"g{self.frame}"
            self.send(wire.PUBLISH, [("q", "a")], [(0, size, group, 1, FLAG_START)], blob=bytes(size))


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.journal"))


READERS: list[Callable[[Path], object]] = [
    lambda path: Engine(journal_dir=path, segment_bytes=SEGMENT),
    count_settlements,
    load_engine,
    lambda path: ended_groups(path, ":finished", audit=True),
]


@pytest.mark.parametrize("compacted", [False, True], ids=["as it grew", "after a compaction"])
@pytest.mark.parametrize("read", READERS, ids=["engine", "settlements", "offline", "departures"])
def test_a_journal_whose_oldest_segments_are_missing_is_refused(
    tmp_path: Path, compacted: bool, read: Callable[[Path], object]
) -> None:
    peer = Publisher(tmp_path)
    peer.publish(60)
    if compacted:
        peer.compact()
        peer.publish(60)
    peer.engine.close()
    assert len(segments(tmp_path)) > 3
    missing = segments(tmp_path)[0]
    for path in segments(tmp_path)[:2]:
        path.unlink()
    with pytest.raises(JournalCorrupt, match="is missing") as caught:
        read(tmp_path)
    assert caught.value.file == missing.name


def test_deleted_segments_are_not_missed(tmp_path: Path) -> None:
    peer = Publisher(tmp_path)
    peer.publish(60)
    first = segments(tmp_path)[0]
    peer.compact()
    peer.publish(5)
    peer.engine.close()
    assert first not in segments(tmp_path)
    for read in READERS:
        read(tmp_path)


@pytest.mark.parametrize(
    "record",
    [
        Record(200, 1, 0, b"", b""),
        Record(records.COPY, 1, 0, b"\xc1 no msgpack", b"body"),
        Record(records.STARTED, 1, 0, wire.encode(1 << 40), b""),
        Record(records.GROUP, 1 << 63, 0, wire.encode(("g", 1, None, False, "", None)), b""),
        Record(records.PUBLISH_FRAME, 1, 7, wire.encode((1, 1, [], [(5, 1)])), b"x"),
    ],
    ids=["an unknown kind", "no msgpack", "an impossible epoch", "an impossible number", "a target that is not there"],
)
def test_a_record_that_makes_no_sense_is_refused_with_its_place(tmp_path: Path, record: Record) -> None:
    peer = Publisher(tmp_path)
    peer.publish(3)
    peer.engine.close()
    journal = Journal.open(tmp_path, replay=lambda batch: None, segment_bytes=SEGMENT)
    place = journal.commit([record], 1.0)
    journal.close()
    assert verify(tmp_path) == [], "its bytes are as they were written"
    for read in READERS:
        with pytest.raises(JournalCorrupt, match="cannot understand") as caught:
            read(tmp_path)
        assert (caught.value.file, caught.value.offset) == (segments(tmp_path)[-1].name, place.batch)


def test_a_body_that_has_changed_on_the_disk_is_neither_delivered_nor_copied_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_RESIDENT_BODIES", 5)
    peer = Publisher(tmp_path)
    peer.publish(60)
    path = segments(tmp_path)[1]
    content = bytearray(path.read_bytes())
    content[1_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(JournalCorrupt) as caught:
        peer.compact()
    assert caught.value.file == path.name
    assert path in segments(tmp_path), "what tells of it is still there"
    assert [found.file for found in verify(tmp_path) if found.damage][:1] == [path.name]
