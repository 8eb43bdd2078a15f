"""`attach`: the command line's connection to a running broker, or to a data directory at rest.

To inspect a cluster at rest, its journal is read into a broker in this process, which writes nothing and takes no lock.
To change it, the directory is locked and a broker process runs on its journal for that time; there are no consumers, so
nothing is delivered. This module never creates a data directory, and runs no user code.
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

from stageflow_actors.core.description import LayoutLookup
from stageflow_actors.core.plan import DLQ_PREFIX, Naming, WorkflowPlan
from stageflow_actors.definition.guesses import closest
from stageflow_actors.errors import BrokerUnavailable, StageFlowError
from stageflow_actors.history import HistoryReader
from stageflow_actors.runtime.messaging.broker_process import BrokerProcess
from stageflow_actors.runtime.messaging.connect import connect
from stageflow_actors.runtime.messaging.manifest import MANIFEST_FACT, read_manifest
from stageflow_actors.runtime.system.data_dir import ClusterRecord, DataDir, DataDirUnusable
from stageflow_actors.runtime.system.socket_dir import is_reachable, remove_runtime_dir, runtime_dir
from stageflow_brokers.api import Broker, BrokerAdmin, Listener
from stageflow_brokers.core.machine import Limits
from stageflow_brokers.memory import MemoryBroker
from stageflow_brokers.offline.settlements import load_engine

__all__ = ["Attached", "attach", "existing", "live_address"]

T = TypeVar("T")

ATTACH_TIMEOUT_SECONDS = 10.0
"""Longest wait for an answer; a broker answers within milliseconds unless it is stopped or starting."""


@dataclass(frozen=True)
class Attached:
    """A connection.

    `live`: a cluster runs on the directory. `history` is None if it does not exist yet, or was not requested.
    """

    data_dir: DataDir
    broker: Broker
    history: HistoryReader | None
    live: bool

    @property
    def admin(self) -> BrokerAdmin:
        """The operations of the broker; `wait` for their answers."""
        return self.broker.admin

    def read_naming(self) -> Naming:
        """Return the names of queues of the cluster, or of the last one in the directory."""
        manifest = read_manifest(self.wait(self.admin.get_fact(MANIFEST_FACT)))
        return Naming() if manifest is None else manifest.naming

    def layouts(self) -> LayoutLookup:
        """Return the function that finds the stages of a workflow that the cluster has registered last."""
        layouts = {(plan.id, plan.version): plan.layout for plan in self._plans()}
        return lambda workflow_id, version: layouts.get((workflow_id, version))

    def registered_workflows(self) -> set[str]:
        """Return the ids of the workflows that the cluster has registered last."""
        return {plan.id for plan in self._plans()}

    def check_queue(self, name: str) -> None:
        """Raise `StageFlowError` if the broker has no queue of this name; the message names the one that is meant."""
        queue = name.removeprefix(DLQ_PREFIX)
        if any(each["name"] == queue for each in self.wait(self.admin.stats(queue))["queues"]):
            return
        stages = [(stage.queue, plan.id) for plan in self._plans() for stage in plan.stages if stage.id == queue]
        meant = closest(queue, [each["name"] for each in self.wait(self.admin.stats(""))["queues"]], cutoff=0.9)
        if stages:
            advice = f"that of stage {queue!r} of workflow {stages[0][1]!r} is {stages[0][0]!r}"
        elif meant is not None:
            advice = f"did you mean {meant!r}?"
        else:
            advice = "`stageflow queue list` lists them all"
        raise StageFlowError(f"no queue is named {queue!r}: {advice}")

    def _plans(self) -> list[WorkflowPlan]:
        manifest = read_manifest(self.wait(self.admin.get_fact(MANIFEST_FACT)))
        return [] if manifest is None else manifest.plans

    def wait(self, answer: Future[T], timeout: float = ATTACH_TIMEOUT_SECONDS) -> T:
        """Return the answer of an operation. Raises `BrokerUnavailable`, or `stageflow_brokers.errors.Refused`."""
        try:
            return answer.result(timeout)
        except FutureTimeout:
            raise BrokerUnavailable(
                f"the broker of {self.data_dir.path} has not answered within {timeout:g} s: it is stopped, overloaded "
                "or restarting; try again"
            ) from None


def existing(path: Path | str) -> DataDir:
    """Return the data directory at `path`. Raises `DataDirUnusable` if there is none, or no journal in it."""
    data_dir = DataDir(path, create=False)
    if not any(data_dir.journal.glob("*.journal")):
        if data_dir.history.exists():
            raise DataDirUnusable(
                f"the journal {data_dir.journal} is missing, but the history of finished instances exists "
                f"({data_dir.history}): the live instances are lost with the journal. Restore the journal from the "
                'backup taken with the history, or use another directory (durability="memory" keeps no journal)',
                path=data_dir.path,
            )
        raise DataDirUnusable(
            f"the data directory {data_dir.path} has no journal: no cluster has run in it yet; is --data right?",
            path=data_dir.path,
        )
    return data_dir


@contextmanager
def attach(path: Path | str, *, write: bool = False, with_history: bool = True) -> Iterator[Attached]:
    """Connect to the cluster of the data directory `path`; `write` allows changes.

    Raises `DataDirUnusable` if there is no journal, `JournalLocked` if another process has locked the directory,
    `BrokerUnavailable` if its broker does not answer, and the errors of reading a damaged journal or history.
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
    """Return the address of a running program's broker, or None if the directory is at rest."""
    deadline = time.monotonic() + ATTACH_TIMEOUT_SECONDS
    while True:
        record = data_dir.read_cluster()
        if record is None or not data_dir.is_live(record):
            return None
        if record.address is not None:
            check_reachable(data_dir, record)
            return record.address
        if time.monotonic() >= deadline:
            raise BrokerUnavailable(
                f"the program with pid {record.program} runs on {data_dir.path} and has not started its broker within "
                f"{ATTACH_TIMEOUT_SECONDS:g} s; try again"
            )
        time.sleep(0.02)


def check_reachable(data_dir: DataDir, record: ClusterRecord) -> None:
    """Raise `BrokerUnavailable` if the cluster runs in another container, whose socket is not visible here."""
    if record.is_elsewhere() and record.address is not None and not is_reachable(record.address):
        raise BrokerUnavailable(
            f"the cluster of {data_dir.path} runs in another container (host name {record.host!r}), whose socket "
            f"{record.address.removeprefix('ipc://')} does not exist here: use it in that container"
        )


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
        # The process inherits the lock: no other process may open the journal during its life.
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
            remove_runtime_dir(socket.parent)  # no other process uses it: the directory is locked
    finally:
        data_dir.remove_cluster()
        data_dir.release()
