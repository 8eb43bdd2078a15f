"""Publishing and delivery: order, credit, priority, release."""

from __future__ import annotations

from concurrent.futures import wait

import pytest

from stageflow_brokers.api import BrokerUnavailable, Target
from stageflow_brokers.testing.harness import TIMEOUT_SECONDS, Hub, Peer

__all__ = ["DeliveryContract"]


class DeliveryContract:
    """Expects a fixture `hub`, a broker without a supervisor."""

    def test_what_is_published_is_delivered_to_a_consumer(self, hub: Hub) -> None:
        peer = Peer(hub)
        assert peer.publish("q", b"body", group="g") == []
        peer.broker.consume("q", 1)
        (received,) = peer.receive()
        assert (received.queue, received.body, received.item.group, received.item.epoch) == ("q", b"body", "g", 1)
        assert received.item.extra is None

    def test_a_queue_is_first_in_first_out(self, hub: Hub) -> None:
        peer = Peer(hub)
        bodies = [b"%d" % number for number in range(50)]
        peer.publish("q", *bodies[:25])
        peer.broker.consume("q", 100)
        for body in bodies[25:]:
            peer.publish("q", body)
        assert [received.body for received in peer.receive(50)] == bodies

    def test_higher_priorities_come_first_and_each_is_in_order(self, hub: Hub) -> None:
        peer = Peer(hub)
        for body, priority in ((b"a", 0), (b"b", -1), (b"c", 5), (b"d", 0), (b"e", 5), (b"f", 1)):
            peer.publish("q", body, priority=priority)
        peer.broker.consume("q", 10)
        received = peer.receive(6)
        assert [each.body for each in received] == [b"c", b"e", b"f", b"a", b"d", b"b"]
        assert received[0].item.extra is not None
        assert received[0].item.extra.priority == 5

    def test_a_consumer_holds_no_more_than_its_credit(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q", b"1", b"2", b"3", b"4")
        peer.broker.consume("q", 2)
        first, second = peer.receive(2)
        assert peer.is_quiet()
        peer.ack(second)
        (third,) = peer.receive()
        assert third.body == b"3"
        peer.ack(first, third)
        assert peer.receive()[0].body == b"4"

    def test_credit_is_filled_though_only_one_message_is_urgent(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q", b"1", b"2", b"3")
        peer.publish("q", b"!", priority=9)
        peer.broker.consume("q", 3)
        assert [received.body for received in peer.receive(3)] == [b"!", b"1", b"2"]

    def test_credit_can_be_changed_with_a_settlement(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q", b"1", b"2", b"3")
        peer.broker.consume("q", 1)
        (first,) = peer.receive()
        peer.drop(first)
        peer.broker.settle([], [], [(*first.lease, 0, "")], [], [], queue="q", prefetch=2)
        assert [received.body for received in peer.receive(2)] == [b"2", b"3"]

    def test_consumers_of_one_queue_share_it(self, hub: Hub) -> None:
        peers = [Peer(hub), Peer(hub)]
        for peer in peers:
            peer.broker.consume("q", 2)
            peer.ask.ping()
        peers[0].publish("q", b"1", b"2", b"3", b"4")
        assert sorted(received.body for peer in peers for received in peer.receive(2)) == [b"1", b"2", b"3", b"4"]

    def test_messages_returned_go_to_the_head_in_order_and_uncharged(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q", b"1", b"2", b"3", b"4")
        peer.broker.consume("q", 3)
        received = peer.receive(3)
        peer.drop(*received[1:])
        peer.broker.release([each.lease for each in received[1:]], "q", 1)
        assert peer.is_quiet()
        peer.ack(received[0])
        for expected in (b"2", b"3", b"4"):
            (one,) = peer.receive()
            assert (one.body, one.item.extra) == (expected, None)
            peer.ack(one)

    def test_a_consumer_that_leaves_gives_back_what_it_held(self, hub: Hub) -> None:
        leaving, staying = Peer(hub), Peer(hub)
        staying.publish("q", b"1", b"2")
        leaving.broker.consume("q", 2)
        first, _ = leaving.receive(2)
        leaving.broker.close()
        staying.broker.consume("q", 2)
        again = staying.receive(2)
        assert [received.body for received in again] == [b"1", b"2"]
        assert again[0].item.id == first.item.id
        assert again[0].item.lease != first.item.lease

    def test_a_consumer_without_credit_is_given_nothing(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.broker.consume("q", 5)
        peer.broker.consume("q", 0)
        peer.publish("q", b"1")
        assert peer.is_quiet()

    def test_a_delayed_message_waits_and_then_comes(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.broker.consume("q", 5)
        peer.publish("q", b"much later", delay=3600.0)
        assert peer.is_quiet()
        assert peer.ask.stats("q")["queues"][0]["delayed"] == 1
        peer.publish("q", b"soon", delay=0.01)
        assert peer.receive()[0].body == b"soon"

    def test_a_message_that_waited_longer_than_its_ttl_comes_as_expired(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q", b"late", ttl=1e-9)
        peer.publish("q", b"in time", ttl=3600.0)
        peer.broker.consume("q", 5)
        late, in_time = peer.receive(2)
        assert late.item.extra is not None
        assert (late.item.extra.failure, late.item.extra.fresh) == (b"expired", True)
        assert in_time.item.extra is not None
        assert in_time.item.extra.failure is None

    def test_bodies_of_any_size_arrive_whole(self, hub: Hub) -> None:
        peer = Peer(hub)
        bodies = [b"", b"x", bytes(range(256)) * 4096, b"", b"y" * 3_000_000, b"z" * 3_000_000]
        peer.publish("q", *bodies)
        peer.broker.consume("q", 10)
        assert [received.body for received in peer.receive(len(bodies))] == bodies

    def test_many_publishes_may_be_on_their_way_at_once(self, hub: Hub) -> None:
        peer = Peer(hub)
        futures = [peer.broker.publish([Target("q")], [(0, 1)], [b"%d" % (number % 10)]) for number in range(200)]
        assert not wait(futures, TIMEOUT_SECONDS).not_done
        assert peer.ask.stats("q")["queues"][0]["ready"] == 200

    def test_a_closed_connection_says_so(self, hub: Hub) -> None:
        peer = Peer(hub)
        pending = peer.broker.publish([Target("q")], [(0, 1)], [b"1"])
        peer.broker.close()
        assert pending.result(TIMEOUT_SECONDS).refused == []
        with pytest.raises(BrokerUnavailable, match="closed"):
            peer.broker.publish([Target("q")], [(0, 1)], [b"1"])
        peer.broker.close()
        assert len(peer.closed) == 1
