"""No answer or delivery leaves the broker before its record is on disk, and none at all after a failed sync."""

from __future__ import annotations

import errno
from pathlib import Path

import msgspec
import pytest
from engine_peer import EnginePeer

from stageflow_brokers.core import wire
from stageflow_brokers.engine.engine import Engine, Outgoing
from stageflow_brokers.errors import JournalFailed, JournalFull
from stageflow_brokers.testing.simulated_disk import SimulatedDisk
from stageflow_brokers.types import FLAG_START, FLAG_WATCH, TERMINAL

DIRECTORY = Path("/journal")


class Publisher(EnginePeer):
    """A peer that publishes to the queue it consumes."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.hello([("q", 10), ("end", 10)])

    def publish(self) -> list[Outgoing]:
        return self.send(
            wire.PUBLISH, [("q", "a")], [(0, 4, f"g{self.frame}", 1, FLAG_START | FLAG_WATCH)], blob=b"body"
        )


def test_a_confirmation_and_a_delivery_leave_after_their_sync() -> None:
    files = SimulatedDisk()
    engine = Engine(journal_dir=DIRECTORY, files=files)
    dispatch = engine.machine.dispatch
    order: list[str] = []
    files.on_call = lambda name, path: order.append(name)
    engine.machine.dispatch = lambda: order.append("dispatch") or dispatch()  # type: ignore[method-assign, func-returns-value]
    peer = Publisher(engine)
    order.clear()
    ((_, header, _),) = peer.publish()
    assert order == ["pwritev", "fdatasync", "dispatch"]
    out = wire.decode_broker_frame(header)
    assert out.acked == 1
    assert [queue for queue, _ in out.deliveries] == ["q"]


@pytest.mark.parametrize("call", ["fdatasync", "pwritev"])
def test_after_a_failed_write_or_sync_nothing_leaves_any_more(call: str) -> None:
    files = SimulatedDisk()
    engine = Engine(journal_dir=DIRECTORY, files=files)
    peer = Publisher(engine)

    def fail(name: str, path: str) -> None:
        if call in name:
            raise OSError(errno.EIO, "input/output error")

    files.on_call = fail
    with pytest.raises(JournalFailed):
        peer.publish()
    files.on_call = lambda name, path: None
    # The disk may say that all is well now: what it holds is unknown all the same.
    with pytest.raises(JournalFailed):
        peer.publish()
    # What the process is ended for is recovered from the disk, where the first publish may or may not be.
    files.kill()
    recovered = Engine(journal_dir=DIRECTORY, files=files)
    assert len(recovered.machine.state.messages) in (0, 1)


def test_a_full_disk_holds_everything_back_until_there_is_room() -> None:
    files = SimulatedDisk()
    engine = Engine(journal_dir=DIRECTORY, files=files, segment_bytes=16 << 10, monotonic=lambda: 0.0)
    peer = Publisher(engine)
    files.size_bytes = files.used()
    answers = peer.publish()
    while wire.decode_broker_frame(answers[0][1]).acked == peer.frame:
        answers = peer.send(wire.PUBLISH, [("elsewhere", "a")], [(0, 6000)], blob=bytes(6000)) or answers
        assert peer.frame < 100
    taken = len(engine.machine.state.messages)
    assert engine.round([]) == []
    files.size_bytes = None
    answers = engine.round([])
    assert wire.decode_broker_frame(answers[0][1]).acked == peer.frame
    assert len(engine.machine.state.messages) == taken + 1


def test_the_brokers_own_decisions_on_a_full_disk_wait_until_there_is_room() -> None:
    files = SimulatedDisk()
    looks = 0

    def stop_requested() -> bool:
        nonlocal looks
        looks += 1
        if looks == 2:
            files.size_bytes = None
        return False

    engine = Engine(journal_dir=DIRECTORY, files=files, segment_bytes=16 << 10, stop_requested=stop_requested)
    peer = Publisher(engine)
    files.size_bytes = files.used()
    engine.machine.writer.record(11, 0, wire.encode(("much", "x" * 40_000)))
    answers = peer.publish()
    assert looks == 2
    assert wire.decode_broker_frame(answers[0][1]).acked == peer.frame


def test_with_little_room_starts_are_refused_and_work_in_hand_goes_on() -> None:
    files = SimulatedDisk()
    clock = iter(range(10_000))
    engine = Engine(journal_dir=DIRECTORY, files=files, segment_bytes=16 << 10, monotonic=lambda: float(next(clock)))
    peer = Publisher(engine)
    ((_, header, _),) = peer.publish()
    (item,) = wire.decode_broker_frame(header).deliveries[0][1]
    files.size_bytes = files.used()
    refused = wire.decode_broker_frame(peer.publish()[0][1])
    while not refused.results:
        item_of = (0, 2000, f"more{peer.frame}", 1, FLAG_START)
        refused = wire.decode_broker_frame(
            peer.send(wire.PUBLISH, [("elsewhere", "a")], [item_of], blob=bytes(2000))[0][1]
        )
    assert "nearly full" in msgspec.msgpack.decode(refused.results[0][1])["message"]
    move = (item.id, item.lease, 0, 6, item.group)
    settled = peer.send(wire.SETTLE, [("end", ":done", TERMINAL)], [move], [], [], blob=b"result")
    assert [queue for queue, _ in wire.decode_broker_frame(settled[0][1]).deliveries] == ["end"]
    files.size_bytes = None
    peer.send(wire.PUBLISH, [("elsewhere", "a")], [(0, 4)], blob=b"more")
    assert not engine.machine.refusal_reason
    assert not wire.decode_broker_frame(peer.publish()[0][1]).results


def test_a_caller_that_waits_for_room_can_be_stopped() -> None:
    files = SimulatedDisk()
    engine = Engine(journal_dir=DIRECTORY, files=files, segment_bytes=16 << 10, stop_requested=lambda: True)
    peer = Publisher(engine)
    files.size_bytes = files.used()
    engine.machine.writer.record(11, 0, wire.encode(("much", "x" * 40_000)))
    with pytest.raises(JournalFull):
        peer.publish()
