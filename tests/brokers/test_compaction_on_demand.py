"""Compaction on demand deletes every sealed segment and loses no live message."""

from __future__ import annotations

from pathlib import Path

import pytest

from stageflow_brokers.api import FLAG_START, Listener, PublishItem, Target
from stageflow_brokers.client.connection import Connection
from stageflow_brokers.engine.engine import Engine
from stageflow_brokers.memory import MemoryBroker

SEGMENT = 1 << 20


class Hub:
    """A broker in this process on a journal of small segments."""

    def __init__(self, path: Path | None) -> None:
        self.engine = Engine(journal_dir=path, segment_bytes=SEGMENT)
        self.hub = MemoryBroker(engine=self.engine)
        self.peer: Connection = self.hub.connect(Listener(), name="test")

    def fill(self, first: int, count: int) -> None:
        bodies = [b"x" * 20_000] * count
        items = [PublishItem(0, len(body), f"g{first + n}", 1, FLAG_START) for n, body in enumerate(bodies)]
        self.peer.publish([Target("q", "label")], items, bodies).result(20)

    def compact(self) -> None:
        assert self.peer.admin.compact(True).result(20) in (True, False)
        while self.peer.admin.compact(False).result(20):
            pass

    def segments(self) -> int:
        assert self.engine.journal is not None
        return len(self.engine.journal.segments())


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "journal"
    path.mkdir()
    return path


def test_all_sealed_segments_go_and_what_is_alive_stays(journal: Path) -> None:
    hub = Hub(journal)
    for first in range(0, 200, 20):
        hub.fill(first, 20)
    ids = [message["id"] for message in hub.peer.admin.peek("q", 0, 1000).result(20)]
    hub.peer.admin.purge("q", ids[:190]).result(20)
    assert hub.segments() > 3
    hub.compact()
    assert hub.segments() <= 2, "the open one, and what was alive may have opened another"
    hub.hub.close()
    again = Hub(journal)
    left = again.peer.admin.peek("q", 0, 1000).result(20)
    assert [message["group"] for message in left] == [f"g{n}" for n in range(190, 200)]
    assert all(message["body"] == b"x" * 20_000 for message in left)
    again.hub.close()


def test_there_may_be_nothing_to_do(journal: Path) -> None:
    hub = Hub(journal)
    hub.compact()
    hub.compact()
    assert hub.segments() == 1
    hub.hub.close()


def test_a_broker_without_a_journal_has_nothing_to_compact() -> None:
    hub = Hub(None)
    hub.compact()
    hub.hub.close()
