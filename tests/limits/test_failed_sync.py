"""A broker process whose sync fails ends with the reason, acknowledges nothing, and recovers when restarted."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from broker_process import BrokerProcess

from stageflow_brokers.api import FLAG_START, Listener, PublishItem, Target
from stageflow_brokers.zeromq.client import ZmqClient
from stageflow_brokers.zeromq.process import EXIT_JOURNAL_FAILED

ENTRY = Path(__file__).with_name("failing_broker.py")


class FailingBroker(BrokerProcess):
    """`failing_broker.py` in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        directory.chmod(0o700)
        self.orders = directory / "orders"
        super().__init__(directory, command=(sys.executable, str(ENTRY)), arguments=(str(self.orders),))


def start(client: ZmqClient, name: str) -> Any:
    return client.publish([Target("q", "label")], [PublishItem(0, 4, name, 1, FLAG_START)], [b"body"])


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sf-") as path:  # a short one: it holds a socket
        yield Path(path)


def test_a_failed_sync_ends_the_broker_which_acknowledges_nothing_and_recovers(directory: Path) -> None:
    broker = FailingBroker(directory)
    client = broker.connect(Listener(), name="test")
    for number in range(20):
        start(client, f"before-{number}").result(20)
    broker.orders.write_text("fdatasync")
    doubtful = start(client, "doubtful")
    assert broker.process is not None
    _, written = broker.process.communicate(timeout=20)
    said = written.decode()
    assert broker.process.returncode == EXIT_JOURNAL_FAILED
    assert "the broker ends because its journal failed" in said
    assert "Input/output error" in said
    assert broker.orders.read_text() == "failed", "the disk worked again, and nobody tried"
    assert not doubtful.done(), "nothing was acknowledged after the failed sync"
    # It starts again, recovers from what is on disk, and takes what its client sends once more.
    broker.start()
    doubtful.result(20)
    start(client, "after").result(20)
    groups = [each["group"] for each in client.admin.peek("q", 0, 100).result(20)]
    assert sorted(groups) == sorted([*(f"before-{number}" for number in range(20)), "doubtful", "after"])
    client.close(timeout=1)
    broker.end()
