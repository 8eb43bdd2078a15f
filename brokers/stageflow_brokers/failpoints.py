"""Named points in the life of each process at which a test may have it killed, stopped or told to end.

Nothing happens, and nothing is looked at, unless the environment says `STAGEFLOW_POINT=name:what:nth:mark`: the first
process that reaches the point for the `nth` time makes the file `mark` and then gives itself the signal: `kill`,
`term`, or `stop` (and is continued a moment later). Everybody else passes.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable

__all__ = ["FAILPOINTS", "STOP_SECONDS", "VARIABLE", "failpoint"]

VARIABLE = "STAGEFLOW_POINT"

STOP_SECONDS = 0.7
"""How long a process stays stopped: long enough for everybody else to notice, were there anything to notice."""

FAILPOINTS: dict[str, str] = {
    "program.node-started": "the program has started its node, which is not ready yet",
    "program.ready": "the program knows that its cluster is ready",
    "program.leaving": "the program is about to stop its cluster",
    "client.publishing": "a client is about to publish",
    "client.published": "a client has handed its start to the connection",
    "client.told": "a client is told how instances ended",
    "node.born": "the node has its configuration",
    "node.broker-started": "the node has started its broker",
    "node.history-opened": "the node has opened the history",
    "node.pools-added": "the node has begun to fill its pools",
    "node.before-roster": "the node is about to say which workers live",
    "node.ready": "the node has said that all is ready",
    "node.greeted": "a broker has said welcome to the node",
    "node.stopping": "the node has been told to stop",
    "coordinator.received": "the coordinator is given a batch",
    "coordinator.decided": "the coordinator knows what follows a failure, and has not said so",
    "coordinator.before-history": "rows are about to be written",
    "coordinator.history-written": "rows are durable, and their ids still live",
    "coordinator.settled": "ids have been told to leave",
    "pool.spawning": "a pool is about to ask for a worker",
    "pool.spawned": "a pool knows the process of its worker",
    "pool.exit-seen": "a pool hears of a death, and has told nobody",
    "zygote.born": "the zygote is ready to fork",
    "zygote.before-fork": "the zygote is about to fork",
    "zygote.forked": "the zygote has forked, and told nobody",
    "worker.born": "a worker has been forked",
    "worker.loaded": "a worker has its code and services",
    "worker.consuming": "a worker has asked for messages",
    "worker.delivered": "a worker has messages, and has begun none",
    "worker.worked": "a worker is about to settle what it has done",
    "worker.settled": "a worker has handed its settlements to the connection",
    "broker.recovered": "the broker has read its journal",
    "broker.started": "the broker's new epoch is durable",
    "broker.received": "the broker has taken frames, and recorded nothing",
    "broker.committed": "what a round decided is durable, and has not left",
    "broker.dispatched": "what a round decided has left",
    "journal.written": "a batch is written, and not synced",
    "journal.synced": "a batch is on disk, and its writer does not know",
}
"""All points by name, with what is true there."""


def _armed(order: str) -> Callable[[str], None]:
    wanted, what, nth, mark = order.split(":", 3)
    left = int(nth)

    def reached(name: str) -> None:
        nonlocal left
        if name != wanted:
            return
        left -= 1
        if left:
            return
        try:
            os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return
        own = os.getpid()
        if what == "stop":
            wake = f"sleep {STOP_SECONDS}; kill -CONT {own}"
            subprocess.Popen(["/bin/sh", "-c", wake], start_new_session=True, stdin=subprocess.DEVNULL)
            os.kill(own, signal.SIGSTOP)
        else:
            os.kill(own, signal.SIGTERM if what == "term" else signal.SIGKILL)

    return reached


def _passed(name: str) -> None:
    """Nobody has asked."""


failpoint: Callable[[str], None] = _armed(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else _passed
"""Say that a point has been reached."""
