"""Failpoints: named places in each process at which a test can kill, stop or terminate it.

A failpoint does nothing unless the environment contains `STAGEFLOW_POINT=name:signal:nth:mark`. The first process that
reaches the failpoint for the `nth` time creates the file `mark` and sends itself the signal: `kill`, `term`, or `stop`
(it continues after `STOP_SECONDS`). All other processes continue. Failpoints must never be armed outside tests.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable

__all__ = ["FAILPOINTS", "FAILPOINT_ENV", "STOP_SECONDS", "failpoint"]

FAILPOINT_ENV = "STAGEFLOW_POINT"

STOP_SECONDS = 0.7
"""Seconds that a process stays stopped: long enough for the other processes to notice it."""

FAILPOINTS: dict[str, str] = {
    "program.node-started": "the program has started its node, which is not ready yet",
    "program.ready": "the program has received that its cluster is ready",
    "program.stopping": "the program is about to stop its cluster",
    "client.publishing": "a client is about to publish",
    "client.published": "a client has passed its start to the connection",
    "client.notified": "a client receives how instances ended",
    "node.born": "the node has its configuration",
    "node.broker-started": "the node has started its broker",
    "node.history-opened": "the node has opened the history",
    "node.pools-added": "the node has begun to fill its pools",
    "node.before-roster": "the node is about to report the live workers",
    "node.ready": "the node has reported that all parts are ready",
    "node.greeted": "the node has received the welcome of a broker",
    "node.stopping": "the node has received the order to stop",
    "coordinator.received": "the coordinator receives a batch",
    "coordinator.decided": "the coordinator has decided what follows a failure, and has sent nothing",
    "coordinator.before-history": "rows are about to be written",
    "coordinator.history-written": "rows are durable, and their groups are still live",
    "coordinator.settled": "the coordinator has sent the end of the groups",
    "pool.spawning": "a pool is about to request a worker",
    "pool.spawned": "a pool knows the process of its worker",
    "pool.exit-seen": "a pool has received the exit of a worker, and has notified no one",
    "zygote.born": "the zygote is ready to fork",
    "zygote.before-fork": "the zygote is about to fork",
    "zygote.forked": "the zygote has forked, and has notified no one",
    "worker.born": "a worker has been forked",
    "worker.loaded": "a worker has loaded its code and services",
    "worker.consuming": "a worker has requested messages",
    "worker.delivered": "a worker has messages, and has begun none",
    "worker.before-settle": "a worker is about to settle completed messages",
    "worker.settled": "a worker has passed its settlements to the connection",
    "broker.recovered": "the broker has replayed its journal",
    "broker.started": "the broker's new epoch is durable",
    "broker.received": "the broker has received frames, and has recorded nothing",
    "broker.committed": "the decisions of a round are durable, and no frame of it was sent",
    "broker.dispatched": "the frames of a round were sent",
    "journal.written": "a batch is written, and not synced",
    "journal.synced": "a batch is synced, and `commit` has not returned",
}
"""The failpoints by name, with the state of the process there."""


def _armed(order: str) -> Callable[[str], None]:
    wanted, signal_name, nth, mark = order.split(":", 3)
    remaining = int(nth)

    def reached(name: str) -> None:
        nonlocal remaining
        if name != wanted:
            return
        remaining -= 1
        if remaining:
            return
        try:
            os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return
        pid = os.getpid()
        if signal_name == "stop":
            wake = f"sleep {STOP_SECONDS}; kill -CONT {pid}"
            subprocess.Popen(["/bin/sh", "-c", wake], start_new_session=True, stdin=subprocess.DEVNULL)
            os.kill(pid, signal.SIGSTOP)
        else:
            os.kill(pid, signal.SIGTERM if signal_name == "term" else signal.SIGKILL)

    return reached


def _unarmed(name: str) -> None:
    """Do nothing."""


failpoint: Callable[[str], None] = _armed(os.environ[FAILPOINT_ENV]) if os.environ.get(FAILPOINT_ENV) else _unarmed
"""Mark a failpoint: call it with the name."""
