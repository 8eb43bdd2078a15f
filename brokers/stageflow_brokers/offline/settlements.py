"""What the journal on disk testifies to: how often each transition was accepted. An audit that asks no broker.

The records are read as they lie in the files and replayed through the broker's own fold, so that a settlement counts
under the name of the message it acknowledged. Only what is still in the journal can be counted: a segment is given back
once nothing in it is alive. It reads, beside a running broker too, and never writes.
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
"""(group, epoch, label) of a message that was acknowledged."""


class SegmentUse(Struct):
    """What one segment holds; `bytes` are those of its records, headers and padding left out."""

    file: str
    batches: int = 0
    records: int = 0
    bytes: int = 0


class SettlementCounts(Struct):
    """The count. `settled` says how often a settlement of each message was accepted: once, if all is well.

    `unnamed` settlements acknowledged messages whose own record is gone with its segment. `kinds` are records by kind,
    `live` the messages, `groups` the instances that have not ended by these records.
    """

    segments: list[SegmentUse]
    settled: Counter[SettlementKey]
    kinds: Counter[str]
    unnamed: int = 0
    live: int = 0
    groups: int = 0

    @property
    def batches(self) -> int:
        """All batches."""
        return sum(segment.batches for segment in self.segments)

    @property
    def records(self) -> int:
        """All records."""
        return sum(segment.records for segment in self.segments)

    @property
    def bytes(self) -> int:
        """The bytes of all records."""
        return sum(segment.bytes for segment in self.segments)


def count_settlements(journal: Path) -> SettlementCounts:
    """Count what is in the journal in this directory.

    Raises `JournalCorrupt` at damage, `JournalVersion`, and `JournalError` if there is no journal.
    """
    accounts = SettlementCounts([], Counter(), Counter())
    settled = accounts.settled

    def on_settled(message: Message | None, group_id: str, label: str) -> None:
        if message is None:
            accounts.unnamed += 1
        else:
            settled["" if message.group is None else message.group.id, message.epoch, label] += 1

    store = BrokerState(paging=True)  # bodies are not looked at, so none is kept
    replay = Replay(store, on_settled=on_settled)
    use = SegmentUse("")
    for batch in _scan(journal, replay):
        name = file_name(batch.segment)
        if name != use.file:
            use = SegmentUse(name)
            accounts.segments.append(use)
        use.batches += 1
        use.records += len(batch.records)
        for record in batch.records:
            use.bytes += len(record.header) + len(record.blob)
            accounts.kinds[records.NAMES.get(record.kind, f"kind {record.kind}")] += 1
    accounts.live = len(store.messages)
    accounts.groups = sum(1 for group in store.groups.values() if group.messages() or group.gathers)
    return accounts


class EndedGroups(Struct):
    """Who has gone, by the records of a journal. `ended`: the groups whose message under the label asked for was
    acknowledged, with the epoch and the time (seconds since the Unix epoch) of that message. `idle`: groups that have
    not ended and of which nothing is left. `latest`: the time of the latest batch, 0 for none. `facts` as they stand.
    `picture`: what a broker that is started on this journal now would answer to the query `audit`.
    """

    ended: dict[str, tuple[int, float]]
    idle: list[str]
    latest: float
    facts: dict[str, str]
    picture: dict[str, Any]


def ended_groups(journal: Path, label: str, *, picture: bool) -> EndedGroups:
    """Who has gone after a message under `label`, as far as the journal still has it; with the `picture` if wanted.

    Bodies are not kept. Raises as `count_settlements` does.
    """
    ended: dict[str, tuple[int, float]] = {}

    def on_settled(message: Message | None, group_id: str, _: str) -> None:
        if message is not None and message.label == label and message.group is not None:
            before = ended.get(message.group.id)
            if before is None or before[0] <= message.epoch:
                ended[message.group.id] = (message.epoch, message.location.wall)

    machine = Machine(paging=True)
    store = machine.state
    replay = Replay(store, on_settled=on_settled)
    latest = 0.0
    with _without_collecting():
        for batch in _scan(journal, replay):
            latest = batch.wall
    idle = [group.id for group in store.groups.values() if group.is_idle]
    if picture:
        replay.finish(0.0, time.time())
    return EndedGroups(ended, idle, latest, store.facts, _picture(machine) if picture else {})


def _scan(journal: Path, replay: Replay) -> Iterator[Batch]:
    """All batches, each replayed when it is given."""
    first = 0
    for batch in scan(journal):
        first = first or batch.segment
        replay_batch(replay, batch)
        yield batch
    if (
        first and writer_of(OsFileSystem(), journal) is None
    ):  # beside a broker, segments are given back while they are read
        check_oldest(replay, first)


@contextmanager
def _without_collecting() -> Iterator[None]:
    """All that is read stays: to look for garbage among it takes longer than reading it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _picture(machine: Machine) -> dict[str, Any]:
    picture: dict[str, Any] = machine.admin.call(Session(0), "audit", msgspec.Raw(msgspec.msgpack.encode(())))
    return picture


def load_engine(journal: Path) -> Engine:
    """A broker's engine that knows what the journal says and writes nothing: to look at a cluster at rest.

    What is changed in it is forgotten with it. Raises as `count_settlements` does.
    """
    engine = Engine(journal_dir=None)
    store = engine.machine.state
    replay = Replay(store)
    for _ in _scan(journal, replay):
        pass
    replay.finish(store.now, store.wall)
    return engine
