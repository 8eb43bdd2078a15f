"""Data directories at rest, filled as a cluster would, and the `stageflow` command on them."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from brokers.api import DEAD, DONE, START, Listener, PublishItem, SettleItem, Target
from brokers.core.wire import DeliveryItem
from brokers.engine import Engine
from brokers.memory import MemoryBroker
from stageflow_actors.core.envelope import EMPTY_TRAIL, Envelope, Failure, StageRecord, append_record, encode, raw
from stageflow_actors.runtime.datadir import DataDir

STAGEFLOW = [sys.executable, "-c", "import sys; from stageflow_actors.cli.main import main; sys.exit(main())"]


class Worker(Listener):
    """Takes one message, and keeps it until told what became of it."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.items: list[DeliveryItem] = []

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        self.items.extend(items)
        self.arrived.set()

    def holding(self) -> list[tuple[int, int]]:
        return [(item.id, item.lease) for item in self.items]


class Filled:
    """A data directory with a journal, written by the broker's own engine while `open` is entered."""

    def __init__(self, path: Path) -> None:
        self.data_dir = DataDir(path)
        self.data_dir.journal.mkdir()
        self.path = self.data_dir.path
        self._hub = MemoryBroker(engine=Engine(journal_dir=self.data_dir.journal))
        self._client = self._hub.connect(Listener(), name="test")

    @staticmethod
    def envelope(stage: str, context: Any, **fields: Any) -> Envelope:
        return Envelope("orders", 1, stage, raw(context), fields.pop("trail", EMPTY_TRAIL), 1_700_000_000.0, **fields)

    def start(
        self, instance: str, context: Any, *, stage: str = "reserve", queue: str = "stageflow.orders.stage0"
    ) -> None:
        """A new instance at a stage."""
        trail = EMPTY_TRAIL
        if stage != "reserve":
            trail = append_record(
                trail, StageRecord("reserve", "completed", 1, 1_700_000_000.5, 0.25, None, raw("r-1"))
            )
        body = encode(self.envelope(stage, context, trail=trail))
        item = PublishItem(0, len(body), instance, 1, START)
        answer = self._client.publish([Target(queue, stage)], [item], [body]).result(5)
        assert answer.refused == []

    def settle_next(
        self, queue: str, *, to: Target | None = None, body: bytes = b"", parked: Failure | None = None
    ) -> None:
        """Take the next message of a queue and settle it: done (and `body` to `to`), or parked with a failure."""
        worker = Worker()
        taking = self._hub.connect(worker, role="worker", name="worker")
        taking.consume(queue, 1)
        assert worker.arrived.wait(5)
        item = worker.items.pop()
        lease = (item.id, item.lease)
        last: Any = {"queue": queue, "prefetch": 0}
        if parked is not None:
            taking.settle([], [], [], [SettleItem([lease], DEAD, failure=encode(parked))], [], **last)
        elif to is not None:
            taking.settle(
                [to], [], [], [SettleItem([lease], DONE, publishes=[PublishItem(0, len(body))])], [body], **last
            )
        else:
            taking.settle([], [], [(*lease, 0, item.group)], [], [], **last)
        taking.query("ping").result(5)

    def ask(self, name: str, *args: Any) -> Any:
        return self._client.query(name, *args).result(5)

    def close(self) -> Path:
        """At rest from now on."""
        self._hub.close()
        return self.path


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Filled]:
    made = Filled(tmp_path / "data")
    yield made
    made.close()


@pytest.fixture
def stageflow(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: exit code, stdout, stderr."""
    from stageflow_actors.cli.main import main

    monkeypatch.delenv("STAGEFLOW_DATA", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        said = capfd.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command as a program of its own, in `tmp_path`."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "STAGEFLOW_DATA"}
        return subprocess.run(
            [*STAGEFLOW, *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
            **options,
        )

    return run
