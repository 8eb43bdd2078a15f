"""Data directories at rest, filled as a cluster would, and the `stageflow` command on them."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from brokers.api import DEAD, DONE, START, Listener, PublishItem, SettleItem, Target
from brokers.engine import Engine
from brokers.memory import MemoryBroker
from brokers.types import DeliveryItem
from stageflow_actors.core.envelope import EMPTY_TRAIL, Envelope, Failure, StageRecord, append_record, encode, raw
from stageflow_actors.runtime.datadir import DataDir

STAGEFLOW = [sys.executable, "-c", "import sys; from stageflow_actors.cli.main import main; sys.exit(main())"]


class Worker(Listener):
    """Takes one message of a queue, and keeps it until told what became of it."""

    def __init__(self, hub: MemoryBroker, queue: str) -> None:
        self._arrived = threading.Event()
        self._queue = queue
        self.leases: list[tuple[int, int]] = []
        self.groups: list[str] = []
        self.stale: list[int] = []
        self._connection = hub.connect(self, role="worker", name="worker")
        self._connection.consume(queue, 1)
        assert self._arrived.wait(5), f"nothing came out of {queue}"

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        self.leases += [(item.id, item.lease) for item in items]
        self.groups += [item.group for item in items]
        self._arrived.set()

    def on_stale(self, ids: list[int]) -> None:
        self.stale += ids

    def holding(self) -> list[tuple[int, int]]:
        return self.leases

    def settle(self, item: SettleItem, targets: tuple[Target, ...] = (), bodies: tuple[bytes, ...] = ()) -> None:
        """Anything, and take nothing more."""
        self._connection.settle(targets, [], [], [item], bodies, queue=self._queue, prefetch=0)
        self._connection.query("ping").result(5)

    def settle_all(self, also: Sequence[tuple[int, int]] = ()) -> None:
        """Done, and nothing follows; `also` leases that others had."""
        acks = [(*lease, 0, group) for lease, group in zip(self.leases, self.groups, strict=True)]
        acks += [(*lease, 0, "") for lease in also]
        self._connection.settle([], [], acks, [], [], queue=self._queue, prefetch=0)
        self._connection.query("ping").result(5)


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
        self.publish(instance, queue, stage, self.envelope(stage, context, trail=trail))

    def publish(self, instance: str, queue: str, label: str, envelope: Envelope) -> None:
        """A new instance, wherever it stands."""
        body = encode(envelope)
        item = PublishItem(0, len(body), instance, 1, START)
        answer = self._client.publish([Target(queue, label)], [item], [body]).result(5)
        assert answer.refused == []

    def take(self, queue: str) -> Worker:
        """A worker that has the next message of a queue."""
        return Worker(self._hub, queue)

    def settle_next(
        self, queue: str, *, to: Target | None = None, body: bytes = b"", parked: Failure | None = None
    ) -> None:
        """Take the next message of a queue and settle it: done (and `body` to `to`), or parked with a failure."""
        worker = self.take(queue)
        if parked is not None:
            worker.settle(SettleItem(worker.leases, DEAD, failure=encode(parked)))
        elif to is not None:
            worker.settle(SettleItem(worker.leases, DONE, publishes=[PublishItem(0, len(body))]), (to,), (body,))
        else:
            worker.settle_all()

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
