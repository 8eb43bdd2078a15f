"""Data directories in every state, sound and damaged, and the doctor that examines them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from programs import launch

from stageflow_actors.core.envelope import EMPTY_TRAIL, Envelope, Outcome, encode, raw
from stageflow_actors.core.plan import FINISHED
from stageflow_actors.diagnostics import doctor as doctor_module
from stageflow_actors.history import HistoryRow, HistoryWriter
from stageflow_actors.runtime.system.data_dir import DataDir
from stageflow_brokers.api import (
    FLAG_CLOSE_GROUP,
    FLAG_START,
    TERMINAL,
    Arrival,
    DeliveryItem,
    GatherOpen,
    Listener,
    PublishItem,
    Target,
)
from stageflow_brokers.core import records
from stageflow_brokers.engine.engine import Engine
from stageflow_brokers.journal.format import Record
from stageflow_brokers.journal.journal import Journal
from stageflow_brokers.memory import MemoryBroker
from stageflow_brokers.testing.harness import Answers

__all__ = ["books", "doctor", "launch", "snapshot"]

FIRST = "stageflow.orders.stage0"


class Report:
    """The report of the doctor, in JSON and by its exit code."""

    def __init__(self, code: int, out: str) -> None:
        self.code = code
        self.said: dict[str, Any] = json.loads(out)
        self.findings: list[dict[str, str]] = self.said["findings"]
        assert self.said["sound"] == (code == 0)

    def errors(self) -> list[dict[str, str]]:
        return [one for one in self.findings if one["severity"] == "error"]

    def alarms(self) -> list[dict[str, str]]:
        return [one for one in self.findings if one["severity"] != "info"]

    def one(self, severity: str, check: str) -> dict[str, str]:
        """The one finding of that kind, which says where, what, and what to do."""
        found = [one for one in self.findings if (one["severity"], one["check"]) == (severity, check)]
        assert len(found) == 1, self.findings
        assert found[0]["where"]
        assert found[0]["what"]
        assert found[0]["advice"]
        return found[0]


Doctor = Callable[[Path], Report]


@pytest.fixture
def doctor(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """Examines a data directory, in this process."""
    from stageflow_actors.cli.main import main

    monkeypatch.delenv("STAGEFLOW_DATA", raising=False)
    monkeypatch.setattr(
        doctor_module, "FAULT_CONFIRM_SECONDS", 20.0
    )  # on a busy machine workers take their time to start

    def examine(data: Path) -> Report:
        capfd.readouterr()
        code = main(["doctor", "--data", str(data), "--output", "json"])
        said = capfd.readouterr()
        assert said.err == ""
        return Report(code, said.out)

    return examine


class _Taker(Listener):
    def __init__(self) -> None:
        self.items: list[DeliveryItem] = []

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        self.items += items

    def holding(self) -> list[tuple[int, int]]:
        return [(item.id, item.lease) for item in self.items]


class Books:
    """A data directory as a cluster leaves it, written by the broker's engine and the history's writer.

    `close` puts it at rest; what is planted after that is planted into the files.
    """

    def __init__(self, path: Path) -> None:
        self.data = DataDir(path)
        self.data.journal.mkdir(mode=0o700)
        self.history = HistoryWriter.open(self.data.history, create=True)
        self._hub = MemoryBroker(engine=Engine(journal_dir=self.data.journal))
        self._client = self._hub.connect(Listener(), name="test")
        self.ask.set_fact("history", self.history.identity)

    @property
    def path(self) -> Path:
        return self.data.path

    @property
    def ask(self) -> Answers:
        return Answers(self._client.admin, 10)

    def publish(
        self,
        id: str,
        queue: str = FIRST,
        label: str = "reserve",
        *,
        flags: int = FLAG_START,
        terminal: bool = False,
        opens: Sequence[tuple[str, int, str, float]] = (),
        arrivals: Sequence[tuple[str, str]] = (),
    ) -> None:
        """A message of an instance (none for an empty `queue`), with gathers as (key, need, queue, deadline)."""
        body = encode(Envelope("orders", 1, label, raw({}), EMPTY_TRAIL, time.time()))
        if label == FINISHED:
            body = self.outcome()
        targets = [Target(queue or FIRST, label, TERMINAL if terminal else 0)]
        items = [PublishItem(0, len(body), id, 1, flags)] if queue else []
        bodies = [body] if queue else []
        opening = []
        for key, need, where, deadline in opens:
            targets.append(Target(where, key))
            opening.append(GatherOpen(key, need, len(targets) - 1, len(body), id, 1, deadline))
            bodies.append(body)
        coming = [Arrival(key, slot, 1, id, 1) for key, slot in arrivals]
        bodies += [b"x"] * len(coming)
        answer = self._client.publish(targets, items, bodies, opens=opening, arrivals=coming).result(10)
        assert answer.refused == []

    @staticmethod
    def outcome() -> bytes:
        return encode(Outcome("orders", 1, "completed", raw({}), EMPTY_TRAIL, 0.0, time.time()))

    def record(self, *ids: str, epoch: int = 1, finished: float | None = None) -> None:
        """Rows of the history."""
        at = time.time() if finished is None else finished
        row = HistoryRow("", epoch, "orders", 1, "completed", at, at, None, None, None, self.outcome())
        self.history.write([row._replace(instance_id=id) for id in ids])

    def finish(self, *ids: str) -> None:
        """Instances that come to their end as they should: the row first, then they leave."""
        for id in ids:
            self.publish(id, "stageflow.finished", FINISHED, terminal=True)
        self.record(*ids)
        taker = _Taker()
        worker = self._hub.connect(taker, role="worker", name="coordinator")
        worker.consume("stageflow.finished", 1000)
        while len(taker.items) < len(ids):
            worker.admin.ping().result(10)
        worker.settle([], [], [(item.id, item.lease, FLAG_CLOSE_GROUP, item.group) for item in taker.items], [], [])
        worker.close()

    def close(self) -> Path:
        """At rest from now on."""
        self._hub.close()
        self.history.close()
        return self.path

    def append(self, *planted: tuple[int, Any], wall: float | None = None) -> None:
        """Records (kind, header) behind the others, by the journal's own writer. At rest only."""
        journal = Journal.open(self.data.journal, replay=lambda batch: None)
        try:
            batch = [Record(kind, 0, 0, records.encode(header), b"") for kind, header in planted]
            journal.commit(batch, time.time() if wall is None else wall)
        finally:
            journal.close()

    def forget(self, *message_ids: int) -> None:
        """These messages are gone, by the journal. At rest only."""
        self.append((records.FORGET, (0, list(message_ids))))


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    """An empty directory, open."""
    made = Books(tmp_path / "data")
    yield made
    made.close()


def contents(directory: Path) -> dict[str, tuple[str, int]]:
    """Every file with its digest and time of change; SQLite's index of the log, which is rebuilt, is left out."""
    return {
        str(path.relative_to(directory)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.endswith("-shm")
    }


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, tuple[str, int]]]:
    """`snapshot(directory)`: what lies in it."""
    return contents
