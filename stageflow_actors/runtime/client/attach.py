"""A way in for the command line: to the broker that serves a data directory, or to the directory itself at rest.

To look at a cluster at rest, its journal is read into a broker in this process, which writes nothing and takes no lock.
To change it, the directory is locked and a broker process is started on its journal for that long; nobody
consumes, so nothing is delivered. This module never makes a data directory, and runs no user code.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from stageflow_actors.errors import BrokerUnavailable
from stageflow_actors.history import HistoryReader
from stageflow_actors.runtime.messaging.broker_process import BrokerProcess
from stageflow_actors.runtime.messaging.connect import connect
from stageflow_actors.runtime.system.data_dir import DataDir, DataDirUnusable, remove_runtime_dir, runtime_dir
from stageflow_brokers.api import Broker, BrokerAdmin, Listener
from stageflow_brokers.core.machine import Limits
from stageflow_brokers.memory import MemoryBroker
from stageflow_brokers.offline.settlements import load_engine

__all__ = ["Attached", "attach", "existing", "live_address"]

T = TypeVar("T")

PATIENCE = 10.0
"""Seconds that a broker gets to answer; it answers within milliseconds unless it is stopped or starting."""


@dataclass(frozen=True)
class Attached:
    """A connection. `live`: a cluster serves the directory. `history` is None while nothing has finished in it, or
    where it was not wanted."""

    data_dir: DataDir
    broker: Broker
    history: HistoryReader | None
    live: bool

    @property
    def admin(self) -> BrokerAdmin:
        """The operations of the broker; `wait` for their answers."""
        return self.broker.admin

    def wait(self, answer: Future[T], timeout: float = PATIENCE) -> T:
        """Return the answer of an operation. Raises `BrokerUnavailable`, or `stageflow_brokers.errors.Refused`."""
        try:
            return answer.result(timeout)
        except FutureTimeout:
            raise BrokerUnavailable(
                f"the broker of {self.data_dir.path} has not answered within {timeout:g} s: it is stopped, overloaded "
                "or restarting; try again"
            ) from None


def existing(path: Path | str) -> DataDir:
    """The data directory at `path`. Raises `DataDirUnusable` if there is none, or no journal in it."""
    data_dir = DataDir(path, create=False)
    if not any(data_dir.journal.glob("*.journal")):
        if data_dir.history.exists():
            raise DataDirUnusable(
                f"the journal {data_dir.journal} is missing, while the history of what has finished here is there "
                f"({data_dir.history}): which instances were live is not known any more. Restore the journal from the "
                'backup taken with the history, or begin anew in another directory (durability="memory" keeps none)',
                path=data_dir.path,
            )
        raise DataDirUnusable(
            f"there is no journal in the data directory {data_dir.path}: nothing has run in it yet; is --data right?",
            path=data_dir.path,
        )
    return data_dir


@contextmanager
def attach(path: Path | str, *, write: bool = False, with_history: bool = True) -> Iterator[Attached]:
    """Connect to the cluster of the data directory `path`; give `write` to change something.

    Raises `DataDirUnusable` if there is nothing to attach to, `JournalLocked` if something else has the directory,
    `BrokerUnavailable` if its broker is silent, and what reading a damaged journal or history raises.
    """
    data_dir = DataDir(path, create=False)
    address = live_address(data_dir)
    if address is None:
        existing(path)
    history = HistoryReader.open(data_dir.history) if with_history and data_dir.history.exists() else None
    try:
        if address is not None:
            connection: Any = _connected(address)
        elif write:
            connection = _own_process(data_dir)
        else:
            connection = _in_memory(data_dir)
        with connection as broker:
            yield Attached(data_dir, broker, history, address is not None)
    finally:
        if history is not None:
            history.close()


def live_address(data_dir: DataDir) -> str | None:
    """Where the broker of a living program listens; None if the directory is at rest."""
    deadline = time.monotonic() + PATIENCE
    while True:
        record = data_dir.read_cluster()
        if record is None or not record.program_lives():
            return None
        if record.address is not None:
            return record.address
        if time.monotonic() >= deadline:
            raise BrokerUnavailable(
                f"the program with pid {record.program} has {data_dir.path} and has not started its broker within "
                f"{PATIENCE:g} s; try again"
            )
        time.sleep(0.02)


@contextmanager
def _connected(address: str) -> Iterator[Broker]:
    client = connect(address, Listener(), role="client", name="cli")
    try:
        yield client
    finally:
        client.close(timeout=1.0)


@contextmanager
def _in_memory(data_dir: DataDir) -> Iterator[Broker]:
    hub = MemoryBroker(engine=load_engine(data_dir.journal))
    try:
        yield hub.connect(Listener(), name="cli")
    finally:
        hub.close()


@contextmanager
def _own_process(data_dir: DataDir) -> Iterator[Broker]:
    lock = data_dir.acquire(os.getpid())
    try:
        socket = runtime_dir(data_dir.path) / f"cli-{os.getpid()}"
        # The lock goes along: nobody else may open the journal while that process lives.
        process = BrokerProcess(
            address=f"ipc://{socket}",
            journal=str(data_dir.journal),
            durability="fsync",
            max_message_bytes=Limits().max_message_bytes,
            keep_fds=(lock,),
            supervised=False,
        )
        try:
            process.start()
            with _connected(process.address) as broker:
                yield broker
        finally:
            process.stop()
            remove_runtime_dir(socket.parent)  # nobody else is in there: the directory is locked
    finally:
        data_dir.remove_cluster()
        data_dir.release()
