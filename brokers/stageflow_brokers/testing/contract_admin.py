"""Administration: pause, purge, peek, stats, facts, limits."""

from __future__ import annotations

from typing import Any

import pytest

from stageflow_brokers.api import (
    ACK,
    DEAD_LETTER,
    FLAG_START,
    Arrival,
    GatherOpen,
    PayloadTooLarge,
    ProtocolError,
    PublishItem,
    QueueFull,
    QueueOptions,
    Refused,
    SettleItem,
    Target,
)
from stageflow_brokers.testing.harness import TIMEOUT_SECONDS, Hub, Peer

__all__ = ["AdminContract"]

MAX_MESSAGE_BYTES = 8 << 20
"""The `max_message_bytes` of the broker under test."""


class AdminContract:
    """Expects a fixture `hub`, a broker without a supervisor whose messages have at most `MAX_MESSAGE_BYTES` bytes."""

    def test_a_paused_queue_takes_messages_and_delivers_none(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.broker.consume("q", 5)
        peer.publish("q", b"1")
        (received,) = peer.receive()
        peer.ask.pause("q")
        peer.publish("q", b"2")
        assert peer.is_quiet()
        assert peer.ask.stats("q")["queues"][0]["state"] == "paused"
        peer.ack(received)
        peer.ask.resume("q")
        assert peer.receive()[0].body == b"2"

    def test_stats_count_what_is_where(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q", b"ready", b"leased", b"dead", b"ready")
        peer.publish("q", b"delayed", delay=3600.0)
        peer.publish("p", b"urgent", priority=1)
        peer.broker.consume("q", 3)
        received = {each.body: each for each in peer.receive(3)}
        dead, ready = received[b"dead"], received[b"ready"]
        peer.drop(dead, ready)
        peer.broker.release([ready.lease], "q", 1)
        peer.broker.settle([], [], [], [SettleItem([dead.lease], DEAD_LETTER)], [])
        peer.ask.ping()
        stats = peer.ask.stats("")
        by_name = {queue["name"]: queue for queue in stats["queues"]}
        q = by_name["q"]
        counts = [q[key] for key in ("ready", "leased", "delayed", "dead", "delivered", "settled", "consumers", "busy")]
        assert counts == [2, 1, 1, 1, 3, 1, 1, 1]
        assert (by_name["p"]["ready"], by_name["p"]["state"]) == (1, "open")
        assert (stats["messages"], stats["sessions"], stats["malformed"]) == (6, 1, 0)
        assert [queue["name"] for queue in peer.ask.stats("q")["queues"]] == ["q"]

    def test_peek_shows_without_taking(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q", b"1", b"2", b"3", group="g")
        peer.publish("q", b"!", priority=1)
        shown = peer.ask.peek("q", 1, 2)
        assert [(each["body"], each["group"], each["state"], each["label"]) for each in shown] == [
            (b"1", "g", "ready", "new"),
            (b"2", "g", "ready", "new"),
        ]
        assert peer.ask.stats("q")["queues"][0]["ready"] == 4
        with pytest.raises(Refused, match="no queue is named"):
            peer.ask.peek("unknown", 0, 1)

    def test_purge_ends_messages_and_the_groups_that_had_no_other(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.start("q", "whole")
        peer.start("q", "half")
        peer.publish("elsewhere", b"half", group="half")
        peer.publish("q", b"leased first", priority=1)
        peer.broker.consume("q", 1)
        peer.receive()
        assert peer.ask.purge("q", []) == {"purged": 2, "instances": ["whole"]}
        assert peer.ask.lookup(["whole", "half"])["groups"].keys() == {"half"}
        assert peer.ask.stats("")["messages"] == 2

    def test_purge_may_name_what_it_means(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q", b"1", b"2", b"3")
        middle = peer.ask.peek("q", 1, 1)[0]["id"]
        assert peer.ask.purge("q", [middle])["purged"] == 1
        peer.broker.consume("q", 9)
        assert [each.body for each in peer.receive(2)] == [b"1", b"3"]

    def test_lookup_tells_where_a_group_stands(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.start("q", "g", b"body", digest=b"d")
        found = peer.ask.lookup(["g", "unknown"])["groups"]
        assert list(found) == ["g"]
        assert (found["g"]["epoch"], found["g"]["digest"], found["g"]["ended"]) == (1, b"d", "")
        (message,) = found["g"]["messages"]
        assert (message["queue"], message["state"], message["attempts"]) == ("q", "ready", 0)
        assert "body" not in message
        assert peer.ask.inspect(["g"])["g"]["messages"][0]["body"] == b"body"
        assert [group["id"] for group in peer.ask.list_groups("q", 10)] == ["g"]
        assert peer.ask.list_groups("other", 10) == []

    def test_a_group_tells_how_the_bodies_begin_that_it_waits_with(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.start("q", "long", b"x" * 2_000)
        peer.start("q", "early", b"first")
        peer.publish("q", b"second", group="early")
        peer.broker.publish([], [], [b"?"], arrivals=[Arrival("k", "slot", 1, "early", 1)]).result(TIMEOUT_SECONDS)
        heads = {group["id"]: group["heads"] for group in peer.ask.list_groups("", 9)}
        assert heads == {"long": [b"x" * 512], "early": [b"first", b"second"]}
        assert peer.ask.lookup(["early"])["groups"]["early"]["heads"] == [b"first", b"second"]

    def test_groups_that_will_go_on_are_counted_once_each_by_queue_or_by_how_their_bodies_go_on(self, hub: Hub) -> None:
        peer = Peer(hub)
        for group, queue, body in (("a", "q", b"-"), ("b", "q", b"-"), ("c", "both", b"-one"), ("d", "both", b"-two")):
            peer.start(queue, group, body)
        peer.start("both", "nobody's", b"-three")
        peer.publish("other", b"-", b"-", group="a")
        peer.start("wait", "waits", b"-")
        peer.start("wait", "parked", b"-")
        peer.broker.consume("wait", 2)
        waits, parked = peer.receive(2)
        opening = SettleItem([waits.lease], ACK, opens=[GatherOpen("k", 1, 0, 4)])
        peer.broker.settle([Target("both", "go on")], [], [], [opening], [b"-two"])
        peer.broker.settle([], [], [], [SettleItem([parked.lease], DEAD_LETTER, failure=b"why")], [])
        peer.ask.ping()
        assert peer.ask.tally(["both"], [b"one", b"two"], [1]) == {"queues": {"q": 2}, "marks": [1, 2]}
        assert peer.ask.tally(["both"], [b"ne", b"two"], [2, 1]) == {"queues": {"q": 2}, "marks": [1, 2]}

    def test_facts_are_kept(self, hub: Hub) -> None:
        peer, other = Peer(hub), Peer(hub)
        assert peer.ask.get_fact("history") is None
        assert peer.ask.set_fact("history", "made") == "made"
        assert other.ask.get_fact("history") == "made"

    def test_a_full_queue_refuses_starts_and_nothing_else(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.ask.declare([QueueOptions("q", max_length=2)])
        peer.start("q", "a")
        two = [PublishItem(0, 0, "b", 1, FLAG_START), PublishItem(0, 0, "c", 1, FLAG_START)]
        with pytest.raises(QueueFull, match="max_queue_length is 2"):
            peer.broker.publish([Target("q")], two, []).result(TIMEOUT_SECONDS)
        assert peer.ask.lookup(["b", "c"])["groups"] == {}
        peer.start("q", "b")
        assert peer.publish("q", b"from work in hand", group="a") == []
        assert peer.ask.stats("q")["queues"][0]["ready"] == 3

    def test_a_message_that_is_too_large_is_refused(self, hub: Hub) -> None:
        peer = Peer(hub)
        with pytest.raises(PayloadTooLarge, match=f"max_message_bytes={MAX_MESSAGE_BYTES}"):
            peer.publish("q", b"x" * (MAX_MESSAGE_BYTES + 1))
        assert peer.publish("q", b"x" * MAX_MESSAGE_BYTES) == []

    def test_what_makes_no_sense_is_refused_and_the_talk_goes_on(self, hub: Hub) -> None:
        peer = Peer(hub)
        nonsense: list[tuple[Any, ...]] = [
            ([Target("q")], [(0, 5)], [b"1234"]),
            ([Target("q")], [(1, 4)], [b"1234"]),
            ([Target("q")], [("0", 4)], [b"1234"]),
            ([Target("")], [(0, 4)], [b"1234"]),
            ([Target("q")], [PublishItem(0, 4, delay=float("nan"))], [b"1234"]),
        ]
        for call in nonsense:
            with pytest.raises(ProtocolError):
                peer.broker.publish(*call).result(TIMEOUT_SECONDS)
        with pytest.raises(ProtocolError, match="has no group"):
            peer.broker.publish([Target("q")], [], [], opens=[GatherOpen("k", 1, 0, 0)]).result(TIMEOUT_SECONDS)
        peer.broker.settle([Target("q")], [], [], [SettleItem([], 0)], [])
        for query in (("unknown",), ("peek", "q"), ("consume", "", 1), ("consume", "q", -1), ("watch", "g")):
            with pytest.raises(Refused):
                peer.query(*query)
        assert peer.publish("q", b"1") == []
        assert peer.ask.stats("q")["messages"] == 1
        assert peer.ask.stats("q")["malformed"] == 12
        assert [word for word, _ in peer.notices] == ["malformed"] * 7

    def test_what_cannot_be_encoded_harms_nobody(self, hub: Hub) -> None:
        peer = Peer(hub)
        with pytest.raises(TypeError):
            peer.query("fact", object(), None)
        assert peer.ask.set_fact("x", "y") == "y"
