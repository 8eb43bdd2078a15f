"""Recall: what consumers hold and have not begun is shared again, in order, and without an attempt."""

from __future__ import annotations

from stageflow_brokers.testing.harness import Hub, Peer, Received

__all__ = ["RecallContract"]


class RecallContract:
    """Expects a fixture `hub`, a broker without a supervisor."""

    def _consumer(self, hub: Hub, held: int, *, working_on: int = 1) -> Peer:
        """Return a consumer that works on some messages at once, and holds more in advance."""
        consumer = Peer(hub, role="worker")
        consumer.broker.consume("q", working_on)
        consumer.broker.release([], "q", held)
        consumer.ask.ping()
        return consumer

    def _release(self, consumer: Peer, *messages: Received) -> None:
        consumer.drop(*messages)
        consumer.broker.release([message.lease for message in messages], "q", 1)
        consumer.ask.ping()

    def _was_recalled(self, consumer: Peer) -> bool:
        consumer.ask.ping()
        return ("recall", None) in consumer.notices

    def test_what_waits_behind_a_message_of_higher_priority_is_recalled(self, hub: Hub) -> None:
        worker = self._consumer(hub, 4)
        worker.publish("q", b"1", b"2", b"3", b"4")
        one, *waiting = worker.receive(4)
        worker.publish("q", b"urgent", priority=9)
        worker.wait_until(lambda: ("recall", None) in worker.notices, "the recall")
        self._release(worker, *waiting)
        assert worker.is_quiet(), "the message in work comes first"
        worker.ack(one)
        assert worker.receive()[0].body == b"urgent"
        worker.broker.release([], "q", 9)
        assert [each.body for each in worker.receive(3)] == [b"2", b"3", b"4"]

    def test_a_message_of_higher_priority_goes_to_the_first_consumer_whose_work_ends(self, hub: Hub) -> None:
        busy, quick = self._consumer(hub, 2), self._consumer(hub, 2)
        busy.publish("q", b"1", b"2", b"3", b"4")
        (_, waiting), (begun, also) = busy.receive(2), quick.receive(2)
        busy.publish("q", b"urgent", priority=1)
        for worker in (busy, quick):
            worker.wait_until(lambda worker=worker: ("recall", None) in worker.notices, "the recall")  # type: ignore[misc]
        # More credit does not put it behind work that may last.
        busy.broker.release([], "q", 9)
        self._release(busy, waiting)
        self._release(quick, also)
        assert busy.is_quiet()
        quick.ack(begun)
        assert quick.receive()[0].body == b"urgent"

    def test_an_idle_consumer_receives_it_at_once_and_nothing_is_recalled_for_it_later(self, hub: Hub) -> None:
        busy = self._consumer(hub, 1)
        busy.publish("q", b"1")
        (one,) = busy.receive()
        idle = self._consumer(hub, 1)
        idle.publish("q", b"urgent", priority=9)
        assert idle.receive()[0].body == b"urgent"
        assert not self._was_recalled(busy)
        busy.ack(one)

    def test_messages_of_the_same_priority_recall_nothing(self, hub: Hub) -> None:
        worker = self._consumer(hub, 4)
        worker.publish("q", b"1", b"2", priority=9)
        worker.receive(2)
        worker.publish("q", b"3", priority=9)
        worker.publish("q", b"4", priority=1)
        assert [each.body for each in worker.receive(2)] == [b"3", b"4"]
        assert not self._was_recalled(worker)

    def test_a_consumer_of_several_at_once_receives_it_beside_those_in_work(self, hub: Hub) -> None:
        worker = self._consumer(hub, 3, working_on=3)
        worker.publish("q", b"1", b"2")
        worker.receive(2)
        worker.publish("q", b"urgent", priority=9)
        assert worker.receive()[0].body == b"urgent"
        assert not self._was_recalled(worker)

    def test_what_two_consumers_release_returns_in_order(self, hub: Hub) -> None:
        first, second = self._consumer(hub, 2), self._consumer(hub, 2)
        first.publish("q", b"1", b"2", b"3", b"4", b"5", b"6")
        of_first, of_second = first.receive(2), second.receive(2)
        earlier, later = sorted((of_first, of_second), key=lambda each: each[0].body)
        whose = {id(of_first): first, id(of_second): second}
        for consumer in (first, second):
            consumer.broker.release([], "q", 0)
            consumer.ask.ping()
        for messages in (earlier, later):
            consumer = whose[id(messages)]
            consumer.drop(*messages)
            consumer.broker.release([message.lease for message in messages], "q", 0)
            consumer.ask.ping()
        third = Peer(hub, role="worker")
        third.broker.consume("q", 9)
        received = third.receive(6)
        assert [each.body for each in received] == [b"1", b"2", b"3", b"4", b"5", b"6"]
        assert [each.item.extra for each in received] == [None] * 6

    def test_a_pause_recalls_also_the_only_message_which_may_not_have_begun(self, hub: Hub) -> None:
        worker, operator = self._consumer(hub, 1), Peer(hub)
        worker.publish("q", b"1", b"2")
        (one,) = worker.receive()
        operator.ask.pause("q")
        worker.wait_until(lambda: ("recall", None) in worker.notices, "the recall")
        self._release(worker, one)
        assert worker.is_quiet()
        stats = operator.ask.stats("q")["queues"][0]
        assert (stats["ready"], stats["leased"], stats["state"]) == (2, 0, "paused")
        operator.ask.resume("q")
        again = worker.receive()[0]
        assert (again.body, again.item.extra) == (b"1", None)

    def test_what_waits_with_a_busy_consumer_is_recalled_for_an_idle_one(self, hub: Hub) -> None:
        busy = self._consumer(hub, 4)
        busy.publish("q", b"1", b"2", b"3", b"4")
        _, *waiting = busy.receive(4)
        idle = self._consumer(hub, 4)
        busy.wait_until(lambda: ("recall", None) in busy.notices, "the recall")
        self._release(busy, *waiting)
        assert [each.body for each in idle.receive(3)] == [b"2", b"3", b"4"]

    def test_a_release_that_crosses_a_settlement_releases_only_what_is_still_held(self, hub: Hub) -> None:
        worker = self._consumer(hub, 3)
        worker.publish("q", b"1", b"2", b"3")
        one, two, three = worker.receive(3)
        worker.ack(one, two)
        worker.drop(three)
        worker.broker.release([one.lease, two.lease, three.lease], "q", 3)
        (again,) = worker.receive()
        assert (again.body, again.item.id) == (b"3", three.item.id)
        # The lease of before is over: a release under it changes nothing.
        worker.broker.release([three.lease], "q", 3)
        assert worker.is_quiet()
        assert worker.ask.stats("q")["queues"][0]["leased"] == 1
