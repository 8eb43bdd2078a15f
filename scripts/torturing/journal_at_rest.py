"""What can happen to a journal at rest: cut at any byte, files or sectors lost, sectors unreadable, bits flipped.

The law, for each: what is whole and has nothing damaged before it is recovered, byte for byte; damage in what was
acknowledged is refused with file and offset, and nothing on the disk is changed by the refusal; a torn end is cut off
with a warning, and the journal goes on. Whatever does not come back, there was a refusal or a warning; and nothing is
said where nothing was lost.
"""

from __future__ import annotations

import random
from collections import Counter

from stageflow_brokers.errors import JournalCorrupt
from stageflow_brokers.journal.format import BATCH_HEADER, SECTOR, Record, file_name
from stageflow_brokers.journal.repair import repair, scan, verify
from stageflow_brokers.testing.simulated_disk import MemoryFiles
from torturing.sample_journal import Kept, Outcome, Specimen, Spot, keep, open_journal
from torturing.workload import DIRECTORY

__all__ = ["cut_everywhere", "flip_bits", "lose_files", "lose_sectors", "spoil_sectors"]

SEGMENT_HEADER = 64
RECORD_HEADER = 25
REPAIRED = 0.1
"""Share of the refused journals that are repaired, too."""
LATER = [Record(1, 1, 0, b"header", b"a batch that comes after")]


def cut_everywhere(
    everything: Specimen, figures: Counter[str], *, share: float, edges: float = 1.0, chance: random.Random
) -> None:
    """Cut each segment at each byte, once as the end of all, once with the later segments in place.

    Tried are a `share` of all bytes, and a share of those at `edges`, where a batch, an end mark or the header begins
    or ends; with the neighbours of the segment, for the others mean nothing for it. As the end of all a segment says
    that it is not followed. A cut in the header is refused; one behind it loses nothing, with nothing said, when the
    end mark is still there, and is warned of when it is not.
    """
    last = max(everything.files)
    for number, content in everything.files.items():
        specimen = everything.around(number)
        spots = [spot for spot in specimen.spots if spot.segment == number]
        end = spots[-1].following
        ends = [edge for spot in spots for edge in (spot.start, spot.end, spot.following)]
        near = {at for edge in (*ends, end + BATCH_HEADER, SEGMENT_HEADER, SECTOR) for at in (edge - 1, edge)}
        alone = specimen.unfollowed(number)
        for at in range(min(len(content), end + SECTOR) + 1):
            if chance.random() >= (edges if at in near else share):
                continue
            figures["bytes cut"] += 1
            whole = specimen.whole_until(number, at)
            disk = specimen.disk(until=number, changed={number: alone[:at]})
            if at < SECTOR:
                figures["  in the header: refused"] += 1
                _refused(disk, specimen, whole, number, 0)
                if chance.random() < REPAIRED:
                    figures["journals repaired"] += 1
                    _repairs(disk, specimen, (number, 0), specimen.said[:whole], [], alone[:at], until=number)
            else:
                silent = at >= end + BATCH_HEADER
                figures["  behind the end mark: nothing lost" if silent else "  before it: warned of"] += 1
                found = verify(DIRECTORY, files=disk)
                place = next((spot.start for spot in spots if at < spot.end), end)
                assert [(each.file, each.offset, each.damage) for each in found] == (
                    [] if silent else [(file_name(number), place, False)]
                )
                _recovers(disk, specimen.said[:whole], again=chance.random() < 0.2, warned=not silent)
            if number == last:
                continue
            disk = specimen.disk(changed={number: content[:at]})
            if at >= spots[-1].end:
                _recovers(disk, specimen.said, again=False)
                continue
            torn = next(spot for spot in spots if at < spot.end)
            offset = 0 if at < SECTOR else torn.start
            _refused(disk, specimen, whole, number, offset)
            if chance.random() < REPAIRED:
                figures["journals repaired"] += 1
                behind = [
                    said for said, spot in zip(specimen.said, specimen.spots, strict=True) if spot.segment > number
                ]
                _repairs(disk, specimen, (number, offset), specimen.said[:whole], behind, content[:at])


def lose_files(everything: Specimen, figures: Counter[str]) -> None:
    """Each segment deleted. The first is not missed here; one in the middle is, and so is the last."""
    numbers = sorted(everything.files)
    for number in numbers:
        specimen = everything.around(number)
        disk = specimen.disk()
        disk.remove(DIRECTORY / file_name(number))
        figures["segments deleted"] += 1
        behind = [said for said, spot in zip(specimen.said, specimen.spots, strict=True) if spot.segment > number]
        if number == numbers[0]:
            _recovers(disk, behind)
            continue
        before = specimen.whole_until(number, 0)
        place = (number, 0) if number < numbers[-1] else (number - 1, specimen.spots[before - 1].following)
        _refused(disk, specimen, before, *place)
        report = repair(DIRECTORY, files=disk)
        assert ((report.file, report.offset), report.batches) == ((file_name(place[0]), place[1]), len(behind))
        _recovers(disk, specimen.said[:before])


def spoil_sectors(everything: Specimen, figures: Counter[str], *, share: float, chance: random.Random) -> None:
    """Each sector (a `share` of them) is one that the disk does not give back.

    In a batch or a header that is refused, in the last batch too: it may all be there. Repair goes on without it.
    """
    for number, content in everything.files.items():
        specimen = everything.around(number)
        spots = [spot for spot in specimen.spots if spot.segment == number]
        for at in range(0, spots[-1].following + SECTOR, SECTOR):
            if at >= len(content) or chance.random() >= share:
                continue
            figures["sectors made unreadable"] += 1
            disk = specimen.disk()
            disk.spoil(DIRECTORY / file_name(number), at)
            spot = next((spot for spot in spots if spot.start <= at < spot.following), None)
            if at >= SECTOR and spot is None and number < max(specimen.files):
                _recovers(disk, specimen.said)  # an end mark, and the next segment says as much
                continue
            offset = 0 if at < SECTOR else spots[-1].following if spot is None else spot.start
            whole = specimen.whole_until(number, offset)
            _refused(disk, specimen, whole, number, offset)
            (found, *_) = verify(DIRECTORY, files=disk)
            assert f"the sector at offset {at} cannot be read" in found.reason
            if chance.random() < 0.5:
                disk.heal()
                _recovers(disk, specimen.said)
                continue
            report = repair(DIRECTORY, files=disk)
            assert (report.file, report.offset, report.unreadable) == (file_name(number), offset, SECTOR)
            copied = {path.name: disk.content(path) for path in report.copies}
            assert copied[file_name(number)] == content[:at] + bytes(SECTOR) + content[at + SECTOR :]
            assert verify(DIRECTORY, files=disk) == []
            _recovers(disk, specimen.said if at < SECTOR else specimen.said[:whole])


def lose_sectors(specimen: Specimen, figures: Counter[str], *, rounds: int, chance: random.Random) -> None:
    """Each sector of the last, unsynced batch zeroed, set, garbled, or as it was before; then any sets of them; then
    sectors of batches before it in the same segment, which were acknowledged."""
    _lose_acknowledged(specimen, figures, rounds, chance)
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
            unwritten = bytes(damaged[spot.start : spot.following + SECTOR]) in (
                specimen.before[spot.start : spot.following + SECTOR],
                content[spot.start : spot.following + SECTOR],
            )
            warned = None if fate == 3 else not unwritten
            _recovers(disk, specimen.said if intact else specimen.said[:-1], warned=warned)


def _lose_acknowledged(specimen: Specimen, figures: Counter[str], rounds: int, chance: random.Random) -> None:
    """With the rest intact, be that only the end mark."""
    segment = specimen.spots[-1].segment
    spots = [spot for spot in specimen.spots if spot.segment == segment]
    content = specimen.files[segment]
    runs = [(first, last) for first in range(len(spots) - 1) for last in range(first, len(spots))]
    for first, last in runs if len(runs) <= rounds else chance.sample(runs, rounds):
        for fate in range(3):
            damaged = bytearray(content)
            # A sector or two of one batch, or all of some: the first sector of the first in any case.
            sectors = range(spots[first].start, spots[last].following, SECTOR)
            for at in sectors if chance.random() < 0.5 else (sectors[0], *chance.sample(sectors, 1)):
                damaged[at : at + SECTOR] = (bytes(SECTOR), b"\xff" * SECTOR, chance.randbytes(SECTOR))[fate]
            figures["acknowledged batches lost"] += last - first + 1
            disk = specimen.disk(changed={segment: bytes(damaged)})
            index = specimen.spots.index(spots[first])
            _refused(disk, specimen, index, segment, spots[first].start)


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


def _recovers(disk: MemoryFiles, expected: list[Kept], *, again: bool = True, warned: bool | None = None) -> None:
    """It opens with exactly these batches, goes on, and (if it is tried `again`) opens again without a word.

    `warned`: whether something must be said, or must not, at the first opening; None if either will do.
    """
    outcome = Outcome()
    with open_journal(disk, outcome) as journal:
        assert outcome.replayed == expected, "other batches were recovered than are whole"
        assert warned is None or bool(outcome.warnings) is warned, f"warnings: {outcome.warnings}"
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
    refusal: JournalCorrupt | None = None
    try:
        open_journal(disk, outcome)
    except JournalCorrupt as error:
        refusal = error
    assert refusal is not None, "damage in what was acknowledged was dropped without a word"
    assert (refusal.file, refusal.offset) == (file_name(segment), offset)
    assert refusal.reason
    assert outcome.replayed == specimen.said[:whole]
    after = {name: disk.content(DIRECTORY / name) for name in disk.listdir(DIRECTORY) if name != "lock"}
    assert after == {name: content for name, content in before.items() if name != "lock"}
    damage = [(found.file, found.offset) for found in verify(DIRECTORY, files=disk) if found.damage]
    assert damage[0] == (file_name(segment), offset)


def _repairs(
    disk: MemoryFiles,
    specimen: Specimen,
    at: tuple[int, int],
    kept: list[Kept],
    given_up: list[Kept],
    damaged: bytes,
    *,
    until: int | None = None,
) -> None:
    """Repair keeps what comes before the damage, copies the rest aside, and says and lists what it gave up."""
    number, offset = at
    report = repair(DIRECTORY, files=disk, names=lambda batch: [f"batch {batch.number}"])
    assert (report.file, report.offset) == (file_name(number), offset)
    assert (report.batches, report.records) == (len(given_up), sum(len(records) for _, records in given_up))
    lines = [] if report.listed is None else disk.content(report.listed).decode().splitlines()
    assert lines[: len(report.lost)] == [f"# {lost.told()}" for lost in report.lost]
    assert report.lost[0][:2] == (file_name(number), offset)
    assert lines[len(report.lost) :] == [f"batch {batch}" for batch, _ in given_up] == report.names
    copied = {path.name: disk.content(path) for path in report.copies}
    originals = {file_name(n): c for n, c in specimen.files.items() if n >= number and (until is None or n <= until)}
    assert copied == {**originals, file_name(number): damaged}
    assert verify(DIRECTORY, files=disk) == []
    assert [keep(batch) for batch in scan(DIRECTORY, files=disk)] == kept
    _recovers(disk, kept)


def _mends_header(disk: MemoryFiles, specimen: Specimen, number: int, damaged: bytes) -> None:
    """What a segment's header said is told by the batches behind it: it is written anew, and nothing is given up."""
    report = repair(DIRECTORY, files=disk)
    assert (report.file, report.offset, report.batches, report.listed) == (file_name(number), 0, 0, None)
    assert [disk.content(path) for path in report.copies] == [damaged]
    _recovers(disk, specimen.said)
