"""Back pressure: a client that publishes faster than the broker confirms is slowed down, and no other client is."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq
from broker_process import BrokerProcess

from stageflow_brokers.api import TERMINAL, Listener, PublishAnswer, Target
from stageflow_brokers.client import connection as brokers_client
from stageflow_brokers.core import wire
from stageflow_brokers.core.machine import Limits
from stageflow_brokers.engine.engine import Engine
from stageflow_brokers.errors import BrokerUnavailable, PayloadTooLarge
from stageflow_brokers.memory import MemoryBroker
from stageflow_brokers.testing.contract import TIMEOUT_SECONDS, Peer
from stageflow_brokers.types import PublishItem
from stageflow_brokers.zeromq import server as zeromq_server
from stageflow_brokers.zeromq.client import ZmqClient

ROOM = 1 << 20
BODY = bytes(100_000)


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[BrokerProcess]:
    """A broker process, and a way to stop it: nothing is confirmed until it is continued."""
    running = BrokerProcess(tmp_path)
    yield running
    assert running.process is not None
    running.process.send_signal(signal.SIGCONT)
    running.close()


def freeze(broker: BrokerProcess, signum: int = signal.SIGSTOP) -> None:
    assert broker.process is not None
    broker.process.send_signal(signum)


def client_of(broker: BrokerProcess, listener: Listener, **options: Any) -> ZmqClient:
    client = ZmqClient(broker.options["address"], listener, max_unconfirmed_bytes=ROOM, **options)
    broker.clients.append(client)
    client.admin.ping().result(TIMEOUT_SECONDS)
    return client


def flood(client: ZmqClient, count: int, **options: Any) -> list[Future[PublishAnswer]]:
    return [client.publish([Target("q", "")], [(0, len(BODY))], [bytes(len(BODY))], **options) for _ in range(count)]


def test_a_program_that_publishes_faster_than_its_broker_keeps_is_slowed_down(
    stopped: BrokerProcess, eventually: Callable[..., Any]
) -> None:
    client = client_of(stopped, Listener())
    freeze(stopped)
    answers: list[Future[PublishAnswer]] = []
    looks: list[int] = []
    publisher = threading.Thread(
        target=lambda: answers.extend(flood(client, 1000, on_wait=lambda: looks.append(len(answers))))
    )
    before = psutil.Process().memory_info().rss
    publisher.start()
    eventually(lambda: len(looks) > 1, "somebody who waits for room")
    # A hundred megabytes are to be published; of these the room and one frame more are here.
    assert client._unconfirmed_bytes < ROOM + 2 * len(BODY)
    assert len(client._unconfirmed) <= ROOM // len(BODY) + 1
    assert psutil.Process().memory_info().rss - before < 40 * ROOM
    freeze(stopped, signal.SIGCONT)
    publisher.join(TIMEOUT_SECONDS)
    assert len(answers) == 1000
    assert all(answer.result(TIMEOUT_SECONDS).refused == [] for answer in answers)
    assert client._unconfirmed_bytes == 0
    assert client.admin.stats("q").result(TIMEOUT_SECONDS)["queues"][0]["ready"] == 1000


def test_settlements_checkpoints_and_queries_never_wait(stopped: BrokerProcess) -> None:
    peer = Peer(stopped)
    peer.publish("work", b"1", b"2")
    client = client_of(stopped, peer)
    peer.broker = client
    client.consume("work", 2)
    one, two = peer.receive(2)
    freeze(stopped)
    flood(client, ROOM // len(BODY) + 1)
    assert client._unconfirmed_bytes >= ROOM
    kept = client.checkpoint(*one.lease, "paid", BODY)
    peer.move(one, "next", BODY)
    client.release([two.lease], "work", 0)
    asked = client.admin.stats("next")
    assert not kept.done()
    freeze(stopped, signal.SIGCONT)
    kept.result(TIMEOUT_SECONDS)
    assert asked.result(TIMEOUT_SECONDS)["queues"][0]["ready"] == 1


def test_a_caller_that_waits_for_room_is_notified_when_it_is_not_worth_waiting(stopped: BrokerProcess) -> None:
    client = client_of(stopped, Listener())
    freeze(stopped)
    flood(client, ROOM // len(BODY) + 1)

    def give_up() -> None:
        raise InterruptedError("nobody serves it any more")

    with pytest.raises(InterruptedError):
        client.publish([Target("q", "")], [(0, 1)], [b"1"], on_wait=give_up)
    closing = threading.Thread(target=client.close, args=(0.0,))
    with pytest.raises(BrokerUnavailable, match="closed"):
        client.publish([Target("q", "")], [(0, 1)], [b"1"], on_wait=lambda: None if closing.ident else closing.start())
    closing.join(TIMEOUT_SECONDS)


def test_a_frame_larger_than_the_room_is_sent_when_there_is_any(stopped: BrokerProcess) -> None:
    client = client_of(stopped, Listener())
    large = bytes(3 * ROOM)
    for _ in range(3):
        last = client.publish([Target("q", "")], [(0, len(large))], [large])
    last.result(TIMEOUT_SECONDS)
    assert client.admin.stats("q").result(TIMEOUT_SECONDS)["queues"][0]["ready"] == 3


class Relay(Listener):
    """Publishes more than there is room for within a listener, and once more within the callback of a future."""

    def __init__(self) -> None:
        self.client: Any = None
        self.published: list[Future[PublishAnswer]] = []
        self.done = threading.Event()

    def on_deliveries(self, queue: str, items: list[Any], bodies: list[bytes]) -> None:
        self._flood()
        self.published[-1].add_done_callback(self._again)

    def _flood(self) -> None:
        for _ in range(2 * ROOM // len(BODY)):
            self.published.append(self.client.publish([Target("out", "")], [(0, len(BODY))], [BODY]))

    def _again(self, answered: Future[PublishAnswer]) -> None:
        self._flood()
        self.published[-1].add_done_callback(lambda answered: self.done.set())


@pytest.mark.parametrize("kind", ["memory", "process"])
def test_the_connections_own_thread_never_waits_for_what_only_it_can_receive(kind: str, tmp_path: Path) -> None:
    relay = Relay()
    if kind == "memory":
        hub: Any = MemoryBroker()
        relay.client = hub.connect(relay, max_unconfirmed_bytes=ROOM)
    else:
        hub = BrokerProcess(tmp_path)
        relay.client = ZmqClient(hub.options["address"], relay, max_unconfirmed_bytes=ROOM)
        hub.clients.append(relay.client)
    try:
        relay.client.consume("in", 1)
        relay.client.publish([Target("in", "")], [(0, 1)], [b"1"]).result(TIMEOUT_SECONDS)
        assert relay.done.wait(TIMEOUT_SECONDS)
        assert all(answer.result(TIMEOUT_SECONDS).refused == [] for answer in relay.published)
    finally:
        hub.close()


def test_a_call_with_too_many_names_is_refused_before_it_takes_a_number(
    stopped: BrokerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(stopped, Listener())
    monkeypatch.setattr(wire, "MAX_HEADER", 1_000)
    with pytest.raises(PayloadTooLarge, match="send fewer at once"):
        client.admin.lookup(["x" * 100] * 10)
    assert client.admin.ping().result(TIMEOUT_SECONDS)


def test_many_watches_are_requested_in_parts(stopped: BrokerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brokers_client, "MAX_WATCHED_PER_FRAME", 10)
    peer = Peer(stopped)
    groups = [f"g{number}" for number in range(35)]
    for group in groups:
        peer.start("q", group, b"1")
    peer.watched = groups
    stopped.kill()
    stopped.start()
    peer.wait_until(lambda: len(peer.epochs) >= 2, "a second welcome")
    peer.ask.ping()  # behind the questions
    ends = [PublishItem(0, 3, group, 1) for group in groups]
    peer.broker.publish([Target("fin", "end", TERMINAL)], ends, [b"end"] * 35).result(TIMEOUT_SECONDS)
    peer.wait_until(lambda: {group for group, _, _ in peer.pushes} == set(groups), "the end of all")


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Engine]]:
    """A server in a thread that lets a peer leave 200 small frames unread, or 8 MiB."""
    monkeypatch.setattr(zeromq_server, "MAX_UNREAD_FRAMES", 200)
    monkeypatch.setattr(zeromq_server, "PROBE_INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(zeromq_server, "IDLE_SECONDS", 0.01)
    engine = Engine(journal_dir=None, limits=Limits(max_unread_bytes=8 << 20))
    server = zeromq_server.Server(engine, f"ipc://{tmp_path}/broker")
    stopping = threading.Event()
    thread = threading.Thread(target=server.run, args=(stopping.is_set,))
    thread.start()
    yield f"ipc://{tmp_path}/broker", engine
    stopping.set()
    thread.join(TIMEOUT_SECONDS)
    server.close()


def test_a_subscriber_that_never_reads_is_cut_off_and_hears_so_when_it_reads(
    counting: tuple[str, Engine], eventually: Callable[..., Any]
) -> None:
    address, engine = counting
    context = zmq.Context()
    deaf = context.socket(zmq.DEALER)
    deaf.setsockopt(zmq.ROUTING_ID, b"\x01" + os.urandom(7))
    deaf.setsockopt(zmq.RCVHWM, 10)
    deaf.setsockopt(zmq.LINGER, 0)
    deaf.connect(address)
    deaf.send_multipart([wire.HELLO, wire.encode((wire.PROTOCOL, "client", "deaf", 1, 1, [], [], [], 1)), b""])
    deaf.send_multipart([wire.QUERY, wire.encode((engine.machine.state.epoch, 1, "subscribe", (True,))), b""])
    number = int.from_bytes(deaf.getsockopt(zmq.ROUTING_ID), "big")
    session = eventually(lambda: engine.machine.state.sessions.get(number), "a session")
    eventually(lambda: session in engine.machine.outbox.subscribers, "a subscription")
    worker = Peer(Hub(address))
    worker.broker.consume("q", 100)
    published = 0
    while number in engine.machine.state.sessions:
        worker.publish("q", bytes(2_000), group=f"g{published}")
        (received,) = worker.receive()
        worker.move(received, "out", bytes(2_000))
        published += 1
        assert published < 20_000, "it is never cut off"
    assert session not in engine.machine.outbox.subscribers or not session.connected
    # It reads at last: the earlier frames, and then the request for a hello.
    words: list[str] = []
    while "hello" not in words:
        assert deaf.poll(int(TIMEOUT_SECONDS * 1000)), "the word that it was cut off"
        words.extend(word for word, _ in wire.decode_broker_frame(deaf.recv_multipart()[0]).notices)
    deaf.close()
    context.term()
    worker.broker.close()


class Hub:
    """A hub for `Peer` that is only an address."""

    def __init__(self, address: str) -> None:
        self.address = address

    def connect(self, listener: Any, *, role: str = "client", name: str = "") -> ZmqClient:
        return ZmqClient(self.address, listener, role=role, name=name)
