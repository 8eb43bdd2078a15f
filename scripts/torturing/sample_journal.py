"""A journal at rest, written by a workload: its files, and the place and contents of each batch.

Its segments are recycled ones, and half of its bodies quote journals, itself included. It is never changed; damage is
done to copies.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

from stageflow_brokers.core import wire
from stageflow_brokers.journal.format import (
    BATCH_HEADER_BYTES,
    SECTOR_BYTES,
    Batch,
    SegmentHeader,
    encode_end,
    encode_header,
    encode_payload,
    encode_segment,
    file_name,
    read_header,
    span,
)
from stageflow_brokers.journal.format import Record as JournalRecord
from stageflow_brokers.journal.journal import Journal
from stageflow_brokers.journal.verify import scan
from stageflow_brokers.testing.simulated_disk import SimulatedDisk
from stageflow_brokers.types import FLAG_START
from torturing.workload import DIRECTORY, Picture, Workload, replayed

__all__ = ["Kept", "Outcome", "SampleJournal", "Spot", "keep", "open_journal"]

SEGMENT = 8 << 10
Kept = tuple[int, list[tuple[int, int, int, bytes, bytes]]]
"""(number, records) of a batch."""


def keep(batch: Batch) -> Kept:
    """Return the contents of a batch as copies."""
    return batch.number, [(r.kind, r.first_id, r.peer, bytes(r.header), bytes(r.blob)) for r in batch.records]


@dataclass
class Outcome:
    """The result of an opening: replayed batches and warnings."""

    replayed: list[Kept] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def open_journal(disk: SimulatedDisk, outcome: Outcome) -> Journal:
    """Open the journal on the disk. Its errors pass through; `outcome` holds the batches replayed before."""
    return Journal.open(
        DIRECTORY,
        replay=lambda batch: outcome.replayed.append(keep(batch)),
        files=disk,
        segment_bytes=SEGMENT,
        warn=outcome.warnings.append,
    )


@dataclass(frozen=True)
class Spot:
    """The place of one batch: from `start` to `end` in the file of `segment`; padding up to `following`."""

    segment: int
    start: int
    end: int
    following: int


@dataclass
class SampleJournal:
    """`files` are the segments by number; `before` is the last segment as it was before the last batch.

    `pictures` are the states in memory, with their times, after batches of these numbers.
    """

    files: dict[int, bytes]
    spots: list[Spot]
    decoded: list[Kept]
    before: bytes
    pictures: dict[int, tuple[Picture, float]]

    @classmethod
    def grow(cls, seed: int, rounds: int) -> Self:
        """Work a workload for so many rounds. The last batch is a large one: ten sectors and more."""
        disk = SimulatedDisk(seed=seed)
        workload = Workload(disk, seed, segment_bytes=SEGMENT)
        workload.begin()
        chance = random.Random(seed)
        workload.quotes = list(_forged(chance))
        workload.work(rounds // 4)
        engine = workload.engine
        assert engine is not None
        journal = engine.journal
        assert journal is not None
        for info in journal.segments():
            content = disk.content(DIRECTORY / file_name(info.number))
            workload.quotes += [content[at:][: 3 * SECTOR_BYTES] for at in (0, 1, SECTOR_BYTES, SECTOR_BYTES + 487)]
        workload.compact()
        workload.work(rounds - rounds // 4)
        bodies = [chance.choice(workload.quotes).ljust(1300, b"z")[:1300] for _ in range(2)]
        for attempt in range(50):
            segment = journal.segments()[-1].number
            before = disk.content(DIRECTORY / file_name(segment))
            items = [(0, 1300, f"last{attempt}.{n}", 1, FLAG_START, 0, 0.0, 0.0, b"d") for n in range(2)]
            workload.send(wire.PUBLISH, [("unread", "a")], items, False, blob=b"".join(bodies))
            if journal.segments()[-1].number == segment:
                break
        else:
            raise AssertionError("no large batch fits behind others")
        batches = list(scan(DIRECTORY, files=disk))
        files = {info.number: disk.content(DIRECTORY / file_name(info.number)) for info in journal.segments()}
        spots = []
        for number, content in files.items():
            at = SECTOR_BYTES
            for batch in batches:
                if batch.segment == number:
                    length = read_header(content, at).length
                    spots.append(Spot(number, at, at + BATCH_HEADER_BYTES + length, at + span(length)))
                    at += span(length)
        return cls(files, spots, [keep(batch) for batch in batches], before, workload.pictures)

    @cached_property
    def records(self) -> int:
        """The number of records."""
        return sum(len(records) for _, records in self.decoded)

    @property
    def size(self) -> int:
        """The bytes up to the end of the last batch, in all segments."""
        return sum(max(s.following for s in self.spots if s.segment == number) for number in self.files)

    def disk(self, *, until: int | None = None, changed: dict[int, bytes] | None = None) -> SimulatedDisk:
        """Return a disk with a copy: without the segments after `until`, and with the `changed` ones."""
        disk = SimulatedDisk(seed=1)
        disk.mkdir(DIRECTORY)
        for number, content in {**self.files, **(changed or {})}.items():
            if until is None or number <= until:
                disk.damage(DIRECTORY / file_name(number), content)
        return disk

    def unfollowed(self, number: int) -> bytes:
        """Return a segment as it was while it was the newest."""
        spot, decoded = [pair for pair in zip(self.spots, self.decoded, strict=True) if pair[0].segment == number][-1]
        content = self.files[number]
        salt = read_header(content, spot.start).salt
        return content[: spot.following] + encode_end(decoded[0], salt) + content[spot.following + SECTOR_BYTES :]

    def around(self, number: int) -> SampleJournal:
        """Return a journal of that segment and its neighbours; the others count as deleted or not yet made."""
        near = (number - 1, number, number + 1)
        near_batches = [pair for pair in zip(self.spots, self.decoded, strict=True) if pair[0].segment in near]
        files = {n: content for n, content in self.files.items() if n in near}
        if number + 1 in files and number + 2 in self.files:
            files[number + 1] = self.unfollowed(number + 1)
        return SampleJournal(
            files, [spot for spot, _ in near_batches], [decoded for _, decoded in near_batches], self.before, {}
        )

    def whole_until(self, segment: int, at: int) -> int:
        """Return the number of whole batches if the journal ends at byte `at` of `segment`."""
        return sum(1 for spot in self.spots if (spot.segment, spot.end) <= (segment, at))

    def check_states(self) -> int:
        """Replay each prefix of the journal and compare with the state in memory then. Return their number."""
        batches = list(scan(DIRECTORY, files=self.disk()))
        for number, (expected, wall) in self.pictures.items():
            found = replayed([batch for batch in batches if batch.number <= number], wall)
            wrong = [key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)]
            assert not wrong, f"the state after batch {number} is not recovered: {wrong}"
        return len(self.pictures)


def _forged(chance: random.Random) -> list[bytes]:
    """Return bodies that hold journal bytes: headers, markers and whole batches, under other salts."""
    forged = []
    for number in (1, 50, 10_000, 1 << 40):
        salt = chance.getrandbits(64)
        record = JournalRecord(4, number, 7, b"header", b"body")
        pieces, length, _ = encode_payload([record], 0)
        batch = (encode_header(number, salt, 0.0, pieces, length, 1) + b"".join(pieces)).ljust(SECTOR_BYTES, b"\0")
        header = encode_segment(SegmentHeader(number % 100, salt, number, SEGMENT))
        forged += [header + batch + encode_end(number, salt), batch * 2, bytes(25) + batch, encode_end(number, salt)]
    return forged
