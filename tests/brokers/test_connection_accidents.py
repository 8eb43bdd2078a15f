"""Sessions that break, double or restart at a bad moment: no caller waits for an answer that was already sent.

The simulator found each of these; here each one is reproduced step by step.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from broker_fixtures import World

from stageflow_brokers.api import ACK, Listener
from stageflow_brokers.client.connection import Connection
from stageflow_brokers.core import wire
from stageflow_brokers.types import FLAG_CLOSE_GROUP, FLAG_START, FLAG_WATCH, TERMINAL

ITEM = (0, 1, "g", 1, FLAG_START | FLAG_WATCH, 0, 0.0, 0.0, b"d")


def test_a_hello_that_arrives_twice_takes_nothing_back() -> None:
    world = World(supervised=True)
    supervisor = world.peer(1, role="supervisor")
    supervisor.query("roster", [])
    worker = world.peer(2, role="worker")
    greeting = wire.encode((wire.PROTOCOL, "worker", "peer2", 1, 1, [], [], [], worker.talk))
    worker.query("consume", "q", 1)
    supervisor.publish([("q", "")], [(0, 1)], [b"1"])
    (lease,) = [item.lease for item in worker.held.values()]
    world.round([(2, wire.HELLO, greeting, b"")])
    assert [item.lease for item in worker.held.values()] == [lease]
    assert len(worker.delivered) == 1, "it is not delivered again"
    (id,) = worker.held
    worker.settle([], others=[([(id, lease)], ACK)])
    assert world.machine.state.messages == {}


@pytest.mark.parametrize("known", [False, True])
def test_how_an_instance_ended_is_sent_again_when_that_was_lost_with_the_session(known: bool) -> None:
    world = World()
    client, worker = world.peer(1), world.peer(2, consume={"q": 9})
    if known:
        world.peer(3).publish([("q", "a")], [ITEM], [b"x"])
    start = client.frame_of(wire.PUBLISH, ([("q", "a")], [ITEM], True, [], []), b"x")
    client.welcomed = False  # every later frame to it is lost
    world.round([start])
    (id,) = worker.held
    lease = worker.held[id].lease
    worker.settle([("finished", ":end", TERMINAL)], others=[([(id, lease)], ACK, [(0, 3)])], bodies=[b"end"])
    client.hello(next_frame=1)
    world.round([start])
    assert client.acked == 1
    assert client.pushes == [("g", ":end", b"end")]


class _Client(Connection):
    """A peer whose frames go nowhere."""

    def __init__(self) -> None:
        super().__init__(Listener(), peer=5)
        self.hellos = 0

    def _transmit(self, op: bytes, header: bytes, blob: bytes) -> None:
        """Lost."""

    def send_hello(self) -> None:
        self.hellos += 1
        self._hello()

    def close(self, timeout: float = 5.0) -> None:
        self.end("closed")


def outgoing(epoch: int, acked: int, results: list[Any], notices: list[Any]) -> bytes:
    encoded = [(frame, msgspec.Raw(msgspec.msgpack.encode(result))) for frame, result in results]
    return wire.encode((epoch, acked, encoded, [], [], notices))


def test_an_answer_that_comes_with_the_welcome_counts() -> None:
    client = _Client()
    client.send_hello()
    answer = client.admin.ping()
    client.on_frame(outgoing(1, 1, [(1, {"epoch": 1})], [("welcome", (1, []))]), b"")
    assert answer.result(0) == {"epoch": 1}, "the frame it answers would not be answered again"


def test_a_peer_that_has_greeted_does_not_greet_again_for_each_frame_it_sent_before() -> None:
    client = _Client()
    client.send_hello()
    for _ in range(3):
        client.on_frame(outgoing(0, 0, [], [("hello", None)]), b"")
    assert client.hellos == 1
    client.on_frame(outgoing(1, 0, [], [("welcome", (1, []))]), b"")
    client.on_frame(outgoing(1, 0, [], [("hello", None)]), b"")
    assert client.hellos == 2, "once it was welcome, it is another broker that asks"


def test_a_worker_that_greets_again_without_the_message_of_a_group_that_has_left_gets_the_next_one() -> None:
    world = World()
    client, worker = world.peer(1), world.peer(2, consume={"q": 1})
    client.publish([("q", "a")], [ITEM], [b"1"])
    client.publish([("q", "a")], [(*ITEM[:2], "h", *ITEM[3:])], [b"2"])
    (id,) = worker.held
    other = world.peer(3, consume={"side": 1})
    client.publish([("side", "a")], [(0, 1, "g", 1)], [b"3"])
    (end,) = other.held.values()
    other.settle([], acks=[(end.id, end.lease, FLAG_CLOSE_GROUP, "g")])
    assert list(worker.held) == [id], "it still works on the message of the group that has left"
    # Its settlement was lost with the session, and nobody waits for it.
    worker.held.clear()
    worker.hello()
    assert [body for _, _, body in worker.delivered] == [b"1", b"2"]
