"""Answers to one peer are bounded: the broker queues no more than the peer can read, and serves the others."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from broker_fixtures import Peer, World, check_whole

from stageflow_brokers.core import gather, inspector, machine, watches, wire
from stageflow_brokers.core.limits import Limits
from stageflow_brokers.types import FLAG_CLOSE_GROUP, FLAG_START, MAX_LISTED_GROUPS, TERMINAL, QueueOptions

MOST = 1_000


class Reader(Peer):
    """A peer that answers pings only on request."""

    def __init__(self, world: World, number: int, **options: Any) -> None:
        super().__init__(world, number, **options)
        self.heard: list[int] = []

    def hear(self, header: bytes, blob: bytes) -> None:
        super().hear(header, blob)
        self.heard += [detail for word, detail in wire.decode_broker_frame(header).notices if word == "mark"]

    def read(self) -> bool:
        """Read what there is; whether there was anything."""
        marks, self.heard = self.heard, []
        for mark in marks:
            self.world.round([(self.number, wire.MARK_READ, wire.encode(mark), b"")])
        return bool(marks)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> World:
    """A broker that sends no answer to a peer with more than `MOST` unread bytes."""
    for module in (machine, watches):
        monkeypatch.setattr(module, "UNREAD_PAUSE_BYTES", MOST)
    return World(limits=msgspec.structs.replace(Limits(), max_unread_bytes=24 * MOST // 10))


def reader(here: World, number: int = 2) -> Reader:
    made = here.peers[number] = Reader(here, number)
    made.hello()
    return made


def end(here: World, *groups: str, size: int = 400) -> None:
    """Groups that have ended, whose end no consumer has received yet."""
    peer = here.peers.get(1) or here.peer(1)
    items = [(0, size, group, 1, FLAG_START) for group in groups]
    peer.publish([("finished", ":end", TERMINAL)], items, [bytes(size)] * len(groups))


def test_an_end_that_is_asked_for_many_times_is_reported_once(here: World) -> None:
    end(here, "g")
    peer = reader(here)
    assert peer.query("watch", ["g"] * 1000) == []
    assert [group for group, _, _ in peer.pushes] == ["g"]


def test_ends_are_sent_as_fast_as_they_are_read(here: World) -> None:
    groups = [f"g{number}" for number in range(20)]
    end(here, *groups)
    peer = reader(here)
    assert peer.query("watch", groups) == []
    told = len(peer.pushes)
    assert 2 <= told <= 4
    here.round()
    assert len(peer.pushes) == told, "it has read nothing yet"
    other = here.peer(3)
    assert other.query("ping")["open"]
    while peer.read():
        assert len(peer.pushes) - told <= 5
        told = len(peer.pushes)
    assert [group for group, _, _ in peer.pushes] == groups
    check_whole(here.machine)


def test_a_hello_with_watches_is_answered_no_faster(here: World) -> None:
    groups = [f"g{number}" for number in range(20)]
    end(here, *groups)
    peer = here.peers[2] = Reader(here, 2)
    peer.hello(watching=groups)
    assert len(peer.pushes) <= 4
    while peer.read():
        pass
    assert [group for group, _, _ in peer.pushes] == groups


def test_an_instance_that_left_before_its_end_could_be_sent_is_gone(here: World) -> None:
    end(here, *(f"g{number}" for number in range(10)))
    peer = reader(here)
    peer.query("watch", [f"g{number}" for number in range(10)])
    keeper = here.peer(4, consume={"finished": 20})
    leaving = [(item.id, item.lease, FLAG_CLOSE_GROUP, item.group) for item in keeper.held.values()]
    keeper.settle([], acks=leaving)
    while peer.read():
        pass
    told = {group for group, _, _ in peer.pushes}
    gone = {detail for word, detail in peer.notices if word == "gone"}
    assert told | gone == {f"g{number}" for number in range(10)}
    assert not told & gone


def test_questions_wait_until_the_answers_before_have_been_read_and_are_answered_in_order(here: World) -> None:
    here.peer(1).publish([("q", "")], [(0, 600)], [bytes(600)])
    peer = reader(here)
    frames = [peer.frame_of(wire.QUERY, ("peek", ("q", 0, 1))) for _ in range(10)]
    here.round(frames)
    first = sorted(peer.results)
    assert 2 <= len(first) <= 3
    assert here.peer(3).query("ping")["open"], "others are served meanwhile"
    here.round([peer.frame_of(wire.PUBLISH, ([("q", "")], [(0, 1)], False), b"1")])
    assert here.machine.state.queues["q"].ready_count == 1, "what comes behind a question waits with it"
    answered = len(first)
    while peer.read():
        assert len(peer.results) - answered <= 3
        answered = len(peer.results)
    assert sorted(peer.results) == list(range(1, 11))
    assert here.machine.state.queues["q"].ready_count == 2


def test_unanswered_queries_are_sent_again_after_a_new_hello(here: World) -> None:
    here.peer(1).publish([("q", "")], [(0, 600)], [bytes(600)])
    peer = reader(here)
    frames = [peer.frame_of(wire.QUERY, ("peek", ("q", 0, 1))) for _ in range(10)]
    here.round(frames)
    session = here.machine.state.sessions[2]
    assert session.waiting_frames
    peer.hello(next_frame=max(peer.results) + 1)
    assert not session.waiting_frames
    assert session.waiting_bytes == 0


def test_a_peer_that_keeps_asking_and_reads_nothing_is_disconnected(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "MAX_WAITING_FRAMES", 20)
    here.peer(1).publish([("q", "")], [(0, 600)], [bytes(600)])
    peer = reader(here)
    here.round([peer.frame_of(wire.QUERY, ("peek", ("q", 0, 1))) for _ in range(40)])
    assert ("hello", None) in peer.notices
    assert 2 not in here.machine.state.sessions
    assert here.peer(3).query("ping")["open"]


def test_one_whose_answer_cannot_be_made_is_cut_off_and_the_others_are_served(
    here: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    end(here, "g")
    peer, other = reader(here), here.peer(3)

    def swallow(value: Any) -> bytes:
        if isinstance(value, tuple) and len(value) == 6 and value[4]:  # an answer with pushes
            raise MemoryError
        return msgspec.msgpack.encode(value)

    frames = [peer.frame_of(wire.QUERY, ("watch", (["g"],))), other.frame_of(wire.QUERY, ("ping", ()))]
    monkeypatch.setattr(wire, "encode", swallow)
    here.round(frames)
    monkeypatch.undo()
    assert other.results[1]["open"]
    assert ("hello", None) in peer.notices


def test_bodies_that_have_no_room_in_an_answer_are_left_out(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspector, "MAX_ANSWER_BYTES", 1_000)
    monkeypatch.setattr(machine, "UNREAD_PAUSE_BYTES", 1 << 20)
    peer = here.peer(1)
    peer.publish([("q", "")], [(0, 400, f"g{number}", 1, FLAG_START) for number in range(4)], [bytes(400)] * 4)
    described = peer.query("inspect", [f"g{number}" for number in range(4)])
    assert [["body" in message for message in described[f"g{number}"]["messages"]] for number in range(4)] == [
        [True],
        [True],
        [False],
        [False],
    ]


def test_no_more_groups_are_listed_than_one_answer_holds() -> None:
    peer = World().peer(1)
    for limit in (-1, MAX_LISTED_GROUPS + 1, 1 << 60):
        assert "the limit must be from 0 to 100,000" in peer.query("groups", "", limit)["refused"]


def test_facts_have_a_size_in_all() -> None:
    here = World(limits=msgspec.structs.replace(Limits(), max_facts_bytes=100))
    peer = here.peer(1)
    assert peer.query("fact", "a", "x" * 60) == "x" * 60
    assert peer.query("fact", "b", "x" * 60)["refused"] == "the facts would have 121 bytes, and max_facts_bytes is 100"
    assert peer.query("fact", "b", "x" * 30) == "x" * 30
    check_whole(here.machine)


@pytest.mark.parametrize("priority", [-1001, 1001, 1 << 62])
def test_a_priority_beyond_the_known_ones_is_refused(priority: int) -> None:
    peer = World().peer(1)
    assert peer.publish([("q", "")], [(0, 1, "", 0, 0, priority)], [b"1"])["error"] == "ProtocolError"


def test_lanes_that_are_empty_are_not_kept() -> None:
    here = World()
    peer = here.peer(1)
    items = [(0, 1, "", 0, 0, priority) for priority in range(1, 500)]
    peer.publish([("q", "")], items, [b"1"] * len(items))
    here.peer(2, consume={"q": 1000})
    queue = here.machine.state.queues["q"]
    assert queue.ready_count == 0
    assert not queue.next_lane()
    assert queue._other_lanes == []


def test_a_second_greeting_makes_no_more_queues_than_a_first_one() -> None:
    here = World(limits=msgspec.structs.replace(Limits(), max_queues=3))
    peer = here.peer(1, consume={"one": 0})
    peer.consuming |= {f"more{number}": 0 for number in range(5)}
    peer.hello()
    assert any("max_queues is 3" in str(detail) for _, detail in peer.notices)
    assert list(here.machine.state.queues) == ["one"]


def test_unused_queues_make_room_for_others() -> None:
    here = World(limits=msgspec.structs.replace(Limits(), max_queues=5))
    junk, peer = here.peer(1), here.peer(2, consume={"consumed": 1})
    junk.query("declare", [QueueOptions("junk1", 3), QueueOptions("junk2", 3)])
    peer.query("declare", [QueueOptions("mine", 3)])
    peer.publish([("full", "")], [(0, 1)], [b"1"])
    assert "max_queues is 5" in peer.query("declare", [QueueOptions("new")])["refused"]
    junk.query("bye")
    here.pass_time(2.0)
    assert peer.query("declare", [QueueOptions("new")]) is None
    assert sorted(here.machine.state.queues) == ["consumed", "full", "mine", "new"]
    check_whole(here.machine)


def test_what_is_gathered_is_never_more_than_one_message_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "MAX_GATHERED_BYTES", 100)
    here = World()
    peer = here.peer(1, consume={"joined": 1})
    peer.publish(
        [("joined", "j")],
        [],
        [bytes(10), bytes(60), bytes(60), bytes(20)],
        opens=[("k", 3, 0, 10, "g", 1)],
        arrivals=[("k", "a", 60, "g", 1), ("k", "b", 60, "g", 1), ("k", "c", 20, "g", 1)],
    )
    ((_, item, body),) = peer.delivered
    assert item.extra is not None
    assert item.extra.parts == [("", 10), ("a", 60), ("b", 0), ("c", 20)]
    assert len(body) == 90
    check_whole(here.machine)


def test_instances_are_counted_by_the_first_mark_that_their_bodies_bear() -> None:
    here = World()
    peer = here.peer(1)
    bodies = [b"..one...", b"..two...", b".one....", b"other..."]
    peer.publish([("shared", "")], [(0, 8, f"g{n}", 1, FLAG_START) for n in range(4)], bodies)
    assert peer.query("tally", ["shared"], [b"two", b"one"], [2, 1])["marks"] == [1, 2]
