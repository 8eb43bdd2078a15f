"""Restarts: groups that are cancelled, halted, changed and started again."""

from __future__ import annotations

from typing import Any

import pytest

from stageflow_brokers.api import ACK, DEAD_LETTER, RETRY, Arrival, GatherOpen, PublishItem, Refused, SettleItem, Target
from stageflow_brokers.testing.contract_gathers import parts_of
from stageflow_brokers.testing.harness import Hub, Peer, Received

__all__ = ["RestartContract"]

REASON = "no longer wanted"


def waits(key: str, need: int = 1) -> GatherOpen:
    """Return a gather that continues in the only target of its settlement."""
    return GatherOpen(key, need, 0, 4)


class RestartContract:
    """Expects a fixture `hub`, a broker without a supervisor."""

    def _in_work(self, hub: Hub, **more: Any) -> tuple[Peer, Received]:
        peer = Peer(hub)
        peer.start("q", "g", watch=True, **more)
        peer.broker.consume("q", 1)
        return peer, peer.receive()[0]

    def _cancel(self, peer: Peer) -> None:
        answer = peer.ask.cancel("g", REASON, ["signal:"])
        assert answer == {"epoch": 2, "ended": "", "reason": REASON}

    def _park(self, peer: Peer, received: Received) -> None:
        peer.drop(received)
        peer.broker.settle([], [], [], [SettleItem([received.lease], DEAD_LETTER, [], 0.0, b"why")], [])

    # cancellation

    def test_what_is_older_than_a_cancel_says_so(self, hub: Hub) -> None:
        peer, received = self._in_work(hub)
        self._cancel(peer)
        peer.broker.release([received.lease], "q", 1)
        (again,) = peer.receive()
        assert again.item.extra is not None
        assert (again.item.extra.cancelled, again.item.extra.epoch_now) == (REASON, 2)

    @pytest.mark.parametrize("outcome", [RETRY, DEAD_LETTER])
    def test_what_fails_after_a_cancel_waits_for_nothing(self, hub: Hub, outcome: int) -> None:
        peer, received = self._in_work(hub)
        self._cancel(peer)
        peer.drop(received)
        peer.broker.settle([], [], [], [SettleItem([received.lease], outcome, [], 3600.0, b"why")], [])
        (again,) = peer.receive()
        assert again.item.extra is not None
        assert (again.item.extra.cancelled, again.item.extra.attempts) == (REASON, 1)

    def test_what_knows_of_a_cancel_and_cannot_be_passed_through_is_parked_until_it_is_requeued(self, hub: Hub) -> None:
        peer, received = self._in_work(hub)
        self._park(peer, received)
        peer.wait_until(lambda: ("parked", "g") in peer.notices, "the halt")
        self._cancel(peer)
        (released,) = peer.receive()
        assert released.item.extra is not None
        assert (released.item.extra.cancelled, released.item.extra.attempts) == (REASON, 1)
        peer.notices.clear()
        self._park(peer, released)
        peer.wait_until(lambda: ("parked", "g") in peer.notices, "the halt")
        self._cancel(peer)
        assert peer.is_quiet()
        assert [message["state"] for message in peer.ask.lookup(["g"])["groups"]["g"]["messages"]] == ["dead"]
        peer.ask.requeue("q", [released.item.id])
        (requeued,) = peer.receive()
        assert requeued.item.extra is not None
        assert requeued.item.extra.cancelled == REASON

    def test_what_knows_of_a_cancel_and_asks_for_time_gets_it(self, hub: Hub) -> None:
        peer, received = self._in_work(hub)
        self._cancel(peer)
        peer.broker.release([received.lease], "q", 1)
        (warned,) = peer.receive()
        peer.drop(warned)
        peer.broker.settle([], [], [], [SettleItem([warned.lease], RETRY, [], 3600.0, b"why")], [])
        assert peer.is_quiet()
        assert [message["state"] for message in peer.ask.lookup(["g"])["groups"]["g"]["messages"]] == ["delayed"]

    def test_a_group_that_was_cancelled_and_begun_anew_can_be_cancelled_again(self, hub: Hub) -> None:
        peer, received = self._in_work(hub)
        self._cancel(peer)
        peer.broker.release([received.lease], "q", 1)
        self._park(peer, peer.receive()[0])
        assert peer.ask.restart("g", "q", "begin", b"anew") == {"epoch": 3}
        (begun,) = peer.receive()
        assert begun.item.extra is None or begun.item.extra.cancelled is None
        assert peer.ask.cancel("g", "once more", []) == {"epoch": 4, "ended": "", "reason": "once more"}
        peer.broker.release([begun.lease], "q", 1)
        (again,) = peer.receive()
        assert again.item.extra is not None
        assert again.item.extra.cancelled == "once more"

    def test_what_waits_for_its_turn_after_a_cancel_can_be_handed_over(self, hub: Hub) -> None:
        peer, received = self._in_work(hub)
        peer.publish("q", b"first", b"second", group="g")
        messages = peer.ask.lookup(["g"])["groups"]["g"]["messages"]
        ids = sorted(message["id"] for message in messages if message["id"] != received.item.id)
        peer.publish("other", b"other", group="other")
        assert peer.ask.hand_over("g", ids, "aside", "passed") == 0, "it is not cancelled"
        self._cancel(peer)
        peer.broker.consume("aside", 9)
        assert peer.ask.hand_over("g", [received.item.id, *ids, ids[0], 999], "aside", "passed") == 2
        came = peer.receive(2)
        assert [each.body for each in came] == [b"first", b"second"]
        for each in came:
            assert each.item.extra is not None
            assert (each.queue, each.item.epoch) == ("aside", 1)
            assert (each.item.extra.label, each.item.extra.cancelled) == ("passed", REASON)
        assert peer.ask.hand_over("g", ids, "aside", "passed") == 0
        with pytest.raises(Refused, match="not live"):
            peer.ask.hand_over("unknown", [], "aside", "passed")

    def test_what_was_gathered_is_not_handed_over(self, hub: Hub) -> None:
        peer, received = self._in_work(hub)
        peer.drop(received)
        done = SettleItem([received.lease], ACK, opens=[waits("k")], arrivals=[Arrival("k", "a", 1)])
        peer.broker.settle([Target("joined", "join")], [], [], [done], [b"base", b"1"])
        self._cancel(peer)
        (joined,) = peer.ask.lookup(["g"])["groups"]["g"]["messages"]
        assert peer.ask.hand_over("g", [joined["id"]], "aside", "passed") == 0

    def test_what_follows_after_a_cancel_waits_for_nothing(self, hub: Hub) -> None:
        peer, received = self._in_work(hub)
        self._cancel(peer)
        peer.broker.consume("next", 9)
        peer.drop(received)
        later = PublishItem(0, 5, "", 0, 0, 0, 3600.0)
        done = SettleItem([received.lease], ACK, [later], opens=[waits("signal:go"), waits("join")])
        peer.broker.settle([Target("next", "next")], [], [], [done], [b"later", b"base", b"base"])
        came = {each.body: each.item.extra for each in peer.receive(2)}
        assert came.keys() == {b"later", b"base"}
        assert all(extra is not None and extra.cancelled == REASON for extra in came.values())
        gathers = {each["key"]: each["need"] for each in peer.ask.lookup(["g"])["groups"]["g"]["gathers"]}
        assert gathers == {"signal:go": None, "join": 1}, "branches and items are waited for"

    # halts

    def test_a_group_has_come_to_a_halt_when_the_last_that_was_in_work_ends(self, hub: Hub) -> None:
        peer, received = self._in_work(hub)
        peer.publish("other", b"other", group="g")
        peer.broker.consume("other", 1)
        (other,) = peer.receive()
        self._park(peer, received)
        assert peer.is_quiet()
        assert ("parked", "g") not in peer.notices
        peer.drop(other)
        peer.broker.settle([], [], [], [SettleItem([other.lease], ACK, arrivals=[Arrival("k", "s", 4)])], [b"body"])
        peer.wait_until(lambda: ("parked", "g") in peer.notices, "the halt")

    # replaced bodies, restarts

    def test_a_dead_letter_can_be_given_another_body(self, hub: Hub) -> None:
        peer, received = self._in_work(hub)
        self._park(peer, received)
        peer.ask.replace("q", received.item.id, b"another")
        peer.ask.requeue("q", [received.item.id])
        assert peer.receive()[0].body == b"another"

    def test_of_a_dead_letter_that_was_gathered_the_base_is_replaced(self, hub: Hub) -> None:
        peer, received = self._in_work(hub)
        peer.broker.consume("joined", 1)
        peer.drop(received)
        arrived = [Arrival("k", "a", 5), Arrival("k", "b", 2)]
        done = SettleItem([received.lease], ACK, opens=[waits("k", 2)], arrivals=arrived)
        peer.broker.settle([Target("joined", "join")], [], [], [done], [b"base", b"first", b"2."])
        (joined,) = peer.receive()
        self._park(peer, joined)
        described = peer.ask.inspect(["g"])["g"]["messages"][0]
        assert (described["body"], described["base"]) == (b"base", 4)
        peer.ask.replace("joined", joined.item.id, b"another base")
        peer.ask.requeue("joined", [joined.item.id])
        assert parts_of(peer.receive()[0]) == [("", b"another base"), ("a", b"first"), ("b", b"2.")]

    def test_a_halted_group_begins_anew_with_nothing_of_what_it_had(self, hub: Hub) -> None:
        peer, received = self._in_work(hub)
        for queue in ("joined", "other"):
            peer.broker.consume(queue, 1)
        peer.publish("other", b"other", group="g")
        (other,) = peer.receive()
        peer.publish("waits", b"waits", group="g", delay=3600.0)
        peer.drop(received)
        arrived = [Arrival("k", "a", 1), Arrival("k", "b", 1), Arrival("half", "a", 1), Arrival("signal:s", "x", 1)]
        done = SettleItem([received.lease], ACK, opens=[waits("k", 2), waits("half", 2)], arrivals=arrived)
        peer.broker.settle([Target("joined", "join")], [], [], [done], [b"base", b"base", b"1", b"2", b"1", b"s"])
        (joined,) = peer.receive()
        with pytest.raises(Refused, match="not parked"):
            peer.ask.restart("g", "q", "begin", b"anew")
        self._park(peer, joined)
        with pytest.raises(Refused, match="in work in other"):
            peer.ask.restart("g", "q", "begin", b"anew")
        peer.broker.release([other.lease], "other", 0)
        assert peer.ask.restart("g", "q", "begin", b"anew") == {"epoch": 2}
        (begun,) = peer.receive()
        assert (begun.queue, begun.body, begun.item.epoch) == ("q", b"anew", 2)
        group = peer.ask.lookup(["g"])["groups"]["g"]
        assert [message["id"] for message in group["messages"]] == [begun.item.id]
        kept = {each["key"]: (each["need"], each["arrived"]) for each in group["gathers"]}
        assert kept == {"k": (None, 0), "half": (None, 0), "signal:s": (None, 1)}
        peer.drop(begun)
        arrived = [Arrival("k", "a", 1), Arrival("k", "b", 1)]
        done = SettleItem([begun.lease], ACK, opens=[waits("k", 2)], arrivals=arrived)
        peer.broker.settle([Target("joined", "join")], [], [], [done], [b"base", b"3", b"4"])
        assert parts_of(peer.receive()[0]) == [("", b"base"), ("a", b"3"), ("b", b"4")]

    def test_what_completes_a_gather_has_the_priority_of_who_opened_it(self, hub: Hub) -> None:
        peer, received = self._in_work(hub, priority=7)
        peer.broker.consume("joined", 1)
        peer.drop(received)
        done = SettleItem([received.lease], ACK, opens=[waits("k")], arrivals=[Arrival("k", "a", 1)])
        peer.broker.settle([Target("joined", "join")], [], [], [done], [b"base", b"1"])
        (joined,) = peer.receive()
        assert joined.item.extra is not None
        assert joined.item.extra.priority == 7
