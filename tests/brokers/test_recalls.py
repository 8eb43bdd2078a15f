"""Recalls in virtual time: whom the broker asks for what has not begun, when, and how often."""

from __future__ import annotations

from broker_fixtures import Peer, World, check_whole

from stageflow_brokers.core import wire
from stageflow_brokers.core.leases import MAX_DELIVERY_BYTES
from stageflow_brokers.core.recalls import MIXED_PREFETCH, MIXED_SECONDS, SHARE_SECONDS


class Cluster:
    """A supervised broker with one queue, and workers that work on one message and hold more."""

    def __init__(self, *prefetches: int) -> None:
        self.world = World(supervised=True)
        self.supervisor = self.world.peer(99, role="supervisor")
        self.supervisor.query("roster", [])
        self.publisher = self.world.peer(1)
        self.workers = [self.hire(number + 2, prefetch) for number, prefetch in enumerate(prefetches)]

    def hire(self, number: int, prefetch: int) -> Peer:
        worker = self.world.peer(number, consume={"q": 1}, role="worker")
        self.credit(worker, prefetch)
        return worker

    def credit(self, worker: Peer, prefetch: int) -> None:
        worker.send(wire.RELEASE, ([], "q", prefetch))

    def publish(self, count: int, priority: int = 0, size: int = 1) -> None:
        names = [f"g{self.world.machine.state.next_id + place}" for place in range(count)]
        items = [(0, size, name, 1, 0, priority) for name in names]
        self.publisher.publish([("q", "a")], items, [b"x" * size] * count)

    def answer(self, worker: Peer, *, begun: int = 1) -> None:
        """Release what has not begun, as a worker does after a recall."""
        worker.notices.clear()
        leases = [(item.id, item.lease) for item in list(worker.held.values())[begun:]]
        for id, _ in leases:
            del worker.held[id]
        worker.send(wire.RELEASE, (leases, "q", 1))

    def finish(self, worker: Peer) -> None:
        item = next(iter(worker.held.values()))
        worker.settle([], acks=[(item.id, item.lease, 0, item.group)])

    def recalls(self, worker: Peer) -> int:
        return worker.notices.count(("recall", None))


def test_what_has_waited_for_the_share_time_is_recalled_once_for_an_idle_consumer() -> None:
    cluster = Cluster(4)
    [busy] = cluster.workers
    cluster.publish(4)
    idle = cluster.hire(9, 4)
    cluster.world.pass_time(SHARE_SECONDS * 0.9)
    assert cluster.recalls(busy) == 0
    cluster.world.pass_time(SHARE_SECONDS * 0.2)
    assert cluster.recalls(busy) == 1
    for _ in range(100):  # it does not answer: its handler may hold the GIL for minutes
        cluster.world.pass_time(SHARE_SECONDS)
    assert cluster.recalls(busy) == 1
    assert cluster.world.machine.next_deadline() is None, "the broker does not wake up for nothing"
    cluster.answer(busy)
    assert [item.id for item in idle.held.values()] == [2, 3, 4]
    check_whole(cluster.world.machine)


def test_nothing_is_recalled_while_no_consumer_is_idle_or_what_waits_moves_on() -> None:
    cluster = Cluster(2, 1)
    busy, other = cluster.workers
    cluster.publish(3)
    cluster.world.pass_time(1.0)
    assert cluster.recalls(busy) + cluster.recalls(other) == 0
    cluster.finish(other)
    cluster.world.pass_time(SHARE_SECONDS * 0.6)
    cluster.finish(busy)
    cluster.world.pass_time(SHARE_SECONDS * 0.6)
    assert cluster.recalls(busy) == 0


def test_what_was_delivered_after_the_watch_began_waits_its_own_time() -> None:
    cluster = Cluster(1)
    [busy] = cluster.workers
    cluster.publish(1)
    idle = cluster.hire(9, 1)
    cluster.publish(1)
    cluster.credit(busy, 2)
    cluster.publish(1)  # the second one of the busy consumer
    cluster.finish(idle)
    held = len(busy.held)
    assert held == 2
    cluster.world.pass_time(SHARE_SECONDS * 1.1)
    assert cluster.recalls(busy) == 1


def test_a_paused_queue_recalls_nothing_for_idle_consumers() -> None:
    cluster = Cluster(4)
    [busy] = cluster.workers
    cluster.publish(4)
    cluster.hire(9, 1)
    cluster.publisher.query("pause", "q")
    busy.notices.clear()
    cluster.world.pass_time(1.0)
    assert cluster.recalls(busy) == 0


def test_a_consumer_that_reconnects_during_a_pause_is_asked_again() -> None:
    cluster = Cluster(2)
    [worker] = cluster.workers
    cluster.publish(2)
    cluster.world.machine.disconnect(worker.number)
    cluster.publisher.query("pause", "q")
    assert cluster.recalls(worker) == 0
    worker.hello()
    assert cluster.recalls(worker) == 1
    cluster.answer(worker, begun=0)
    cluster.publisher.query("resume", "q")
    assert [item.id for item in worker.held.values()] == [1]


def test_a_broker_that_has_restarted_asks_the_holders_of_a_paused_queue() -> None:
    cluster = Cluster(3)
    [worker] = cluster.workers
    cluster.publish(3)
    cluster.publisher.query("pause", "q")
    worker.notices.clear()
    cluster.world.restart()
    cluster.supervisor.hello()
    cluster.supervisor.query("roster", [])
    worker.hello()
    assert cluster.recalls(worker) == 1


def test_a_recall_that_was_lost_with_the_connection_is_repeated_for_a_higher_priority() -> None:
    cluster = Cluster(3)
    [worker] = cluster.workers
    cluster.publish(3)
    cluster.world.machine.disconnect(worker.number)
    cluster.publish(1, priority=9)
    worker.hello()
    cluster.publish(1, priority=9)
    assert cluster.recalls(worker) == 1


def test_many_messages_of_a_higher_priority_ask_once_for_each_delivery() -> None:
    cluster = Cluster(3)
    [worker] = cluster.workers
    cluster.publish(3)
    for _ in range(50):
        cluster.publish(1, priority=9)
    assert cluster.recalls(worker) == 1
    cluster.answer(worker)
    cluster.finish(worker)
    assert [item.extra and item.extra.priority for item in worker.held.values()] == [9]


def test_while_priorities_meet_a_consumer_holds_few_messages() -> None:
    cluster = Cluster(1_000)
    [worker] = cluster.workers
    cluster.publish(500)
    assert len(worker.held) == 500
    cluster.publish(1, priority=9)
    cluster.answer(worker)
    cluster.credit(worker, 1_000)
    cluster.finish(worker)
    assert len(worker.held) == MIXED_PREFETCH
    assert next(iter(worker.held.values())).id == 501, "the urgent one is the first"
    cluster.world.pass_time(MIXED_SECONDS)
    cluster.credit(worker, 1_000)
    assert len(worker.held) == 499 + 1


def test_a_lower_priority_is_not_delivered_past_a_higher_one_that_waits() -> None:
    cluster = Cluster(2, 2)
    first, second = cluster.workers
    cluster.publish(4)
    cluster.publish(1, priority=1)
    cluster.credit(first, 9)
    cluster.credit(second, 9)
    cluster.publish(5)
    assert (len(first.held), len(second.held)) == (2, 2)


def test_negative_priorities_give_way_to_those_without_one() -> None:
    cluster = Cluster(3)
    [worker] = cluster.workers
    cluster.publish(3, priority=-5)
    cluster.publish(1)
    assert cluster.recalls(worker) == 1
    cluster.answer(worker)
    cluster.finish(worker)
    assert [item.id for item in worker.held.values()] == [4]


def test_what_a_dead_worker_held_returns_in_order_among_what_others_have_released() -> None:
    cluster = Cluster(3, 3)
    first, second = cluster.workers
    cluster.publish(6)
    kept = next(iter(second.held.values()))
    cluster.supervisor.query("hold", True)
    cluster.answer(second)
    cluster.supervisor.query("dead", first.number, 0, False, False, b"")
    cluster.world.pass_time(0.01)
    cluster.supervisor.query("hold", False)
    cluster.credit(second, 9)
    order = [item.id for _, item, _ in second.delivered[3:]]
    assert order == sorted(order)
    assert {*order, kept.id} == set(range(1, 7))
    check_whole(cluster.world.machine)


def test_the_bodies_that_wait_with_a_consumer_are_bounded() -> None:
    cluster = Cluster(100)
    [worker] = cluster.workers
    size = MAX_DELIVERY_BYTES // 4
    for _ in range(20):
        cluster.publish(1, size=size)
    assert len(worker.held) == 5
    cluster.finish(worker)
    assert len(worker.held) == 5
