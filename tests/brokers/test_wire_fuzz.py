"""Arbitrary frames: the broker accepts only valid ones, never fails, and protects the leases of each peer."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from broker_fixtures import Peer as RawPeer
from broker_fixtures import World, assert_same, check_whole, picture
from broker_process import BrokerProcess
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stageflow_brokers.core import wire
from stageflow_brokers.errors import PayloadTooLarge
from stageflow_brokers.testing.contract import Peer
from stageflow_brokers.types import FLAG_START, FLAG_WATCH

VICTIM, ATTACKER = 1, 2

integers = st.one_of(st.integers(-3, 6), st.sampled_from([2**31, 2**40 + 1, 2**62, 2**63 - 1, 2**64 - 1, -(2**63)]))
values = st.recursive(
    st.none()
    | st.booleans()
    | integers
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | st.sampled_from(["q", "g0", "g1", "fin"]),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=20,
)
index = st.integers(0, 1) | st.integers(0, 1) | integers
size = st.integers(0, 4) | st.integers(0, 4) | integers
seconds = st.sampled_from([0.0, 0.0, 1.5, 1e308, float("inf"), float("nan"), -1.0])
names = st.sampled_from(["q", "r", "g0", "g1", "", "dlq.q"])
target = st.tuples(names, st.text(max_size=2), st.sampled_from([0, 0, 1, 2, 3, 2**40]))
item = st.tuples(index, size, names, integers, integers, integers, seconds, seconds, st.none(), integers)
arrival = st.tuples(names, names, size, names, integers)
opening = st.tuples(names, size, index, size, names, integers, seconds)
lease = st.tuples(st.integers(1, 6), st.one_of(integers, st.sampled_from([(2 << 40) + n for n in range(5)])))
move = st.tuples(st.integers(1, 6), st.sampled_from([(1 << 40) + n for n in range(1, 6)]), index, size, names)
other = st.tuples(
    st.lists(lease, min_size=1, max_size=2),
    st.integers(0, 2) | integers,
    st.lists(item, max_size=2),
    seconds,
    st.none() | st.binary(max_size=3),
    st.lists(opening, max_size=2),
    st.lists(arrival, max_size=2),
    names,
)
args = st.one_of(
    st.tuples(names),
    st.tuples(names, integers),
    st.tuples(names, integers, integers),
    st.tuples(names, st.lists(integers, max_size=3)),
    st.tuples(st.lists(names, max_size=3)),
    st.tuples(names, integers, names, names),
    st.tuples(st.lists(st.tuples(names, integers, st.booleans(), names, names, integers), max_size=2)),
    st.tuples(names, st.none() | names),
    st.tuples(integers, integers, st.booleans(), st.booleans(), st.binary(max_size=3)),
    values,
)
QUERIES = """consume watch lookup inspect groups declare stats peek pause resume requeue purge raise-epoch cancel
hand-over dead roster hold recall fact ping unknown""".split()
fields = {
    wire.PUBLISH: st.tuples(
        st.lists(target, max_size=3),
        st.lists(item, max_size=4),
        st.booleans(),
        st.lists(opening, max_size=2),
        st.lists(arrival, max_size=2),
    ),
    wire.SETTLE: st.tuples(
        st.lists(target, max_size=3),
        st.lists(move, max_size=3),
        st.lists(st.tuples(st.integers(1, 6), integers, integers, names), max_size=3),
        st.lists(other, max_size=2),
        names,
        integers,
    ),
    wire.CHECKPOINT: st.tuples(st.integers(1, 6), integers, st.text(max_size=3)),
    wire.RELEASE: st.tuples(st.lists(lease, max_size=3), names, integers),
    wire.QUERY: st.tuples(st.sampled_from(QUERIES), args),
}


@st.composite
def frames(draw: st.DrawFn) -> tuple[bytes, Any, bytes]:
    """(operation, fields or whole header, blob)"""
    op = draw(st.sampled_from([*fields, wire.HELLO, b"?"]))
    if op in fields and draw(st.integers(0, 3)):
        return op, draw(fields[op]), draw(st.binary(max_size=12))
    header = draw(st.binary(max_size=40) | values.map(wire.encode) | st.lists(values, max_size=8).map(wire.encode))
    return op, header, draw(st.binary(max_size=12))


def fitting(op: bytes, said: Any, blob: bytes) -> bytes:
    """A blob of the size that the header speaks of, if it is a sane one, so that not all is refused for its size."""
    try:
        if op == wire.PUBLISH:
            size = sum(each[1] for each in said[1]) + sum(each[3] for each in said[3])
            size += sum(each[2] for each in said[4])
        elif op == wire.SETTLE:
            size = sum(each[3] for each in said[1])
            for each in said[3]:
                size += sum(one[1] for one in each[2]) + sum(one[3] for one in each[5]) + sum(one[2] for one in each[6])
        else:
            return blob
    except TypeError:
        return blob
    return bytes(size) if 0 <= size < 100 else blob


def world_with_a_victim() -> tuple[World, RawPeer, RawPeer]:
    world = World()
    victim = world.peer(VICTIM, consume={"q": 3})
    victim.publish([("q", "a")], [(0, 2, f"g{n}", 1, FLAG_START | FLAG_WATCH) for n in range(3)], [b"xx"] * 3)
    victim.publish([("q", "a")], [(0, 2)], [b"yy"])
    assert len(victim.held) == 3
    return world, victim, world.peer(ATTACKER)


@settings(max_examples=int(os.environ.get("BROKER_FUZZ", 200)), deadline=None)
@given(sent=st.lists(frames(), min_size=1, max_size=6))
@example(sent=[(wire.PUBLISH, b"\x91" * 5000, b"")])
@example(sent=[(wire.QUERY, b"\x94\x01\x01\xa4ping" + b"\x91" * 5000, b"")])
@example(sent=[(wire.SETTLE, b"\xdd\xff\xff\xff\xff", b"")])
@example(sent=[(wire.SETTLE, b"\x96\x01\x01\xdd\xff\xff\xff\xff", b"")])
@example(sent=[(wire.HELLO, wire.encode((1, "", "", 1, -(2**63))), b"")])
@example(sent=[(wire.HELLO, wire.encode((2, "worker", "", 1, 1)), b"")])
@example(sent=[(wire.QUERY, wire.encode((1, 1, "\udc80".encode("utf8", "surrogatepass"), ())), b"")])
def test_no_frame_harms_the_machine_or_another_peer(sent: list[tuple[bytes, Any, bytes]]) -> None:
    world, victim, attacker = world_with_a_victim()
    held = {id: item.lease for id, item in victim.held.items()}
    for op, said, blob in sent:
        if isinstance(said, bytes):
            world.round([(ATTACKER, op, said, blob)])
        else:
            if not attacker.welcomed:
                attacker.hello()
            # One that was not taken left the number to the next.
            session = world.machine.state.sessions[ATTACKER]
            attacker.frame = session.received_frame
            attacker.send(op, said, fitting(op, said, blob))
        check_whole(world.machine)
    for id, lease in held.items():
        message = world.machine.state.messages[id]
        assert message.holder is not None
        assert (message.holder.session.peer, message.lease) == (VICTIM, lease)
    assert_same(picture(world.recover(), clocks_agree=True), picture(world.machine, clocks_agree=True))
    # Whoever means well is served as before, and what it holds it settles.
    mine = list(victim.held.values())
    victim.settle([("r", "b")], [(item.id, item.lease, 0, 1, item.group) for item in mine], bodies=[b"!"] * 3)
    assert victim.query("ping")["epoch"] == victim.epoch
    assert not any(item.id in world.machine.state.messages for item in mine)


def test_a_frame_that_makes_no_sense_is_counted_answered_and_not_asked_for_again() -> None:
    world, _, attacker = world_with_a_victim()
    attacker.send(wire.PUBLISH, ([("q", "a")], [(0, 99)]), b"short")
    assert world.machine.malformed_frames == 1
    assert attacker.acked == attacker.frame
    assert attacker.results[attacker.frame]["error"] == "ProtocolError"
    assert ("malformed", attacker.results[attacker.frame]["message"]) in attacker.notices
    assert attacker.query("ping") is not None


def test_a_frame_is_taken_once_and_a_gap_is_noticed() -> None:
    world, _, peer = world_with_a_victim()
    frame = peer.frame_of(wire.PUBLISH, ([("r", "a")], [(0, 1)]), b"1")
    world.round([frame, frame])
    world.round([frame])
    assert world.machine.state.queue("r").ready_count == 1
    peer.frame += 1
    peer.send(wire.PUBLISH, ([("r", "a")], [(0, 1)]), b"2")
    assert ("resend", peer.frame - 1) in peer.notices
    assert world.machine.state.queue("r").ready_count == 1


def test_a_peer_of_another_protocol_is_notified() -> None:
    world = World()
    stranger = RawPeer(world, 5)
    world.peers[5] = stranger
    world.round([(5, wire.HELLO, wire.encode((99, "client", "", 1, 1)), b"")])
    ((word, detail),) = stranger.notices
    assert word == "refused"
    assert "uses protocol 99" in detail


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    """A broker without a supervisor."""
    running = BrokerProcess(tmp_path)
    yield running
    running.close()


def test_garbage_on_the_socket_is_counted_and_dropped(broker: BrokerProcess) -> None:
    chance = random.Random(7)
    peer = Peer(broker)
    peer.publish("q", b"1", group="g")
    peer.broker.consume("q", 1)
    (held,) = peer.receive()
    context = zmq.Context()
    sockets = []
    for identity in (b"x", b"12345678", bytes(8), b"123456789", None):
        socket = context.socket(zmq.DEALER)
        if identity is not None:
            socket.setsockopt(zmq.ROUTING_ID, identity if any(identity) else b"\x01" + identity[1:])
        socket.setsockopt(zmq.LINGER, 2000)
        socket.connect(broker.options["address"])
        sockets.append(socket)
    operations = [b"H", b"P", b"S", b"C", b"R", b"Q", b"", b"?", b"HH"]
    for number in range(300):
        parts = [chance.randbytes(chance.choice([0, 1, 8, 300])) for _ in range(chance.choice([1, 2, 3, 3, 3, 4, 7]))]
        parts[0] = chance.choice([*operations, parts[0]])
        sockets[number % len(sockets)].send_multipart(parts)
    # One that speaks well enough to be known, and then names what another holds.
    thief = sockets[1]
    thief.send_multipart([b"H", wire.encode((wire.PROTOCOL, "worker", "thief", 1, 1)), b""])
    epoch = peer.broker.broker_epoch
    settle = (epoch, 1, [["stolen", "", 0]], [[held.item.id, held.item.lease, 0, 1, "g"]])
    thief.send_multipart([b"S", wire.encode(settle), b"!"])
    thief.send_multipart([b"R", wire.encode((epoch, 2, [[held.item.id, held.item.lease]])), b""])
    thief.send_multipart([b"Q", wire.encode((epoch, 3, "fact", ["reached", "yes"])), b""])
    while peer.ask.get_fact("reached") != "yes":
        pass
    for socket in sockets:
        socket.close()
    context.term()
    stats = peer.ask.stats("")
    assert stats["malformed"] > 100
    assert stats["messages"] == 1
    peer.move(held, "next", b"mine")
    assert peer.ask.stats("next")["queues"][0]["ready"] == 1
    assert peer.stale == []


def test_a_call_beyond_what_a_frame_can_hold_is_refused_before_it_is_sent(
    monkeypatch: pytest.MonkeyPatch, broker: BrokerProcess
) -> None:
    peer = Peer(broker)
    monkeypatch.setattr(wire, "MAX_FRAME", 1000)
    with pytest.raises(PayloadTooLarge, match="send fewer"):
        peer.publish("q", bytes(600), bytes(600))
    assert peer.publish("q", bytes(600)) == []
