"""Groups: idempotent starts, ends, watches, epochs."""

from __future__ import annotations

import pytest

from stageflow_brokers.api import (
    ACK,
    DEAD_LETTER,
    FLAG_CHECK,
    FLAG_CLOSE_GROUP,
    PUSH_ONLY,
    TERMINAL,
    PublishItem,
    Refused,
    SettleItem,
    Target,
)
from stageflow_brokers.testing.harness import TIMEOUT_SECONDS, Hub, Peer

__all__ = ["GroupContract"]


class GroupContract:
    """Expects a fixture `hub`, a broker without a supervisor."""

    # starts

    def test_a_group_is_started_once(self, hub: Hub) -> None:
        peer = Peer(hub)
        assert peer.start("q", "g", digest=b"one") == []
        assert peer.start("q", "g", digest=b"one") == [(0, "exists", "g")]
        assert peer.start("q", "g", digest=b"two") == [(0, "conflict", "g")]
        assert peer.ask.stats("q")["messages"] == 1

    def test_of_two_starts_in_one_call_the_first_counts(self, hub: Hub) -> None:
        peer = Peer(hub)
        start = {"group": "g", "flags": 1}
        items = [("q", b"1", {**start, "digest": b"d"}), ("q", b"2", {**start, "digest": b"d"})]
        assert peer.publish_items([*items, ("q", b"3", {**start, "digest": b"e"}), ("q", b"4", {})]) == [
            (1, "exists", "g"),
            (2, "conflict", "g"),
        ]
        peer.broker.consume("q", 9)
        assert [received.body for received in peer.receive(2)] == [b"1", b"4"]

    def test_all_or_nothing_is_possible(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.start("q", "g", digest=b"one")
        items = [(0, 1, "new", 1, 1), (0, 1, "g", 1, 1, 0, 0.0, 0.0, b"two")]
        answer = peer.broker.publish([Target("q")], items, [b"a", b"b"], atomic=True).result(TIMEOUT_SECONDS)
        assert answer.refused == [(1, "conflict", "g")]
        assert peer.ask.lookup(["new"])["groups"] == {}
        items[1] = (0, 1, "g", 1, 1, 0, 0.0, 0.0, b"one")
        answer = peer.broker.publish([Target("q")], items, [b"a", b"b"], atomic=True).result(TIMEOUT_SECONDS)
        assert answer.refused == [(1, "exists", "g")]
        assert list(peer.ask.lookup(["new"])["groups"]) == ["new"]

    def test_who_may_have_missed_an_end_has_to_look_again(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.broker.consume("q", 1)
        assert peer.start("q", "mine", flags=FLAG_CHECK, seen=0) == [(0, "look-again", "mine")]
        known = peer.ask.lookup([])
        seen = (known["epoch"] << 40) + known["left_seq"]
        assert peer.start("q", "mine", flags=FLAG_CHECK, seen=seen) == []
        peer.ack(peer.receive()[0], flags=FLAG_CLOSE_GROUP)
        assert peer.start("q", "other", flags=FLAG_CHECK, seen=seen) == []
        peer.ack(peer.receive()[0], flags=FLAG_CLOSE_GROUP)
        # The group has ended since the sender read the history, so the sender must read it again.
        answer = peer.broker.publish(
            [Target("q")], [(0, 1, "mine", 1, 1 | FLAG_CHECK, 0, 0.0, 0.0, None, seen)], [b"x"]
        ).result(TIMEOUT_SECONDS)
        assert answer.refused == [(0, "look-again", "mine")]
        assert peer.start("q", "mine", flags=FLAG_CHECK, seen=answer.history_sequence) == []

    # ends

    def test_how_a_group_ended_is_pushed_to_who_watches(self, hub: Hub) -> None:
        starter, worker = Peer(hub), Peer(hub)
        starter.start("q", "g", watch=True)
        worker.broker.consume("q", 1)
        worker.move(worker.receive()[0], "finished", b"result", label=":completed", flags=TERMINAL)
        starter.wait_until(lambda: starter.pushes == [("g", ":completed", b"result")], "the result")
        late = Peer(hub)
        assert late.ask.watch(["g", "unknown"]) == ["unknown"]
        late.wait_until(lambda: late.pushes == [("g", ":completed", b"result")], "the result, after the end")
        assert ("gone", "unknown") in late.notices

    def test_news_may_be_pushed_without_a_message(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.start("q", "g", watch=True)
        peer.broker.consume("q", 1)
        (received,) = peer.receive()
        peer.drop(received)
        publishes = [PublishItem(0, 4), PublishItem(1, 4)]
        others = [SettleItem([received.lease], ACK, publishes)]
        peer.broker.settle([Target("", "news", PUSH_ONLY), Target("q", "next")], [], [], others, [b"half", b"rest"])
        peer.wait_until(lambda: peer.pushes == [("g", "news", b"half")], "the news")
        assert peer.receive()[0].body == b"rest"
        assert peer.ask.stats("")["messages"] == 1

    def test_a_group_that_leaves_takes_all_its_messages_along(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.start("q", "g")
        peer.publish("ready", b"left over", group="g")
        peer.publish("held", b"left over", b"left over", group="g")
        peer.publish("delayed", b"left over", group="g", delay=3600.0)
        peer.publish("held", b"another's", group="h")
        for queue in ("q", "held"):
            peer.broker.consume(queue, 1)
        received = {each.queue: each for each in peer.receive(2)}
        peer.ack(received["q"], flags=FLAG_CLOSE_GROUP)
        assert peer.ask.stats("")["messages"] == 1
        assert peer.ask.lookup(["g", "h"])["groups"].keys() == {"h"}
        # The consumer still works on the purged message; its credit is free only after the settlement.
        assert peer.is_quiet()
        peer.ack(received["held"])
        peer.wait_until(lambda: peer.stale == [received["held"].item.id], "the purged message refused")
        assert peer.receive()[0].body == b"another's"
        assert peer.start("q", "g") == []

    def test_a_purged_message_that_is_returned_leaves_room_for_another(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.start("q", "g")
        peer.publish("held", b"left over", group="g")
        peer.publish("held", b"another's", group="h")
        for queue in ("q", "held"):
            peer.broker.consume(queue, 1)
        received = {each.queue: each for each in peer.receive(2)}
        peer.ack(received["q"], flags=FLAG_CLOSE_GROUP)
        peer.broker.release([received["held"].lease], "held", 1)
        assert peer.receive()[0].body == b"another's"

    def test_a_settlement_may_end_its_group(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.start("q", "g")
        peer.broker.consume("q", 1)
        (received,) = peer.receive()
        peer.drop(received)
        peer.broker.settle([], [], [], [SettleItem([received.lease], ACK, close_group="g")], [])
        peer.ask.ping()
        assert peer.ask.lookup(["g"])["groups"] == {}

    def test_a_group_of_which_nothing_is_left_is_not_live(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.start("q", "g", digest=b"one")
        peer.broker.consume("q", 1)
        peer.ack(peer.receive()[0])
        peer.ask.ping()
        assert peer.ask.lookup(["g"])["groups"] == {}
        assert peer.start("q", "g", digest=b"two") == []

    def test_a_watcher_is_notified_that_a_group_has_come_to_a_halt(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.start("q", "g", watch=True)
        peer.broker.consume("q", 1)
        (received,) = peer.receive()
        peer.drop(received)
        peer.broker.settle([], [], [], [SettleItem([received.lease], DEAD_LETTER, [], 0.0, b"why")], [])
        peer.wait_until(lambda: ("parked", "g") in peer.notices, "the halt")
        other = Peer(hub)
        other.ask.watch(["g"])
        other.wait_until(lambda: ("parked", "g") in other.notices, "the notice of the halt")

    def test_each_watcher_of_a_group_is_notified_of_its_halt_its_end_and_its_leaving(self, hub: Hub) -> None:
        worker, first, second = Peer(hub), Peer(hub), Peer(hub)
        worker.start("q", "g")
        assert (first.ask.watch(["g"]), second.ask.watch(["g"])) == ([], [])
        worker.broker.consume("q", 1)
        (received,) = worker.receive()
        worker.drop(received)
        worker.broker.settle([], [], [], [SettleItem([received.lease], DEAD_LETTER, [], 0.0, b"why")], [])
        first.wait_until(lambda: ("parked", "g") in first.notices, "the halt, at the first watcher")
        second.wait_until(lambda: ("parked", "g") in second.notices, "the halt, at the second watcher")
        worker.ask.requeue("q", [])
        worker.move(worker.receive()[0], "finished", b"result", label=":completed", flags=TERMINAL)
        first.wait_until(lambda: first.pushes == [("g", ":completed", b"result")], "the end, at the first watcher")
        second.wait_until(lambda: second.pushes == [("g", ":completed", b"result")], "the end, at the second watcher")
        worker.broker.consume("finished", 1)
        worker.ack(worker.receive()[0], flags=FLAG_CLOSE_GROUP)
        worker.ask.ping()
        assert (first.ask.watch(["g"]), second.ask.watch(["g"])) == (["g"], ["g"])
        assert all(("gone", "g") in watcher.notices for watcher in (first, second))

    # epochs

    def test_a_raised_epoch_diverts_what_is_older(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.start("q", "g", b"ready")
        peer.publish("held", b"held", group="g")
        peer.publish("later", b"delayed", group="g", delay=3600.0)
        peer.publish("new", b"new", group="g", epoch=2)
        peer.broker.consume("held", 1)
        (held,) = peer.receive()
        answer = peer.ask.raise_epoch("g", 2, "coordinator", "cancel")
        assert answer == {"epoch": 2, "leased": [held.item.id], "ended": ""}
        peer.broker.consume("coordinator", 9)
        diverted = peer.receive(2)
        assert sorted(each.body for each in diverted) == [b"delayed", b"ready"]
        assert {each.item.epoch for each in diverted} == {1}
        # Messages in hand follow when they are settled; the others are not delivered again.
        peer.move(held, "q", b"settled", label="next")
        assert peer.receive()[0].body == b"settled"
        states = {message["queue"] for message in peer.ask.lookup(["g"])["groups"]["g"]["messages"]}
        assert states == {"coordinator", "new"}

    def test_an_epoch_is_raised_once(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.start("q", "g")
        peer.ask.raise_epoch("g", 2, "coordinator", "cancel")
        peer.publish("q", b"newer", group="g", epoch=2)
        assert peer.ask.raise_epoch("g", 2, "elsewhere", "cancel")["epoch"] == 2
        queues = {queue["name"]: queue["ready"] for queue in peer.ask.stats("")["queues"]}
        assert (queues["q"], queues["coordinator"]) == (1, 1)
        with pytest.raises(Refused, match="not live"):
            peer.ask.raise_epoch("unknown", 2, "coordinator", "cancel")

    def test_overtaken_messages_that_are_given_back_are_diverted(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.start("q", "g", b"1")
        peer.broker.consume("q", 1)
        (received,) = peer.receive()
        peer.ask.raise_epoch("g", 2, "coordinator", "cancel")
        peer.drop(received)
        peer.broker.release([received.lease], "q", 1)
        peer.broker.consume("coordinator", 1)
        (diverted,) = peer.receive()
        assert (diverted.queue, diverted.item.id) == ("coordinator", received.item.id)

    def test_the_epoch_of_a_group_that_has_ended_is_not_raised(self, hub: Hub) -> None:
        peer = Peer(hub)
        peer.start("q", "g")
        peer.broker.consume("q", 1)
        peer.move(peer.receive()[0], "finished", b"", label=":completed", flags=TERMINAL)
        answer = peer.ask.raise_epoch("g", 2, "coordinator", "cancel")
        assert (answer["epoch"], answer["ended"]) == (1, ":completed")
        assert peer.ask.stats("finished")["queues"][0]["ready"] == 1

    def test_a_second_start_may_ask_to_be_told_of_the_end_too(self, hub: Hub) -> None:
        first, second = Peer(hub), Peer(hub)
        first.start("q", "g", digest=b"d")
        assert second.start("q", "g", digest=b"d", watch=True) == [(0, "exists", "g")]
        first.broker.consume("q", 1)
        first.move(first.receive()[0], "finished", b"end", label=":completed", flags=TERMINAL)
        second.wait_until(lambda: second.pushes == [("g", ":completed", b"end")], "the end")
