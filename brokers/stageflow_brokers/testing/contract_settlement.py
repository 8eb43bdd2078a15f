"""Settlement: leases, transitions, retries, dead letters, checkpoints."""

from __future__ import annotations

import pytest

from stageflow_brokers.api import ACK, DEAD_LETTER, RETRY, PublishItem, Refused, SettleItem, Target
from stageflow_brokers.testing.harness import TIMEOUT_SECONDS, Hub, Peer, Received

__all__ = ["SettlementContract"]


def settle_again(peer: Peer, received: Received, delay: float = 0.0, failure: bytes | None = b"boom") -> None:
    """Settle a message with a request to deliver it again."""
    peer.drop(received)
    peer.broker.settle([], [], [], [SettleItem([received.lease], RETRY, [], delay, failure)], [])


def settle_dead(peer: Peer, received: Received, reason: bytes = b"hopeless") -> None:
    """Settle a message as a dead letter."""
    peer.drop(received)
    peer.broker.settle([], [], [], [SettleItem([received.lease], DEAD_LETTER, [], 0.0, reason)], [])


class SettlementContract:
    """Expects a fixture `hub`, a broker without a supervisor."""

    def test_a_move_ends_one_message_and_makes_the_next(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q0", b"first", group="g", epoch=1)
        peer.broker.consume("q0", 1)
        peer.broker.consume("q1", 1)
        (first,) = peer.receive()
        peer.move(first, "q1", b"second")
        (second,) = peer.receive()
        assert (second.queue, second.body, second.item.group, second.item.epoch) == ("q1", b"second", "g", 1)
        assert second.item.id != first.item.id
        peer.ack(second)
        assert peer.ask.stats("")["messages"] == 0

    def test_settlements_of_many_messages_go_in_one_call(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q0", b"1", b"2", b"3", b"4")
        peer.broker.consume("q0", 4)
        peer.broker.consume("q1", 4)
        one, two, three, four = peer.receive(4)
        peer.drop(one, two, three, four)
        peer.broker.settle(
            [Target("q1", "x"), Target("q1", "y")],
            [(*one.lease, 0, 3, ""), (*two.lease, 1, 3, "")],
            [(*three.lease, 0, "")],
            [SettleItem([four.lease], ACK, [PublishItem(1, 4), PublishItem(0, 4)])],
            [b"one", b"two", b"4, 5", b"4, 6"],
        )
        assert [received.body for received in peer.receive(4)] == [b"one", b"two", b"4, 5", b"4, 6"]

    def test_several_messages_may_end_as_one(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q0", b"1", b"2")
        peer.broker.consume("q0", 2)
        peer.broker.consume("q1", 1)
        one, two = peer.receive(2)
        both = SettleItem([one.lease, two.lease], ACK, [PublishItem(0, 4)])
        peer.drop(one, two)
        peer.broker.settle([Target("q1")], [], [], [both], [b"both"])
        assert peer.receive()[0].body == b"both"

    def test_a_message_settled_once_cannot_be_settled_again(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q0", b"1", group="g")
        peer.broker.consume("q0", 1)
        (received,) = peer.receive()
        peer.move(received, "q1", b"2")
        peer.move(received, "q1", b"twice")
        peer.wait_until(lambda: peer.stale == [received.item.id], "the second settlement refused")
        assert peer.ask.stats("q1")["queues"][0]["ready"] == 1

    def test_a_lease_ends_when_the_message_is_given_back(self, hub: Hub) -> None:
        peer, other = Peer(hub), Peer(hub)
        peer.publish("q", b"1")
        peer.broker.consume("q", 1)
        (received,) = peer.receive()
        peer.broker.release([received.lease], "q", 0)
        other.broker.consume("q", 1)
        (again,) = other.receive()
        assert again.item.id == received.item.id
        peer.ack(received)
        peer.wait_until(lambda: peer.stale == [received.item.id], "the old lease refused")
        other.ack(again)
        assert other.ask.stats("q")["messages"] == 0
        assert other.stale == []

    def test_an_old_lease_is_refused_though_its_holder_has_the_message_again(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q", b"1", group="g")
        peer.broker.consume("q", 1)
        (old,) = peer.receive()
        peer.broker.release([old.lease], "q", 1)
        (held,) = peer.receive()
        assert held.item.id == old.item.id
        peer.ack(old)
        peer.move(old, "q1", b"doubled")
        settle_again(peer, old)
        settle_dead(peer, old)
        with pytest.raises(Refused, match="not held"):
            peer.broker.checkpoint(*old.lease, "step", b"x").result(TIMEOUT_SECONDS)
        peer.broker.release([old.lease], "q", 1)
        peer.wait_until(lambda: peer.stale == [old.item.id] * 4, "everything refused")
        peer.move(held, "q1", b"moved once")
        assert peer.ask.stats("q1")["queues"][0]["ready"] == 1
        assert peer.stale == [old.item.id] * 4
        assert peer.is_quiet()

    def test_nobody_settles_what_another_holds(self, hub: Hub) -> None:
        holder, thief = Peer(hub), Peer(hub)
        holder.publish("q", b"1", group="g")
        holder.broker.consume("q", 2)
        (one,) = holder.receive()
        thief.broker.consume("q", 2)
        thief.ack(one)
        thief.move(one, "q1", b"stolen")
        settle_again(thief, one)
        with pytest.raises(Refused, match="not held"):
            thief.broker.checkpoint(*one.lease, "step", b"x").result(TIMEOUT_SECONDS)
        thief.broker.release([one.lease], "q", 2)
        thief.wait_until(lambda: thief.stale == [one.item.id] * 3, "everything refused")
        holder.move(one, "q1", b"mine")
        holder.ask.ping()
        assert holder.stale == []
        assert holder.ask.stats("q1")["queues"][0]["ready"] == 1

    def test_of_a_call_taken_in_part_the_rest_counts(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q0", b"1", b"2")
        peer.broker.consume("q0", 2)
        peer.broker.consume("q1", 5)
        one, two = peer.receive(2)
        peer.ack(one)
        moves = [(*one.lease, 0, 3, ""), (*two.lease, 0, 3, "")]
        peer.drop(two)
        peer.broker.settle([Target("q1")], moves, [], [], [b"one", b"two"])
        assert peer.receive()[0].body == b"two"
        assert peer.stale == [one.item.id]

    def test_a_group_that_is_not_that_of_the_message_is_refused(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q0", b"1", group="mine")
        peer.broker.consume("q0", 1)
        (received,) = peer.receive()
        peer.broker.settle([Target("q1")], [(*received.lease, 0, 1, "yours")], [], [], [b"2"])
        peer.wait_until(lambda: peer.stale == [received.item.id], "the move refused")

    def test_again_counts_an_attempt_and_brings_the_body_as_delivered(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q", b"1", b"2")
        peer.broker.consume("q", 1)
        (first,) = peer.receive()
        settle_again(peer, first)
        (again,) = peer.receive()
        assert (again.item.id, again.body) == (first.item.id, b"1")
        assert again.item.lease != first.item.lease
        extra = again.item.extra
        assert extra is not None
        assert (extra.attempts, extra.deaths, extra.failure, extra.fresh) == (1, 0, b"boom", False)

    def test_again_after_a_delay_lets_others_go_first(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q", b"1", b"2", b"3")
        peer.broker.consume("q", 1)
        (one,) = peer.receive()
        settle_again(peer, one, delay=3600.0)
        (two,) = peer.receive()
        settle_again(peer, two, delay=0.01)
        (three,) = peer.receive()
        assert three.body == b"3"
        peer.ack(three)
        assert peer.receive()[0].body == b"2"
        assert peer.ask.stats("q")["queues"][0]["delayed"] == 1

    def test_a_retried_message_does_not_expire(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q", b"1", ttl=1e-9)
        peer.broker.consume("q", 1)
        (expired,) = peer.receive()
        settle_again(peer, expired)
        (again,) = peer.receive()
        assert again.item.extra is not None
        assert again.item.extra.failure == b"boom"

    def test_a_dead_letter_waits_until_it_is_requeued(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q", b"1", group="g")
        peer.broker.consume("q", 1)
        (first,) = peer.receive()
        settle_dead(peer, first)
        (letter,) = peer.ask.peek("dlq.q", 0, 10)
        assert (letter["id"], letter["body"], letter["reason"], letter["state"]) == (
            first.item.id,
            b"1",
            b"hopeless",
            "dead",
        )
        assert peer.is_quiet()
        assert peer.ask.requeue("dlq.q", [first.item.id]) == {"requeued": 1, "refused": []}
        (again,) = peer.receive()
        assert (again.item.id, again.body) == (first.item.id, b"1")
        assert again.item.extra is not None
        assert (again.item.extra.attempts, again.item.extra.failure) == (0, None)

    def test_only_dead_letters_can_be_requeued(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q", b"1")
        with pytest.raises(Refused, match="no dead letter 1"):
            peer.ask.requeue("dlq.q", [1])
        assert peer.ask.requeue("dlq.q", []) == {"requeued": 0, "refused": []}

    def test_a_checkpoint_travels_with_the_message(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q", b"1")
        peer.broker.consume("q", 1)
        (first,) = peer.receive()
        peer.broker.checkpoint(*first.lease, "charge", b"42").result(TIMEOUT_SECONDS)
        peer.broker.checkpoint(*first.lease, "mail", b"sent").result(TIMEOUT_SECONDS)
        settle_again(peer, first)
        (again,) = peer.receive()
        assert again.item.extra is not None
        assert again.item.extra.steps == {"charge": b"42", "mail": b"sent"}
        settle_dead(peer, again)
        peer.ask.requeue("dlq.q", [])
        (revived,) = peer.receive()
        assert revived.item.extra is not None
        assert revived.item.extra.steps == {"charge": b"42", "mail": b"sent"}

    def test_a_checkpoint_under_an_old_lease_is_refused(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.publish("q", b"1")
        peer.broker.consume("q", 1)
        (first,) = peer.receive()
        settle_again(peer, first)
        peer.receive()
        with pytest.raises(Refused, match="not held"):
            peer.broker.checkpoint(*first.lease, "late", b"x").result(TIMEOUT_SECONDS)
