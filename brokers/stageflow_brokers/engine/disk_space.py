"""Whether there is room for what is new. What is under way is never refused: room is kept for it.

Starts are taken while all that is alive could grow to what instances are seen to end with, wait for the history as
that, and still leave the largest segment to be copied: only then can the work in hand be finished and the dead be given
back, whatever happens to the disk. Nobody knows what a stage will return, so that even this may run out: then what has
to be written waits here, as it came, until there is room, and what only asks is answered meanwhile. Must never write
anything but segments to come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice

from stageflow_brokers.core import wire
from stageflow_brokers.core.machine import Machine
from stageflow_brokers.engine.compaction import MARGIN, PER_GROUP, PER_MESSAGE, RESERVE, Compactor
from stageflow_brokers.errors import ProtocolError
from stageflow_brokers.journal.journal import Journal
from stageflow_brokers.journal.segment_allocator import SMALLEST
from stageflow_brokers.types import FLAG_START

__all__ = ["NEARLY_FULL", "DiskSpaceGuard", "Frame"]

Frame = tuple[int, bytes, bytes, bytes]
"""(peer, operation, header, blob) as it came in."""

NEARLY_FULL = "the disk that holds the journal is nearly full; free some space and submit again"

LOOK_AGAIN = 0.2
"""Seconds between looks at a disk that was nearly full."""

UNSEEN = 8 << 20
"""Most bytes that come in before the disk is looked at again: others write to it too."""

PLENTY = 8
"""A disk with so many times what is needed is not nearly full: nothing has to be taken yet."""

STEP = 1 << 20
"""What is kept for later grows by so many bytes."""

SMALLEST_ROUND, LARGEST_ROUND = 64 << 10, 64 << 20

SAMPLE, SAMPLES_KEPT = 256, 1024
"""How many messages are looked at to learn what instances end with, and how many of those seen count."""

SMALL = 4 << 10
"""A frame up to this is let in when others wait: most of them end something, which is what makes room."""

FRAMING = 512
"""A batch takes this much beside its frames, with its end mark; and a frame no more than a part of it."""

READS = frozenset(
    ("audit", "groups", "inspect", "live", "lookup", "peek", "ping", "progress", "stats", "subscribe", "tally", "watch")
)
"""Queries that change nothing the journal is told of."""

MOST_ASIDE, MOST_BYTES_ASIDE = 100_000, 96 << 20
"""Frames of one peer that wait for room, and their bytes: more than any client leaves unconfirmed. Who sends more is
cut off, and has to say it again."""


class WriteBudget:
    """What may be written with one round: into the segment that is open, or else into the next one."""

    def __init__(self, left: int, next: int, have: int, keep: int, slack: int) -> None:
        self._left = left - FRAMING
        self._next = next - FRAMING
        self._have = have
        self._keep = keep
        self._slack = slack
        self._taken = 0

    def take(self, size: int) -> bool:
        """Whether there is room for so many bytes more, which are taken then."""
        after = self._taken + size + FRAMING // 8
        keep = self._keep + self._slack if size > SMALL else self._slack // 2
        if after <= self._left:
            allowed = after + keep <= self._have
        else:
            # What is left of the open segment is lost then.
            allowed = after <= self._next and self._left + after + keep <= self._have
        if allowed:
            self._taken = after
        return allowed


class DiskSpaceGuard:
    """Keeps `machine.refusal_reason` true to the disk that holds `journal`."""

    def __init__(self, machine: Machine, journal: Journal, reclaim: Compactor) -> None:
        self._machine = machine
        self._journal = journal
        self._reclaim = reclaim
        self._unseen = 0
        self._look_at = 0.0
        self._final_bytes = 0.0
        self._finals = 0.0
        self._aside: dict[int, deque[Frame]] = {}
        self._bytes_aside: dict[int, int] = {}

    @property
    def round_bytes(self) -> int:
        """How much may come in with one round, so that it fits into what is reserved already."""
        room = self._journal.room
        return max(SMALLEST_ROUND, min(LARGEST_ROUND, max(room.left, room.spare) // 2))

    @property
    def holding(self) -> bool:
        """Whether frames wait here for room."""
        return bool(self._aside)

    @property
    def cramped(self) -> bool:
        """Whether there is hardly room for what the broker writes by itself."""
        return bool(self._machine.refusal_reason) and self._reclaim.have < self._reclaim.slack // 4

    def admit(self, frames: Sequence[Frame]) -> Sequence[Frame]:
        """Those of these frames, and of the ones that wait, for which there is room now.

        What has not been taken has changed nothing: the machine knows no more than the journal, so that whatever is
        answered meanwhile is as true as ever. The frames of one peer stay in order; behind one that waits all of its
        others do, and a peer that says hello again will send again what waits.
        """
        if not self._aside and not self._machine.refusal_reason:
            return frames
        room = self._journal.room
        journal_free = self._journal.free
        beside = max(room.spare, self._reclaim.clean, 0 if room.spare else journal_free * 7 // 8)
        allowance = WriteBudget(room.left, beside, self._reclaim.have, self._reclaim.keep(), self._reclaim.slack)
        for record in self._machine.writer.records:
            if not allowance.take(len(record[3]) + len(record[4])):
                break
        taken: list[Frame] = []
        for peer in list(self._aside):
            waiting = self._aside[peer]
            while waiting and self._fits(waiting[0], allowance):
                frame = waiting.popleft()
                self._bytes_aside[peer] -= len(frame[2]) + len(frame[3])
                taken.append(frame)
            if not waiting:
                self._forget(peer)
        for frame in frames:
            peer, operation = frame[0], frame[1]
            if operation == wire.HELLO:
                self._forget(peer)
                taken.append(frame)
            elif peer not in self._aside and self._fits(frame, allowance):
                taken.append(frame)
            else:
                self._put_aside(frame)
        return taken

    def _fits(self, frame: Frame, allowance: WriteBudget) -> bool:
        _, operation, header, blob = frame
        if operation == wire.MARK_READ:
            return True
        try:
            if operation == wire.QUERY and wire.decode_query(header).name in READS:
                return True
            if operation == wire.PUBLISH and self._machine.refusal_reason and _starts(header, blob):
                return True  # it is refused
        except ProtocolError:
            return True  # so is this
        return allowance.take(len(header) + len(blob))

    def _put_aside(self, frame: Frame) -> None:
        peer = frame[0]
        waiting = self._aside.setdefault(peer, deque())
        waiting.append(frame)
        size = self._bytes_aside[peer] = self._bytes_aside.get(peer, 0) + len(frame[2]) + len(frame[3])
        if len(waiting) > MOST_ASIDE or size > MOST_BYTES_ASIDE:
            self._forget(peer)
            session = self._machine.state.sessions.get(peer)
            if session is not None and session not in self._machine.outbox.slow_peers:
                self._machine.outbox.slow_peers.append(session)

    def _forget(self, peer: int) -> None:
        self._aside.pop(peer, None)
        self._bytes_aside.pop(peer, None)

    def look(self, frames: Sequence[Frame]) -> None:
        """Before a round takes these frames: may starts among them be taken?"""
        coming = 0
        for frame in frames:
            coming += len(frame[2]) + len(frame[3])
        self._unseen -= coming
        machine = self._machine
        now = machine.state.now
        if machine.refusal_reason:
            if now < self._look_at:
                return
        elif self._unseen >= 0 and not self._journal.room.low:
            return
        self._look_at = now + LOOK_AGAIN
        spared = self._spared(coming)
        # What comes in takes room, and has to find some once more.
        self._unseen = min(spared // 4, UNSEEN)
        machine.refusal_reason = NEARLY_FULL if spared < 0 else ""

    def _spared(self, coming: int) -> int:
        """Bytes that could be done without, with all that is `coming` written and all that is alive still in hand."""
        journal = self._journal
        if journal.room_low and not journal.prepare():
            return -1
        if coming > self.round_bytes and not journal.prepare(2 * coming):
            return -1
        self._observe()
        alive = self._reclaim.alive + coming
        growth = self._reclaim.growth(self._final_bytes / self._finals if self._finals else 0.0) + coming
        needed = RESERVE * growth + coming + self._reclaim.slack
        whole = int(MARGIN * (alive + growth)) + self._reclaim.slack
        spared = self._spare_of(needed, whole)
        if spared >= 0 or journal.free >= PLENTY * max(needed, UNSEEN):
            return spared if spared >= 0 else UNSEEN
        # Others write to this disk too: what has to be had is taken now, and half of what is free left to them.
        room = journal.room
        wanted = min(needed - room.left, room.spare + journal.free // 2)
        journal.prepare(wanted // STEP * STEP)
        while (spared := self._spare_of(needed, whole)) < 0 and self._another():
            journal.seal()  # takes the spare, and another one is made of what is free
        return spared

    def _another(self) -> bool:
        """Whether there is more to be had from the disk than is lost of the open segment when the next one begins."""
        room, half = self._journal.room, self._journal.free // 2
        return room.spare > 0 and max(room.left, SMALLEST) <= half

    def _spare_of(self, needed: int, whole: int) -> int:
        """Bytes more than are `needed` beside what is used already, and than the `whole` journal must hold beside its
        largest segment, which may be the one to go."""
        room = self._journal.room
        sizes = [segment.size for segment in self._journal.segments()]
        sizes.append(room.spare)
        without = sum(sizes) - max(sizes)
        return min(room.left + room.spare + self._reclaim.clean - needed, without - needed, without - whole)

    def _observe(self) -> None:
        """Learn what instances end with from those that have just ended, or wait for the history."""
        for message in islice(reversed(self._machine.state.messages.values()), SAMPLE):
            group = message.group
            if group is not None and group.ended == message.label and group.ended:
                self._final_bytes += message.weight + PER_MESSAGE + PER_GROUP
                self._finals += 1
        if self._finals > SAMPLES_KEPT:
            self._final_bytes *= SAMPLES_KEPT / self._finals
            self._finals = SAMPLES_KEPT


def _starts(header: bytes, blob: bytes) -> bool:
    return any(item.flags & FLAG_START for item in wire.decode_publish(header, blob).items)
