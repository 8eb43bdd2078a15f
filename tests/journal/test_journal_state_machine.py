"""Any order of commits, seals, drops, crashes and starts, compared with a list."""

import random
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stageflow_brokers.errors import JournalError
from stageflow_brokers.journal.format import Batch, Record
from stageflow_brokers.journal.journal import BatchLocation, Journal
from stageflow_brokers.journal.verify import scan, verify
from stageflow_brokers.testing.simulated_disk import Crash, SimulatedDisk

DIRECTORY = Path("/journal")

records = st.lists(
    st.builds(
        Record,
        kind=st.integers(0, 255),
        first_id=st.integers(0, 2**64 - 1),
        peer=st.integers(0, 2**64 - 1),
        header=st.binary(max_size=40),
        blob=st.one_of(
            st.binary(max_size=60), st.integers(0, 6000).map(lambda size: b"\xd3\xf7\xb1\xff" * (size // 4))
        ),
    ),
    min_size=1,
    max_size=4,
)


class JournalMachine(RuleBasedStateMachine):
    """`kept` is what must be there: per batch its records, and where they went."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = SimulatedDisk()
        self.journal: Journal
        self.kept: dict[int, tuple[list[Record], BatchLocation | None]] = {}
        self.last = 0

    def replay(self, batch: Batch) -> None:
        self.seen[batch.number] = (batch.wall, [Record(*each[:3], *map(bytes, each[3:])) for each in batch.records])

    @initialize()
    def start(self) -> None:
        self.seen: dict[int, tuple[float, list[Record]]] = {}
        self.journal = Journal.open(
            DIRECTORY, replay=self.replay, files=self.disk, segment_bytes=4096, warn=lambda text: None
        )

    def recover(self, maybe: dict[int, list[Record]], gone: set[int]) -> None:
        """`maybe` was being committed, `gone` being dropped: there or not, and nothing between."""
        self.start()
        for number, (_, kept) in self.seen.items():
            expected = self.kept[number][0] if number in self.kept else maybe[number]
            assert kept == expected
        missing = self.kept.keys() - self.seen.keys()
        assert missing <= gone
        assert not missing or missing == gone
        self.kept = {number: self.kept.get(number, (each, None)) for number, (_, each) in self.seen.items()}
        self.last = max([*self.seen, self.last])
        assert self.journal.last_batch == self.last

    @rule(batch=records)
    def commit(self, batch: list[Record]) -> None:
        place = self.journal.commit(batch, float(self.last))
        self.last += 1
        self.kept[self.last] = batch, place

    @rule()
    def seal(self) -> None:
        self.journal.seal()

    @rule()
    def drop_oldest(self) -> None:
        segments = self.journal.segments()
        if len(segments) == 1:
            try:
                self.journal.drop_oldest()
            except JournalError:
                return
            raise AssertionError("the open segment was dropped")
        self.journal.drop_oldest()
        for number in range(segments[0].first, segments[1].first):
            del self.kept[number]

    @rule()
    def prepare(self) -> None:
        assert self.journal.prepare()

    @rule()
    def restart(self) -> None:
        self.journal.close()
        self.recover({}, set())

    @rule(seed=st.none() | st.integers(0, 1 << 30))
    def crash(self, seed: int | None) -> None:
        self.disk.crash(None if seed is None else random.Random(seed))
        self.recover({}, set())

    @rule(seed=st.none() | st.integers(0, 1 << 30), step=st.integers(0, 12), batch=records, what=st.integers(0, 2))
    def crash_in_the_middle(self, seed: int | None, step: int, batch: list[Record], what: int) -> None:
        def on_call(name: str, path: str) -> None:
            nonlocal step
            step -= 1
            if step < 0:
                raise Crash

        segments = self.journal.segments()
        maybe: dict[int, list[Record]] = {}
        gone: set[int] = set()
        self.disk.on_call = on_call
        try:
            if what == 0:
                maybe = {self.last + 1: batch}
                self.commit(batch)
            elif what == 1:
                self.journal.seal()
            elif len(segments) > 1:
                gone = set(range(segments[0].first, segments[1].first))
                self.drop_oldest()
        except Crash:
            pass
        self.disk.crash(None if seed is None else random.Random(seed))
        self.recover(maybe, gone)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def read_back(self, data: st.DataObject) -> None:
        kept, place = self.kept[data.draw(st.sampled_from(sorted(self.kept)))]
        if place is not None:
            for record, offset in zip(kept, place.blob_offsets, strict=True):
                assert self.journal.read(place.segment, offset, len(record.blob), batch=place.batch) == record.blob

    @invariant()
    def what_is_on_disk_is_whole(self) -> None:
        assert [batch.number for batch in scan(DIRECTORY, files=self.disk)] == sorted(self.kept)
        assert verify(DIRECTORY, files=self.disk) == []


JournalMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestJournalMachine = JournalMachine.TestCase
