"""Compaction: the journal of a steady state does not grow, and no live message is lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from broker_fixtures import assert_same, check_whole, picture
from engine_peer import EnginePeer

from stageflow_brokers.core import state as store
from stageflow_brokers.core import wire
from stageflow_brokers.core.machine import Machine
from stageflow_brokers.core.message import RecordLocation
from stageflow_brokers.core.replay import Replay
from stageflow_brokers.engine import compaction
from stageflow_brokers.engine.engine import Engine, Outgoing
from stageflow_brokers.journal.format import Record
from stageflow_brokers.journal.journal import BatchLocation
from stageflow_brokers.testing.simulated_disk import SimulatedDisk
from stageflow_brokers.types import (
    ACK,
    DEAD_LETTER,
    FLAG_CLOSE_GROUP,
    FLAG_START,
    RETRY,
    TERMINAL,
    Arrival,
    DeliveryItem,
    GatherOpen,
    SettleItem,
)

SEGMENT = 32 << 10
DIRECTORY = Path("/journal")


class RecordedPeer(EnginePeer):
    """A peer of an engine on small segments, with a copy of all committed records by segment."""

    def __init__(self) -> None:
        self.files = SimulatedDisk()
        self.wall = 1_000_000.0
        self.epoch_began = 0.0
        self.number = 7
        self.held: dict[int, DeliveryItem] = {}
        self.committed: list[tuple[int, float, Sequence[Record]]] = []
        self.dropped: list[int] = []
        self.written = self.largest = 0
        self.begin()

    def begin(self) -> None:
        self.engine = Engine(
            journal_dir=DIRECTORY,
            files=self.files,
            segment_bytes=SEGMENT,
            monotonic=lambda: self.wall,
            wall=lambda: self.wall,
        )
        journal = self.engine.journal
        assert journal is not None
        commit, drop = journal.commit, journal.drop_oldest

        def remember(records: Sequence[Record], wall: float) -> BatchLocation:
            place = commit(records, wall)
            self.committed.append((place.segment, wall, list(records)))
            sizes = [len(record.header) + len(record.blob) for record in records]
            self.written, self.largest = self.written + sum(sizes), max(self.largest, sum(sizes))
            return place

        def check_and_drop() -> None:
            oldest = journal.segments()[0].number
            self.committed = [each for each in self.committed if each[0] > oldest]
            self.check()
            self.dropped.append(oldest)
            drop()

        self.committed.append((journal.segments()[-1].number, self.wall, [Record(13, 1, 0, wire.encode(1), b"")]))
        journal.commit, journal.drop_oldest = remember, check_and_drop  # type: ignore[method-assign]
        self.hello([("q", 50), ("next", 50), ("fin", 50), ("joined", 5)])

    def check(self) -> None:
        """What is left on disk makes the state that is in memory."""
        live = self.engine.machine
        recovered = Machine()
        replay = Replay(recovered.state)
        for segment, wall, records in self.committed:
            for record in records:
                replay.apply(
                    record.kind,
                    record.first_id,
                    record.peer,
                    record.header,
                    record.blob,
                    RecordLocation(wall, segment, 0),
                )
        recovered.begin(self.wall, self.wall)
        recovered.begin_epoch(self.wall, self.wall)
        check_whole(live)
        assert_same(picture(recovered, clocks_agree=True), picture(live, clocks_agree=True))

    def round(self, op: bytes, header: bytes, blob: bytes = b"") -> list[Outgoing]:
        self.wall += 0.001
        outgoing = super().round(op, header, blob)
        for _, answer, _ in outgoing:
            for _, items in wire.decode_broker_frame(answer).deliveries:
                self.held.update((item.id, item) for item in items)
        return outgoing

    def start(self, *groups: str, queue: str = "q", delay: float = 0.0, size: int = 200, priority: int = 0) -> None:
        items = [(0, size, group, 1, FLAG_START, priority, delay, 0.0, b"d") for group in groups]
        self.send(wire.PUBLISH, [(queue, "a")], items, blob=bytes(size) * len(groups))

    def settle(self, targets: Any, moves: Any = (), acks: Any = (), others: Any = (), blob: bytes = b"") -> None:
        for id in [m[0] for m in moves] + [a[0] for a in acks] + [o.leases[0][0] for o in others]:
            del self.held[id]
        self.send(wire.SETTLE, targets, moves, acks, others, blob=blob)

    def work(self, group: str) -> None:
        """One instance, from its start to its leave."""
        self.start(group)
        for target in (("next", "b", 0), ("fin", ":end", TERMINAL)):
            (item,) = [item for item in self.held.values() if item.group == group]
            self.settle([target], moves=[(item.id, item.lease, 0, 300, group)], blob=bytes(300))
        (item,) = [item for item in self.held.values() if item.group == group]
        self.settle([], acks=[(item.id, item.lease, FLAG_CLOSE_GROUP, group)])

    def used(self) -> int:
        assert self.engine.journal is not None
        return sum(segment.used for segment in self.engine.journal.segments())

    def make_long_lived(self) -> None:
        """One of each kind of thing that may be in a broker for long."""
        self.start("delayed", "dead", "gathering", "held", "stepped", "raised")
        by_group = {item.group: (item.id, item.lease) for item in self.held.values()}
        self.send(wire.CHECKPOINT, *by_group["stepped"], "paid", blob=b"42")
        opening = GatherOpen("k", 2, 0, 50, deadline=1e6)
        self.settle(
            [("joined", "j", 0)],
            others=[
                SettleItem([by_group["delayed"]], RETRY, [], 1e6, b"boom"),
                SettleItem([by_group["dead"]], DEAD_LETTER, [], 0.0, b"hopeless"),
                SettleItem([by_group["gathering"]], ACK, opens=[opening]),
            ],
            blob=bytes(50),
        )
        self.send(wire.PUBLISH, [], [], False, [], [Arrival("k", "s", 20, "gathering", 1)], blob=bytes(20))
        self.send(wire.QUERY, "raise-epoch", ("raised", 2, "coordinator", "cancel"))
        self.send(wire.QUERY, "fact", ("history", "made"))
        self.start("sleeping", queue="unread", delay=1e6)
        self.send(wire.QUERY, "pause", ("unread",))
        self.start("waiting", queue="unread")
        self.send(wire.PUBLISH, [], [], False, [], [Arrival("early", "s", 20, "waiting", 1)], blob=bytes(20))


def test_the_journal_of_a_steady_state_does_not_grow_whatever_lives_long_in_it() -> None:
    peer = RecordedPeer()
    peer.make_long_lived()
    sizes = []
    for number in range(1500):
        peer.work(f"g{number}")
        sizes.append(peer.used())
    assert len(peer.dropped) > 20
    assert peer.dropped == sorted(peer.dropped)
    assert max(sizes) < 12 * SEGMENT
    assert max(sizes[len(sizes) // 2 :]) <= max(sizes[: len(sizes) // 2]) + SEGMENT
    peer.check()
    # And all of it is there after a crash.
    before = picture(peer.engine.machine, clocks_agree=True)
    peer.files.crash()
    recovered = Engine(journal_dir=DIRECTORY, files=peer.files, monotonic=lambda: 0.0, wall=lambda: peer.wall)
    assert_same(picture(recovered.machine, clocks_agree=True), before)


def test_a_gather_keeps_its_priority_when_the_message_that_opened_it_goes_with_its_segment() -> None:
    peer = RecordedPeer()
    peer.start("urgent", priority=5)
    for number in range(60):
        peer.start(f"filler{number}", queue="unread", size=2000)
    (item,) = [item for item in peer.held.values() if item.group == "urgent"]
    journal = peer.engine.journal
    assert journal is not None
    assert journal.segments()[-1].number > 1
    opening = GatherOpen("k", 2, 0, 50, deadline=1e6)
    others = [SettleItem([(item.id, item.lease)], ACK, opens=[opening])]
    peer.settle([("joined", "j", 0)], others=others, blob=bytes(50))
    peer.send(wire.QUERY, "compact", (True,))
    while not peer.dropped:
        peer.send(wire.QUERY, "ping", ())
    peer.check()
    peer.files.crash()
    recovered = Engine(journal_dir=DIRECTORY, files=peer.files, monotonic=lambda: 0.0, wall=lambda: peer.wall)
    (gather,) = (recovered.machine.state.groups["urgent"].gathers or {}).values()
    assert gather.priority == 5


def test_a_backlog_that_is_all_alive_is_not_written_over_and_over() -> None:
    peer = RecordedPeer()
    for number in range(300):
        peer.start(*(f"g{number}.{each}" for each in range(10)), queue="unread", size=20)
    peer.files.calls.clear()
    for number in range(300):
        peer.work(f"w{number}")
    written = sum(1 for name, _ in peer.files.calls if name == "pwritev")
    # Four commits an instance, and few that only copy.
    assert written < 300 * 5
    assert peer.used() < 40 * SEGMENT


def test_a_backlog_that_is_worked_off_gives_its_space_back() -> None:
    peer = RecordedPeer()
    for number in range(200):
        peer.start(*(f"g{number}.{each}" for each in range(10)))
        peer.wall += 1
    most = peer.used()
    while peer.held:
        batch = list(peer.held.values())
        peer.settle([], acks=[(item.id, item.lease, FLAG_CLOSE_GROUP, item.group) for item in batch])
    for number in range(200):
        peer.work(f"w{number}")
    assert peer.used() < most / 2
    assert peer.engine.machine.state.messages == {}
    peer.check()


def test_long_queues_keep_their_bodies_on_disk_while_segments_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_RESIDENT_BODIES", 100)
    peer = RecordedPeer()
    for number in range(50):
        peer.start(*(f"g{number}.{each}" for each in range(10)), queue="unread", size=30)
    queue = peer.engine.machine.state.queue("unread")
    for number in range(600):
        peer.work(f"w{number}")
    assert len(peer.dropped) > 5
    peer.start("last", queue="unread")
    assert sum(message.body is not None for message in queue.ready) <= 100
    assert peer.engine.machine.writer.body(queue.ready[-2]) == bytes(30)


@pytest.mark.parametrize(("priority", "delay"), [(1, 0.0), (-1, 0.0), (0, 3600.0)])
def test_bodies_of_every_lane_and_of_what_is_delayed_leave_memory(
    monkeypatch: pytest.MonkeyPatch, priority: int, delay: float
) -> None:
    monkeypatch.setattr(store, "MAX_RESIDENT_BODIES", 20)
    peer = RecordedPeer()
    for number in range(100):
        peer.start(f"g{number}", queue="unread", size=30, priority=priority, delay=delay)
    messages = peer.engine.machine.state.messages.values()
    assert sum(message.body is not None for message in messages) <= 21
    assert all(peer.engine.machine.writer.body(message) == bytes(30) for message in messages)
    peer.check()


def test_the_bodies_of_large_messages_leave_memory_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_RESIDENT_BODY_BYTES", 100_000)
    peer = RecordedPeer()
    for number in range(200):
        peer.start(f"g{number}", queue="unread", size=1_000)
    messages = peer.engine.machine.state.messages.values()
    assert sum(message.body is not None for message in messages) <= 101


def test_a_dead_letters_body_leaves_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = RecordedPeer()
    peer.start("g")
    ((id, item),) = peer.held.items()
    peer.settle([], others=[SettleItem([(id, item.lease)], DEAD_LETTER, [], 0.0, b"hopeless")])
    (message,) = peer.engine.machine.state.messages.values()
    assert message.body is None
    assert peer.engine.machine.writer.body(message) == bytes(200)
    peer.send(wire.QUERY, "requeue", ("q", []))
    assert [item.id for item in peer.held.values()] == [id]


def test_steps_count_as_alive_when_it_comes_to_giving_space_back() -> None:
    peer = RecordedPeer()
    for number in range(40):
        peer.start(f"g{number}", size=10)
    for item in list(peer.held.values()):
        peer.send(wire.CHECKPOINT, item.id, item.lease, "step", blob=bytes(5_000))
    alive, before = 40 * 5_000, peer.written
    for number in range(100):
        peer.send(wire.QUERY, "fact", ("x", str(number)))
    assert peer.written - before < alive, "what is alive is not written over and over"
    for number in range(300):
        peer.work(f"w{number}")
    assert peer.dropped
    assert peer.used() < 4 * alive + 6 * SEGMENT
    peer.check()


def test_facts_count_as_alive_too() -> None:
    peer = RecordedPeer()
    for number in range(10):
        peer.send(wire.QUERY, "fact", (f"fact{number}", "x" * 40_000))
    before = peer.written
    for number in range(50):
        peer.send(wire.QUERY, "fact", ("x", str(number)))
    assert peer.written - before < 400_000, "what is alive is not written over and over"


def test_what_is_copied_in_one_round_is_bounded_with_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "SLICE_BYTES", 20_000)
    peer = RecordedPeer()
    for number in range(40):
        peer.start(f"g{number}", size=10)
    for item in list(peer.held.values()):
        peer.send(wire.CHECKPOINT, item.id, item.lease, "step", blob=bytes(5_000))
    peer.largest = 0
    peer.compact()
    assert peer.dropped
    assert peer.largest < 20_000 + 3 * 5_100
    peer.check()


def test_epoch_and_frames_outlive_the_segments_that_recorded_them() -> None:
    """Leases are fenced by the one, and nothing that is sent again is taken twice because of the other."""
    peer = RecordedPeer()
    peer.start("g")
    for number in range(300):
        peer.work(f"w{number}")
    assert len(peer.dropped) > 3
    epoch, frame = peer.engine.machine.state.epoch, peer.frame
    peer.engine.close()
    peer.begin()
    store_now = peer.engine.machine.state
    assert store_now.epoch == epoch + 1
    again = wire.encode((store_now.epoch, frame, [("q", "a")], [(0, 1, "again", 1, FLAG_START)]))
    hello = wire.encode((wire.PROTOCOL, "client", "", 1, frame, [], [], [], 2))
    peer.engine.round([(7, wire.HELLO, hello, b""), (7, wire.PUBLISH, again, b"x")])
    assert "again" not in store_now.groups


def test_frames_of_a_peer_that_sent_nothing_since_are_remembered() -> None:
    peer = RecordedPeer()
    header = wire.encode((peer.engine.machine.state.epoch, 1, [("q", "a")], [(0, 1, "once", 1, FLAG_START)]))
    hello = wire.encode((wire.PROTOCOL, "client", "", 1, 1, [], [], [], 1))
    peer.engine.round([(9, wire.HELLO, hello, b""), (9, wire.PUBLISH, header, b"x")])
    for number in range(300):
        peer.work(f"w{number}")
    assert len(peer.dropped) > 3
    peer.engine.close()
    peer.begin()
    assert peer.engine.machine.state.last_frames[9] == 1
