"""Count accepted settlements, list ended groups, and load an engine, all from the journal on disk without a broker.

The records are replayed through the broker's own `Replay`, so that a settlement counts for the message that it
acknowledged. Records of deleted segments cannot be counted: compaction deletes a segment when nothing in it is live.
The functions may run beside a broker. They must never write to the journal.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from stageflow_brokers.core import records
from stageflow_brokers.core.machine import Machine
from stageflow_brokers.core.message import Message
from stageflow_brokers.core.replay import Replay
from stageflow_brokers.core.sessions import Session
from stageflow_brokers.core.state import BrokerState
from stageflow_brokers.engine.engine import Engine, check_oldest, replay_batch
from stageflow_brokers.journal.filesystem import OsFileSystem
from stageflow_brokers.journal.format import Batch, file_name
from stageflow_brokers.journal.lock import writer_of
from stageflow_brokers.journal.verify import scan

__all__ = [
    "EndedGroups",
    "SegmentUse",
    "SettlementCounts",
    "SettlementKey",
    "count_settlements",
    "ended_groups",
    "load_engine",
]

SettlementKey = tuple[str, int, str]
"""(group, epoch, label) of an acknowledged message."""


class SegmentUse(Struct):
    """The content of one segment. `bytes` counts its records without batch headers and padding."""

    file: str
    batches: int = 0
    records: int = 0
    bytes: int = 0


class SettlementCounts(Struct):
    """Counts of the records in a journal.

    Args:
        segments: The content of each segment.
        settled: How often a settlement of each message was accepted; each number must be 1.
        record_kinds: Number of records of each kind.
        unnamed: Settlements of messages whose own record was in a deleted segment.
        live_messages: Messages that have not ended according to the records.
        live_groups: Groups that have not ended according to the records.
    """

    segments: list[SegmentUse]
    settled: Counter[SettlementKey]
    record_kinds: Counter[str]
    unnamed: int = 0
    live_messages: int = 0
    live_groups: int = 0

    @property
    def batches(self) -> int:
        """Number of all batches."""
        return sum(segment.batches for segment in self.segments)

    @property
    def records(self) -> int:
        """Number of all records."""
        return sum(segment.records for segment in self.segments)

    @property
    def bytes(self) -> int:
        """Bytes of all records."""
        return sum(segment.bytes for segment in self.segments)


def count_settlements(journal: Path) -> SettlementCounts:
    """Count the settlements and records of the journal in directory `journal`.

    Raises `JournalCorrupt` at damage, `JournalVersion`, and `JournalError` if there is no journal.
    """
    counts = SettlementCounts([], Counter(), Counter())
    settled = counts.settled

    def on_settled(message: Message | None, group_id: str, label: str) -> None:
        if message is None:
            counts.unnamed += 1
        else:
            settled["" if message.group is None else message.group.id, message.epoch, label] += 1

    state = BrokerState(paging=True)  # bodies are not needed, so none stays in memory
    replay = Replay(state, on_settled=on_settled)
    use = SegmentUse("")
    for batch in _scan(journal, replay):
        name = file_name(batch.segment)
        if name != use.file:
            use = SegmentUse(name)
            counts.segments.append(use)
        use.batches += 1
        use.records += len(batch.records)
        for record in batch.records:
            use.bytes += len(record.header) + len(record.blob)
            counts.record_kinds[records.NAMES.get(record.kind, f"kind {record.kind}")] += 1
    counts.live_messages = len(state.messages)
    counts.live_groups = sum(1 for group in state.groups.values() if group.messages() or group.gathers)
    return counts


class EndedGroups(Struct):
    """The ended groups of a journal.

    Args:
        ended: Groups whose message with the requested label was acknowledged, with the epoch of that message and its
            time in seconds since 1970.
        idle: Groups that have not ended, but have no message, gather or timer.
        latest_wall: Time of the latest batch in seconds since 1970, 0 if there is none.
        facts: The current facts.
        audit: The answer to the query `audit` that a broker would give after a start on this journal; empty if it was
            not requested.
    """

    ended: dict[str, tuple[int, float]]
    idle: list[str]
    latest_wall: float
    facts: dict[str, str]
    audit: dict[str, Any]


def ended_groups(journal: Path, label: str, *, audit: bool) -> EndedGroups:
    """Return the groups that ended with a message of label `label`, as far as the journal still holds it.

    `audit` adds the audit of the messages. Bodies are not kept in memory. Raises like `count_settlements`.
    """
    ended: dict[str, tuple[int, float]] = {}

    def on_settled(message: Message | None, group_id: str, _: str) -> None:
        if message is not None and message.label == label and message.group is not None:
            before = ended.get(message.group.id)
            if before is None or before[0] <= message.epoch:
                ended[message.group.id] = (message.epoch, message.location.wall)

    machine = Machine(paging=True)
    state = machine.state
    replay = Replay(state, on_settled=on_settled)
    latest_wall = 0.0
    with _gc_disabled():
        for batch in _scan(journal, replay):
            latest_wall = batch.wall
    idle = [group.id for group in state.groups.values() if group.is_idle]
    if audit:
        replay.finish(0.0, time.time())
    return EndedGroups(ended, idle, latest_wall, state.facts, _audit_of(machine) if audit else {})


def _scan(journal: Path, replay: Replay) -> Iterator[Batch]:
    """Yield all batches, each after its replay."""
    first = 0
    for batch in scan(journal):
        first = first or batch.segment
        replay_batch(replay, batch)
        yield batch
    if first and writer_of(OsFileSystem(), journal) is None:  # a running broker may delete segments at the same time
        check_oldest(replay, first)


@contextmanager
def _gc_disabled() -> Iterator[None]:
    """Disable the garbage collector: nothing read here is garbage, and collections would take longer than reading."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _audit_of(machine: Machine) -> dict[str, Any]:
    answer: dict[str, Any] = machine.admin.call(Session(0), "audit", msgspec.Raw(msgspec.msgpack.encode(())))
    return answer


def load_engine(journal: Path) -> Engine:
    """Return an engine with the state of the journal, which writes nothing: for reading the data of a stopped cluster.

    Changes exist only in that engine. Raises like `count_settlements`.
    """
    engine = Engine(journal_dir=None)
    state = engine.machine.state
    replay = Replay(state)
    for _ in _scan(journal, replay):
        pass
    replay.finish(state.now, state.wall)
    return engine
