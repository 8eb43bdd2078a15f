"""Rows that the coordinator could not write at first: each is written, and each instance acknowledged once."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors.core.envelope import EMPTY_TRAIL, Outcome, encode, raw
from stageflow_actors.core.plan import Naming
from stageflow_actors.history import HistoryReader, HistoryRow, HistoryUnavailable, HistoryWriter
from stageflow_actors.runtime.node import coordinator as module
from stageflow_actors.runtime.node.coordinator import Coordinator, Deliveries, Flush
from stageflow_brokers.types import DeliveryItem

NAMING = Naming()


class Broker:
    """Records which instances were acknowledged."""

    def __init__(self) -> None:
        self.acknowledged: list[str] = []
        self.admin = self

    def settle(self, targets: Any, moves: Any, acks: Any, others: Any, bodies: Any) -> None:
        self.acknowledged += [group for _, _, _, group in acks]

    def set_fact(self, name: str, value: str) -> Future[None]:
        return Future()


class FullAtFirst:
    """A history on a disk that has no room for more than `room` rows at once."""

    def __init__(self, writer: HistoryWriter, path: Path, room: int) -> None:
        self._writer = writer
        self._path = path
        self.room = room
        self.sizes: list[int] = []

    @property
    def written(self) -> int:
        return self._writer.written

    def write(self, rows: Iterable[HistoryRow], *more: Any) -> None:
        rows = list(rows)
        self.sizes.append(len(rows))
        if len(rows) > self.room:
            raise HistoryUnavailable(self._path, "the disk is full")
        self._writer.write(rows, *more)


def test_after_a_write_that_failed_each_pending_row_is_written_and_acknowledged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", 8)
    monkeypatch.setattr(module, "WRITE_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(module, "FULL_RETRY_SECONDS", 0.0)
    path = tmp_path / "history.db"
    ids = [f"i{number}" for number in range(11)]
    outcome = encode(Outcome("orders", 1, "completed", raw({}), EMPTY_TRAIL, 1.0, 2.0))
    items = [DeliveryItem(number, number, len(outcome), id, 1) for number, id in enumerate(ids)]
    with HistoryWriter.open(path, create=True) as writer, HistoryReader.open(path) as reader:
        history, broker = FullAtFirst(writer, path, 2), Broker()
        given: Any = (broker, history)
        coordinator = Coordinator(*given, NAMING, [], None, fail=pytest.fail)
        coordinator.on_receive(Deliveries(NAMING.finished, items, [outcome] * len(items)))
        for _ in range(20):
            coordinator.on_receive(Flush())
        assert history.sizes[:4] == [8, 4, 2, 4], "half of it, until it fits, and then more again"
        assert broker.acknowledged == ids
        assert [id for id in ids if not reader.exists(id)] == []
        assert sum(size for size in history.sizes if size <= history.room) == len(ids)
