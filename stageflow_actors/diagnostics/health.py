"""`stageflow health`: checks program, node, zygote, broker, coordinator and pools of a running cluster.

A fault may be temporary (a worker that is starting, a queue that is being opened), so it counts only if it lasts for
`FAULT_CONFIRM_SECONDS`. This module must not change anything.
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
from stageflow_actors.runtime.system.data_dir import DataDir
from stageflow_actors.runtime.system.processes import is_stopped, start_ticks
from stageflow_actors.runtime.zygote.protocol import ZYGOTE_NAME
from stageflow_brokers.errors import BrokerError
from stageflow_brokers.types import QueueStats

__all__ = ["Fault", "examine"]

FAULT_CONFIRM_SECONDS = 3.0
"""Time that a fault must last to be reported."""
RECHECK_INTERVAL_SECONDS = 0.1


class Fault(NamedTuple):
    """One fault: the part of the cluster, and a description with the command that helps."""

    part: str
    text: str


def examine(path: Path | str) -> list[Fault]:
    """Return the faults of the cluster on a data directory; an empty list if it is healthy."""
    deadline = time.monotonic() + FAULT_CONFIRM_SECONDS
    progress: dict[str, int] = {}
    while True:
        faults = _check_cluster(path, progress)
        if not faults or time.monotonic() > deadline:
            return faults
        time.sleep(RECHECK_INTERVAL_SECONDS)


def _check_cluster(path: Path | str, progress: dict[str, int]) -> list[Fault]:
    try:
        data = DataDir(path, create=False)
        record = data.read_cluster()
        if record is None or not data.is_live(record):
            return [Fault("program", f"no cluster runs on {data.path}; start one with Runtime or `stageflow up`")]
        faults: list[Fault] = []
        if not record.is_elsewhere():  # the processes of another container are not visible
            if record.node is None or start_ticks(record.node) is None:
                return [Fault("node", "it does not run; its program restarts it, or reports the cause on stderr")]
            faults = _check_processes(record.node)
        try:
            with attach(path) as attached:
                return faults + _check_parts(attached, progress)
        except (BrokerUnavailable, BrokerError) as error:
            return [*faults, Fault("broker", str(error))]
    except StageFlowError as error:
        return [Fault("data directory", str(error))]


def _check_processes(node: int) -> list[Fault]:
    """Return a fault if the node or its zygote is stopped: a stopped process answers no request."""
    try:
        process = psutil.Process(node)
        faults = (
            [Fault("node", f"process {node} is stopped: `kill -CONT {node}` resumes it")] if is_stopped(node) else []
        )
        for child in process.children():
            if child.name() == ZYGOTE_NAME and is_stopped(child.pid):
                faults.append(
                    Fault(
                        "zygote",
                        f"process {child.pid} is stopped and starts no workers: `kill -CONT {child.pid}` resumes it",
                    )
                )
    except psutil.Error:
        return []  # the process has just ended, which the next check reports
    return faults


def _check_parts(attached: Attached, progress: dict[str, int]) -> list[Fault]:
    stats = attached.wait(attached.admin.stats(""))
    faults = [Fault("broker", f"it refuses new instances: {stats['refusing']}")] if stats["refusing"] else []
    queues = {queue["name"]: queue for queue in stats["queues"]}
    manifest = read_manifest(attached.wait(attached.admin.get_fact(MANIFEST_FACT)))
    naming = Naming() if manifest is None else manifest.naming
    for name in (naming.finished, naming.coordinator):
        faults += _check_coordinator(name, queues.get(name), progress)
    for plan in () if manifest is None else manifest.plans:
        for name in _pool_queues(plan):
            faults += _check_pool(name, queues.get(name))
    return list(dict.fromkeys(faults))


def _check_coordinator(name: str, queue: QueueStats | None, progress: dict[str, int]) -> list[Fault]:
    if queue is None or not queue["consumers"]:
        return [Fault("coordinator", f"it does not consume {name}; see the cluster's stderr, and restart the cluster")]
    waiting = queue["ready"] + queue["leased"]
    settled_before = progress.setdefault(name, queue["settled"])
    if waiting and queue["settled"] == settled_before:
        return [Fault("coordinator", f"{pluralize(waiting, 'message')} waiting in {name}, and none is processed")]
    return []


def _check_pool(name: str, queue: QueueStats | None) -> list[Fault]:
    part = f"pool {name}"
    if queue is None:
        return [Fault(part, "its queue does not exist; restart the cluster")]
    faults = []
    if queue["state"] == "paused":
        faults.append(Fault(part, f"it is paused: `stageflow queue resume {name}`"))
    elif queue["state"] == "closed":
        faults.append(Fault(part, "it is closed until its workers have registered after a restart of the broker"))
    if queue["reason"]:
        faults.append(Fault(part, f"its workers cannot start: {queue['reason']}{_next_try(queue['next_start_at'])}"))
    elif queue["starting"]:
        faults.append(Fault(part, f"no worker has started yet: {queue['starting']}"))
    elif not queue["consumers"]:
        faults.append(Fault(part, "no worker consumes its messages; see the cluster's stderr"))
    return faults


def _next_try(at: float) -> str:
    """Return when workers are started again, as the end of a sentence."""
    return f"; next try in {at - time.time():.1f} s" if at > time.time() else ""


def _pool_queues(plan: WorkflowPlan) -> list[str]:
    names = [stage.queue for stage in plan.stages if stage.has_pool]
    if any(stage.compensated for stage in plan.stages):
        names.append(plan.compensation.queue)
    return list(dict.fromkeys(names))
