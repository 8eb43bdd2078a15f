"""A small disk in memory: starts are refused in time, work in hand ends, and the broker recovers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from stageflow_brokers.core import wire
from stageflow_brokers.engine.engine import Engine
from stageflow_brokers.errors import JournalFull
from stageflow_brokers.testing.simulated_disk import SimulatedDisk
from stageflow_brokers.types import FLAG_CLOSE_GROUP, FLAG_START, TERMINAL, DeliveryItem

DIRECTORY = Path("/journal")
CONTEXT = 1000
"""Bytes of one instance's context, which each of its messages carries."""


class Tight:
    """An engine on a disk of `room` bytes, and a peer that starts instances and works them off in three stages."""

    def __init__(self, room: int, *, segment_bytes: int = 64 << 20, files: SimulatedDisk | None = None) -> None:
        self.files = files or SimulatedDisk(size_bytes=room)
        self.segment_bytes = segment_bytes
        self.clock = 0.0
        self.frame = 0
        self.waits = 0
        self.started: set[str] = set()
        self.ended: set[str] = set()
        self.held: dict[int, tuple[str, DeliveryItem]] = {}
        self.answers: dict[int, Any] = {}
        self.grown = [CONTEXT, CONTEXT]
        self.begin()

    def begin(self) -> None:
        self.engine = Engine(
            journal_dir=DIRECTORY,
            files=self.files,
            segment_bytes=self.segment_bytes,
            monotonic=lambda: self.clock,
            wall=lambda: self.clock,
            stop_requested=lambda: True,
            warn=lambda text: None,
        )
        self.held.clear()
        hello = wire.encode((wire.PROTOCOL, "client", "", 1, self.frame + 1, [("q0", 50), ("q1", 50), ("fin", 50)]))
        self.round([(7, wire.HELLO, hello, b"")])

    def round(self, frames: list[tuple[int, bytes, bytes, bytes]]) -> None:
        self.clock += 0.01
        for _, header, _ in self.engine.round(frames):
            out = wire.decode_broker_frame(header)
            for queue, items in out.deliveries:
                self.held.update((item.id, (queue, item)) for item in items)
            self.answers.update((frame, msgspec.msgpack.decode(raw)) for frame, raw in out.results)

    def say(self, op: bytes, *fields: Any, blob: bytes = b"") -> Any:
        self.frame += 1
        self.round([(7, op, wire.encode((self.engine.machine.state.epoch, self.frame, *fields)), blob)])
        return self.answers.pop(self.frame, None)

    def start(self, count: int, *, queue: str = "q0") -> bool:
        """Start so many with one frame, all or none; whether they were taken."""
        names = [f"g{self.frame}.{each}" for each in range(count)]
        items = [(0, CONTEXT, name, 1, FLAG_START, 0, 0.0, 0.0, b"d") for name in names]
        answer = self.say(wire.PUBLISH, [(queue, "a")], items, True, blob=bytes(CONTEXT * count))
        if answer is not None:
            assert "nearly full" in answer["message"]
            return False
        self.started.update(names)
        return True

    def work(self, *, history: bool = True) -> bool:
        """Settle all that is held, but what has ended only with a history that can be written; whether any was."""
        moves: dict[str, list[Any]] = {"q0": [], "q1": [], "fin": []}
        for queue, item in list(self.held.values()):
            if history or queue != "fin":
                moves[queue].append(item)
                del self.held[item.id]
        if not any(moves.values()):
            self.round([])
            return history and bool(self.held)
        for queue, target, size in (
            ("q0", ("q1", "b", 0), self.grown[0]),
            ("q1", ("fin", ":end", TERMINAL), self.grown[1]),
        ):
            if items := moves[queue]:
                done = [(item.id, item.lease, 0, size, item.group) for item in items]
                self.say(wire.SETTLE, [target], done, [], [], blob=bytes(size * len(items)))
        if items := moves["fin"]:
            self.say(wire.SETTLE, [], [], [(item.id, item.lease, FLAG_CLOSE_GROUP, item.group) for item in items], [])
            self.ended.update(item.group for item in items)
        return True

    def work_off(self) -> None:
        while self.work():
            pass


@pytest.mark.parametrize(("room", "at_once"), [(13, 1), (16, 300), (24, 50), (24, 300), (40, 300)])
def test_starts_are_refused_in_time_and_everything_started_ends_on_what_is_left(room: int, at_once: int) -> None:
    tight = Tight(room << 20)

    per_round = max(at_once, 50)
    refused = 0
    while refused < 5:
        for _ in range(per_round // at_once):
            refused += not tight.start(at_once)
    assert len(tight.started) * CONTEXT > (room << 20) // 16, "there was room for more"
    tight.work_off()
    assert tight.ended == tight.started
    # And with no live message there is room again, although no other process has freed any.
    tight.clock += 1
    for _ in range(20):
        tight.clock += 1
        tight.round([])
    assert tight.start(at_once)
    tight.work_off()


def test_a_small_disk_does_any_amount_of_work_one_after_the_other() -> None:
    tight = Tight(13 << 20)
    while len(tight.ended) < 12_000:
        if tight.start(200):
            tight.work_off()
        else:
            tight.clock += 1
            tight.round([])
    assert tight.ended == tight.started


def test_submitting_and_working_at_once_on_a_small_disk_never_stalls() -> None:
    tight = Tight(16 << 20)
    for _ in range(400):
        tight.start(60)
        tight.clock += 0.2
        tight.work()
    assert len(tight.ended) > 5000
    tight.work_off()
    assert tight.ended == tight.started


def test_what_waits_for_ever_is_kept_while_the_rest_goes_on_in_little_room() -> None:
    tight = Tight(16 << 20)
    waiting = 0
    for _ in range(10):
        waiting += 100 * tight.start(100, queue="waits")
    for _ in range(200):
        tight.start(60)
        tight.clock += 0.2
        tight.work()
    tight.work_off()
    assert len(tight.ended) > 3000
    assert len(tight.started) - len(tight.ended) == waiting
    tight.files.kill()
    tight.begin()
    assert tight.engine.machine.state.queue("waits").ready_count == waiting


def test_one_frame_larger_than_the_disk_is_refused_and_stops_no_other_peer() -> None:
    tight = Tight(16 << 20)
    assert tight.start(10)
    assert not tight.start(10_000), "ten megabytes, with four in the open segment and eight in the spare"
    tight.clock += 1
    tight.work_off()
    assert tight.ended == tight.started
    assert tight.start(10)


def test_a_frame_larger_than_a_segment_is_taken_where_the_disk_has_room() -> None:
    tight = Tight(200 << 20)
    assert tight.start(10_000)
    tight.work_off()
    assert tight.ended == tight.started


def test_room_that_others_took_and_gave_back_is_found_again() -> None:
    tight = Tight(200 << 20)
    assert tight.start(10)
    tight.files.size_bytes = tight.files.used()
    refused = 0
    while not refused:
        refused += not tight.start(300)
    tight.work_off()
    assert tight.ended == tight.started
    tight.files.size_bytes = 200 << 20
    tight.clock += 1
    assert tight.start(300)


@pytest.mark.parametrize("room", [16, 24, 60])
def test_work_ends_while_others_hold_all_that_was_free_and_the_history_waits(room: int) -> None:
    tight = Tight(room << 20)
    while tight.start(200):
        pass
    tight.files.size_bytes = tight.files.used()
    while tight.work(history=False):
        pass
    store = tight.engine.machine.state
    assert store.queue("q0").ready_count == store.queue("q1").ready_count == 0
    assert len(store.groups) == len(tight.started), "all of them wait for the history"
    tight.files.size_bytes = room << 20
    tight.clock += 1
    tight.work_off()
    assert tight.ended == tight.started
    tight.clock += 1
    tight.round([])
    tight.clock += 1
    assert tight.start(1)


def test_a_broker_that_starts_on_a_full_disk_finishes_what_it_finds() -> None:
    tight = Tight(16 << 20)
    while tight.start(50):
        pass
    tight.files.kill()
    tight.begin()
    tight.work_off()
    assert tight.ended == tight.started


def test_a_compaction_that_does_not_fit_gives_up_and_loses_nothing() -> None:
    tight = Tight(1 << 30)
    for _ in range(7):
        tight.start(1000)
    tight.files.size_bytes = tight.files.used() + 1000
    tight.say(wire.QUERY, "compact", (True,))
    for _ in range(200):
        if not tight.engine.machine.compacting:
            break
        tight.round([])
    assert not tight.engine.machine.compacting
    tight.work_off()
    assert tight.ended == tight.started


def test_without_any_room_frames_wait_in_order_and_queries_are_answered() -> None:
    tight = Tight(16 << 20)
    tight.start(1, queue="waits")
    body = bytes(3 << 20)
    for each in range(8):
        tight.say(wire.PUBLISH, [("waits", "more")], [(0, len(body), f"event{each}", 1)], blob=body)
    store = tight.engine.machine.state
    taken = store.queue("waits").ready_count
    assert 1 < taken < 9
    heard = store.sessions[7].received_frame
    assert heard < tight.frame, "nobody is told that it has been taken"
    # Behind what waits, everything of the same peer does.
    assert tight.say(wire.QUERY, "stats", ("",)) is None
    hello = wire.encode((wire.PROTOCOL, "client", "", 2, 1, []))
    tight.round([(8, wire.HELLO, hello, b"")])
    tight.round([(8, wire.QUERY, wire.encode((store.epoch, 1, "stats", ("",))), b"")])
    stats = tight.answers.pop(1)
    assert "nearly full" in stats["refusing"]
    assert stats["messages"] == taken
    assert 0.0 < tight.engine.next_timeout(60.0) <= 0.5, "it looks again, without hurry"
    # A crash finds no more than was acknowledged.
    tight.files.size_bytes = 64 << 20
    tight.clock += 1
    for _ in range(20):
        tight.clock += 1
        tight.round([])
    assert store.queue("waits").ready_count == 9
    assert store.sessions[7].received_frame == tight.frame
    assert tight.answers.pop(tight.frame)["messages"] == 9
    tight.files.kill()
    tight.begin()
    assert tight.engine.machine.state.queue("waits").ready_count == 9


def test_a_new_hello_sends_again_what_waited_for_room() -> None:
    tight = Tight(16 << 20)
    body = bytes(3 << 20)
    for each in range(8):
        tight.say(wire.PUBLISH, [("waits", "more")], [(0, len(body), f"event{each}", 1)], blob=body)
    store = tight.engine.machine.state
    heard = store.sessions[7].received_frame
    assert heard < tight.frame
    hello = wire.encode((wire.PROTOCOL, "client", "", 2, heard + 1, []))
    tight.round([(7, wire.HELLO, hello, b"")])
    tight.files.size_bytes = 64 << 20
    for frame in range(heard + 1, tight.frame + 1):
        tight.clock += 1
        items = [(0, len(body), f"event{frame - 2}", 1)]
        header = wire.encode((store.epoch, frame, [("waits", "more")], items))
        tight.round([(7, wire.PUBLISH, header, body)])
    for _ in range(20):
        tight.clock += 1
        tight.round([])
    assert store.queue("waits").ready_count == 8


def test_the_brokers_own_decisions_are_sent_later_when_there_is_no_room() -> None:
    tight = Tight(16 << 20)
    for each in range(3):
        tight.say(wire.PUBLISH, [("waits", "more")], [(0, 10, f"event{each}", 1)], blob=bytes(10))
    tight.files.size_bytes = tight.files.used()
    assert tight.engine.journal is not None
    room = tight.engine.journal.free_space
    tight.engine.machine.writer.record(11, 0, wire.encode(("much", "x" * (room.open_bytes + room.spare_bytes))))
    with pytest.raises(JournalFull):  # it was asked to give up, or it would wait
        tight.round([])
    tight.files.kill()
    tight.files.size_bytes = 64 << 20
    tight.begin()
    assert tight.engine.machine.state.queue("waits").ready_count == 3


@pytest.mark.parametrize("room", [16, 24, 64])
@pytest.mark.parametrize("larger", [2, 3])
@pytest.mark.parametrize("segment", [64, 4])
def test_instances_that_grow_on_their_way_all_end_though_the_history_waits(
    room: int, larger: int, segment: int
) -> None:
    tight = Tight(room << 20, segment_bytes=segment << 20)
    tight.grown = [CONTEXT * (larger + 1) // 2, CONTEXT * larger]
    tight.files.size_bytes = tight.files.used()
    while tight.start(20):
        pass
    assert len(tight.started) > 200
    for _ in range(3000):
        tight.work(history=False)
        if not any(tight.engine.machine.state.queue(name).ready_count for name in ("q0", "q1")) and not any(
            queue != "fin" for queue, _ in tight.held.values()
        ):
            break
    store = tight.engine.machine.state
    assert sum(1 for group in store.groups.values() if group.end_label) == len(tight.started)
    tight.files.size_bytes = room << 20
    tight.clock += 1
    tight.work_off()
    assert tight.ended == tight.started
    for _ in range(20):
        tight.clock += 1
        tight.round([])
    assert tight.start(20)


def test_instances_that_grow_beyond_all_bounds_wait_for_room_and_end_when_there_is_some() -> None:
    tight = Tight(16 << 20)
    tight.grown = [30 * CONTEXT, 60 * CONTEXT]
    tight.files.size_bytes = tight.files.used()
    while tight.start(20):
        pass
    for _ in range(300):
        tight.work(history=False)
    store = tight.engine.machine.state
    assert sum(1 for group in store.groups.values() if group.end_label) < len(tight.started)
    tight.files.kill()
    tight.begin()
    tight.files.size_bytes = 400 << 20
    for _ in range(100):
        tight.clock += 1
        tight.work()
    tight.work_off()
    assert tight.ended == tight.started


def test_what_instances_end_with_is_learnt_and_fewer_are_taken_then() -> None:
    taken = []
    for larger in (1, 8):
        tight = Tight(64 << 20)
        tight.grown = [CONTEXT * larger, CONTEXT * larger]
        tight.files.size_bytes = tight.files.used()
        for _ in range(20):
            assert tight.start(5)
            tight.work(history=False)
            tight.work(history=False)
        while tight.start(5):
            pass
        taken.append(len(tight.started))
    assert taken[1] < taken[0] // 2
