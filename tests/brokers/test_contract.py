"""The contract of the port, on the in-memory broker and on the broker process alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from broker_process import BrokerProcess

from stageflow_brokers.core.machine import Limits
from stageflow_brokers.memory import MemoryBroker
from stageflow_brokers.testing.contract import MAX_MESSAGE_BYTES, BrokerContract, Hub

KINDS = ["memory", "process"]


def running(kind: str, directory: Path, *, supervised: bool) -> Iterator[Hub]:
    if kind == "memory":
        hub = MemoryBroker(limits=Limits(max_message_bytes=MAX_MESSAGE_BYTES), supervised=supervised)
        yield hub
        hub.close()
    else:
        broker = BrokerProcess(directory, supervised=supervised, max_message_bytes=MAX_MESSAGE_BYTES)
        yield broker
        broker.close()


@pytest.fixture(params=KINDS)
def hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hub]:
    """A broker without a supervisor."""
    yield from running(request.param, tmp_path, supervised=False)


@pytest.fixture(params=KINDS)
def supervised_hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hub]:
    """A broker that waits for its supervisor."""
    yield from running(request.param, tmp_path, supervised=True)


class TestBrokers(BrokerContract):
    """Both of them."""
