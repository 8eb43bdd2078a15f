"""A journal on a disk in memory, and what it replayed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stageflow_brokers.journal.filesystem import OsFileSystem
from stageflow_brokers.journal.format import Batch, Record, file_name
from stageflow_brokers.journal.journal import Journal
from stageflow_brokers.testing.simulated_disk import SimulatedDisk

Kept = list[tuple[int, int, int, bytes, bytes]]


class Bench:
    """One directory on one disk; `open` refills `replayed` and `warnings`."""

    def __init__(self, disk: SimulatedDisk | OsFileSystem, directory: Path, segment_bytes: int = 16 << 10) -> None:
        self.disk: Any = disk
        self.directory = directory
        self.segment_bytes = segment_bytes
        self.warnings: list[str] = []
        self.batches: list[Batch] = []
        self.replayed: list[tuple[int, float, Kept]] = []

    def open(self, **options: Any) -> Journal:
        self.warnings, self.batches, self.replayed = [], [], []
        options = {"segment_bytes": self.segment_bytes, **options}
        return Journal.open(self.directory, replay=self.replay, files=self.disk, warn=self.warnings.append, **options)

    def replay(self, batch: Batch) -> None:
        self.batches.append(batch)
        self.replayed.append((batch.number, batch.wall, self.kept(batch.records)))

    @staticmethod
    def kept(records: list[Record]) -> Kept:
        return [(kind, first_id, peer, bytes(header), bytes(blob)) for kind, first_id, peer, header, blob in records]

    @staticmethod
    def records(number: int, count: int = 2, size: int = 100) -> list[Record]:
        """Return records that name their batch."""
        return [
            Record(number % 256, number, each, b"header %d.%d" % (number, each), b"%d." % number * (size // 4))
            for each in range(count)
        ]

    def fill(self, journal: Journal, count: int, *, first: int = 1, size: int = 100) -> list[tuple[int, float, Kept]]:
        """Commit `count` batches; what a replay must say of them."""
        said = []
        for number in range(first, first + count):
            records = self.records(number, size=size)
            journal.commit(records, number / 4)
            said.append((number, number / 4, self.kept(records)))
        return said

    def path(self, number: int) -> Path:
        return self.directory / file_name(number)

    def content(self, number: int) -> bytes:
        return bytes(self.disk.content(self.path(number)))


@pytest.fixture
def make_bench() -> Callable[..., Bench]:
    def make(**options: Any) -> Bench:
        return Bench(SimulatedDisk(**options), Path("/data/journal"))

    return make


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


@pytest.fixture
def real(tmp_path: Path) -> Bench:
    """The same, on a real disk."""
    return Bench(OsFileSystem(), tmp_path / "journal")
