"""What can happen to a journal at rest: cut at any byte, sectors of the last write lost, bits flipped.

The law, for each: what is whole and has nothing damaged before it is recovered, byte for byte; damage in what was
acknowledged is refused with file and offset, and nothing on the disk is changed by the refusal; a torn end is cut off
with a warning, and the journal goes on.
"""

from __future__ import annotations

import random
from collections import Counter

from brokers.errors import JournalCorrupt, JournalVersion
from brokers.journal.format import BATCH_HEADER, SECTOR, Record, file_name
from brokers.journal.inspect import repair, scan, verify
from brokers.journal.testing import MemoryFiles
from torturing.plant import DIRECTORY
from torturing.specimen import Kept, Outcome, Specimen, Spot, keep, open_journal

__all__ = ["cut_everywhere", "flip_bits", "lose_sectors"]

SEGMENT_HEADER = 64
RECORD_HEADER = 25
REPAIRED = 0.1
"""Share of the refused journals that are repaired, too."""
LATER = [Record(1, 1, 0, b"header", b"a batch that comes after")]


def cut_everywhere(
    everything: Specimen, figures: Counter[str], *, share: float, edges: float = 1.0, chance: random.Random
) -> None:
    """Cut each segment at each byte, once as the end of all, once with the later segments in place.

    Tried are a `share` of all bytes, and a share of those at `edges`, where a batch begins or ends; with the neighbours
    of the segment, for the others mean nothing for it.
    """
    last = max(everything.files)
    for number, content in everything.files.items():
        specimen = everything.around(number)
        spots = [spot for spot in specimen.spots if spot.segment == number]
        near = {at for spot in spots for edge in (spot.start, spot.end, spot.following) for at in (edge - 1, edge)}
        for at in range(min(len(content), spots[-1].following + SECTOR) + 1):
            if chance.random() >= (edges if at in near else share):
                continue
            figures["bytes cut"] += 1
            whole = specimen.whole_until(number, at)
            disk = specimen.disk(until=number, changed={number: content[:at]})
            _recovers(disk, specimen.said[:whole], again=chance.random() < 0.2)
            if number == last:
                continue
            disk = specimen.disk(changed={number: content[:at]})
            if at >= spots[-1].end:
                _recovers(disk, specimen.said, again=False)
                continue
            torn = next(spot for spot in spots if at < spot.end)
            offset = 0 if at < SEGMENT_HEADER else torn.start
            _refused(disk, specimen, whole, number, offset)
            if chance.random() < REPAIRED:
                figures["journals repaired"] += 1
                behind = [
                    said for said, spot in zip(specimen.said, specimen.spots, strict=True) if spot.segment > number
                ]
                _repairs(disk, specimen, (number, offset), specimen.said[:whole], behind, content[:at])


def lose_sectors(specimen: Specimen, figures: Counter[str], *, rounds: int, chance: random.Random) -> None:
    """Each sector of the last, unsynced batch zeroed, set, garbled, or as it was before; then any sets of them."""
    spot = specimen.spots[-1]
    content = specimen.files[spot.segment]
    sectors = list(range(spot.start, min(spot.following + SECTOR, len(content)), SECTOR))
    losses: list[tuple[int, ...]] = [(each,) for each in sectors]
    losses += [tuple(each for each in sectors if chance.random() < 0.5) for _ in range(rounds)]
    for lost in losses:
        for fate in range(4):
            damaged = bytearray(content)
            for at in lost:
                garbled = chance.randbytes(SECTOR)
                before = specimen.before[at : at + SECTOR]
                damaged[at : at + SECTOR] = (bytes(SECTOR), b"\xff" * SECTOR, garbled, before)[fate]
            figures["sectors lost"] += len(lost)
            intact = damaged[spot.start : spot.end] == content[spot.start : spot.end]
            disk = specimen.disk(changed={spot.segment: bytes(damaged)})
            _recovers(disk, specimen.said if intact else specimen.said[:-1])


def flip_bits(
    everything: Specimen, figures: Counter[str], *, share: float, bodies: float, chance: random.Random
) -> None:
    """Flip each bit (a `share` of them) of all headers, and a share `bodies` of those of what stands between."""
    for number, content in everything.files.items():
        specimen = everything.around(number)
        spots = [spot for spot in specimen.spots if spot.segment == number]
        for at in range(min(spots[-1].following + BATCH_HEADER, len(content))):
            headers, spot = _what_is_at(specimen, spots, at)
            for bit in range(8):
                if chance.random() >= (share if headers else bodies):
                    continue
                figures["bits flipped"] += 1
                flipped = bytearray(content)
                flipped[at] ^= 1 << bit
                disk = specimen.disk(changed={number: bytes(flipped)})
                if at < SEGMENT_HEADER:
                    _refused(disk, specimen, specimen.whole_until(number, 0), number, 0)
                    if chance.random() < REPAIRED:
                        figures["headers repaired"] += 1
                        _mends_header(disk, specimen, number, bytes(flipped))
                elif spot is None:
                    # Padding means nothing, and the end mark of a sealed segment nothing that the next one does not.
                    _recovers(disk, specimen.said)
                elif spot is specimen.spots[-1]:
                    _recovers(disk, specimen.said[:-1])
                else:
                    index = specimen.spots.index(spot)
                    _refused(disk, specimen, index, number, spot.start)
                    if chance.random() < REPAIRED:
                        figures["journals repaired"] += 1
                        kept, behind = specimen.said[:index], specimen.said[index + 1 :]
                        _repairs(disk, specimen, (number, spot.start), kept, behind, bytes(flipped))


def _what_is_at(specimen: Specimen, spots: list[Spot], at: int) -> tuple[bool, Spot | None]:
    """Whether the byte is one of a header, and which batch it is in."""
    if at < SECTOR:
        return at < SEGMENT_HEADER, None
    spot = next((spot for spot in spots if spot.start <= at < spot.end), None)
    if spot is None:
        return at >= spots[-1].following, None
    at -= spot.start + BATCH_HEADER
    if at < 0:
        return True, spot
    for _, _, _, header, blob in specimen.said[specimen.spots.index(spot)][1]:
        if at < RECORD_HEADER:
            return True, spot
        at -= RECORD_HEADER + len(header) + len(blob)
        if at < 0:
            return False, spot
    raise AssertionError("a batch has bytes that are of none of its records")


def _recovers(disk: MemoryFiles, expected: list[Kept], *, again: bool = True) -> None:
    """It opens with exactly these batches, goes on, and (if it is tried `again`) opens again without a word."""
    outcome = Outcome()
    with open_journal(disk, outcome) as journal:
        assert outcome.replayed == expected, "other batches were recovered than are whole"
        journal.commit(LATER, 1.0)
    if not again:
        return
    second = Outcome()
    with open_journal(disk, second):
        assert second.replayed[:-1] == expected
        assert second.replayed[-1][1] == [(1, 1, 0, b"header", b"a batch that comes after")]
        assert second.warnings == [], "what was torn is cut off once"


def _refused(disk: MemoryFiles, specimen: Specimen, whole: int, segment: int, offset: int) -> None:
    """It does not open, says where and why, has replayed no more than what comes before, and has changed nothing."""
    before = {name: disk.content(DIRECTORY / name) for name in disk.listdir(DIRECTORY)}
    outcome = Outcome()
    refusal: JournalCorrupt | JournalVersion | None = None
    try:
        open_journal(disk, outcome)
    except (JournalCorrupt, JournalVersion) as error:
        refusal = error
    assert refusal is not None, "damage in what was acknowledged was dropped without a word"
    assert refusal.file == file_name(segment)
    if isinstance(refusal, JournalVersion):
        assert offset == 0
        return
    assert refusal.offset == offset
    assert refusal.reason
    assert outcome.replayed == specimen.said[:whole]
    after = {name: disk.content(DIRECTORY / name) for name in disk.listdir(DIRECTORY) if name != "lock"}
    assert after == {name: content for name, content in before.items() if name != "lock"}
    damage = [(found.file, found.offset) for found in verify(DIRECTORY, files=disk) if found.damage]
    assert damage[0] == (file_name(segment), offset)


def _repairs(
    disk: MemoryFiles, specimen: Specimen, at: tuple[int, int], kept: list[Kept], given_up: list[Kept], damaged: bytes
) -> None:
    """Repair keeps what comes before the damage, copies the rest aside, and says and lists what it gave up."""
    number, offset = at
    report = repair(DIRECTORY, files=disk, names=lambda batch: [f"batch {batch.number}"])
    assert (report.file, report.offset) == (file_name(number), offset)
    assert (report.batches, report.records) == (len(given_up), sum(len(records) for _, records in given_up))
    listed = b"" if report.listed is None else disk.content(report.listed)
    assert listed.decode().splitlines() == [f"batch {batch}" for batch, _ in given_up] == report.names
    copied = {path.name: disk.content(path) for path in report.copies}
    originals = {file_name(n): c for n, c in specimen.files.items() if n >= number}
    assert copied == {**originals, file_name(number): damaged}
    assert verify(DIRECTORY, files=disk) == []
    assert [keep(batch) for batch in scan(DIRECTORY, files=disk)] == kept
    _recovers(disk, kept)


def _mends_header(disk: MemoryFiles, specimen: Specimen, number: int, damaged: bytes) -> None:
    """What a segment's header said is told by the batches behind it: it is written anew, and nothing is given up."""
    try:
        report = repair(DIRECTORY, files=disk)
    except JournalVersion:  # a flipped bit can make it one of a newer format, which is not for this release to repair
        assert disk.content(DIRECTORY / file_name(number)) == damaged
        return
    assert (report.file, report.offset, report.batches, report.listed) == (file_name(number), 0, 0, None)
    assert [disk.content(path) for path in report.copies] == [damaged]
    _recovers(disk, specimen.said)
