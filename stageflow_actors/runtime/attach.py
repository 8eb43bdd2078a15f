"""A way in for the command line: to the broker that serves a data directory, or to the directory itself at rest.

To look at a cluster at rest, its journal is read into a broker in this process, which writes nothing and takes no lock.
To change it, the directory is locked and a broker process is started on its journal for that long; nobody
consumes, so nothing is delivered. This module never makes a data directory, and runs no user code.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from brokers.accounts import offline
from brokers.api import Broker, Listener
from brokers.memory import MemoryBroker
from brokers.zeromq.client import ZmqClient
from brokers.zeromq.process import ProcessOptions
from stageflow_actors.errors import BrokerUnavailable, StageFlowError
from stageflow_actors.history import HistoryReader
from stageflow_actors.runtime.datadir import DataDir, DataDirUnusable, runtime_dir

__all__ = ["Attached", "attach", "existing"]

PATIENCE = 10.0
"""Seconds that a broker gets to answer; it answers within milliseconds unless it is stopped or starting."""

READY_WITHIN = 60.0
"""Seconds that a broker of our own gets to read the journal: a million messages take five."""


@dataclass(frozen=True)
class Attached:
    """A connection. `live`: a cluster serves the directory. `history` is None while nothing has finished in it."""

    data_dir: DataDir
    broker: Broker
    history: HistoryReader | None
    live: bool

    def ask(self, query: str, *args: Any, timeout: float = PATIENCE) -> Any:
        """The answer to a query of the broker. Raises `BrokerUnavailable`, or `brokers.errors.Refused`."""
        try:
            return self.broker.query(query, *args).result(timeout)
        except FutureTimeout:
            raise BrokerUnavailable(
                f"the broker of {self.data_dir.path} has not answered within {timeout:g} s: it is stopped, overloaded "
                "or restarting; try again"
            ) from None


def existing(path: Path | str) -> DataDir:
    """The data directory at `path`. Raises `DataDirUnusable` if there is none, or no journal in it."""
    data_dir = DataDir(path, create=False)
    if not any(data_dir.journal.glob("*.journal")):
        raise DataDirUnusable(
            f"there is no journal in the data directory {data_dir.path}: nothing has run in it yet; is --data right?",
            path=data_dir.path,
        )
    return data_dir


@contextmanager
def attach(path: Path | str, *, write: bool = False) -> Iterator[Attached]:
    """Connect to the cluster of the data directory `path`; give `write` to change something.

    Raises `DataDirUnusable` if there is nothing to attach to, `JournalLocked` if something else has the directory,
    `BrokerUnavailable` if its broker is silent, and what reading a damaged journal or history raises.
    """
    data_dir = existing(path)
    address = _live_address(data_dir)
    history = HistoryReader.open(data_dir.history) if data_dir.history.exists() else None
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


def _live_address(data_dir: DataDir) -> str | None:
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
    client = ZmqClient(address, Listener(), role="client", name="cli")
    try:
        yield client
    finally:
        client.close(timeout=1.0)


@contextmanager
def _in_memory(data_dir: DataDir) -> Iterator[Broker]:
    hub = MemoryBroker(engine=offline(data_dir.journal))
    try:
        yield hub.connect(Listener(), name="cli")
    finally:
        hub.close()


@contextmanager
def _own_process(data_dir: DataDir) -> Iterator[Broker]:
    lock = data_dir.acquire(os.getpid())
    try:
        sockets = runtime_dir(data_dir.path)
        socket = sockets / f"cli-{os.getpid()}"
        address = f"ipc://{socket}"
        process = _start(data_dir, address, lock)
        try:
            with _connected(address) as broker:
                yield broker
        finally:
            _stop(process)
            socket.unlink(missing_ok=True)
    finally:
        data_dir.remove_cluster()
        data_dir.release()


def _start(data_dir: DataDir, address: str, lock: int) -> subprocess.Popen[bytes]:
    reading, ready = os.pipe()
    try:
        options = ProcessOptions(
            address=address, journal=str(data_dir.journal), supervised=False, ready_fd=ready, parent=os.getpid()
        )
        command = [sys.executable, "-m", "brokers.zeromq.process", msgspec.json.encode(options).decode()]
        # The lock goes along: nobody else may open the journal while that process lives.
        process = subprocess.Popen(command, pass_fds=(ready, lock), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(ready)
    try:
        report = _first_line(reading)
    finally:
        os.close(reading)
    if not report.get("ready"):
        _stop(process)
        raise StageFlowError(report.get("message") or "the broker ended before it was ready")
    return process


def _first_line(fd: int) -> dict[str, Any]:
    line = b""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    deadline = time.monotonic() + READY_WITHIN
    while not line.endswith(b"\n"):
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return {"message": f"the broker was not ready within {READY_WITHIN:g} s"}
        chunk = os.read(fd, 65536)
        if not chunk:
            return {}
        line += chunk
    report: dict[str, Any] = msgspec.json.decode(line)
    return report


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
