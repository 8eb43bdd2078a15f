"""Scenarios for a journal whose disk fails or whose machine stops, each with a check of the result.

A scenario is set up on a working disk, runs on a failing one, and is checked on the disk left over. The law: what was
acknowledged is recovered, with at most the one round that was under way; nothing is acknowledged after a failure; a
repair copies aside what it gives up.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path

from stageflow_brokers.core import wire
from stageflow_brokers.errors import BrokerError, JournalFailed
from stageflow_brokers.journal.format import SECTOR_BYTES, Batch, file_name
from stageflow_brokers.journal.journal import Journal
from stageflow_brokers.journal.repair import repair
from stageflow_brokers.journal.verify import scan, verify
from stageflow_brokers.testing.simulated_disk import SimulatedDisk
from torturing.workload import DIRECTORY, Picture, Workload, replayed

__all__ = ["SCENARIOS", "Disk", "RepairScenario", "Scenario"]

SEGMENT = 4 << 10


class Disk(SimulatedDisk):
    """A disk on which opening a file may fail as well."""

    def open(self, path: Path, *, create: bool = False, write: bool = True) -> int:
        """Open a file; may fail by injection."""
        if path in self._names:
            self._on_call("open", path)
        return super().open(path, create=create, write=write)


class Scenario:
    """A workload; `acting` is its part while the disk fails."""

    def __init__(self, acting: Callable[[Workload], None], *, before: int = 0, torn: bool = False) -> None:
        self._acting = acting
        self._before = before
        self._torn = torn

    def set(self, seed: int) -> Disk:
        """Return the disk as it is before the failure."""
        self.disk = Disk(seed=seed)
        self.attempted: tuple[Picture, float] | None = None
        self.workload = Workload(self.disk, seed, segment_bytes=SEGMENT)
        if self._before:
            self.workload.begin()
            self.workload.work(self._before)
        if self._torn:
            self._tear()
        return self.disk

    def act(self) -> None:
        """Run the workload; after an error continue, as no broker should."""
        workload = self.workload
        try:
            self._acting(workload)
        except BrokerError:
            self.disk.on_call = lambda name, path: None
            self.disk.on_read = lambda path, offset: None
            self.disk.heal()
            if workload.failed:
                self.attempted = workload.now(), workload.wall
                self._insist(workload)

    def judge(self, disk: SimulatedDisk) -> None:
        """Recover from this disk and compare. Raises AssertionError if the law is broken."""
        try:
            self._judge(disk)
        except BrokerError as error:
            raise AssertionError(f"what was acknowledged is not what was recovered: {error}") from error

    def _judge(self, disk: SimulatedDisk) -> None:
        workload = self.workload
        batches: list[Batch] = []
        # Compare before a broker continues: its first round already handles the messages in work.
        Journal.open(
            DIRECTORY, replay=batches.append, files=disk, segment_bytes=SEGMENT, warn=lambda text: None
        ).close()
        possible: list[tuple[Picture, float]] = [
            (workload.acknowledged or {"facts": (), "bytes": 0}, workload.acknowledged_at)
        ]
        if self.attempted is not None:
            possible.append(self.attempted)
        elif workload.engine is not None and not workload.failed and self.disk is not disk:
            possible.append((workload.now(), workload.wall))  # the machine stops in the middle of a round
        different = [_difference(replayed(batches, wall), expected) for expected, wall in possible]
        assert "" in different, "what was acknowledged is not what was recovered: " + " or ".join(different)
        recovered = Workload(disk, segment_bytes=SEGMENT)
        recovered.wall = workload.wall
        recovered.begin()
        recovered.send(wire.QUERY, "fact", ("goes", "on"))

    def _insist(self, workload: Workload) -> None:
        for _ in range(2):
            try:
                workload.send(wire.QUERY, "fact", ("after", "failure"))
            except JournalFailed:
                continue
            raise AssertionError("a round was acknowledged after a failed one")

    def _tear(self) -> None:
        """Kill the process in the middle of its last write."""
        workload = self.workload

        def on_call(name: str, path: str) -> int | None:
            if name == "fdatasync":
                raise OSError(errno.EIO, "the end")
            return 2 * SECTOR_BYTES + 100 if name == "pwritev" else None

        workload.chance = random.Random(1)
        self.disk.on_call = on_call
        try:
            while True:
                workload.start()
        except JournalFailed:
            pass
        assert workload.engine is not None
        assert workload.engine.journal is not None
        torn = workload.engine.journal.segments()[-1]
        self.disk.kill()
        journal = DIRECTORY / file_name(torn.number)
        content = bytearray(self.disk.content(journal))
        content[torn.used + 60] ^= 1  # the write is incomplete, whatever part arrived
        self.disk.damage(journal, bytes(content))
        workload.engine, workload.failed = None, False
        workload.wall = workload.acknowledged_at


class RepairScenario(Scenario):
    """A journal damaged in two places, and its repair."""

    def __init__(self) -> None:
        super().__init__(lambda workload: None, before=30)

    def set(self, seed: int) -> Disk:
        """Damage a header and a batch; remember the files and the batches before."""
        disk = super().set(seed)
        assert self.workload.engine is not None
        self.workload.engine.close()
        before = list(scan(DIRECTORY, files=disk))
        numbers = sorted({batch.segment for batch in before})
        first, second = numbers[0], numbers[len(numbers) // 2]
        self._damage(first, 30)
        self._damage(second, SECTOR_BYTES + 44)
        self.expected = [batch.number for batch in before if batch.segment < second]
        self.originals = [disk.content(DIRECTORY / file_name(number)) for number in numbers if number >= second]
        self.originals.append(disk.content(DIRECTORY / file_name(first)))
        return disk

    def act(self) -> None:
        """Repair."""
        try:
            repair(DIRECTORY, files=self.disk)
        except BrokerError:
            pass

    def _judge(self, disk: SimulatedDisk) -> None:
        # After a second repair only the batches behind the damage are gone, and each of their bytes is in a copy.
        repair(DIRECTORY, files=disk)
        assert verify(DIRECTORY, files=disk) == []
        assert [batch.number for batch in scan(DIRECTORY, files=disk)] == self.expected
        left = {bytes(inode.durable) for inode in disk._durable_names.values()}
        assert all(original in left for original in self.originals), "cut before it was copied"

    def _damage(self, number: int, at: int) -> None:
        path = DIRECTORY / file_name(number)
        content = bytearray(self.disk.content(path))
        content[at] ^= 4
        self.disk.damage(path, bytes(content))


def _work(workload: Workload) -> None:
    workload.work(12)


def _restart(workload: Workload) -> None:
    workload.begin()
    workload.work(2)


SCENARIOS: dict[str, Callable[[], Scenario]] = {
    "first creation": lambda: Scenario(_restart),
    "append and rotation": lambda: Scenario(_work, before=10),
    "compaction": lambda: Scenario(Workload.compact, before=25),
    "recovery": lambda: Scenario(_restart, before=12, torn=True),
    "repair": RepairScenario,
}


def _difference(found: Picture, expected: Picture) -> str:
    keys = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    lines = [f"{key} is {str(found.get(key))[:200]} instead of {str(expected.get(key))[:200]}" for key in keys]
    return "; ".join(lines)
