"""Limits of one peer, and its notices when it exceeds them; work in hand is settled all the same."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from broker_fixtures import Peer, World, assert_same, check_whole, picture

from stageflow_brokers.core import wire
from stageflow_brokers.core.limits import Limits
from stageflow_brokers.core.wire import MAX_HEADER
from stageflow_brokers.types import ACK, DEAD_LETTER, FLAG_START, MAX_LIST_ITEMS, MAX_NAME_CHARS, TERMINAL, QueueOptions


def world(**limits: int) -> World:
    return World(limits=msgspec.structs.replace(Limits(), **limits))


def whole(here: World) -> None:
    check_whole(here.machine)
    assert_same(picture(here.recover(), clocks_agree=True), picture(here.machine, clocks_agree=True))


def holding_one(here: World, queue: str = "work") -> tuple[Peer, tuple[int, int]]:
    """A worker, and the lease of the message that it holds, of group g."""
    worker = here.peer(2, consume={queue: 1}, role="worker")
    worker.publish([(queue, "a")], [(0, 1, "g", 1, FLAG_START)], [b"1"])
    ((id, item),) = worker.held.items()
    return worker, (id, item.lease)


# peers


def test_one_peer_too_many_is_refused_and_let_in_when_another_has_left() -> None:
    here = world(max_peers=2)
    first, _ = here.peer(1), here.peer(2)
    third = here.peer(3)
    ((word, detail),) = third.notices
    assert word == "refused"
    assert "2 peers are connected (max_peers): close other connections" in detail
    first.query("bye")
    third.hello()
    assert third.welcomed


# names, headers, lists


@pytest.mark.parametrize(
    ("op", "fields", "blob"),
    [
        (wire.PUBLISH, ([("{name}", "")], [(0, 1)]), b"1"),
        (wire.PUBLISH, ([("q", "{name}")], [(0, 1)]), b"1"),
        (wire.PUBLISH, ([("q", "")], [(0, 1, "{name}", 1)]), b"1"),
        (wire.PUBLISH, ([], [], False, [], [("{name}", "slot", 1, "g", 1)]), b"1"),
        (wire.PUBLISH, ([], [], False, [], [("key", "{name}", 1, "g", 1)]), b"1"),
        (wire.PUBLISH, ([("q", "")], [], False, [("{name}", 1, 0, 1, "g", 1)]), b"1"),
        (wire.SETTLE, ([("{name}", "")], []), b""),
        (wire.SETTLE, ([("q", "")], [(1, 1, 0, 1, "{name}")]), b"1"),
        (wire.CHECKPOINT, (1, 1, "{name}"), b"1"),
    ],
)
def test_a_name_has_so_many_characters_and_no_more(op: bytes, fields: Any, blob: bytes) -> None:
    def named(value: Any, name: str) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(named(each, name) for each in value)
        return name if value == "{name}" else value

    here = world()
    peer = here.peer(1)
    answer = peer.send(op, named(fields, "n" * (MAX_NAME_CHARS + 1)), blob)
    assert answer["error"] == "ProtocolError"
    assert f"length <= {MAX_NAME_CHARS}" in answer["message"]
    assert here.machine.malformed_frames == 1
    assert not here.machine.state.messages
    peer.send(op, named(fields, "n" * MAX_NAME_CHARS), blob)
    assert here.machine.malformed_frames == 1


def test_a_list_that_declares_more_items_than_allowed_is_refused_before_it_is_read() -> None:
    here = world()
    peer = here.peer(1)
    lying = b"\xdd" + (MAX_LIST_ITEMS + 1).to_bytes(4, "big")
    for op, before in (
        (wire.PUBLISH, b"\x94\x01\x01" + lying),
        (wire.PUBLISH, b"\x94\x01\x01\x90" + lying),
        (wire.SETTLE, b"\x94\x01\x01\x90" + lying),
        (wire.SETTLE, b"\x96\x01\x01\x90\x90\x90\x91\x92" + lying),
        (wire.RELEASE, b"\x93\x01\x01" + lying),
    ):
        here.round([(1, op, before, b"")])
    assert [f"length <= {MAX_LIST_ITEMS}" in detail for word, detail in peer.notices if word == "malformed"] == [
        True
    ] * 5


def test_a_header_beyond_its_limit_is_refused_without_being_decoded() -> None:
    here = world()
    peer = here.peer(1)
    here.round([(1, wire.PUBLISH, bytes(MAX_HEADER + 1), b"")])
    assert any(
        word == "malformed" and f"more than the limit of {MAX_HEADER}" in detail for word, detail in peer.notices
    )
    assert peer.query("ping") is not None


# queues


def test_a_peer_makes_no_more_queues_than_there_may_be() -> None:
    here = world(max_queues=3)
    peer = here.peer(1, consume={"one": 0})
    assert peer.publish([("two", ""), ("three", "")], [(0, 1), (1, 1)], [b"1", b"1"]) is None
    refusals = [
        peer.publish([("four", "")], [(0, 1)], [b"1"])["message"],
        peer.query("consume", "four", 1)["refused"],
        peer.query("declare", [QueueOptions("four")])["refused"],
    ]
    for refused in refusals:
        assert refused == "there are 3 queues, and max_queues is 3: 'four' cannot be created"
    assert sorted(here.machine.state.queues) == ["one", "three", "two"]
    assert peer.publish([("two", "")], [(0, 1)], [b"1"]) is None
    other = Peer(here, 5, consume={"five": 1})
    here.peers[5] = other
    other.hello()
    ((word, detail),) = other.notices
    assert (word, "max_queues is 3" in detail) == ("refused", True)
    whole(here)


def test_what_work_in_hand_settles_makes_the_queue_it_needs_and_what_is_not_held_makes_none() -> None:
    here = world(max_queues=1)
    worker, (id, lease) = holding_one(here)
    stranger = here.peer(3)
    assert stranger.settle([("stolen", "")], [(id, lease, 0, 1, "g")], bodies=[b"!"]) == {"stale": [id]}
    assert list(here.machine.state.queues) == ["work"]
    assert worker.settle([("next", "")], [(id, lease, 0, 1, "g")], bodies=[b"2"]) is None
    assert here.machine.state.queues["next"].ready_count == 1
    whole(here)


# steps


def test_a_message_keeps_so_many_steps_and_so_many_bytes_of_them() -> None:
    here = world(max_steps=2, max_steps_bytes=12, max_message_bytes=8)
    worker, (id, lease) = holding_one(here)
    send = worker.send
    assert send(wire.CHECKPOINT, (id, lease, "large"), bytes(9))["refused"] == (
        "the value of the step has 9 bytes, and max_message_bytes is 8"
    )
    assert send(wire.CHECKPOINT, (id, lease, "a"), bytes(4)) is None
    assert send(wire.CHECKPOINT, (id, lease, "b"), bytes(7))["refused"] == (
        "the steps of this message would take 13 bytes, and max_steps_bytes is 12"
    )
    assert send(wire.CHECKPOINT, (id, lease, "b"), bytes(6)) is None
    assert send(wire.CHECKPOINT, (id, lease, "c"), b"")["refused"] == ("the message has 2 steps, and max_steps is 2")
    assert send(wire.CHECKPOINT, (id, lease, "a"), bytes(3)) is None, "the same step again takes the place of the first"
    assert worker.settle([("next", "")], [(id, lease, 0, 1, "g")], bodies=[b"2"]) is None
    whole(here)


# arrivals from outside


def test_a_bounded_number_of_unexpected_arrivals_is_kept_at_a_gather() -> None:
    here = world(max_early=2, max_early_bytes=100, max_gathers=2)
    worker, (id, lease) = holding_one(here)
    peer = here.peer(3)

    def arrive(*arrivals: tuple[str, str, int]) -> Any:
        bodies = [bytes(size) for _, _, size in arrivals]
        answer = peer.publish([], [], bodies, arrivals=[(key, slot, size, "g", 1) for key, slot, size in arrivals])
        return answer and answer["message"]

    assert arrive(("k", "1", 1)) is None
    assert "gather 'k' of group g has 2 arrivals and waits for no more" in arrive(("k", "2", 1), ("k", "3", 1)), (
        "of one frame all or none"
    )
    assert arrive(("k", "2", 1)) is None
    assert "max_early is 2" in arrive(("k", "3", 1))
    assert "max_early_bytes is 100" in arrive(("l", "1", 101))
    assert arrive(("l", "1", 100)) is None
    assert "group g has 2 gathers, and max_gathers is 2: 'm' cannot be created" in arrive(("m", "1", 1))
    # A worker's own arrivals are accepted, and so are those that a gather waits for.
    opened = [([(id, lease)], ACK, [(0, 1, "g", 1)], 0.0, None, [("k", 4, 0, 1, "g", 1)], [("k", "3", 1, "g", 1)])]
    assert worker.settle([("done", "")], others=opened, bodies=[b"xyz"]) is None
    assert arrive(("k", "4", 1)) is None
    assert here.machine.state.queues["done"].ready_count == 2
    whole(here)


# queries


def test_so_many_groups_are_asked_for_at_once() -> None:
    here = world(max_looked_up=2, max_inspected=1)
    peer = here.peer(1)
    assert peer.query("lookup", ["a", "b"])["groups"] == {}
    assert peer.query("watch", ["a", "b"]) == ["a", "b"]
    assert peer.query("inspect", ["a"]) == {}
    for name in ("lookup", "watch"):
        assert peer.query(name, ["a", "b", "c"])["refused"] == (
            "3 groups in one query, and max_looked_up is 2: ask for fewer at once"
        )
    assert "max_inspected is 1" in peer.query("inspect", ["a", "b"])["refused"]


def test_facts_and_bodies_that_queries_bring_are_bounded_too() -> None:
    here = world(max_facts=1, max_message_bytes=10)
    peer = here.peer(1)
    assert peer.query("fact", "a", "1") == "1"
    assert peer.query("fact", "a", "2") == "2"
    assert peer.query("fact", "b", "1")["refused"] == "1 facts are stored, and max_facts is 1"
    assert "max_message_bytes=10" in peer.query("fact", "a", "x" * 11)["refused"]
    assert "is over the limit of 65536" in peer.query("tell", "word", "x" * 70_000)["refused"]
    worker, (id, lease) = holding_one(here)
    worker.settle([], others=[([(id, lease)], DEAD_LETTER, [], 0.0, b"why")])
    assert "max_message_bytes=10" in peer.query("replace", "dlq.work", id, bytes(11))["refused"]
    assert "max_message_bytes=10" in peer.query("restart", "g", "work", "", bytes(11))["refused"]
    assert peer.query("replace", "dlq.work", id, bytes(10)) == {"epoch": 1}
    whole(here)


# credit, and what is not read


def test_no_consumer_gets_more_credit_than_there_is() -> None:
    here = world(max_prefetch=3)
    peer = here.peer(1)
    peer.publish([("q", "")], [(0, 1)] * 10, [b"1"] * 10)
    peer.query("consume", "q", 2**40)
    assert len(peer.held) == 3
    peer.send(wire.RELEASE, ([], "q", 2**40))
    assert len(peer.held) == 3
    (id, item), *_ = peer.held.items()
    peer.held.pop(id)
    peer.send(wire.SETTLE, ([], [], [(id, item.lease, 0, "")], [], "q", 2**40))
    assert len(peer.held) == 3


def test_a_peer_that_reads_nothing_is_disconnected_and_may_reconnect() -> None:
    here = world(max_unread_bytes=10_000)
    watcher, publisher = here.peer(1, consume={"q": 4}), here.peer(2)
    groups = [f"g{number}" for number in range(100)]
    publisher.publish([("q", "")], [(0, 1)] * 4, [b"1"] * 4)
    publisher.publish([("r", "")], [(0, 1, group, 1, FLAG_START) for group in groups], [b"1"] * 100)
    assert watcher.query("watch", groups) == []
    said: list[int] = []
    heard = watcher.hear
    watcher.hear = lambda header, blob: said.append(len(header) + len(blob))  # type: ignore[method-assign]
    for group in groups:
        publisher.publish([("fin", "end", TERMINAL)], [(0, 500, group, 1)], [bytes(500)])
    assert 1 not in here.machine.state.sessions
    assert sum(said) < 10_000 + 4_000, "it is told no more"
    assert here.machine.state.queues["q"].ready_count == 4, "and what it was given is another's"
    # As soon as it reads again it finds that it was cut off, and says hello.
    watcher.hear = heard  # type: ignore[method-assign]
    here.round([(1, wire.QUERY, wire.encode((watcher.epoch, 1, "ping", ())), b"")])
    assert ("hello", None) in watcher.notices
    watcher.hello(watching=groups)
    assert {group for group, _, _ in watcher.pushes} == set(groups)
    assert len(watcher.held) == 4


def test_a_peer_that_answers_pings_is_never_disconnected() -> None:
    here = world(max_unread_bytes=10_000)
    reader = here.peer(1)
    marks = 0
    for _ in range(100):
        assert len(reader.query("watch", [f"{n:0100}" for n in range(5)])) == 5
        for word, detail in reader.notices:
            if word == "mark":
                marks += 1
                here.round([(1, wire.MARK_READ, wire.encode(detail), b"")])
        reader.notices.clear()
    assert marks > 10
    session = here.machine.state.sessions[1]
    assert session.connected
    # A mark that was never made, or something else altogether, confirms nothing.
    read = session.read_bytes
    for lie in (session.sent_bytes + 1, -1, 2**63):
        here.round([(1, wire.MARK_READ, wire.encode(lie), b"")])
    assert session.read_bytes == read
    here.round([(1, wire.MARK_READ, b"\xc1", b"")])
    assert any(word == "malformed" for word, _ in reader.notices)


def test_a_disconnected_worker_keeps_what_it_holds_until_it_reconnects() -> None:
    here = World(supervised=True, limits=msgspec.structs.replace(Limits(), max_unread_bytes=4_000))
    supervisor = here.peer(9, role="supervisor")
    supervisor.query("roster", [])
    worker, (id, lease) = holding_one(here)
    deaf = worker.hear
    worker.hear = lambda header, blob: None  # type: ignore[method-assign]
    for _ in range(40):
        supervisor.query("pause", "work")
        here.machine.outbox.add_notice(here.machine.state.sessions[2], "recall", "x" * 300)
        here.round()
    assert not here.machine.state.sessions[2].connected
    worker.hear = deaf  # type: ignore[method-assign]
    worker.hello()
    assert worker.settle([("next", "")], [(id, lease, 0, 1, "g")], bodies=[b"2"]) is None
    assert here.machine.state.queues["next"].ready_count == 1
    assert here.machine.state.sessions[2].connected
