"""What a journal goes through while its disk fails or its machine stops: scenes, each with a law to be judged by.

A scene is set on a disk that works, acted on one that does not, and judged on what is left of it. The law: what was
acknowledged is recovered, with at most the one round more that was under way; nothing is acknowledged after a failure;
what a repair gives up has been copied aside before.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path

from stageflow_brokers.core import wire
from stageflow_brokers.errors import BrokerError, JournalFailed
from stageflow_brokers.journal.format import SECTOR, Batch, file_name
from stageflow_brokers.journal.journal import Journal
from stageflow_brokers.journal.repair import repair, scan, verify
from stageflow_brokers.testing.simulated_disk import MemoryFiles
from torturing.workload import DIRECTORY, Picture, Plant, replayed

__all__ = ["SCENES", "Disk", "RepairScene", "Scene"]

SEGMENT = 4 << 10


class Disk(MemoryFiles):
    """One on which opening a file may fail as well."""

    def open(self, path: Path, *, create: bool = False, write: bool = True) -> int:
        """As any disk does."""
        if path in self._names:
            self._note("open", path)
        return super().open(path, create=create, write=write)


class Scene:
    """A plant at work: `acting` is what it does when the disk fails."""

    def __init__(self, acting: Callable[[Plant], None], *, before: int = 0, torn: bool = False) -> None:
        self._acting = acting
        self._before = before
        self._torn = torn

    def set(self, seed: int) -> Disk:
        """The disk as it is before anything fails."""
        self.disk = Disk(seed=seed)
        self.attempted: tuple[Picture, float] | None = None
        self.plant = Plant(self.disk, seed, segment_bytes=SEGMENT)
        if self._before:
            self.plant.begin()
            self.plant.work(self._before)
        if self._torn:
            self._tear()
        return self.disk

    def act(self) -> None:
        """Do what there is to do, and after an error go on, as no broker should."""
        plant = self.plant
        try:
            self._acting(plant)
        except BrokerError:
            self.disk.on_call = lambda name, path: None
            self.disk.on_read = lambda path, offset: None
            self.disk.heal()
            if plant.failed:
                self.attempted = plant.now(), plant.wall
                self._insist(plant)

    def judge(self, disk: MemoryFiles) -> None:
        """Recover from this disk, and compare. Raises AssertionError where the law is broken."""
        try:
            self._judge(disk)
        except BrokerError as error:
            raise AssertionError(f"what was acknowledged is not what was recovered: {error}") from error

    def _judge(self, disk: MemoryFiles) -> None:
        plant = self.plant
        batches: list[Batch] = []
        # Looked at before a broker goes on with it: what was in work is dealt with by its first round already.
        Journal.open(
            DIRECTORY, replay=batches.append, files=disk, segment_bytes=SEGMENT, warn=lambda text: None
        ).close()
        possible: list[tuple[Picture, float]] = [(plant.acknowledged or {"facts": (), "bytes": 0}, plant.said_at)]
        if self.attempted is not None:
            possible.append(self.attempted)
        elif plant.engine is not None and not plant.failed and self.disk is not disk:
            possible.append((plant.now(), plant.wall))  # the machine stops in the middle of a round
        different = [_difference(replayed(batches, wall), expected) for expected, wall in possible]
        assert "" in different, "what was acknowledged is not what was recovered: " + " or ".join(different)
        recovered = Plant(disk, segment_bytes=SEGMENT)
        recovered.wall = plant.wall
        recovered.begin()
        recovered.say(wire.QUERY, "fact", ("goes", "on"))

    def _insist(self, plant: Plant) -> None:
        for _ in range(2):
            try:
                plant.say(wire.QUERY, "fact", ("after", "failure"))
            except JournalFailed:
                continue
            raise AssertionError("a round was acknowledged after a failed one")

    def _tear(self) -> None:
        """The process dies in the middle of its last write."""
        plant = self.plant

        def on_call(name: str, path: str) -> int | None:
            if name == "fdatasync":
                raise OSError(errno.EIO, "the end")
            return 2 * SECTOR + 100 if name == "pwritev" else None

        plant.chance = random.Random(1)
        self.disk.on_call = on_call
        try:
            while True:
                plant.start()
        except JournalFailed:
            pass
        assert plant.engine is not None
        assert plant.engine.journal is not None
        torn = plant.engine.journal.segments()[-1]
        self.disk.kill()
        journal = DIRECTORY / file_name(torn.number)
        content = bytearray(self.disk.content(journal))
        content[torn.used + 60] ^= 1  # whatever of it arrived, not all did
        self.disk.damage(journal, bytes(content))
        plant.engine, plant.failed = None, False
        plant.wall = plant.said_at


class RepairScene(Scene):
    """A journal damaged in two places, and its repair."""

    def __init__(self) -> None:
        super().__init__(lambda plant: None, before=30)

    def set(self, seed: int) -> Disk:
        """A header and a batch are damaged; what the files were, and which batches come before, is remembered."""
        disk = super().set(seed)
        assert self.plant.engine is not None
        self.plant.engine.close()
        before = list(scan(DIRECTORY, files=disk))
        numbers = sorted({batch.segment for batch in before})
        first, second = numbers[0], numbers[len(numbers) // 2]
        self._damage(first, 30)
        self._damage(second, SECTOR + 44)
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

    def _judge(self, disk: MemoryFiles) -> None:
        # Repaired again, nothing but what follows the damage is gone, and every byte of that is somewhere.
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


def _work(plant: Plant) -> None:
    plant.work(12)


def _restart(plant: Plant) -> None:
    plant.begin()
    plant.work(2)


SCENES: dict[str, Callable[[], Scene]] = {
    "first creation": lambda: Scene(_restart),
    "append and rotation": lambda: Scene(_work, before=10),
    "compaction": lambda: Scene(Plant.compact, before=25),
    "recovery": lambda: Scene(_restart, before=12, torn=True),
    "repair": RepairScene,
}


def _difference(found: Picture, expected: Picture) -> str:
    keys = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    told = [f"{key} is {str(found.get(key))[:200]} instead of {str(expected.get(key))[:200]}" for key in keys]
    return "; ".join(told)
