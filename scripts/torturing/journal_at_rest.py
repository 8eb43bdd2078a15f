"""Damage to a journal at rest: cut at any byte, files or sectors lost, sectors unreadable, bits flipped.

The law for each: whole batches before the damage are recovered byte for byte; damage in acknowledged batches is refused
with file and offset, and the refusal changes nothing on disk; a torn end is cut off with a warning. Each loss comes
with a refusal or a warning, and there is no warning without a loss.
"""

from __future__ import annotations

import random
from collections import Counter

from stageflow_brokers.errors import JournalCorrupt
from stageflow_brokers.journal.format import BATCH_HEADER_BYTES, SECTOR_BYTES, Record, file_name
from stageflow_brokers.journal.repair import repair
from stageflow_brokers.journal.verify import scan, verify
from stageflow_brokers.testing.simulated_disk import SimulatedDisk
from torturing.sample_journal import Kept, Outcome, SampleJournal, Spot, keep, open_journal
from torturing.workload import DIRECTORY

__all__ = ["cut_everywhere", "flip_bits", "lose_files", "lose_sectors", "spoil_sectors"]

SEGMENT_HEADER = 64
RECORD_HEADER = 25
REPAIRED = 0.1
"""Share of the refused journals that are also repaired."""
LATER = [Record(1, 1, 0, b"header", b"a batch that comes after")]


def cut_everywhere(
    everything: SampleJournal, figures: Counter[str], *, share: float, edges: float = 1.0, chance: random.Random
) -> None:
    """Cut each segment at each byte, once as the end of the journal, once with the later segments in place.

    Tried are a `share` of all bytes, and a share `edges` of those where a batch, an end mark or the header begins or
    ends. Only the neighbours of the segment are present, because the others do not affect it. A segment at the end of
    the journal is marked as not followed. A cut in the header is refused; a later one loses nothing, without a warning,
    if the end mark is still there, and gives a warning otherwise.
    """
    last = max(everything.files)
    for number, content in everything.files.items():
        sample = everything.around(number)
        spots = [spot for spot in sample.spots if spot.segment == number]
        end = spots[-1].following
        ends = [edge for spot in spots for edge in (spot.start, spot.end, spot.following)]
        near = {
            at for edge in (*ends, end + BATCH_HEADER_BYTES, SEGMENT_HEADER, SECTOR_BYTES) for at in (edge - 1, edge)
        }
        alone = sample.unfollowed(number)
        for at in range(min(len(content), end + SECTOR_BYTES) + 1):
            if chance.random() >= (edges if at in near else share):
                continue
            figures["bytes cut"] += 1
            whole = sample.whole_until(number, at)
            disk = sample.disk(until=number, changed={number: alone[:at]})
            if at < SECTOR_BYTES:
                figures["  in the header: refused"] += 1
                _refused(disk, sample, whole, number, 0)
                if chance.random() < REPAIRED:
                    figures["journals repaired"] += 1
                    _repairs(disk, sample, (number, 0), sample.decoded[:whole], [], alone[:at], until=number)
            else:
                silent = at >= end + BATCH_HEADER_BYTES
                figures["  behind the end mark: nothing lost" if silent else "  before it: warning"] += 1
                found = verify(DIRECTORY, files=disk)
                place = next((spot.start for spot in spots if at < spot.end), end)
                assert [(each.file, each.offset, each.damage) for each in found] == (
                    [] if silent else [(file_name(number), place, False)]
                )
                _recovers(disk, sample.decoded[:whole], again=chance.random() < 0.2, warned=not silent)
            if number == last:
                continue
            disk = sample.disk(changed={number: content[:at]})
            if at >= spots[-1].end:
                _recovers(disk, sample.decoded, again=False)
                continue
            torn = next(spot for spot in spots if at < spot.end)
            offset = 0 if at < SECTOR_BYTES else torn.start
            _refused(disk, sample, whole, number, offset)
            if chance.random() < REPAIRED:
                figures["journals repaired"] += 1
                behind = [
                    decoded for decoded, spot in zip(sample.decoded, sample.spots, strict=True) if spot.segment > number
                ]
                _repairs(disk, sample, (number, offset), sample.decoded[:whole], behind, content[:at])


def lose_files(everything: SampleJournal, figures: Counter[str]) -> None:
    """Delete each segment. The first is not missed here; one in the middle is, and so is the last."""
    numbers = sorted(everything.files)
    for number in numbers:
        sample = everything.around(number)
        disk = sample.disk()
        disk.remove(DIRECTORY / file_name(number))
        figures["segments deleted"] += 1
        behind = [decoded for decoded, spot in zip(sample.decoded, sample.spots, strict=True) if spot.segment > number]
        if number == numbers[0]:
            _recovers(disk, behind)
            continue
        before = sample.whole_until(number, 0)
        place = (number, 0) if number < numbers[-1] else (number - 1, sample.spots[before - 1].following)
        _refused(disk, sample, before, *place)
        report = repair(DIRECTORY, files=disk)
        assert ((report.file, report.offset), report.batches) == ((file_name(place[0]), place[1]), len(behind))
        _recovers(disk, sample.decoded[:before])


def spoil_sectors(everything: SampleJournal, figures: Counter[str], *, share: float, chance: random.Random) -> None:
    """Make each sector (a `share` of them) unreadable.

    In a batch or a header that is refused, in the last batch too, which may be complete. Repair goes on without it.
    """
    for number, content in everything.files.items():
        sample = everything.around(number)
        spots = [spot for spot in sample.spots if spot.segment == number]
        for at in range(0, spots[-1].following + SECTOR_BYTES, SECTOR_BYTES):
            if at >= len(content) or chance.random() >= share:
                continue
            figures["sectors made unreadable"] += 1
            disk = sample.disk()
            disk.spoil(DIRECTORY / file_name(number), at)
            spot = next((spot for spot in spots if spot.start <= at < spot.following), None)
            if at >= SECTOR_BYTES and spot is None and number < max(sample.files):
                _recovers(disk, sample.decoded)  # an end mark, and the next segment says as much
                continue
            offset = 0 if at < SECTOR_BYTES else spots[-1].following if spot is None else spot.start
            whole = sample.whole_until(number, offset)
            _refused(disk, sample, whole, number, offset)
            (found, *_) = verify(DIRECTORY, files=disk)
            assert f"the sector at offset {at} cannot be read" in found.reason
            if chance.random() < 0.5:
                disk.heal()
                _recovers(disk, sample.decoded)
                continue
            report = repair(DIRECTORY, files=disk)
            assert (report.file, report.offset, report.unreadable) == (file_name(number), offset, SECTOR_BYTES)
            copied = {path.name: disk.content(path) for path in report.copies}
            assert copied[file_name(number)] == content[:at] + bytes(SECTOR_BYTES) + content[at + SECTOR_BYTES :]
            assert verify(DIRECTORY, files=disk) == []
            _recovers(disk, sample.decoded if at < SECTOR_BYTES else sample.decoded[:whole])


def lose_sectors(sample: SampleJournal, figures: Counter[str], *, rounds: int, chance: random.Random) -> None:
    """Zero, set, garble or restore each sector of the last, unsynced batch; then sets of them; then acknowledged ones.

    The acknowledged sectors are those of earlier batches in the same segment.
    """
    _lose_acknowledged(sample, figures, rounds, chance)
    spot = sample.spots[-1]
    content = sample.files[spot.segment]
    sectors = list(range(spot.start, min(spot.following + SECTOR_BYTES, len(content)), SECTOR_BYTES))
    losses: list[tuple[int, ...]] = [(each,) for each in sectors]
    losses += [tuple(each for each in sectors if chance.random() < 0.5) for _ in range(rounds)]
    for lost in losses:
        for fate in range(4):
            damaged = bytearray(content)
            for at in lost:
                garbled = chance.randbytes(SECTOR_BYTES)
                before = sample.before[at : at + SECTOR_BYTES]
                damaged[at : at + SECTOR_BYTES] = (bytes(SECTOR_BYTES), b"\xff" * SECTOR_BYTES, garbled, before)[fate]
            figures["sectors lost"] += len(lost)
            intact = damaged[spot.start : spot.end] == content[spot.start : spot.end]
            disk = sample.disk(changed={spot.segment: bytes(damaged)})
            unwritten = bytes(damaged[spot.start : spot.following + SECTOR_BYTES]) in (
                sample.before[spot.start : spot.following + SECTOR_BYTES],
                content[spot.start : spot.following + SECTOR_BYTES],
            )
            warned = None if fate == 3 else not unwritten
            _recovers(disk, sample.decoded if intact else sample.decoded[:-1], warned=warned)


def _lose_acknowledged(sample: SampleJournal, figures: Counter[str], rounds: int, chance: random.Random) -> None:
    """Damage acknowledged batches with the rest intact, even if that is only the end mark."""
    segment = sample.spots[-1].segment
    spots = [spot for spot in sample.spots if spot.segment == segment]
    content = sample.files[segment]
    runs = [(first, last) for first in range(len(spots) - 1) for last in range(first, len(spots))]
    for first, last in runs if len(runs) <= rounds else chance.sample(runs, rounds):
        for fate in range(3):
            damaged = bytearray(content)
            # A sector or two of one batch, or all of some: the first sector of the first in any case.
            sectors = range(spots[first].start, spots[last].following, SECTOR_BYTES)
            for at in sectors if chance.random() < 0.5 else (sectors[0], *chance.sample(sectors, 1)):
                damaged[at : at + SECTOR_BYTES] = (
                    bytes(SECTOR_BYTES),
                    b"\xff" * SECTOR_BYTES,
                    chance.randbytes(SECTOR_BYTES),
                )[fate]
            figures["acknowledged batches lost"] += last - first + 1
            disk = sample.disk(changed={segment: bytes(damaged)})
            index = sample.spots.index(spots[first])
            _refused(disk, sample, index, segment, spots[first].start)


def flip_bits(
    everything: SampleJournal, figures: Counter[str], *, share: float, bodies: float, chance: random.Random
) -> None:
    """Flip each bit (a `share` of them) of all headers, and a share `bodies` of the bits in between."""
    for number, content in everything.files.items():
        sample = everything.around(number)
        spots = [spot for spot in sample.spots if spot.segment == number]
        for at in range(min(spots[-1].following + BATCH_HEADER_BYTES, len(content))):
            headers, spot = _what_is_at(sample, spots, at)
            for bit in range(8):
                if chance.random() >= (share if headers else bodies):
                    continue
                figures["bits flipped"] += 1
                flipped = bytearray(content)
                flipped[at] ^= 1 << bit
                disk = sample.disk(changed={number: bytes(flipped)})
                if at < SEGMENT_HEADER:
                    _refused(disk, sample, sample.whole_until(number, 0), number, 0)
                    if chance.random() < REPAIRED:
                        figures["headers repaired"] += 1
                        _mends_header(disk, sample, number, bytes(flipped))
                elif spot is None:
                    # Padding has no meaning, and the next segment repeats the meaning of the end mark of a sealed one.
                    _recovers(disk, sample.decoded)
                elif spot is sample.spots[-1]:
                    _recovers(disk, sample.decoded[:-1])
                else:
                    index = sample.spots.index(spot)
                    _refused(disk, sample, index, number, spot.start)
                    if chance.random() < REPAIRED:
                        figures["journals repaired"] += 1
                        kept, behind = sample.decoded[:index], sample.decoded[index + 1 :]
                        _repairs(disk, sample, (number, spot.start), kept, behind, bytes(flipped))


def _what_is_at(sample: SampleJournal, spots: list[Spot], at: int) -> tuple[bool, Spot | None]:
    """Return (True if the byte belongs to a header, the batch that holds it)."""
    if at < SECTOR_BYTES:
        return at < SEGMENT_HEADER, None
    spot = next((spot for spot in spots if spot.start <= at < spot.end), None)
    if spot is None:
        return at >= spots[-1].following, None
    at -= spot.start + BATCH_HEADER_BYTES
    if at < 0:
        return True, spot
    for _, _, _, header, blob in sample.decoded[sample.spots.index(spot)][1]:
        if at < RECORD_HEADER:
            return True, spot
        at -= RECORD_HEADER + len(header) + len(blob)
        if at < 0:
            return False, spot
    raise AssertionError("a batch has bytes that belong to none of its records")


def _recovers(disk: SimulatedDisk, expected: list[Kept], *, again: bool = True, warned: bool | None = None) -> None:
    """Check that it opens with exactly these batches, goes on, and (if tried `again`) opens again without a warning.

    `warned`: True if the first opening must give a warning, False if it must not, None for either.
    """
    outcome = Outcome()
    with open_journal(disk, outcome) as journal:
        assert outcome.replayed == expected, "the recovered batches are not the whole ones"
        assert warned is None or bool(outcome.warnings) is warned, f"warnings: {outcome.warnings}"
        journal.commit(LATER, 1.0)
    if not again:
        return
    second = Outcome()
    with open_journal(disk, second):
        assert second.replayed[:-1] == expected
        assert second.replayed[-1][1] == [(1, 1, 0, b"header", b"a batch that comes after")]
        assert second.warnings == [], "a torn end is cut off once"


def _refused(disk: SimulatedDisk, sample: SampleJournal, whole: int, segment: int, offset: int) -> None:
    """Check that it is refused with place and reason, has replayed only earlier batches, and has changed nothing."""
    before = {name: disk.content(DIRECTORY / name) for name in disk.listdir(DIRECTORY)}
    outcome = Outcome()
    refusal: JournalCorrupt | None = None
    try:
        open_journal(disk, outcome)
    except JournalCorrupt as error:
        refusal = error
    assert refusal is not None, "damage in acknowledged batches was dropped silently"
    assert (refusal.file, refusal.offset) == (file_name(segment), offset)
    assert refusal.reason
    assert outcome.replayed == sample.decoded[:whole]
    after = {name: disk.content(DIRECTORY / name) for name in disk.listdir(DIRECTORY) if name != "lock"}
    assert after == {name: content for name, content in before.items() if name != "lock"}
    damage = [(found.file, found.offset) for found in verify(DIRECTORY, files=disk) if found.damage]
    assert damage[0] == (file_name(segment), offset)


def _repairs(
    disk: SimulatedDisk,
    sample: SampleJournal,
    at: tuple[int, int],
    kept: list[Kept],
    given_up: list[Kept],
    damaged: bytes,
    *,
    until: int | None = None,
) -> None:
    """Check that repair keeps the batches before the damage, copies the rest aside, and lists the lost ones."""
    number, offset = at
    report = repair(DIRECTORY, files=disk, names_in=lambda batch: [f"batch {batch.number}"])
    assert (report.file, report.offset) == (file_name(number), offset)
    assert (report.batches, report.records) == (len(given_up), sum(len(records) for _, records in given_up))
    lines = [] if report.list_file is None else disk.content(report.list_file).decode().splitlines()
    assert lines[: len(report.lost)] == [f"# {lost.describe()}" for lost in report.lost]
    assert report.lost[0][:2] == (file_name(number), offset)
    assert lines[len(report.lost) :] == [f"batch {batch}" for batch, _ in given_up] == report.names
    copied = {path.name: disk.content(path) for path in report.copies}
    originals = {file_name(n): c for n, c in sample.files.items() if n >= number and (until is None or n <= until)}
    assert copied == {**originals, file_name(number): damaged}
    assert verify(DIRECTORY, files=disk) == []
    assert [keep(batch) for batch in scan(DIRECTORY, files=disk)] == kept
    _recovers(disk, kept)


def _mends_header(disk: SimulatedDisk, sample: SampleJournal, number: int, damaged: bytes) -> None:
    """Check that repair rewrites a header from the batches behind it and gives up nothing."""
    report = repair(DIRECTORY, files=disk)
    assert (report.file, report.offset, report.batches, report.list_file) == (file_name(number), 0, 0, None)
    assert [disk.content(path) for path in report.copies] == [damaged]
    _recovers(disk, sample.decoded)
