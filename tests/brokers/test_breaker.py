"""The breaker of a queue: when it opens, which messages it lets through, and that it never stays stuck."""

from __future__ import annotations

from typing import Any

import pytest
from broker_fixtures import Peer, World, assert_same, check_whole, picture
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from stageflow_brokers.core.breaker import CLOSED, HALF_OPEN, OPEN, Breaker
from stageflow_brokers.types import (
    ACK,
    ATTEMPT_FAILED,
    ATTEMPT_SUCCEEDED,
    ATTEMPT_UNKNOWN,
    DEAD_LETTER,
    RETRY,
    DeliveryItem,
    QueueOptions,
    SettleItem,
)

FAILURES, RESET = 3, 30.0
SUPERVISOR = 99


class Cluster:
    """A supervised broker with one guarded queue, and workers that hold four messages each."""

    def __init__(self, workers: int = 1, prefetch: int = 4) -> None:
        self.world = World(supervised=True)
        self.supervisor = self.world.peer(SUPERVISOR, role="supervisor")
        self.supervisor.query("roster", [])
        self.declare(FAILURES, RESET)
        self.publisher = self.world.peer(1)
        self.prefetch = prefetch
        self.workers = [self.hire(number) for number in range(2, 2 + workers)]

    def hire(self, number: int) -> Peer:
        return self.world.peer(number, consume={"q": self.prefetch}, role="worker")

    def declare(self, failures: int, reset: float) -> None:
        self.supervisor.query("declare", [QueueOptions("q", 3, breaker_failures=failures, breaker_reset=reset)])

    def publish(self, count: int, priority: int = 0) -> None:
        names = [f"g{self.world.machine.state.next_id + place}" for place in range(count)]
        items = [(0, 1, name, 1, 0, priority) for name in names]
        self.publisher.publish([("q", "a")], items, [b"x"] * count)

    @property
    def worker(self) -> Peer:
        return self.workers[0]

    @property
    def breaker(self) -> Breaker:
        breaker = self.world.machine.state.queue("q").breaker
        assert breaker is not None
        return breaker

    def state(self) -> str:
        [queue] = self.supervisor.query("stats", "q")["queues"]
        return str(queue["breaker"])

    def say(self, item: DeliveryItem, verdict: int, outcome: int = RETRY, worker: Peer | None = None) -> None:
        said = SettleItem([(item.id, item.lease)], outcome, [], 0.0, b"no" if outcome != ACK else None)
        said.attempt_result = verdict
        (worker or self.worker).settle([], others=[said])

    def fail(self, times: int = 1, **how: Any) -> None:
        for _ in range(times):
            self.say(next(iter(self.worker.held.values())), ATTEMPT_FAILED, **how)

    def open(self) -> None:
        """Three messages, of which each fails once."""
        self.publish(FAILURES)
        self.fail(FAILURES)
        assert self.state() == OPEN

    def half_open(self) -> DeliveryItem:
        """The probe."""
        self.open()
        self.world.pass_time(RESET)
        assert self.state() == HALF_OPEN
        [probe] = self.worker.held.values()
        return probe


def test_failures_in_a_row_open_it_and_then_nothing_is_delivered_until_its_time_is_over() -> None:
    cluster = Cluster()
    cluster.publish(3)
    cluster.fail(2)
    assert cluster.state() == CLOSED
    cluster.fail()
    assert cluster.state() == OPEN
    assert not cluster.worker.held
    cluster.publish(5)
    cluster.world.pass_time(RESET - 1)
    assert not cluster.worker.held
    [queue] = cluster.supervisor.query("stats", "q")["queues"]
    assert (queue["ready"], queue["dead"], queue["state"]) == (8, 0, "open")
    cluster.world.pass_time(1)
    assert len(cluster.worker.held) == 1


@pytest.mark.parametrize("outcome", [RETRY, DEAD_LETTER, ACK])
def test_a_failed_attempt_counts_however_it_is_settled(outcome: int) -> None:
    cluster = Cluster()
    cluster.publish(4)
    cluster.fail(3, outcome=outcome)
    assert cluster.state() == OPEN


def test_a_success_in_between_resets_the_count() -> None:
    cluster = Cluster(prefetch=1)
    cluster.publish(9)
    for settle in ("move", "ack", "other"):
        cluster.fail(2, outcome=ACK)
        [item] = cluster.worker.held.values()
        if settle == "move":
            cluster.worker.settle([("next", "b")], moves=[(item.id, item.lease, 0, 1, item.group)], bodies=[b"y"])
        elif settle == "ack":
            cluster.worker.settle([], acks=[(item.id, item.lease, 0, item.group)])
        else:
            cluster.say(item, ATTEMPT_SUCCEEDED, ACK)
    assert cluster.state() == CLOSED
    assert cluster.breaker.failure_count == 0


def test_a_settlement_that_is_no_attempt_does_not_count() -> None:
    cluster = Cluster()
    cluster.publish(3)
    cluster.fail(2)
    cluster.say(next(iter(cluster.worker.held.values())), ATTEMPT_UNKNOWN, ACK)
    assert cluster.breaker.failure_count == 2


def test_a_refused_settlement_counts_as_neither_success_nor_failure() -> None:
    cluster = Cluster()
    cluster.publish(3)
    cluster.fail(2)
    [item, *_] = cluster.worker.held.values()
    cluster.worker.settle([("next", "b")], moves=[(item.id, item.lease + 1, 0, 1, item.group)], bodies=[b"y"])
    assert cluster.breaker.failure_count == 2


def test_deaths_and_timeouts_are_failures_over_all_workers() -> None:
    cluster = Cluster(workers=3, prefetch=1)
    cluster.publish(3)
    for worker, charge in zip(cluster.workers, (True, False, True), strict=True):
        [item] = worker.held.values()
        cluster.supervisor.query("dead", worker.number, item.id, charge, False, b"died")
        cluster.world.pass_time(0.01)
    assert cluster.state() == OPEN


def test_a_worker_that_is_stopped_prints_nothing() -> None:
    cluster = Cluster()
    cluster.publish(3)
    cluster.fail(2)
    cluster.supervisor.query("dead", cluster.worker.number, 0, False, False, b"")
    cluster.world.pass_time(0.01)
    assert cluster.breaker.failure_count == 2


def test_the_more_has_failed_the_fewer_a_worker_is_given_in_advance() -> None:
    cluster = Cluster(prefetch=100)
    cluster.publish(50)
    assert len(cluster.worker.held) == FAILURES
    cluster.fail(2, outcome=ACK)
    assert len(cluster.worker.held) == 1


def test_what_a_worker_holds_in_advance_is_asked_back_when_it_opens() -> None:
    cluster = Cluster(workers=2, prefetch=4)
    cluster.publish(6)
    cluster.fail(2, outcome=ACK)
    other = cluster.workers[1]
    assert len(other.held) == 3
    cluster.say(next(iter(other.held.values())), ATTEMPT_FAILED, worker=other)
    assert ("recall", None) in other.notices
    other.release([(item.id, item.lease) for item in list(other.held.values())[1:]])
    cluster.world.pass_time(1)
    assert (len(other.held), len(cluster.worker.held)) == (1, 1)


def test_attempts_begun_before_it_opened_do_not_count() -> None:
    cluster = Cluster(workers=2, prefetch=2)
    cluster.publish(4)
    late, later = cluster.workers[1].held.values()
    cluster.fail(2, outcome=ACK)
    cluster.publish(1)
    cluster.fail(1)
    cluster.say(late, ATTEMPT_SUCCEEDED, ACK, worker=cluster.workers[1])
    assert cluster.state() == OPEN
    until = cluster.breaker.open_until
    cluster.world.pass_time(RESET / 2)
    cluster.say(later, ATTEMPT_FAILED, worker=cluster.workers[1])
    assert cluster.breaker.open_until == until


def test_a_probe_that_works_closes_it_and_all_go_through() -> None:
    cluster = Cluster()
    probe = cluster.half_open()
    cluster.publish(3)
    assert len(cluster.worker.held) == 1
    cluster.worker.settle([("next", "b")], moves=[(probe.id, probe.lease, 0, 1, probe.group)], bodies=[b"y"])
    assert cluster.state() == CLOSED
    assert len(cluster.worker.held) == FAILURES


def test_a_probe_that_fails_opens_it_for_as_long_again() -> None:
    cluster = Cluster()
    cluster.say(cluster.half_open(), ATTEMPT_FAILED)
    assert cluster.state() == OPEN
    cluster.world.pass_time(RESET - 1)
    assert not cluster.worker.held
    cluster.world.pass_time(1)
    assert len(cluster.worker.held) == 1


def test_half_open_with_nothing_to_do_it_waits_for_the_next_message() -> None:
    cluster = Cluster()
    cluster.publish(3)
    cluster.fail(3, outcome=ACK)
    cluster.world.pass_time(RESET)
    cluster.publish(2)
    assert len(cluster.worker.held) == 1
    assert cluster.state() == HALF_OPEN


def stop(cluster: Cluster, probe: DeliveryItem) -> None:
    cluster.supervisor.query("dead", cluster.worker.number, 0, False, False, b"")


def die(cluster: Cluster, probe: DeliveryItem) -> None:
    cluster.supervisor.query("dead", cluster.worker.number, probe.id, True, False, b"died")


def give_back(cluster: Cluster, probe: DeliveryItem) -> None:
    cluster.worker.release([(probe.id, probe.lease)])


def park(cluster: Cluster, probe: DeliveryItem) -> None:
    cluster.say(probe, ATTEMPT_UNKNOWN, DEAD_LETTER)


def purge(cluster: Cluster, probe: DeliveryItem) -> None:
    cluster.say(probe, ATTEMPT_UNKNOWN, DEAD_LETTER)
    cluster.publisher.query("purge", "dlq.q", [])


def forward(cluster: Cluster, probe: DeliveryItem) -> None:
    cluster.say(probe, ATTEMPT_UNKNOWN, ACK)


def cancel(cluster: Cluster, probe: DeliveryItem) -> None:
    cluster.publisher.query("raise-epoch", probe.group, 2, "coord", "cancel")
    cluster.worker.release([(probe.id, probe.lease)])


def leave(cluster: Cluster, probe: DeliveryItem) -> None:
    """Another message of its group ends the group, and what the worker does with the probe is refused."""
    other = cluster.world.peer(50, consume={"end": 1}, role="worker")
    cluster.publisher.publish([("end", "e")], [(0, 1, probe.group, 1)], [b"e"])
    [end] = other.held.values()
    other.settle([], acks=[(end.id, end.lease, 1, end.group)])
    del cluster.worker.held[probe.id]


def lose(cluster: Cluster, probe: DeliveryItem) -> None:
    """It never arrived: the connection broke."""
    cluster.worker.held.clear()
    cluster.worker.hello()


def forget(cluster: Cluster, probe: DeliveryItem) -> None:
    """The broker is killed."""
    cluster.world.restart()
    for peer in cluster.world.peers.values():
        peer.held.clear()
        peer.hello()
    cluster.supervisor.query("roster", [(cluster.worker.number, ["q"])])


@pytest.mark.parametrize("end", [stop, die, give_back, park, purge, forward, cancel, leave, lose, forget])
def test_however_a_probe_ends_the_breaker_is_not_stuck(end: Any) -> None:
    cluster = Cluster()
    probe = cluster.half_open()
    cluster.publish(3)
    end(cluster, probe)
    cluster.world.pass_time(0.01)
    if end in (stop, die):
        cluster.workers = [cluster.hire(30)]
    cluster.world.pass_time(RESET)
    for _ in range(20):
        for item in list(cluster.worker.held.values()):
            cluster.say(item, ATTEMPT_SUCCEEDED, ACK)
    assert cluster.state() == CLOSED
    [queue] = cluster.supervisor.query("stats", "q")["queues"]
    assert (queue["ready"], queue["leased"], queue["delayed"]) == (0, 0, 0)


def cancelled(cluster: Cluster, group: str) -> bool:
    """Cancel it; whether its message is delivered at once, to be passed through, which is done."""
    cluster.publisher.query("cancel", group, "no more", [])
    found = [item for item in cluster.worker.held.values() if item.group == group]
    for item in found:
        assert item.extra is not None
        assert item.extra.cancelled == "no more"
        cluster.say(item, ATTEMPT_UNKNOWN, ACK)
    return bool(found)


def test_what_is_cancelled_does_not_wait_for_the_breaker() -> None:
    cluster = Cluster()
    cluster.open()
    cluster.publish(1, priority=5)
    ready, *_ = [message for message in cluster.world.machine.state.queue("q").iterate_ready() if message.priority == 0]
    assert ready.group is not None
    assert cancelled(cluster, ready.group.id)
    assert cluster.state() == OPEN
    assert not cluster.worker.held


def test_what_is_cancelled_does_not_wait_for_the_probe() -> None:
    cluster = Cluster()
    probe = cluster.half_open()
    waiting = next(cluster.world.machine.state.queue("q").iterate_ready())
    assert waiting.group is not None
    assert cancelled(cluster, waiting.group.id)
    assert list(cluster.worker.held) == [probe.id]
    cluster.say(probe, ATTEMPT_SUCCEEDED, ACK)
    assert cluster.state() == CLOSED


def test_what_comes_on_after_its_group_was_cancelled_does_not_wait_either() -> None:
    cluster = Cluster()
    cluster.open()
    before = cluster.world.peer(60, consume={"earlier": 1}, role="worker")
    cluster.publisher.publish([("earlier", "e")], [(0, 1, "late", 1)], [b"e"])
    [item] = before.held.values()
    cluster.publisher.query("cancel", "late", "no more", [])
    before.settle([("q", "a")], moves=[(item.id, item.lease, 0, 1, "late")], bodies=[b"x"])
    assert [held.group for held in cluster.worker.held.values()] == ["late"]


def test_declared_as_before_it_stays_as_it_is_and_otherwise_is_reset() -> None:
    cluster = Cluster()
    cluster.open()
    cluster.declare(FAILURES, RESET)
    assert cluster.state() == OPEN
    cluster.declare(FAILURES, 5)
    assert cluster.state() == CLOSED
    assert len(cluster.worker.held) == 3
    cluster.declare(0, 0)
    assert cluster.state() == ""
    cluster.fail(3)
    assert len(cluster.worker.held) == 3


def test_a_restart_of_the_broker_keeps_the_breaker_and_closes_it() -> None:
    cluster = Cluster()
    cluster.open()
    cluster.world.restart()
    cluster.supervisor.hello()
    assert cluster.state() == CLOSED
    assert cluster.breaker.max_failures == FAILURES


@pytest.mark.parametrize(("failures", "reset"), [(-1, 1.0), (1, -1.0), (1, float("nan")), (1, float("inf"))])
def test_a_breaker_that_makes_no_sense_is_refused(failures: int, reset: float) -> None:
    cluster = Cluster()
    options = QueueOptions("q", breaker_failures=failures, breaker_reset=reset)
    assert "must be finite and not negative" in cluster.supervisor.query("declare", [options])["refused"]


class RandomTimes(RuleBasedStateMachine):
    """Whatever happens: open delivers nothing, half-open one at a time, and in the end everything is done."""

    @initialize(workers=st.integers(1, 3), prefetch=st.integers(1, 4))
    def begin(self, workers: int, prefetch: int) -> None:
        self.cluster = Cluster(workers, prefetch)
        self.hired = 10

    def _some(self, place: int) -> Peer:
        return self.cluster.workers[place % len(self.cluster.workers)]

    def _delivered(self) -> int:
        return self.cluster.world.machine.state.queue("q").delivered_count

    @rule(count=st.integers(1, 4))
    def publish(self, count: int) -> None:
        self.cluster.publish(count)

    @rule(
        place=st.integers(0, 2),
        which=st.integers(0, 3),
        verdict=st.sampled_from([ATTEMPT_FAILED, ATTEMPT_FAILED, ATTEMPT_SUCCEEDED, ATTEMPT_UNKNOWN]),
        outcome=st.sampled_from([RETRY, DEAD_LETTER, ACK]),
    )
    def settle(self, place: int, which: int, verdict: int, outcome: int) -> None:
        worker = self._some(place)
        held = list(worker.held.values())
        if held:
            self.cluster.say(held[which % len(held)], verdict, outcome, worker)

    @rule(place=st.integers(0, 2))
    def move_all(self, place: int) -> None:
        worker = self._some(place)
        moves = [(item.id, item.lease, 0, 1, item.group) for item in worker.held.values()]
        worker.settle([("next", "b")], moves=moves, bodies=[b"y"] * len(moves))

    @rule(place=st.integers(0, 2), guilty=st.booleans())
    def die(self, place: int, guilty: bool) -> None:
        worker = self._some(place)
        culprit = next(iter(worker.held), 0) if guilty else 0
        self.cluster.supervisor.query("dead", worker.number, culprit, guilty, False, b"died" if guilty else b"")
        self.cluster.world.pass_time(0.01)
        self.hired += 1
        self.cluster.workers[self.cluster.workers.index(worker)] = self.cluster.hire(self.hired)

    @rule(place=st.integers(0, 2))
    def release(self, place: int) -> None:
        worker = self._some(place)
        worker.release([(item.id, item.lease) for item in list(worker.held.values())])

    @rule(seconds=st.sampled_from([1.0, RESET / 2, RESET]))
    def pass_time(self, seconds: float) -> None:
        self.cluster.world.pass_time(seconds)

    @rule(which=st.integers(0, 3))
    def cancel(self, which: int) -> None:
        live = list(self.cluster.world.machine.state.groups)
        if live:
            self.cluster.publisher.query("cancel", live[which % len(live)], "no more", [])

    @rule()
    def requeue(self) -> None:
        self.cluster.publisher.query("requeue", "dlq.q", [])

    @invariant()
    def open_delivers_nothing_and_half_open_one_at_a_time(self) -> None:
        breaker, world = self.cluster.breaker, self.cluster.world
        # What is cancelled goes through whatever the breaker says.
        assert not world.machine.state.queue("q").has_cancelled_next() or all(
            len(worker.held) >= self.cluster.prefetch for worker in self.cluster.workers
        )
        before = self._delivered()
        world.machine.state.changed_queues[world.machine.state.queue("q")] = None
        world.round()
        if breaker.state == OPEN:
            assert self._delivered() == before
        if breaker.state == HALF_OPEN:
            assert self._delivered() - before <= 1
        check_whole(world.machine)
        assert_same(picture(world.recover(), clocks_agree=True), picture(world.machine, clocks_agree=True))

    def teardown(self) -> None:
        cluster = getattr(self, "cluster", None)
        if cluster is None:
            return
        for _ in range(200):
            cluster.world.pass_time(RESET)
            held = [(worker, item) for worker in cluster.workers for item in worker.held.values()]
            if not held:
                break
            for worker, item in held:
                cluster.say(item, ATTEMPT_SUCCEEDED, ACK, worker)
        [queue] = cluster.supervisor.query("stats", "q")["queues"]
        assert (queue["ready"], queue["leased"], queue["delayed"]) == (0, 0, 0)


TestRandomTimes = RandomTimes.TestCase
TestRandomTimes.settings = settings(max_examples=40, stateful_step_count=30)
