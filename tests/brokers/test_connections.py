"""Broken connections: no call waits forever, and no state is kept of a peer that has gone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from broker_process import BrokerProcess

from stageflow_brokers.api import BrokerUnavailable, DeliveryItem, Listener
from stageflow_brokers.core import wire
from stageflow_brokers.core.state import MAX_REMEMBERED_PEERS
from stageflow_brokers.engine.engine import Engine, Frame, Outgoing
from stageflow_brokers.memory import MemoryBroker
from stageflow_brokers.testing.contract import TIMEOUT_SECONDS, Peer
from stageflow_brokers.zeromq import server as zeromq_server
from stageflow_brokers.zeromq.client import ZmqClient


class Failing(Peer):
    """Its listener fails at the first delivery."""

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        raise ValueError("a bug of the listener")


class BrokenEngine(Engine):
    """Fails in the middle of its work."""

    broken = False

    def round(self, frames: Any, *, more: bool = False) -> list[Outgoing]:
        taken: list[Frame] = list(frames)
        if self.broken and taken:
            raise RuntimeError("a bug of the broker")
        return super().round(taken, more=more)


def test_a_broker_in_this_process_that_fails_fails_its_waiting_callers(caplog: pytest.LogCaptureFixture) -> None:
    engine = BrokenEngine(journal_dir=None)
    hub = MemoryBroker(engine=engine)
    peer, other = Peer(hub), Peer(hub)
    peer.ask.ping()
    other.ask.ping()
    engine.broken = True
    with pytest.raises(BrokerUnavailable, match="a bug of the broker"):
        peer.ask.ping()
    other.wait_until(lambda: other.closed, "the end of every connection")
    with pytest.raises(BrokerUnavailable, match="open another"):
        other.ask.ping()
    with pytest.raises(BrokerUnavailable, match="a bug of the broker"):
        Peer(hub)
    assert "has failed" in caplog.text


def test_a_listener_that_fails_ends_its_own_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    hub = MemoryBroker()
    failing, other = Failing(hub), Peer(hub)
    other.publish("q", b"1")
    failing.broker.consume("q", 1)
    failing.wait_until(lambda: failing.closed, "the end of the connection")
    other.broker.consume("q", 1)
    assert other.receive()[0].body == b"1"
    assert "a bug of the listener" in caplog.text
    hub.close()


def test_a_closed_broker_notifies_every_peer() -> None:
    hub = MemoryBroker()
    peer = Peer(hub)
    peer.ask.ping()
    hub.close()
    peer.wait_until(lambda: peer.closed == ["the broker was closed"], "the end")
    peer.broker.close()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    """A broker without a supervisor."""
    running = BrokerProcess(tmp_path)
    yield running
    running.close()


def test_a_listener_that_fails_ends_its_connection_to_a_process_too(
    broker: BrokerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        failing = Failing(broker)
        failing.publish("q", b"1")
        failing.broker.consume("q", 1)
        failing.wait_until(lambda: failing.closed, "the end of the connection")
    assert "a bug of the listener" in caplog.text


def test_a_connection_without_a_broker_can_be_closed(tmp_path: Path) -> None:
    peer = Peer(Address(f"ipc://{tmp_path}/nobody"))
    waiting = peer.broker.admin.ping()
    peer.broker.close(timeout=0.05)
    with pytest.raises(BrokerUnavailable, match="closed"):
        waiting.result(TIMEOUT_SECONDS)


@pytest.fixture
def probing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Engine]]:
    """A server in a thread, which looks all the time whether its peers are there."""
    monkeypatch.setattr(zeromq_server, "PROBE_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(zeromq_server, "IDLE_SECONDS", 0.01)
    engine = Engine(journal_dir=None)
    server = zeromq_server.Server(engine, f"ipc://{tmp_path}/broker")
    stopping = threading.Event()
    thread = threading.Thread(target=server.run, args=(stopping.is_set,))
    thread.start()
    yield f"ipc://{tmp_path}/broker", engine
    stopping.set()
    thread.join(TIMEOUT_SECONDS)
    server.close()


class Address:
    """A hub for `Peer` that is only an address."""

    def __init__(self, address: str) -> None:
        self.address = address

    def connect(self, listener: Any, *, role: str = "client", name: str = "") -> ZmqClient:
        return ZmqClient(self.address, listener, role=role, name=name)


def test_a_peer_that_vanishes_is_forgotten_and_its_messages_return(probing: tuple[str, Engine]) -> None:
    address, engine = probing
    peer = Peer(Address(address))
    peer.publish("q", b"1")
    context = zmq.Context()
    gone = context.socket(zmq.DEALER)
    gone.setsockopt(zmq.ROUTING_ID, b"\x01gone...")
    gone.connect(address)
    hello = wire.encode((wire.PROTOCOL, "client", "gone", 1, 1, [("q", 1)], [], [], 1))
    gone.send_multipart([wire.HELLO, hello, b""])
    while not wire.decode_broker_frame(gone.recv_multipart()[0]).deliveries:
        pass
    gone.close(0)
    context.term()
    peer.broker.consume("q", 1)
    assert peer.receive()[0].body == b"1"
    assert peer.ask.stats("")["sessions"] == 1
    # It may come back with frames that were taken, so its last number is kept, for so many and no more.
    assert len(engine.machine.state.last_frames) == 1
    for number in range(MAX_REMEMBERED_PEERS + 10):
        engine.machine.state.remember_peer(number + 1, 1)
    assert len(engine.machine.state.last_frames) == MAX_REMEMBERED_PEERS
    peer.broker.close()


def test_no_state_is_kept_of_a_peer_that_says_goodbye(probing: tuple[str, Engine]) -> None:
    address, engine = probing
    staying = Peer(Address(address))
    for _ in range(3):
        leaving = Peer(Address(address))
        leaving.publish("q", b"1")
        leaving.broker.close()
    while staying.ask.stats("")["sessions"] != 1:
        pass
    assert list(engine.machine.state.sessions) == [staying.broker.peer]
    assert engine.machine.state.last_frames == {}
    staying.broker.close()


def test_more_connections_than_there_are_descriptors_end_no_peer(tmp_path: Path) -> None:
    """Most of them send nothing: connected peers work on, and later ones connect when others have left."""
    broker = BrokerProcess(tmp_path, descriptors=600)
    context = zmq.Context()
    try:
        early = Peer(broker)
        early.publish("q", b"1")
        crowd = []
        for _ in range(700):
            dealer = context.socket(zmq.DEALER)
            dealer.linger = 0
            dealer.connect(broker.options["address"])
            crowd.append(dealer)
            if len(crowd) % 10 == 0:
                early.ask.ping()
        assert early.ask.stats("q")["queues"][0]["ready"] == 1
        assert broker.process is not None
        taken = len(list(Path(f"/proc/{broker.process.pid}/fd").iterdir()))
        assert 300 < taken < 600
        for dealer in crowd:
            dealer.close()
        late = Peer(broker)
        assert late.ask.stats("q")["queues"][0]["ready"] == 1
    finally:
        context.destroy(linger=0)
        broker.close()


@pytest.mark.parametrize("name", ["s" * 200, "a\0b", "\ud800"], ids=["too long", "with a NUL", "no UTF-8"])
def test_an_address_that_cannot_be_connected_to_ends_the_connection_with_a_reason(name: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)

    class Told(Listener):
        why = ""

        def on_closed(self, reason: str) -> None:
            self.why = reason

    told = Told()
    client = ZmqClient(f"ipc://{tmp_path}/{name}", told)
    with pytest.raises(BrokerUnavailable, match="cannot be reached"):
        client.admin.ping().result(20)
    client.close()
    assert "cannot be reached" in told.why
