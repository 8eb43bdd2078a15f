"""The runtime's own clients, workers and coordinator over the in-memory broker: a cluster of threads, without files.

Workers get their code pickled, as processes do. Nothing here dies, so nobody supervises.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import msgspec

from brokers.api import Broker, DeliveryItem, Listener
from brokers.memory import MemoryBroker
from stageflow_actors import Workflow
from stageflow_actors.core.endings import untrue
from stageflow_actors.core.plan import Naming, compile_plan
from stageflow_actors.history.rows import HistoryRow
from stageflow_actors.runtime import worker
from stageflow_actors.runtime.asking import Ends
from stageflow_actors.runtime.client import Client
from stageflow_actors.runtime.coordinator import Coordinator, Delivered
from stageflow_actors.runtime.mailbox import Mailbox
from stageflow_actors.runtime.programs import PoolSpec, WorkerPayload, pool_specs
from stageflow_actors.runtime.slots import SlotTable
from stageflow_actors.runtime.supervisor import queue_options
from stageflow_actors.runtime.work import ignore

NAMING = Naming()


class _Node(Listener):
    """Hands deliveries to the coordinator."""

    coordinator: Any = None

    def on_deliveries(self, queue: str, items: list[DeliveryItem], bodies: list[bytes]) -> None:
        self.coordinator.tell(Delivered(queue, items, bodies))


class _History:
    """Nothing here outlives the cluster; but what would be kept must be true."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def write(self, rows: list[HistoryRow]) -> None:
        """Looked at and forgotten."""
        for row in rows:
            wrong = untrue(row.workflow_id, row.version, row.status, row.error, row.failed_stage, row.outcome)
            if wrong is not None:
                self.faults.append(f"{row.instance_id}: {wrong}")


class _MemoryClient(Client):
    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__()
        self._broker = broker.connect(Ends(self._waiters, self._connected), name="client")


class MemoryCluster:
    """A context manager that gives a client which knows the workflows."""

    def __init__(self, workflows: Iterable[Workflow[Any]]) -> None:
        self._workflows = list(workflows)
        self._threads: list[threading.Thread] = []
        self._actors: list[Any] = []

    def __enter__(self) -> Client:
        self._broker = MemoryBroker()
        self._plans = [compile_plan(workflow, NAMING) for workflow in self._workflows]
        listener = _Node()
        port = self._broker.connect(listener, role="supervisor", name="node")
        self._history = history = _History()
        listener.coordinator = self._coordinator = Coordinator.start(port, history, NAMING, self._plans, None)
        port.consume(NAMING.finished, 4_000)
        port.consume(NAMING.coordinator, 500)
        specs = [
            spec
            for workflow, plan in zip(self._workflows, self._plans, strict=True)
            for spec in pool_specs(workflow, plan, {})
        ]
        port.query("declare", queue_options(specs, NAMING, 3)).result(5)
        self._slots = SlotTable.create(len(specs))
        for number, spec in enumerate(specs):
            self._work(spec, number)
        return _MemoryClient(self._broker)

    def _work(self, spec: PoolSpec, number: int) -> None:
        payload = WorkerPayload(
            "", number + 1, f"{spec.queue}#1", spec.kind, spec.queue, spec.programs, NAMING, 16 << 20
        )
        given = msgspec.msgpack.decode(msgspec.msgpack.encode(payload), type=WorkerPayload)
        slot = self._slots[number]
        mailbox = Mailbox(given.queue)
        work = worker._load(given, slot, mailbox, ignore)
        actor = mailbox.actor = worker._actor_for(work, 1)(work, mailbox, given, slot)
        broker: Broker = self._broker.connect(mailbox, role="worker", name=given.worker_id)
        mailbox.broker = broker
        broker.consume(given.queue, actor.least)
        thread = threading.Thread(target=actor.serve, name=given.worker_id, daemon=True)
        thread.start()
        self._threads.append(thread)
        self._actors.append(actor)

    def __exit__(self, *exc: object) -> None:
        for actor in self._actors:
            actor.stop()
        self._coordinator.stop()
        for thread in self._threads:
            thread.join(5)
        self._broker.close()
        assert self._history.faults == []
