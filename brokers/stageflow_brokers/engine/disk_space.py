"""The disk-space guard: refuse starts in time, so that work in hand can always be written.

A start is accepted only if the disk has space for three things: the records with which every live instance grows to its
usual final size, the live data at that size while it waits for the history, and a copy of the largest segment. Only
then can the work in hand end and dead records be removed, whatever other programs write to the disk. The size of a
stage's result is not known beforehand, so the space may run out nevertheless. Then frames that must be written wait
here, unchanged, until there is space, and frames that only read are answered. The guard must never write anything
except future segments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice

from stageflow_brokers.core import wire
from stageflow_brokers.core.machine import Machine
from stageflow_brokers.engine.compaction import (
    COPY_MARGIN,
    GROUP_OVERHEAD_BYTES,
    MESSAGE_OVERHEAD_BYTES,
    RESERVE_FACTOR,
    Compactor,
)
from stageflow_brokers.errors import ProtocolError
from stageflow_brokers.journal.journal import Journal
from stageflow_brokers.journal.segment_allocator import MIN_SEGMENT_BYTES
from stageflow_brokers.types import FLAG_START

__all__ = ["NEARLY_FULL", "DiskSpaceGuard", "Frame"]

Frame = tuple[int, bytes, bytes, bytes]
"""(peer, operation, header, blob) as it arrived."""

NEARLY_FULL = "the disk that holds the journal is nearly full; free some space and submit again"

DISK_RECHECK_SECONDS = 0.2
"""Seconds between checks of a disk that was nearly full."""

DISK_CHECK_BYTES = 8 << 20
"""The most bytes that arrive between two checks of the disk: other programs write to it too."""

DISK_HEADROOM_FACTOR = 8
"""A disk with this many times the needed space free is not nearly full: no segment has to be reserved yet."""

RESERVE_INCREMENT_BYTES = 1 << 20
"""The reserved space grows in multiples of this."""

MIN_ROUND_BYTES, MAX_ROUND_BYTES = 64 << 10, 64 << 20
"""Limits of the bytes that one round receives, whatever the free space is."""

SAMPLED_MESSAGES = 256
"""Messages inspected per check to learn the size that instances end with."""

MAX_FINAL_SAMPLES = 1024
"""Samples that count for the average; older ones lose weight."""

SMALL_FRAME_BYTES = 4 << 10
"""A frame up to this size may use half of the slack while larger ones wait: most small frames end something, and so
free space."""

BATCH_OVERHEAD_BYTES = 512
"""Bytes of a batch beside its frames, with its end mark. A frame adds at most an eighth of it."""

READ_QUERIES = frozenset(
    ("audit", "groups", "inspect", "live", "lookup", "peek", "ping", "progress", "stats", "subscribe", "tally", "watch")
)
"""Queries that write nothing to the journal."""

MAX_HELD_FRAMES, MAX_HELD_BYTES = 100_000, 96 << 20
"""Frames of one peer that wait for space, and their bytes: more than a client leaves unconfirmed. A peer that sends
more is disconnected and must send them again."""


class WriteBudget:
    """The bytes that one round may write, into the open segment or else into the next one."""

    def __init__(
        self, open_bytes: int, next_bytes: int, available_bytes: int, reserved_bytes: int, slack_bytes: int
    ) -> None:
        self._open_bytes = open_bytes - BATCH_OVERHEAD_BYTES
        self._next_bytes = next_bytes - BATCH_OVERHEAD_BYTES
        self._available_bytes = available_bytes
        self._reserved_bytes = reserved_bytes
        self._slack_bytes = slack_bytes
        self._taken_bytes = 0

    def take(self, size: int) -> bool:
        """Take `size` more bytes from the budget. Return False, and take nothing, if they do not fit."""
        after = self._taken_bytes + size + BATCH_OVERHEAD_BYTES // 8
        keep = self._reserved_bytes + self._slack_bytes if size > SMALL_FRAME_BYTES else self._slack_bytes // 2
        if after <= self._open_bytes:
            allowed = after + keep <= self._available_bytes
        else:
            # The rest of the open segment is lost when the next one begins.
            allowed = after <= self._next_bytes and self._open_bytes + after + keep <= self._available_bytes
        if allowed:
            self._taken_bytes = after
        return allowed


class DiskSpaceGuard:
    """Sets `machine.refusal_reason` by the state of the disk, and holds frames for which there is no space."""

    def __init__(self, machine: Machine, journal: Journal, compactor: Compactor) -> None:
        self._machine = machine
        self._journal = journal
        self._compactor = compactor
        self._bytes_to_check = 0
        self._next_check = 0.0
        self._final_bytes = 0.0
        self._final_count = 0.0
        self._held: dict[int, deque[Frame]] = {}
        self._held_bytes: dict[int, int] = {}

    @property
    def round_bytes(self) -> int:
        """How many bytes one round should accept, so that they fit into space that is reserved already."""
        space = self._journal.free_space
        return max(MIN_ROUND_BYTES, min(MAX_ROUND_BYTES, max(space.open_bytes, space.spare_bytes) // 2))

    @property
    def is_holding(self) -> bool:
        """True while frames wait for space."""
        return bool(self._held)

    @property
    def is_exhausted(self) -> bool:
        """True if there is hardly space for the records that the broker writes without a request."""
        return bool(self._machine.refusal_reason) and self._compactor.available_bytes < self._compactor.slack_bytes // 4

    def admit(self, frames: Sequence[Frame]) -> Sequence[Frame]:
        """Return the frames, held ones first, for which there is space; hold the others.

        A held frame has changed nothing, so the machine never knows more than the journal, and every answer stays
        true. Frames of one peer stay in order: behind a held frame all later ones of its peer are held. A hello
        discards the held frames of its peer, because the peer sends them again.
        """
        if not self._held and not self._machine.refusal_reason:
            return frames
        compactor = self._compactor
        space = self._journal.free_space
        disk_free_bytes = self._journal.disk_free_bytes
        next_bytes = max(
            space.spare_bytes, compactor.recyclable_bytes, 0 if space.spare_bytes else disk_free_bytes * 7 // 8
        )
        budget = WriteBudget(
            space.open_bytes,
            next_bytes,
            compactor.available_bytes,
            compactor.reserved_bytes(),
            compactor.slack_bytes,
        )
        for record in self._machine.writer.records:
            if not budget.take(len(record[3]) + len(record[4])):
                break
        admitted: list[Frame] = []
        for peer in list(self._held):
            waiting = self._held[peer]
            while waiting and self._fits(waiting[0], budget):
                frame = waiting.popleft()
                self._held_bytes[peer] -= len(frame[2]) + len(frame[3])
                admitted.append(frame)
            if not waiting:
                self._discard_held(peer)
        for frame in frames:
            peer, operation = frame[0], frame[1]
            if operation == wire.HELLO:
                self._discard_held(peer)
                admitted.append(frame)
            elif peer not in self._held and self._fits(frame, budget):
                admitted.append(frame)
            else:
                self._hold(frame)
        return admitted

    def _fits(self, frame: Frame, budget: WriteBudget) -> bool:
        _, operation, header, blob = frame
        if operation == wire.MARK_READ:
            return True
        try:
            if operation == wire.QUERY and wire.decode_query(header).name in READ_QUERIES:
                return True
            if operation == wire.PUBLISH and self._machine.refusal_reason and _has_start(header, blob):
                return True  # the machine refuses it, so it writes nothing
        except ProtocolError:
            return True  # the machine refuses it, too
        return budget.take(len(header) + len(blob))

    def _hold(self, frame: Frame) -> None:
        peer = frame[0]
        waiting = self._held.setdefault(peer, deque())
        waiting.append(frame)
        size = self._held_bytes[peer] = self._held_bytes.get(peer, 0) + len(frame[2]) + len(frame[3])
        if len(waiting) > MAX_HELD_FRAMES or size > MAX_HELD_BYTES:
            self._discard_held(peer)
            session = self._machine.state.sessions.get(peer)
            if session is not None and session not in self._machine.outbox.slow_peers:
                self._machine.outbox.slow_peers.append(session)

    def _discard_held(self, peer: int) -> None:
        self._held.pop(peer, None)
        self._held_bytes.pop(peer, None)

    def check_disk(self, frames: Sequence[Frame]) -> None:
        """Decide, before a round receives these frames, whether starts are accepted."""
        incoming = 0
        for frame in frames:
            incoming += len(frame[2]) + len(frame[3])
        self._bytes_to_check -= incoming
        machine = self._machine
        now = machine.state.now
        if machine.refusal_reason:
            if now < self._next_check:
                return
        elif self._bytes_to_check >= 0 and not self._journal.free_space.is_low:
            return
        self._next_check = now + DISK_RECHECK_SECONDS
        surplus = self._surplus_bytes(incoming)
        # The incoming bytes use the surplus up: check again before a quarter of it is gone.
        self._bytes_to_check = min(surplus // 4, DISK_CHECK_BYTES)
        machine.refusal_reason = NEARLY_FULL if surplus < 0 else ""

    def _surplus_bytes(self, incoming: int) -> int:
        """Return the bytes beyond the space that the live data and the `incoming` bytes may need; negative if too few.

        Reserves segments while the disk has space for them.
        """
        journal = self._journal
        if journal.is_space_low and not journal.prepare():
            return -1
        if incoming > self.round_bytes and not journal.prepare(2 * incoming):
            return -1
        self._sample_final_sizes()
        live = self._compactor.live_bytes + incoming
        average = self._final_bytes / self._final_count if self._final_count else 0.0
        growth = self._compactor.growth_bytes(average) + incoming
        needed = RESERVE_FACTOR * growth + incoming + self._compactor.slack_bytes
        whole = int(COPY_MARGIN * (live + growth)) + self._compactor.slack_bytes
        surplus = self._surplus_over(needed, whole)
        if surplus >= 0 or journal.disk_free_bytes >= DISK_HEADROOM_FACTOR * max(needed, DISK_CHECK_BYTES):
            return surplus if surplus >= 0 else DISK_CHECK_BYTES
        # Other programs write to this disk too: reserve the needed space now, and leave them half of what is free.
        space = journal.free_space
        wanted = min(needed - space.open_bytes, space.spare_bytes + journal.disk_free_bytes // 2)
        journal.prepare(wanted // RESERVE_INCREMENT_BYTES * RESERVE_INCREMENT_BYTES)
        while (surplus := self._surplus_over(needed, whole)) < 0 and self._gains_by_sealing():
            journal.seal()  # uses the spare; the allocator makes another one from the free space
        return surplus

    def _gains_by_sealing(self) -> bool:
        """True if the disk can give more than the rest of the open segment, which sealing loses."""
        space, half = self._journal.free_space, self._journal.disk_free_bytes // 2
        return space.spare_bytes > 0 and max(space.open_bytes, MIN_SEGMENT_BYTES) <= half

    def _surplus_over(self, needed: int, whole: int) -> int:
        """Return the bytes beyond `needed` for new records, and beyond `whole` for the live data at its largest.

        The largest segment does not count for either: it may be the one that compaction has to copy.
        """
        space = self._journal.free_space
        sizes = [segment.size for segment in self._journal.segments()]
        sizes.append(space.spare_bytes)
        without_largest = sum(sizes) - max(sizes)
        writable = space.open_bytes + space.spare_bytes + self._compactor.recyclable_bytes
        return min(writable - needed, without_largest - needed, without_largest - whole)

    def _sample_final_sizes(self) -> None:
        """Add the sizes of the messages with which groups have just ended, or wait for the history, to the average."""
        for message in islice(reversed(self._machine.state.messages.values()), SAMPLED_MESSAGES):
            group = message.group
            if group is not None and group.end_label == message.label and group.end_label:
                self._final_bytes += message.weight + MESSAGE_OVERHEAD_BYTES + GROUP_OVERHEAD_BYTES
                self._final_count += 1
        if self._final_count > MAX_FINAL_SAMPLES:
            self._final_bytes *= MAX_FINAL_SAMPLES / self._final_count
            self._final_count = MAX_FINAL_SAMPLES


def _has_start(header: bytes, blob: bytes) -> bool:
    return any(item.flags & FLAG_START for item in wire.decode_publish(header, blob).items)
