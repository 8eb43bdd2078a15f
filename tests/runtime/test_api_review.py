"""Regressions from a code review: starts that race with a hello, histories read too early, leftover files."""

from __future__ import annotations

import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from stageflow_actors import InstanceNotFound, Runtime, Workflow
from stageflow_actors.runtime.client.client import Client
from stageflow_brokers.api import Listener, PublishItem, Target
from stageflow_brokers.client.connection import Connection
from stageflow_brokers.core import wire
from stageflow_brokers.types import FLAG_START, FLAG_WATCH

flow = Workflow("flow").add_stage(lambda context: None, id="only")
waits = Workflow("waits").add_signal("go")


class Talk(Connection):
    """A connection whose frames go nowhere."""

    def _transmit(self, op: bytes, header: bytes, blob: bytes) -> None: ...

    def _wake(self) -> None: ...

    def send_hello(self) -> None: ...

    def close(self, timeout: float = 5.0) -> None: ...


class Watcher(Listener):
    def __init__(self) -> None:
        self.watched: list[str] = []

    def watching(self) -> list[str]:
        return list(self.watched)


def test_what_is_being_published_is_never_asked_after_in_a_hello() -> None:
    watcher = Watcher()
    talk = Talk(watcher)
    seen: list[list[str]] = []

    def on_numbered() -> None:
        assert talk._lock.locked(), "a hello could be made between the watch and the frame"
        watcher.watched.append("new")

    item = PublishItem(0, 1, "new", 1, FLAG_START | FLAG_WATCH)
    talk.publish([Target("q", "a")], [item], [b"x"], on_numbered=on_numbered)
    seen.append(wire.decode_hello(talk._hello()[1]).watching)
    assert seen == [[]]
    assert watcher.watched == ["new"]


def test_a_start_carries_the_count_of_finished_instances_from_when_the_history_was_read_not_from_when_it_is_sent() -> (
    None
):
    program: Any = Client()
    sent: list[int] = []

    class Reader:
        def get_many(self, ids: list[str]) -> dict[str, Any]:
            program._session.history_sequence = (
                99  # another thread hears that something has left, behind the back of this reading
            )
            return {}

    class Broker:
        def publish(self, targets: Any, items: Any, bodies: Any, **options: Any) -> Future[Any]:
            sent.extend(item[9] for item in items)
            raise RuntimeError("enough has been seen")

    program._session.history_sequence = 7
    program._session._reader = Reader()
    program._session.connection = Broker()
    with pytest.raises(RuntimeError):
        program.submit(flow, {"n": 1}, instance_id="chosen")
    assert sent == [7]


def test_starting_and_stopping_leaves_no_descriptor_and_no_directory_of_sockets(tmp_path: Path) -> None:
    os.environ["XDG_RUNTIME_DIR"] = str(tmp_path / "run")
    try:
        (tmp_path / "run").mkdir(mode=0o700)
        with Runtime(flow, data_dir=tmp_path / "data"):
            pass
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(2):
            with Runtime(flow, data_dir=tmp_path / "data") as runtime:
                assert runtime.execute(flow, {"n": 1}, timeout=20).success
        assert len(os.listdir("/proc/self/fd")) == before
        assert os.listdir(tmp_path / "run") == []
    finally:
        del os.environ["XDG_RUNTIME_DIR"]


def test_a_signal_to_an_instance_that_is_not_live_is_an_error(tmp_path: Path) -> None:
    with Runtime(waits, data_dir=tmp_path / "data") as runtime:
        instance = runtime.submit(waits, {})
        instance.signal("go")
        assert instance.result(timeout=20).success
        with pytest.raises(InstanceNotFound):
            for _ in range(200):  # until it has left
                instance.signal("go")
