"""A broker process that is killed and started again keeps its state, and its peers reconnect automatically."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from broker_process import BrokerProcess

from stageflow_brokers.api import (
    ACK,
    DEAD_LETTER,
    FLAG_START,
    FLAG_WATCH,
    RETRY,
    TERMINAL,
    Arrival,
    DeliveryItem,
    GatherOpen,
    Listener,
    PublishAnswer,
    QueueOptions,
    SettleItem,
    Target,
)
from stageflow_brokers.offline.settlements import count_settlements
from stageflow_brokers.testing.contract import TIMEOUT_SECONDS, Peer


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    """A broker without a supervisor."""
    running = BrokerProcess(tmp_path)
    yield running
    running.close()


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[BrokerProcess]:
    """A broker that waits for its supervisor."""
    running = BrokerProcess(tmp_path, supervised=True)
    yield running
    running.close()


def restart(broker: BrokerProcess) -> None:
    broker.kill()
    broker.start()


def back(*peers: Peer) -> None:
    """Wait until these are talking to the broker that was started last."""
    for peer in peers:
        peer.wait_until(lambda peer=peer: len(peer.epochs) >= 2, "a second welcome")


def description_of(peer: Peer, groups: list[str]) -> dict[str, Any]:
    """What a lookup says of groups, without what a restart changes."""
    found = peer.ask.inspect(groups)
    for group in found.values():
        group["messages"].sort(key=lambda message: message["id"])
        for message in group["messages"]:
            del message["holder"]
    return found


def test_whatever_was_in_the_broker_is_in_it_again(broker: BrokerProcess) -> None:
    peer = Peer(broker)
    peer.ask.declare([QueueOptions("q", 3, True, "coordinator", "dead"), QueueOptions("paused", 1)])
    groups = ["ready", "delayed", "dead", "gathering", "stepped", "raised"]
    for group in groups[1:]:
        peer.start("work", group, group.encode(), digest=group.encode())
    peer.broker.consume("work", 5)
    by_group = {received.item.group: received for received in peer.receive(5)}
    leases = {group: received.lease for group, received in by_group.items()}
    peer.broker.checkpoint(*leases["stepped"], "paid", b"42").result(TIMEOUT_SECONDS)
    peer.drop(*by_group.values())
    peer.broker.settle(
        [Target("joined", "join")],
        [],
        [],
        [
            SettleItem([leases["delayed"]], RETRY, [], 3600.0, b"boom"),
            SettleItem([leases["dead"]], DEAD_LETTER, [], 0.0, b"hopeless"),
            SettleItem([leases["gathering"]], ACK, opens=[GatherOpen("k", 2, 0, 4)]),
        ],
        [b"base"],
    )
    peer.broker.publish([], [], [b"one"], arrivals=[Arrival("k", "1", 3, "gathering", 1)]).result(TIMEOUT_SECONDS)
    peer.broker.release([leases["stepped"], leases["raised"]], "work", 0)
    peer.ask.raise_epoch("raised", 2, "coordinator", "cancel")
    peer.start("q", "ready", b"body", digest=b"ready")
    peer.publish("q", b"urgent", priority=3)
    peer.ask.pause("paused")
    peer.ask.set_fact("history", "made")
    before, stats = description_of(peer, groups), peer.ask.stats("")
    restart(broker)
    back(peer)
    assert description_of(peer, groups) == before
    after = peer.ask.stats("")
    assert after["epoch"] == stats["epoch"] + 1
    for key in ("messages", "groups", "live_bytes"):
        assert after[key] == stats[key]
    of_interest = ("name", "ready", "delayed", "dead", "state")
    queues = [[queue[key] for key in of_interest] for queue in stats["queues"]]
    assert [[queue[key] for key in of_interest] for queue in after["queues"]] == queues
    assert peer.ask.get_fact("history") == "made"
    assert peer.start("q", "ready", digest=b"another") == [(0, "conflict", "ready")]
    # And it goes on from there.
    peer.broker.consume("joined", 1)
    peer.broker.publish([], [], [b"two"], arrivals=[Arrival("k", "2", 3, "gathering", 1)]).result(TIMEOUT_SECONDS)
    assert peer.receive()[0].body == b"baseonetwo"
    assert peer.ask.requeue("dlq.work", [])["requeued"] == 1


def test_a_step_that_was_confirmed_is_there_after_a_restart(broker: BrokerProcess) -> None:
    peer = Peer(broker)
    peer.start("work", "g", b"body")
    peer.broker.consume("work", 1)
    (held,) = peer.receive()
    peer.broker.checkpoint(*held.lease, "paid", b"42").result(TIMEOUT_SECONDS)
    peer.drop(held)
    peer.broker.consume("work", 0)
    restart(broker)
    back(peer)
    peer.broker.consume("work", 1)
    (again,) = peer.receive()
    assert again.item.extra is not None
    assert again.item.extra.steps == {"paid": b"42"}


def test_a_worker_keeps_what_it_holds_and_its_settlement_counts_once(supervised: BrokerProcess) -> None:
    supervisor, worker, other = (Peer(supervised, role=role) for role in ("supervisor", "worker", "worker"))
    supervisor.ask.set_workers([])
    supervisor.publish("q", b"1", b"2", b"3", b"4", group="g")
    worker.broker.consume("q", 2)
    one, two = worker.receive(2)
    other.ask.ping()  # all of them have been welcomed once
    restart(supervised)
    back(supervisor, worker, other)
    other.broker.consume("q", 9)
    supervisor.ask.set_workers([(worker.broker.peer, ["q"]), (other.broker.peer, ["q"])])
    # The queue is open, and what the worker holds is still its own.
    assert [received.body for received in other.receive(2)] == [b"3", b"4"]
    assert worker.lost == []
    worker.move(one, "next", b"1, done")
    worker.move(two, "next", b"2, done")
    worker.ask.ping()
    worker.move(one, "next", b"again")
    worker.wait_until(lambda: worker.stale == [one.item.id], "the second settlement refused")
    assert worker.ask.stats("next")["queues"][0]["ready"] == 2
    assert other.is_quiet()


def test_a_queue_opens_when_each_of_its_workers_has_reported_or_is_dead(supervised: BrokerProcess) -> None:
    supervisor, dying = Peer(supervised, role="supervisor"), Peer(supervised, role="worker")
    supervisor.ask.declare([QueueOptions("q", 3)])
    supervisor.ask.set_workers([])
    supervisor.publish("q", b"1", b"2")
    dying.broker.consume("q", 1)
    (held,) = dying.receive()
    supervised.kill()
    dying.broker.close(timeout=1.0)  # it never reconnects, like a killed process
    supervised.start()
    back(supervisor)
    heir = Peer(supervised, role="worker")
    heir.broker.consume("q", 9)
    assert heir.is_quiet()
    supervisor.ask.set_workers([(dying.broker.peer, ["q"])])
    assert heir.is_quiet()
    assert heir.ask.stats("q")["queues"][0]["state"] == "closed"
    # The message it ran when it died is known, and charged, although the broker has restarted since.
    supervisor.ask.report_death(dying.broker.peer, held.item.id, True, False, b"SIGKILL")
    first, second = heir.receive(2)
    assert (first.body, second.body) == (b"1", b"2")
    assert first.item.extra is not None
    assert (first.item.extra.deaths, first.item.extra.failure) == (1, b"SIGKILL")
    assert second.item.extra is None


def test_questions_and_publishes_on_their_way_are_answered_by_the_next_broker(broker: BrokerProcess) -> None:
    peer = Peer(broker)
    peer.publish("q", b"1")
    peer.broker.consume("q", 1)
    (received,) = peer.receive()
    broker.kill()
    answer = peer.broker.admin.stats("q")
    published = peer.broker.publish([Target("q")], [(0, 1)], [b"2"])
    step = peer.broker.checkpoint(*received.lease, "step", b"value")
    assert [future.done() for future in (answer, published, step)] == [False] * 3
    broker.start()
    assert answer.result(TIMEOUT_SECONDS)["queues"][0]["leased"] == 1
    assert published.result(TIMEOUT_SECONDS).refused == []
    assert step.result(TIMEOUT_SECONDS) is None
    peer.ack(received)
    assert peer.receive()[0].body == b"2"


def test_a_watcher_is_notified_after_a_restart_too(broker: BrokerProcess) -> None:
    peer = Peer(broker)
    for group in ("ended", "parked", "left"):
        peer.start("q", group, watch=True)
    peer.watched = ["ended", "parked", "left"]
    peer.broker.consume("q", 9)
    by_group = {received.item.group: received for received in peer.receive(3)}
    peer.move(by_group["ended"], "finished", b"end", label=":completed", flags=TERMINAL)
    peer.drop(by_group["parked"])
    peer.broker.settle([], [], [], [SettleItem([by_group["parked"].lease], DEAD_LETTER)], [])
    peer.ack(by_group["left"], flags=1)
    peer.ask.ping()
    peer.pushes.clear()
    peer.notices.clear()
    restart(broker)
    back(peer)
    peer.wait_until(lambda: peer.pushes == [("ended", ":completed", b"end")], "how it ended")
    peer.wait_until(lambda: {("parked", "parked"), ("gone", "left")} <= set(peer.notices), "what became of the others")


class Mover(Listener):
    """Settles whatever it is given into the next queue, at once."""

    def __init__(self, broker: BrokerProcess, queue: str, target: Target) -> None:
        self.target = target
        self.holding_now: dict[int, int] = {}
        self.connection = broker.connect(self, role="worker", name=queue)
        self.connection.consume(queue, 16)

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        moves = [(item.id, item.lease, 0, len(body) + 1, item.group) for item, body in zip(items, bodies, strict=True)]
        self.connection.settle([self.target], moves, [], [], [body + b"!" for body in bodies])


class Starter(Listener):
    """Starts groups and remembers how they ended."""

    def __init__(self, broker: BrokerProcess, count: int) -> None:
        self.ended: Counter[str] = Counter()
        self.bodies: set[bytes] = set()
        self.open = {f"g{number}" for number in range(count)}
        self.all = threading.Event()
        self.connection = broker.connect(self, name="starter")

    def on_pushes(self, pushes: list[tuple[str, str, bytes]]) -> None:
        for group, _, body in pushes:
            self.ended[group] += 1
            self.bodies.add(body)
            self.open.discard(group)
        if not self.open:
            self.all.set()

    def watching(self) -> list[str]:
        return list(self.open)


def test_nothing_is_lost_or_doubled_while_the_broker_is_killed_again_and_again(broker: BrokerProcess) -> None:
    count = 300
    queues = ["q0", "q1", "q2"]
    targets = [Target("q1", "q1"), Target("q2", "q2"), Target("finished", ":completed", TERMINAL)]
    movers = [Mover(broker, queue, target) for queue, target in zip(queues, targets, strict=True)]
    starter = Starter(broker, count)
    answers = []

    def publish(number: int) -> None:
        item = (0, 1, f"g{number}", 1, FLAG_START | FLAG_WATCH, 0, 0.0, 0.0, b"d")
        answers.append(starter.connection.publish([Target("q0", "q0")], [item], [b"b"]))

    for kills in range(6):
        for number in range(kills * 50, kills * 50 + 50):
            publish(number)
        if kills % 2:
            answers[-1].result(TIMEOUT_SECONDS)
        restart(broker)
    assert starter.all.wait(TIMEOUT_SECONDS)
    for answer in answers:
        refused = answer.result(TIMEOUT_SECONDS).refused
        # A frame whose first answer was lost may only get the answer that its group exists, or existed.
        assert all(why in ("exists", "look-again") for _, why, _ in refused)
    assert starter.bodies == {b"b!!!"}
    stats = Peer(broker).ask.stats("")
    assert stats["messages"] == count
    by_name = {queue["name"]: queue for queue in stats["queues"]}
    assert by_name["finished"]["ready"] == count
    assert stats["epoch"] == 7
    for mover in movers:
        mover.connection.close()
    broker.kill()
    accounts = count_settlements(broker.journal)
    assert accounts.unnamed == 0
    assert set(accounts.settled.values()) == {1}
    assert len(accounts.settled) == count * 3
    broker.start()
    assert isinstance(answers[0].result(), PublishAnswer)
