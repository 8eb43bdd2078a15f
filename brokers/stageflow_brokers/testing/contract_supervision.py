"""Supervision: reports of deaths, known workers, suspended delivery, recall and retire."""

from __future__ import annotations

from typing import Any

import pytest

from stageflow_brokers.api import ACK, Arrival, GatherOpen, QueueOptions, Refused, SettleItem, Target
from stageflow_brokers.testing.harness import Hub, Peer

__all__ = ["SupervisionContract"]


class SupervisionContract:
    """Expects a fixture `supervised_hub`, a broker that waits for its supervisor."""

    def _supervise(self, hub: Hub, *options: QueueOptions) -> Peer:
        supervisor = Peer(hub, role="supervisor", name="supervisor")
        supervisor.ask.declare(list(options))
        supervisor.ask.set_workers([])
        return supervisor

    def _report_death(
        self, supervisor: Peer, dead: Peer, responsible: int = 0, *, charge: bool = True, failure: bytes = b""
    ) -> None:
        supervisor.ask.report_death(dead.broker.peer, responsible, charge, False, failure)

    def test_nothing_is_delivered_before_the_roster_is_known(self, supervised_hub: Hub) -> None:
        supervisor, worker = Peer(supervised_hub, role="supervisor"), Peer(supervised_hub, role="worker")
        worker.broker.consume("q", 1)
        worker.publish("q", b"1")
        assert worker.is_quiet()
        assert worker.ask.stats("q")["queues"][0]["state"] == "closed"
        supervisor.ask.set_workers([])
        assert worker.receive()[0].body == b"1"

    def test_a_queue_waits_for_the_consumers_that_are_alive(self, supervised_hub: Hub) -> None:
        supervisor, worker = Peer(supervised_hub, role="supervisor"), Peer(supervised_hub, role="worker")
        worker.broker.consume("q", 1)
        worker.broker.consume("free", 1)
        worker.publish("q", b"1")
        worker.publish("free", b"2")
        supervisor.ask.set_workers([(12345, ["q"])])
        assert worker.receive()[0].body == b"2"
        assert worker.is_quiet()
        supervisor.ask.report_death(12345, 0, False, False, b"")
        assert worker.receive()[0].body == b"1"

    def test_only_the_supervisor_speaks_of_deaths(self, supervised_hub: Hub) -> None:
        peer = Peer(supervised_hub)
        queries: list[tuple[Any, ...]] = [
            ("dead", peer.broker.peer, 0, False, False, b""),
            ("roster", []),
            ("hold", True),
            ("leave", ["g"]),
            ("recall", peer.broker.peer),
            ("retire", peer.broker.peer),
            ("starts", [("q", True, "why", 1.0)]),
        ]
        for query in queries:
            with pytest.raises(Refused, match="supervisor"):
                peer.query(*query)

    def test_only_the_responsible_message_is_charged(self, supervised_hub: Hub) -> None:
        supervisor = self._supervise(supervised_hub, QueueOptions("q", max_deaths=3))
        dying, next_one = Peer(supervised_hub, role="worker"), Peer(supervised_hub, role="worker")
        supervisor.publish("q", b"1", b"2", b"3", b"4")
        dying.broker.consume("q", 3)
        responsible = dying.receive(3)[0]
        self._report_death(supervisor, dying, responsible.item.id, failure=b"SIGSEGV")
        next_one.broker.consume("q", 9)
        received = next_one.receive(4)
        assert [each.body for each in received] == [b"1", b"2", b"3", b"4"]
        first = received[0].item.extra
        assert first is not None
        assert (first.deaths, first.attempts, first.failure, first.fresh) == (1, 0, b"SIGSEGV", True)
        assert [each.item.extra for each in received[1:]] == [None, None, None]

    def test_a_death_without_fault_charges_nobody(self, supervised_hub: Hub) -> None:
        supervisor = self._supervise(supervised_hub, QueueOptions("q", max_deaths=1))
        dying, next_one = Peer(supervised_hub, role="worker"), Peer(supervised_hub, role="worker")
        supervisor.publish("q", b"1", b"2")
        dying.broker.consume("q", 2)
        responsible = dying.receive(2)[0]
        self._report_death(supervisor, dying, responsible.item.id, charge=False)
        next_one.broker.consume("q", 9)
        assert [each.item.extra for each in next_one.receive(2)] == [None, None]

    def test_what_was_settled_before_the_death_stays_settled(self, supervised_hub: Hub) -> None:
        supervisor = self._supervise(supervised_hub, QueueOptions("q", max_deaths=1))
        dying = Peer(supervised_hub, role="worker")
        supervisor.publish("q", b"1", b"2")
        dying.broker.consume("q", 2)
        one, two = dying.receive(2)
        dying.ack(one)
        self._report_death(supervisor, dying, one.item.id)
        stats = supervisor.ask.stats("q")["queues"][0]
        assert (stats["ready"], stats["dead"], stats["leased"]) == (1, 0, 0)
        # The worker still runs: its later settlements are refused, because its leases ended with the report.
        dying.ack(two)
        dying.wait_until(lambda: dying.lost == [two.item.id] and dying.stale == [two.item.id], "the refused settlement")
        assert dying.receive()[0].item.id == two.item.id

    def test_a_message_that_kills_too_often_becomes_a_dead_letter(self, supervised_hub: Hub) -> None:
        supervisor = self._supervise(supervised_hub, QueueOptions("q", max_deaths=2))
        supervisor.start("q", "g", b"bad", watch=True)
        supervisor.publish("q", b"good")
        for _ in range(2):
            worker = Peer(supervised_hub, role="worker")
            worker.broker.consume("q", 2)
            received = worker.receive(2)
            assert [each.body for each in received] == [b"bad", b"good"]
            self._report_death(supervisor, worker, received[0].item.id, failure=b"SIGKILL")
        supervisor.wait_until(lambda: ("parked", "g") in supervisor.notices, "the halt of its group")
        (letter,) = supervisor.ask.peek("dlq.q", 0, 9)
        assert (letter["body"], letter["deaths"], letter["reason"]) == (b"bad", 2, b"SIGKILL")
        worker = Peer(supervised_hub, role="worker")
        worker.broker.consume("q", 2)
        (good,) = worker.receive()
        assert (good.body, good.item.extra) == (b"good", None)
        assert supervisor.ask.requeue("dlq.q", [letter["id"]])["requeued"] == 1
        assert worker.receive()[0].body == b"bad"

    def test_the_consumer_notified_of_a_dead_letter_takes_over_and_it_is_evidence(self, supervised_hub: Hub) -> None:
        options = QueueOptions("q", max_deaths=1, evidence=True, notify_queue="coordinator", notify_label="dead-letter")
        supervisor = self._supervise(supervised_hub, options)
        supervisor.start("q", "g", b"bad", watch=True)
        worker = Peer(supervised_hub, role="worker")
        worker.broker.consume("q", 1)
        (responsible,) = worker.receive()
        worker.broker.checkpoint(*responsible.lease, "step", b"done").result(20)
        self._report_death(supervisor, worker, responsible.item.id, failure=b"OOM")
        supervisor.broker.consume("coordinator", 1)
        (notified,) = supervisor.receive()
        extra = notified.item.extra
        assert extra is not None
        assert (notified.body, notified.item.group, extra.label, extra.failure, extra.deaths, extra.steps) == (
            b"bad",
            "g",
            "dead-letter",
            b"OOM",
            1,
            {"step": b"done"},
        )
        assert ("parked", "g") not in supervisor.notices
        (letter,) = supervisor.ask.peek("dlq.q", 0, 9)
        assert letter["evidence"] is True
        with pytest.raises(Refused, match="evidence"):
            supervisor.ask.requeue("dlq.q", [letter["id"]])
        assert supervisor.ask.requeue("dlq.q", []) == {"requeued": 0, "refused": [letter["id"]]}
        # The group is closed, and the evidence stays until it is purged.
        supervisor.ack(notified, flags=1)
        supervisor.ask.ping()
        assert supervisor.ask.lookup(["g"])["groups"] == {}
        assert len(supervisor.ask.peek("dlq.q", 0, 9)) == 1
        assert supervisor.ask.purge("dlq.q", [])["purged"] == 1
        assert supervisor.ask.stats("")["messages"] == 0

    def test_the_consumer_notified_of_a_gathered_dead_letter_receives_its_parts(self, supervised_hub: Hub) -> None:
        options = QueueOptions("q", max_deaths=1, evidence=True, notify_queue="coordinator", notify_label="dead-letter")
        supervisor = self._supervise(supervised_hub, options)
        supervisor.start("before", "g", b"start")
        worker = Peer(supervised_hub, role="worker")
        worker.broker.consume("before", 1)
        (begun,) = worker.receive()
        joined = SettleItem(
            [begun.lease], ACK, opens=[GatherOpen("k", 2, 0, 4)], arrivals=[Arrival("k", "a", 1), Arrival("k", "b", 2)]
        )
        worker.broker.settle([Target("q", "join")], [], [], [joined], [b"base", b"A", b"BB"])
        worker.broker.consume("q", 1)
        (responsible,) = worker.receive()
        self._report_death(supervisor, worker, responsible.item.id, failure=b"OOM")
        supervisor.broker.consume("coordinator", 1)
        (notified,) = supervisor.receive()
        assert notified.item.extra is not None
        assert (notified.body, notified.item.extra.label) == (b"baseABB", "dead-letter")
        assert [tuple(part) for part in notified.item.extra.parts or ()] == [("", 4), ("a", 1), ("b", 2)]

    def test_a_worker_that_left_without_settling_is_waited_for(self, supervised_hub: Hub) -> None:
        """The worker may still work on the message: only its death ends the lease."""
        supervisor = self._supervise(supervised_hub)
        worker, other = Peer(supervised_hub, role="worker"), Peer(supervised_hub, role="worker")
        supervisor.publish("q", b"1", b"2")
        worker.broker.consume("q", 1)
        worker.receive()
        worker.broker.close()
        other.broker.consume("q", 9)
        assert other.receive()[0].body == b"2"
        assert other.is_quiet()
        self._report_death(supervisor, worker)
        assert other.receive()[0].body == b"1"

    def test_held_back_nothing_is_delivered_but_to_the_supervisor(self, supervised_hub: Hub) -> None:
        supervisor = self._supervise(supervised_hub)
        worker = Peer(supervised_hub, role="worker")
        worker.broker.consume("q", 1)
        worker.ask.ping()
        supervisor.broker.consume("own", 1)
        supervisor.ask.suspend_delivery(True)
        worker.wait_until(lambda: ("recall", None) in worker.notices, "the recall")
        supervisor.publish("q", b"1")
        supervisor.publish("own", b"2")
        assert supervisor.receive()[0].body == b"2"
        assert worker.is_quiet()
        supervisor.ask.suspend_delivery(False)
        assert worker.receive()[0].body == b"1"

    def test_a_consumer_that_is_to_retire_is_notified_and_given_nothing_more(self, supervised_hub: Hub) -> None:
        supervisor = self._supervise(supervised_hub)
        worker, heir = Peer(supervised_hub, role="worker"), Peer(supervised_hub, role="worker")
        supervisor.publish("q", b"1")
        worker.broker.consume("q", 3)
        (one,) = worker.receive()
        worker.ask.ping()  # its hello may have requested messages too: this was the last request
        assert supervisor.ask.retire(worker.broker.peer) is True
        worker.wait_until(lambda: ("retire", None) in worker.notices, "the notice")
        supervisor.publish("q", b"2")
        assert worker.is_quiet(), "nothing more is delivered to it"
        worker.ack(one)
        worker.ask.ping()
        assert supervisor.ask.stats("q")["queues"][0]["leased"] == 0
        heir.broker.consume("q", 1)
        assert heir.receive()[0].body == b"2"
        assert supervisor.ask.retire(987654321) is False, "no peer has that number"

    def test_a_consumer_with_more_than_it_works_on_can_be_recalled(self, supervised_hub: Hub) -> None:
        supervisor = self._supervise(supervised_hub)
        worker, other = Peer(supervised_hub, role="worker"), Peer(supervised_hub, role="worker")
        supervisor.publish("q", b"1", b"2", b"3")
        worker.broker.consume("q", 3)
        _, two, three = worker.receive(3)
        supervisor.ask.recall(worker.broker.peer)
        worker.wait_until(lambda: ("recall", None) in worker.notices, "the recall")
        worker.drop(two, three)
        worker.broker.release([two.lease, three.lease], "q", 1)
        other.broker.consume("q", 3)
        assert [each.body for each in other.receive(2)] == [b"2", b"3"]
