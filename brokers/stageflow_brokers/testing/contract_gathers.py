"""Gathers: joins, signals, deadlines."""

from __future__ import annotations

from typing import Any

from stageflow_brokers.api import ACK, FLAG_CLOSE_GROUP, Arrival, GatherOpen, SettleItem, Target
from stageflow_brokers.testing.harness import TIMEOUT_SECONDS, Hub, Peer, Received

__all__ = ["GatherContract"]

Parts = list[tuple[str, bytes]]


def parts_of(received: Received) -> Parts:
    """Return the parts of a completed gather: the base under the empty name, then the arrivals in order."""
    assert received.item.extra is not None
    parts, at = [], 0
    for slot, size in received.item.extra.parts or ():
        parts.append((slot, received.body[at : at + size]))
        at += size
    assert at == len(received.body)
    return parts


def arrive(peer: Peer, key: str, *slots: str, group: str = "g") -> Any:
    """Send an arrival from outside for each slot, with the slot as its body; return the refused ones."""
    arrivals = [Arrival(key, slot, len(slot), group, 1) for slot in slots]
    return (
        peer.broker.publish([], [], [slot.encode() for slot in slots], arrivals=arrivals)
        .result(TIMEOUT_SECONDS)
        .refused
    )


def wait_for(peer: Peer, received: Received, key: str, need: int, base: bytes = b"base", deadline: float = 0.0) -> None:
    """Settle a message with a gather that continues in `joined` after `need` arrivals."""
    peer.drop(received)
    opening = GatherOpen(key, need, 0, len(base), deadline=deadline)
    peer.broker.settle([Target("joined", "join")], [], [], [SettleItem([received.lease], ACK, opens=[opening])], [base])


class GatherContract:
    """Expects a fixture `hub`, a broker without a supervisor."""

    def _begin(self, hub: Hub) -> tuple[Peer, Received]:
        peer = Peer(hub)
        peer.start("q", "g")
        peer.broker.consume("q", 1)
        peer.broker.consume("joined", 9)
        return peer, peer.receive()[0]

    def test_the_last_arrival_publishes(self, hub: Hub) -> None:
        peer, received = self._begin(hub)
        wait_for(peer, received, "k", 2)
        arrive(peer, "k", "a")
        assert peer.is_quiet()
        (gather,) = peer.ask.lookup(["g"])["groups"]["g"]["gathers"]
        assert (gather["key"], gather["need"], gather["arrived"]) == ("k", 2, 1)
        arrive(peer, "k", "b")
        (joined,) = peer.receive()
        assert parts_of(joined) == [("", b"base"), ("a", b"a"), ("b", b"b")]
        assert (joined.item.group, joined.item.epoch) == ("g", 1)
        assert joined.item.extra is not None
        assert (joined.item.extra.label, joined.item.extra.failure) == ("join", None)

    def test_arrivals_may_come_before_anybody_waits(self, hub: Hub) -> None:
        peer, received = self._begin(hub)
        arrive(peer, "k", "a", "b")
        wait_for(peer, received, "k", 2)
        assert parts_of(peer.receive()[0]) == [("", b"base"), ("a", b"a"), ("b", b"b")]

    def test_a_slot_counts_once(self, hub: Hub) -> None:
        peer, received = self._begin(hub)
        wait_for(peer, received, "k", 2)
        arrive(peer, "k", "a", "a")
        arrive(peer, "k", "a")
        assert peer.is_quiet()
        arrive(peer, "k", "b")
        (joined,) = peer.receive()
        arrive(peer, "k", "a", "b")
        wait_for(peer, joined, "k", 1)
        assert peer.is_quiet()
        arrive(peer, "k", "c")
        (joined,) = peer.receive()
        assert parts_of(joined) == [("", b"base"), ("c", b"c")]
        wait_for(peer, joined, "k", 1)
        arrive(peer, "k", "a")
        assert parts_of(peer.receive()[0]) == [("", b"base"), ("a", b"a")], "in the next round it may come again"

    def test_what_arrives_beyond_the_need_waits_for_the_next_opening(self, hub: Hub) -> None:
        peer, received = self._begin(hub)
        arrive(peer, "k", "a", "b", "c")
        for expected in "abc":
            wait_for(peer, received, "k", 1)
            (received,) = peer.receive()
            assert parts_of(received) == [("", b"base"), (expected, expected.encode())]

    def test_who_needs_nothing_goes_on_at_once(self, hub: Hub) -> None:
        peer, received = self._begin(hub)
        wait_for(peer, received, "k", 0, b"")
        assert parts_of(peer.receive()[0]) == [("", b"")]

    def test_at_its_deadline_a_gather_goes_on_with_what_is_there(self, hub: Hub) -> None:
        peer, received = self._begin(hub)
        arrive(peer, "k", "a")
        wait_for(peer, received, "k", 2, deadline=0.01)
        (joined,) = peer.receive()
        assert parts_of(joined) == [("", b"base"), ("a", b"a")]
        assert joined.item.extra is not None
        assert (joined.item.extra.failure, joined.item.extra.fresh) == (b"expired", True)
        arrive(peer, "k", "late")
        assert peer.is_quiet()

    def test_items_of_a_map_arrive_by_their_settlements(self, hub: Hub) -> None:
        peer, received = self._begin(hub)
        wait_for(peer, received, "k", 3)
        for number in range(3):
            peer.publish("q", b"item", group="g")
            (item,) = peer.receive()
            peer.drop(item)
            arrival = Arrival("k", str(number), 1)
            peer.broker.settle([], [], [], [SettleItem([item.lease], ACK, arrivals=[arrival])], [b"%d" % number])
        assert parts_of(peer.receive()[0]) == [("", b"base"), ("0", b"0"), ("1", b"1"), ("2", b"2")]

    def test_an_arrival_for_a_group_that_is_not_live_is_refused(self, hub: Hub) -> None:
        peer, received = self._begin(hub)
        assert arrive(peer, "k", "a", group="unknown") == [(0, "gone", "unknown")]
        peer.ack(received, flags=FLAG_CLOSE_GROUP)
        peer.ask.ping()
        assert arrive(peer, "k", "late") == [(0, "gone", "g")]
        assert peer.ask.stats("")["groups"] == 0

    def test_a_group_that_leaves_waits_for_nothing(self, hub: Hub) -> None:
        peer, received = self._begin(hub)
        peer.publish("q", b"other", group="g")
        wait_for(peer, received, "k", 2, deadline=3600.0)
        (other,) = peer.receive()
        peer.ack(other, flags=FLAG_CLOSE_GROUP)
        assert arrive(peer, "k", "a", "b") == [(0, "gone", "g"), (1, "gone", "g")]
        assert peer.ask.lookup(["g"])["groups"] == {}

    def test_a_raised_epoch_ends_the_wait(self, hub: Hub) -> None:
        peer, received = self._begin(hub)
        wait_for(peer, received, "k", 2)
        arrive(peer, "k", "a")
        peer.ask.raise_epoch("g", 2, "coordinator", "cancel")
        peer.broker.consume("coordinator", 9)
        (diverted,) = peer.receive()
        assert diverted.queue == "coordinator"
        assert parts_of(diverted) == [("", b"base"), ("a", b"a")]
        assert diverted.item.extra is not None
        assert diverted.item.extra.label == "cancel"

    def test_a_stale_settlement_neither_waits_nor_arrives(self, hub: Hub) -> None:
        peer, received = self._begin(hub)
        peer.publish("q", b"other", group="g")
        peer.ack(received)
        (other,) = peer.receive()
        arrival = Arrival("k", "a", 1)
        others = [
            SettleItem([received.lease], ACK, arrivals=[Arrival("k", "stale", 1)]),
            SettleItem([other.lease], ACK, opens=[GatherOpen("k", 2, 0, 0)], arrivals=[arrival]),
        ]
        peer.broker.settle([Target("joined")], [], [], others, [b"x", b"", b"y"])
        peer.wait_until(lambda: peer.stale == [received.item.id], "the stale part refused")
        arrive(peer, "k", "b")
        assert parts_of(peer.receive()[0]) == [("", b""), ("a", b"y"), ("b", b"b")]
