"""A full disk is an error type of its own, on the wire and in the API; no text of an error decides its type."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stageflow_actors import QueueFull, StageFlowError
from stageflow_actors.runtime.messaging.errors import translate_error
from stageflow_brokers.api import FLAG_START, BrokerError, Listener, PublishItem, Refused, StorageFull, Target
from stageflow_brokers.client.unconfirmed import UnconfirmedFrame, resolve
from stageflow_brokers.core import wire
from stageflow_brokers.engine.engine import Engine
from stageflow_brokers.memory import MemoryBroker
from stageflow_brokers.testing.simulated_disk import SimulatedDisk

IDS = ("disk-42", "order-42")
PATIENCE = 20.0


class SmallDisk:
    """A broker whose disk a test fills."""

    def __init__(self) -> None:
        self.files = SimulatedDisk()
        self.hub = MemoryBroker(
            engine=Engine(
                journal_dir=Path("/journal"), files=self.files, segment_bytes=16 << 10, warn=lambda text: None
            )
        )
        self.port = self.hub.connect(Listener())

    def start(self, id: str, size: int = 2_000) -> BrokerError | None:
        answer = self.port.publish([Target("q", "a")], [PublishItem(0, size, id, 1, FLAG_START)], [bytes(size)])
        error = answer.exception(PATIENCE)
        assert error is None or isinstance(error, BrokerError)
        return error

    def fill(self) -> None:
        self.files.size_bytes = self.files.used()
        assert any(self.start(f"more-{number}") is not None for number in range(1_000)), "a start is refused in the end"


@pytest.fixture
def small_disk() -> Iterator[SmallDisk]:
    disk = SmallDisk()
    yield disk
    disk.hub.close()


def test_a_start_on_a_full_disk_gets_one_error_type_whatever_its_id(small_disk: SmallDisk) -> None:
    small_disk.fill()
    errors = {id: small_disk.start(id) for id in IDS}
    assert {id: type(error) for id, error in errors.items()} == dict.fromkeys(IDS, StorageFull)
    ours = [translate_error(error) for error in errors.values() if error is not None]
    assert [type(error) for error in ours] == [QueueFull, QueueFull]
    assert all("nearly full; free some space" in str(error) for error in ours)


def test_a_refusal_that_has_nothing_to_do_with_the_disk_gets_one_error_type_whatever_the_id(
    small_disk: SmallDisk,
) -> None:
    errors = {id: small_disk.port.admin.cancel(id, "no longer wanted", []).exception(PATIENCE) for id in IDS}
    assert {id: (type(error), str(error)) for id, error in errors.items()} == {
        id: (Refused, f"{id} is not live") for id in IDS
    }
    assert [type(translate_error(error)) for error in errors.values() if error is not None] == [StageFlowError] * 2


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (StorageFull("the journal of orders takes nothing more"), QueueFull),
        (Refused("the disk of disk-42 is no disk"), StageFlowError),
    ],
)
def test_the_type_of_a_refusal_decides_and_never_its_text(error: Refused, ours: type[StageFlowError]) -> None:
    assert type(translate_error(error)) is ours


def answered(answer: Any) -> BaseException | None:
    pending = UnconfirmedFrame(1, wire.PUBLISH, (), b"", Future(), 0)
    resolve(pending, msgspec.msgpack.decode(wire.encode(answer)))
    assert pending.future is not None
    return pending.future.exception(0)


def test_a_peer_that_does_not_know_the_narrower_kind_reads_a_refusal() -> None:
    answer = wire.error_answer(StorageFull("full"))
    assert answer == {"error": "Refused", "kind": "StorageFull", "message": "full"}
    assert type(answered(answer)) is StorageFull
    assert type(answered(answer | {"kind": "OfALaterRelease"})) is Refused
    assert type(answered({"error": "Refused", "message": "full"})) is Refused, "a broker of an earlier release"
    assert wire.error_answer(Refused("no")) == {"error": "Refused", "message": "no"}
