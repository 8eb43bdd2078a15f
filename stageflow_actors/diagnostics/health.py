"""Whether a cluster is well: what can be seen from outside of its program, node, broker, coordinator and pools.

A fault that might be over in a moment (a worker on its way, a queue that is being opened) is looked at again before it
counts. Nothing here changes anything.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import psutil

from stageflow_actors.core.plan import Naming, WorkflowPlan
from stageflow_actors.core.plural import pluralize
from stageflow_actors.errors import BrokerUnavailable, StageFlowError
from stageflow_actors.runtime.client.attach import Attached, attach
from stageflow_actors.runtime.messaging.manifest import MANIFEST_FACT, read_manifest
from stageflow_actors.runtime.messaging.pauses import PAUSE_REASON_FACT, PAUSED_BY_POOL_FACT
from stageflow_actors.runtime.system.data_dir import DataDir
from stageflow_actors.runtime.system.processes import is_stopped, start_ticks
from stageflow_actors.runtime.zygote.protocol import ZYGOTE_NAME
from stageflow_brokers.errors import BrokerError
from stageflow_brokers.types import QueueStats

__all__ = ["Fault", "examine"]

FAULT_CONFIRM_SECONDS = 3.0
"""Seconds that a fault must last."""
RECHECK_INTERVAL_SECONDS = 0.1


class Fault(NamedTuple):
    """What is wrong with which part."""

    part: str
    text: str


def examine(path: Path | str) -> list[Fault]:
    """The faults of the cluster that serves a data directory, none if all is well."""
    deadline = time.monotonic() + FAULT_CONFIRM_SECONDS
    progress: dict[str, int] = {}
    while True:
        faults = _look(path, progress)
        if not faults or time.monotonic() > deadline:
            return faults
        time.sleep(RECHECK_INTERVAL_SECONDS)


def _look(path: Path | str, progress: dict[str, int]) -> list[Fault]:
    try:
        data = DataDir(path, create=False)
        record = data.read_cluster()
        if record is None or not record.is_program_alive():
            return [Fault("program", f"nobody serves {data.path}")]
        if record.node is None or start_ticks(record.node) is None:
            return [Fault("node", "it is not running; its program starts it again, or says why it cannot")]
        faults = _of_processes(record.node)
        try:
            with attach(path) as attached:
                return faults + _of_cluster(attached, progress)
        except (BrokerUnavailable, BrokerError) as error:
            return [*faults, Fault("broker", str(error))]
    except StageFlowError as error:
        return [Fault("data directory", str(error))]


def _of_processes(node: int) -> list[Fault]:
    """The node, and the zygote below it: nothing that either is asked for happens while it is stopped."""
    try:
        process = psutil.Process(node)
        faults = [Fault("node", f"process {node} is stopped")] if is_stopped(node) else []
        for child in process.children():
            if child.name() == ZYGOTE_NAME and is_stopped(child.pid):
                faults.append(Fault("zygote", f"process {child.pid} is stopped: it starts no workers"))
    except psutil.Error:
        return []  # it has just ended, which the next look finds
    return faults


def _of_cluster(attached: Attached, progress: dict[str, int]) -> list[Fault]:
    stats = attached.wait(attached.admin.stats(""))
    faults = [Fault("broker", f"it refuses new instances: {stats['refusing']}")] if stats["refusing"] else []
    queues = {queue["name"]: queue for queue in stats["queues"]}
    served = read_manifest(attached.wait(attached.admin.get_fact(MANIFEST_FACT)))
    naming = Naming() if served is None else served.naming
    for name in (naming.finished, naming.coordinator):
        faults += _of_coordinator(name, queues.get(name), progress)
    for plan in () if served is None else served.plans:
        for name in _pools(plan):
            faults += _of_pool(name, queues.get(name), attached)
    return list(dict.fromkeys(faults))


def _of_coordinator(name: str, queue: QueueStats | None, progress: dict[str, int]) -> list[Fault]:
    if queue is None or not queue["consumers"]:
        return [Fault("coordinator", f"it does not take what arrives in {name}")]
    waiting = queue["ready"] + queue["leased"]
    before = progress.setdefault(name, queue["settled"])
    if waiting and queue["settled"] == before:
        return [Fault("coordinator", f"{pluralize(waiting, 'message')} waiting in {name}, and none gets done")]
    return []


def _of_pool(name: str, queue: QueueStats | None, attached: Attached) -> list[Fault]:
    part = f"pool {name}"
    if queue is None:
        return [Fault(part, "its queue does not exist")]
    faults = []
    if queue["state"] == "paused":
        why = _why_paused(name, attached)
        faults.append(Fault(part, f"it is paused{why} `stageflow queue resume {name}`"))
    elif queue["state"] == "closed":
        faults.append(Fault(part, "it waits for workers to announce themselves after a restart of the broker"))
    if not queue["consumers"]:
        faults.append(Fault(part, "no worker takes its messages"))
    return faults


def _why_paused(name: str, attached: Attached) -> str:
    """What its pool has paused it for, where it was not a person who did."""
    if attached.wait(attached.admin.get_fact(PAUSED_BY_POOL_FACT + name)) != "yes":
        return ":"
    why = attached.wait(attached.admin.get_fact(PAUSE_REASON_FACT + name)) or "its workers died too fast"
    return f" by itself, because {why}; mend that, then"


def _pools(plan: WorkflowPlan) -> list[str]:
    names = [stage.queue for stage in plan.stages if stage.has_pool]
    if any(stage.compensated for stage in plan.stages):
        names.append(plan.compensation.queue)
    return list(dict.fromkeys(names))
