"""Attacks one by one: truncated frames, false lengths, replays, claimed roles, and queries with any value."""

from __future__ import annotations

import os
import types
import typing
from typing import Any

import pytest
from broker_fixtures import Peer, World, assert_same, check_whole, picture
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stageflow_brokers.core import wire
from stageflow_brokers.core.wire import MAX_NUMBER
from stageflow_brokers.types import ACK, FLAG_CLOSE_GROUP, FLAG_START, RETRY, QueueOptions

VICTIM, ATTACKER = 1, 2

Frame = tuple[int, bytes, bytes, bytes]


def attacked(*, supervised: bool = False) -> tuple[World, Peer, Peer]:
    """A world, a worker that holds three messages, and who is after them."""
    world = World(supervised=supervised)
    if supervised:
        world.peer(9, role="supervisor").query("roster", [])
    victim = world.peer(VICTIM, consume={"q": 3}, role="worker")
    victim.publish([("q", "a")], [(0, 2, f"g{n}", 1, FLAG_START) for n in range(3)], [b"xx"] * 3)
    assert len(victim.held) == 3
    return world, victim, world.peer(ATTACKER)


def unharmed(world: World, victim: Peer) -> None:
    """The victim settles what it holds, and nothing else has come of it."""
    check_whole(world.machine)
    assert_same(picture(world.recover(), clocks_agree=True), picture(world.machine, clocks_agree=True))
    mine = list(victim.held.values())
    moves = [(item.id, item.lease, 0, 1, item.group) for item in mine]
    assert victim.settle([("next", "b")], moves, bodies=[b"!"] * 3) is None
    assert victim.query("ping")["epoch"] == victim.epoch
    assert world.machine.state.queues["next"].ready_count == 3


def sound_frames(peer: Peer, victim: Peer) -> list[Frame]:
    """One good frame of each kind, the first of which would be the next of `peer`."""
    (one, two, three) = victim.held.values()
    lease = (two.id, two.lease)
    settle = (
        [("r", "b"), ("fin", "end", 1)],
        [(one.id, one.lease, 0, 2, one.group)],
        [(three.id, three.lease, FLAG_CLOSE_GROUP, three.group)],
        [([lease], RETRY, [(0, 2)], 1.5, b"why", [("k", 2, 0, 3, "g9", 1, 5.0)], [("k", "s", 1, "g9", 1)])],
        "q",
        5,
    )
    start = (0, 2, "h", 1, FLAG_START, 5, 0.5, 9.0, b"digest", 7)
    return [
        peer.frame_of(wire.PUBLISH, ([("r", "b")], [start, (0, 3)], True, [], []), b"12345"),
        peer.frame_of(wire.SETTLE, settle, b"12345678"),
        peer.frame_of(wire.CHECKPOINT, (*lease, "step"), b"value"),
        peer.frame_of(wire.RELEASE, ([lease], "q", 1)),
        peer.frame_of(wire.QUERY, ("lookup", (["g0", "g1"],))),
        (peer.number, wire.MARK_READ, wire.encode(300), b""),
    ]


def hello(talk: int, **fields: Any) -> bytes:
    said = {"role": "worker", "next": 1, "consume": [], "holding": [], "watching": [], **fields}
    values = (said["role"], "a", 1, said["next"], said["consume"], said["holding"], said["watching"], talk)
    return wire.encode((wire.PROTOCOL, *values))


@pytest.mark.parametrize("number", range(6))
def test_a_header_or_a_body_may_end_anywhere(number: int) -> None:
    world, victim, attacker = attacked()
    peer, op, header, blob = sound_frames(attacker, victim)[number]
    for cut in range(len(header)):
        world.round([(peer, op, header[:cut], blob)])
    for cut in range(len(blob)):
        world.round([(peer, op, header, blob[:cut]), (peer, op, header, blob + bytes(cut + 1))])
    # Only a header that ends where optional fields begin makes sense without them, and then not with these bodies.
    assert world.machine.malformed_frames >= len(header)
    assert set(world.machine.state.queues) <= {"q"}
    unharmed(world, victim)


def test_a_hello_may_end_anywhere() -> None:
    world, victim, _ = attacked()
    whole = hello(1, consume=[("r", 1)], holding=[(1, 1)], watching=["g0"])
    for cut in range(len(whole) - 1):
        world.round([(ATTACKER + 1, wire.HELLO, whole[:cut], b"")])
    assert world.machine.malformed_frames > 10
    unharmed(world, victim)


@pytest.mark.parametrize("number", range(6))
def test_every_byte_of_a_header_may_be_another(number: int) -> None:
    """Lengths that lie, types that are others, numbers that are not: each byte in turn becomes each telling value."""
    world, victim, attacker = attacked()
    peer, op, header, blob = sound_frames(attacker, victim)[number]
    telling = (
        0x00,
        0x7F,
        0x80,
        0x8F,
        0x90,
        0x9F,
        0xA0,
        0xBF,
        0xC0,
        0xC1,
        0xC3,
        0xC6,
        0xCB,
        0xCF,
        0xD3,
        0xDB,
        0xDD,
        0xDF,
    )
    for place in range(len(header)):
        for value in (*telling, header[place] ^ 1):
            bent = header[:place] + bytes([value]) + header[place + 1 :]
            world.round([(peer, op, bent, blob)])
    assert world.machine.malformed_frames > len(header)
    unharmed(world, victim)


@pytest.mark.parametrize("size", [-1, -(2**63), 2**31, 2**62, 2**63 - 1, 2**64 - 1])
def test_sizes_that_lie_are_refused_also_where_they_add_up(size: int) -> None:
    world, victim, attacker = attacked()
    targets = [("r", "b")]
    id, lease = next((item.id, item.lease) for item in victim.held.values())
    lying: list[tuple[bytes, Any]] = [
        (wire.PUBLISH, (targets, [(0, size)])),
        (wire.PUBLISH, (targets, [(0, size), (0, 4 - size)])),
        (wire.PUBLISH, (targets, [], False, [("k", 1, 0, size, "g0", 1)], [])),
        (wire.PUBLISH, (targets, [], False, [], [("k", "s", size, "g0", 1), ("k", "t", 4 - size, "g0", 1)])),
        (wire.SETTLE, (targets, [(id, lease, 0, size, "g0")])),
        (wire.SETTLE, (targets, [(id, lease, 0, size, "g0"), (id, lease, 0, 4 - size, "g0")])),
        (wire.SETTLE, (targets, [], [], [([(id, lease)], ACK, [(0, size), (0, 4 - size)])])),
    ]
    for op, fields in lying:
        try:
            frame = attacker.frame_of(op, fields, b"1234")
        except OverflowError:  # no number of msgpack's either
            attacker.frame -= 1
            continue
        world.round([frame])
        assert attacker.results[attacker.frame]["error"] == "ProtocolError"
    assert not world.machine.state.queues.keys() - {"q"}
    unharmed(world, victim)


def test_frames_of_another_peer_replayed_by_a_stranger_settle_nothing() -> None:
    world, victim, attacker = attacked()
    attacker.frame = victim.frame  # so that they come in turn
    attacker.hello()
    for _, op, header, blob in sound_frames(victim, victim):
        world.round([(ATTACKER, op, header, blob)])
    store = world.machine.state
    assert store.queues["r"].ready_count == 1, "what it published is its own"
    assert store.queues["r"].delayed_count == 1
    assert "fin" not in store.queues or not store.queues["fin"].ready_count
    assert all(store.messages[id].ensure_delivery_state().steps is None for id in victim.held)
    victim.frame -= 5  # it has not sent them itself
    unharmed(world, victim)


def test_a_frame_sent_again_in_another_session_or_epoch_is_accepted_once() -> None:
    world, victim, attacker = attacked()
    frame = attacker.frame_of(wire.PUBLISH, ([("r", "b")], [(0, 1)]), b"1")
    world.round([frame] * 3)
    for first in (1, 2, attacker.frame, attacker.frame + 1):
        attacker.hello(next_frame=first)
        world.round([frame] * 2)
    world.restart()
    victim.hello()
    for first in (1, attacker.frame, attacker.frame + 1):
        attacker.hello(next_frame=first)
        world.round([frame])
        old = wire.encode((attacker.epoch - 1, attacker.frame + 1, [("r", "b")], [(0, 1)]))
        world.round([(ATTACKER, wire.PUBLISH, old, b"1")])
    assert world.machine.state.queues["r"].ready_count == 1
    unharmed(world, victim)


@pytest.mark.parametrize("role", ["client", "worker", "", "Supervisor", "supervisor\0"])
def test_only_a_peer_in_the_supervisor_role_may_report_live_and_dead_workers(role: str) -> None:
    world, victim, _ = attacked(supervised=True)
    thief = world.peer(5, role=role)
    (id, item) = next(iter(victim.held.items()))
    for name, args in (
        ("dead", (VICTIM, id, True, True, b"dead")),
        ("dead", (VICTIM, list(victim.held), False, False, b"")),
        ("roster", ([(VICTIM, ["q"])],)),
        ("hold", (True,)),
        ("recall", (VICTIM,)),
        ("retire", (VICTIM,)),
        ("starts", ([("q", True, "why", 1.0)],)),
    ):
        assert thief.query(name, *args) == {"refused": "this query is only for the supervisor"}, name
    world.pass_time(1.0)
    # The last hello decides the role, which gives no access to the leases of others.
    for later in ("worker", "supervisor"):
        thief.role = later
        thief.hello()
        assert thief.settle([("r", "b")], [(id, item.lease, 0, 1, item.group)], bodies=[b"!"]) == {"stale": [id]}
        assert "is not held" in thief.send(wire.CHECKPOINT, (id, item.lease, "step"), b"!")["refused"]
        thief.release([(id, item.lease)])
    assert not [word for word, _ in victim.notices if word in ("recall", "retire", "cancel")]
    unharmed(world, victim)


def test_a_hello_that_claims_what_another_holds_gets_none_of_it() -> None:
    world, victim, attacker = attacked()
    claims = [(item.id, item.lease) for item in victim.held.values()]
    claims += [
        (item.id, lease) for item in victim.held.values() for lease in (0, -1, item.lease - 1, item.lease + 1, 2**63)
    ]
    for role in ("worker", "supervisor"):
        attacker.talk += 1
        said = hello(attacker.talk, role=role, next=attacker.frame + 1, consume=[("q", 99)], holding=claims)
        world.round([(ATTACKER, wire.HELLO, said, b"")])
    (*_, (_, lost)) = (detail for word, detail in attacker.notices if word == "welcome")
    assert set(lost) == set(victim.held)
    assert not attacker.held
    attacker.query("consume", "q", 0)
    unharmed(world, victim)


# every query, with values of the right types


numbers = st.sampled_from([0, 1, 2, 3, -1, 10_000, 10_001, MAX_NUMBER, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)])
texts = st.sampled_from(["q", "r", "g0", "g1", "dlq.q", "dlq.", "", "worker", "\0", "x" * 2_000])
blobs = st.sampled_from([b"", b"x", bytes(5_000)])
seconds = st.sampled_from([0.0, 1.0, -1.0, 1e308, float("inf"), float("nan")])
options = st.builds(QueueOptions, texts, numbers, st.booleans(), texts, texts, numbers, numbers, seconds)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of the type that a query's argument has."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return st.tuples(*map(values_of, inner)) if inner != ((),) else st.just(())
    if origin is list:
        return st.lists(values_of(inner[0]), max_size=3)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values_of, inner))
    known = {int: numbers, str: texts, bytes: blobs, bool: st.booleans(), type(None): st.none(), QueueOptions: options}
    return known.get(kind, numbers | texts | blobs)


QUERIES = {name: kind for name, (kind, _) in World().machine.admin._queries.items()}


@st.composite
def queries(draw: st.DrawFn) -> tuple[str, Any]:
    name = draw(st.sampled_from(sorted(QUERIES)))
    return name, draw(values_of(QUERIES[name]))


@settings(max_examples=int(os.environ.get("BROKER_FUZZ", 100)))
@given(asked=st.lists(queries(), min_size=1, max_size=5), role=st.sampled_from(["client", "supervisor"]))
@example(asked=[("peek", ("q", 2**63, 1))], role="client")
@example(asked=[("peek", ("dlq.q", 2**64 - 1, 10_000))], role="client")
@example(asked=[("consume", ("q", 2**64 - 1))], role="client")
def test_no_query_with_values_of_the_right_types_ends_the_broker(asked: list[tuple[str, Any]], role: str) -> None:
    world, victim, _ = attacked()
    held = {id: item.lease for id, item in victim.held.items()}
    asker = world.peer(5, role=role)
    for name, args in asked:
        if not asker.welcomed or 5 not in world.machine.state.sessions:
            asker.hello()
        asker.query(name, *args)
        world.pass_time(0.1)
        check_whole(world.machine)
    assert_same(picture(world.recover(), clocks_agree=True), picture(world.machine, clocks_agree=True))
    told = {name for name, _ in asked} & {"dead", "restart", "purge"}
    for id, lease in held.items():
        message = world.machine.state.messages.get(id)
        if role == "client" and not told:
            assert message is not None
            assert message.lease == lease
    assert world.peer(77).query("ping") is not None
